// A writer and a reader thread that exchange records as fast as they can, to be compiled with -fsanitize=thread, which
// reports every access to a record that the ring's memory orders do not order. The reader holds up to kMostHeld records
// at once and checks every byte of each when it releases it.
//
//   stress small|mixed RECORDS [head-store|head-load|tail-store|tail-load]
//
// The fourth word makes one memory order relaxed. Both ends have to lie in one mapping, or the sanitizer would take
// them for different memory: the ring's mmap() is wrapped to give the second end the first one's addresses.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <thread>

#include "ring/process.h"
#include "ring/ring.h"

using dflash::ring::HeaderPage;
using dflash::ring::Meta;
using dflash::ring::Record;
using dflash::ring::Ring;

namespace {

constexpr std::size_t kCapacity = 16384;
constexpr std::size_t kMostHeld = 4;

struct Load {
  std::uint64_t records;
  std::size_t largest;  // bytes of a payload
};

std::uint64_t scramble(std::uint64_t x) {
  x ^= x >> 31;
  x *= 0x7FB5D329728EA185ull;
  x ^= x >> 27;
  return x * 0x81DADEF4BC2DD44Dull;
}

std::size_t bytes_of(const Load& load, std::uint64_t record) { return scramble(record + 1) % (load.largest + 1); }

std::uint64_t word_of(std::uint64_t record, std::size_t i) { return (record + 1) * 0x9E3779B97F4A7C15ull + i; }

void write_all(Ring& ring, const Load& load) {
  for (std::uint64_t record = 0; record < load.records; ++record) {
    const std::size_t bytes = bytes_of(load, record);
    auto slot = ring.reserve(bytes);
    while (!slot) {
      std::this_thread::yield();
      slot = ring.reserve(bytes);
    }
    auto* words = reinterpret_cast<std::uint64_t*>(slot->data);
    for (std::size_t i = 0; i < bytes / 8; ++i) words[i] = word_of(record, i);
    for (std::size_t i = bytes / 8 * 8; i < bytes; ++i) slot->data[i] = static_cast<std::byte>(word_of(record, i));
    if (scramble(record) % 16 == 0) {
      ring.abandon();
      slot = ring.reserve(0);  // where the other began, and a word shorter than that was
      ring.commit(Meta{record, record ^ 5, 1, 0});
    } else {
      ring.commit(Meta{record, record ^ 5, 0, bytes});
    }
    ring.beat();
  }
}

void expect(bool holds, std::uint64_t record) {
  if (holds) return;
  std::fprintf(stderr, "record %llu is not what was written\n", static_cast<unsigned long long>(record));
  std::exit(1);
}

void check(const Record& found, const Load& load, std::uint64_t record) {
  const bool empty = scramble(record) % 16 == 0;
  const std::size_t bytes = empty ? 0 : bytes_of(load, record);
  expect(found.meta.sample == record && found.meta.epoch == (record ^ 5) && found.meta.status == empty &&
             found.meta.tokens == bytes && found.payload.bytes == bytes,
         record);
  const auto* words = reinterpret_cast<const std::uint64_t*>(found.payload.data);
  for (std::size_t i = 0; i < bytes / 8; ++i) expect(words[i] == word_of(record, i), record);
  for (std::size_t i = bytes / 8 * 8; i < bytes; ++i) {
    expect(found.payload.data[i] == static_cast<std::byte>(word_of(record, i)), record);
  }
}

void read_all(Ring& ring, const Load& load) {
  std::deque<Record> held;
  for (std::uint64_t released = 0; released < load.records;) {
    if (const auto found = ring.read()) {
      held.push_back(*found);
      if (held.size() < kMostHeld) continue;
    } else if (held.empty()) {
      std::this_thread::yield();
      continue;
    }
    check(held.front(), load, released);
    ring.release();
    held.pop_front();
    ring.set_reader_mark(released++);
  }
}

dflash::ring::Weakened parse_weakened(const std::string& which) {
  const std::size_t word = which.starts_with("head") ? offsetof(HeaderPage, writer) : offsetof(HeaderPage, reader);
  return {word, which.ends_with("store")};  // head and tail are the first words of their lines
}

}  // namespace

int main(int count, char** words) {
  const Load load{std::strtoull(words[2], nullptr, 10), std::string(words[1]) == "small" ? 48 : kCapacity / 2 - 64};
  const std::string name = "/dflash-stress" + std::to_string(::getpid()) + "-" + std::to_string(::getpid()) + "-" +
                           std::to_string(dflash::ring::process_start(dflash::ring::own_process())) + "-0";
  const auto writer = Ring::create(name, kCapacity);
  const auto reader = Ring::open(name);
  writer->unlink();
  if (count > 3) dflash::ring::weakened = parse_weakened(words[3]);
  std::thread writing([&] { write_all(*writer, load); });
  read_all(*reader, load);
  writing.join();
  expect(writer->released() == load.records && reader->committed() == load.records, load.records);
  std::printf("%llu records\n", static_cast<unsigned long long>(load.records));
}

extern "C" {

void* __real_mmap(void* address, std::size_t bytes, int protection, int flags, int fd, off_t offset);
void* __wrap_mmap(void* address, std::size_t bytes, int protection, int flags, int fd, off_t offset) {
  static void* const segment = __real_mmap(address, bytes, protection, flags, fd, offset);  // all of it: the maker's
  return segment;
}

int __wrap_munmap(void*, std::size_t) { return 0; }  // it goes with the process
}
