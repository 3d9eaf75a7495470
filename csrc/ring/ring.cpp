#include "ring.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <new>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace dflash::ring {
namespace {

constexpr const char* kFolder = "/dev/shm";
constexpr std::size_t kLongestName = 200;

std::size_t round_up(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

[[noreturn]] void fail(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

std::string mebibytes(std::uint64_t bytes) {
  char text[48];
  std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(bytes) / (1024.0 * 1024.0));
  return text;
}

// shm_open wants "/name"; the name becomes a file in /dev/shm, so nothing that could leave the folder may be in it.
std::string checked_name(const std::string& name) {
  const std::string bare = name.starts_with('/') ? name.substr(1) : name;
  const bool plain = std::all_of(bare.begin(), bare.end(), [](unsigned char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' ||
           c == '.';
  });
  if (!bare.starts_with("dflash-") || !plain || bare.size() > kLongestName) {
    throw std::invalid_argument("ring name '" + name +
                                "' is not of the form [/]dflash-..., letters, digits, '-', '_' and '.', at most " +
                                std::to_string(kLongestName) + " characters");
  }
  return "/" + bare;
}

// A file descriptor that closes itself; the mapping stays valid without it.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

[[noreturn]] void refuse_full(const std::string& name, std::size_t bytes) {
  struct statvfs room{};
  std::string have = "not enough";
  if (::statvfs(kFolder, &room) == 0) {
    have = mebibytes(static_cast<std::uint64_t>(room.f_bavail) * room.f_frsize) + " free of " +
           mebibytes(static_cast<std::uint64_t>(room.f_blocks) * room.f_frsize);
  }
  fail(ENOSPC, "ring " + name + " needs " + mebibytes(bytes) + " of shared memory, /dev/shm has " + have +
                   "; lower stream.ring_bytes or enlarge /dev/shm (docker run --shm-size=..., or mount -o "
                   "remount,size=... /dev/shm)");
}

void allocate(int fd, const std::string& name, std::size_t bytes) {
  struct statvfs room{};
  if (::fstatvfs(fd, &room) == 0 && room.f_blocks != 0 &&
      static_cast<std::uint64_t>(room.f_bavail) * room.f_frsize < bytes) {
    refuse_full(name, bytes);  // before a single page is taken from the others
  }
  if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0) fail(errno, "ring " + name + ": ftruncate");
  int error;
  do {
    error = ::posix_fallocate(fd, 0, static_cast<off_t>(bytes));
  } while (error == EINTR);
  if (error == ENOSPC || error == ENOMEM) refuse_full(name, bytes);
  if (error != 0) fail(error, "ring " + name + ": posix_fallocate");
}

}  // namespace

Mapping::Mapping(int fd, std::size_t bytes) : bytes_(bytes) {
  // The pages exist already; MAP_POPULATE enters them in the page table now instead of at the first lap's stores.
  void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  if (data == MAP_FAILED) fail(errno, "ring: mmap of " + mebibytes(bytes));
  data_ = static_cast<std::byte*>(data);
}

Mapping::~Mapping() { ::munmap(data_, bytes_); }

Ring::Ring(std::string name, std::shared_ptr<Mapping> mapping, std::size_t capacity, bool is_writer)
    : name_(std::move(name)), mapping_(std::move(mapping)), capacity_(capacity), is_writer_(is_writer) {}

Ring::~Ring() { close(); }

std::unique_ptr<Ring> Ring::create(const std::string& name, std::size_t capacity) {
  const std::string path = checked_name(name);
  if (capacity < kPage || capacity % kLine != 0 || capacity > (std::size_t{1} << 46)) {
    throw std::invalid_argument("ring " + path + ": capacity " + std::to_string(capacity) +
                                " is not a multiple of 64 from 4096 to 2^46 bytes");
  }
  const Descriptor fd(::shm_open(path.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600));
  if (fd.get() < 0) fail(errno, "ring " + path + ": shm_open");
  try {
    allocate(fd.get(), path, kPage + capacity);
    auto mapping = std::make_shared<Mapping>(fd.get(), kPage + capacity);
    auto* page = new (mapping->data()) HeaderPage{};
    page->identity.version = kVersion;
    page->identity.header_bytes = kPage;
    page->identity.capacity = capacity;
    page->writer.process.store(process_id(::getpid()), std::memory_order_relaxed);
    page->identity.magic.store(kMagic, std::memory_order_release);
    return std::unique_ptr<Ring>(new Ring(path, std::move(mapping), capacity, true));
  } catch (...) {
    ::shm_unlink(path.c_str());
    throw;
  }
}

std::unique_ptr<Ring> Ring::open(const std::string& name) {
  const std::string path = checked_name(name);
  const Descriptor fd(::shm_open(path.c_str(), O_RDWR | O_CLOEXEC, 0));
  if (fd.get() < 0) fail(errno, "ring " + path + ": shm_open");
  struct stat info{};
  if (::fstat(fd.get(), &info) != 0) fail(errno, "ring " + path + ": fstat");
  const auto bytes = static_cast<std::size_t>(info.st_size);
  if (bytes == 0) fail(ENOENT, "ring " + path + " is still being made");
  if (bytes < 2 * kPage) {
    throw std::invalid_argument("ring " + path + " is a file of " + std::to_string(bytes) + " bytes, not a ring");
  }
  auto header = std::make_shared<Mapping>(fd.get(), kPage);  // the whole is mapped once the header is believed
  const auto& page = *reinterpret_cast<const HeaderPage*>(header->data());
  const std::uint64_t magic = page.identity.magic.load(std::memory_order_acquire);
  if (magic == 0) fail(ENOENT, "ring " + path + " is still being made");
  if (magic != kMagic || page.identity.version != kVersion || page.identity.header_bytes != kPage) {
    throw std::invalid_argument("ring " + path + " has magic/version " + std::to_string(magic) + "/" +
                                std::to_string(page.identity.version) + ", this build wants " + std::to_string(kMagic) +
                                "/" + std::to_string(kVersion) + "; start receiver and trainer from the same build");
  }
  const std::size_t capacity = page.identity.capacity;
  if (capacity % kLine != 0 || bytes - kPage != capacity) {
    throw std::invalid_argument("ring " + path + " says capacity " + std::to_string(capacity) + " but holds " +
                                std::to_string(bytes - kPage) + " bytes behind its header");
  }
  auto ring = std::unique_ptr<Ring>(new Ring(path, std::make_shared<Mapping>(fd.get(), bytes), capacity, false));
  auto& reader = ring->page().reader;
  std::uint64_t old = reader.process.load(std::memory_order_acquire);
  const bool living = old != 0 && process_id(process_pid(old)) == old && reader.closed.load() == 0;
  if (living || !reader.process.compare_exchange_strong(old, process_id(::getpid()))) {
    ring->mapping_.reset();  // not ours: close() must not mark the other reader as gone
    throw std::invalid_argument("ring " + path + " already has a reader, pid " + std::to_string(process_pid(old)) +
                                "; a ring has one");
  }
  reader.closed.store(0, std::memory_order_release);
  return ring;
}

HeaderPage& Ring::page() const {
  if (!mapping_) throw std::invalid_argument("ring " + name_ + " is closed");
  return *reinterpret_cast<HeaderPage*>(mapping_->data());
}

std::byte* Ring::at(std::uint64_t count) const { return mapping_->data() + kPage + count % capacity_; }

void Ring::expect(bool writer, const char* call) const {
  if (!mapping_) throw std::invalid_argument("ring " + name_ + " is closed");
  if (is_writer_ != writer) {
    throw std::invalid_argument(std::string("ring ") + name_ + ": " + call + "() is for the " +
                                (writer ? "writer" : "reader"));
  }
}

std::optional<Span> Ring::reserve(std::size_t bytes) {
  expect(true, "reserve");
  if (reservation_) throw std::invalid_argument("ring " + name_ + ": reserve() before commit() or abandon()");
  if (bytes > capacity_ || record_span(bytes) > capacity_) {
    throw std::invalid_argument("ring " + name_ + ": a record of " + mebibytes(bytes) + " never fits into " +
                                mebibytes(capacity_) + "; raise stream.ring_bytes");
  }
  auto& head_line = page().writer;
  const std::uint64_t head = head_line.head.load(std::memory_order_relaxed);  // only this side stores it
  const std::uint64_t tail = page().reader.tail.load(std::memory_order_acquire);
  const std::size_t free = capacity_ - static_cast<std::size_t>(head - tail);
  const std::size_t to_end = capacity_ - static_cast<std::size_t>(head % capacity_);
  const std::size_t span = record_span(bytes);
  const std::size_t skip = span <= to_end ? 0 : to_end;
  if (skip + span > free) return std::nullopt;
  reservation_ = Reservation{head + skip, bytes, span, skip};
  return Span{mapping_, at(head + skip) + kLine, bytes};
}

void Ring::commit(const Meta& meta) {
  expect(true, "commit");
  if (!reservation_) throw std::invalid_argument("ring " + name_ + ": commit() without reserve()");
  const Reservation r = *reservation_;
  auto& writer = page().writer;
  if (r.skip != 0) new (at(r.start - r.skip)) RecordHeader{RecordKind::kSkip, 0, r.skip, 0, 0, 0, 0};
  new (at(r.start))
      RecordHeader{RecordKind::kRecord, meta.status, r.span, r.bytes, meta.sample, meta.epoch, meta.tokens};
  writer.committed.fetch_add(1, std::memory_order_relaxed);
  writer.head.store(r.start + r.span, std::memory_order_release);
  reservation_.reset();
}

void Ring::abandon() {
  expect(true, "abandon");
  if (!reservation_) throw std::invalid_argument("ring " + name_ + ": abandon() without reserve()");
  reservation_.reset();
}

void Ring::beat() {
  expect(true, "beat");
  page().writer.beat.fetch_add(1, std::memory_order_relaxed);
}

// The writer is a process of the same user, but a stray store must end in an error here, not in a wild read.
const RecordHeader& Ring::checked_header(std::uint64_t tail, std::uint64_t head) const {
  const auto& header = *reinterpret_cast<const RecordHeader*>(at(tail));
  const std::size_t room = std::min<std::uint64_t>(head - tail, capacity_ - tail % capacity_);
  const bool kind = header.kind == RecordKind::kRecord || header.kind == RecordKind::kSkip;
  if (!kind || header.span < kLine || header.span % kLine != 0 || header.span > room ||
      header.bytes > header.span - kLine) {
    throw std::runtime_error("ring " + name_ + " is damaged at byte " + std::to_string(tail) +
                             ": something else wrote into it");
  }
  return header;
}

std::optional<Record> Ring::peek() {
  expect(false, "peek");
  auto& reader = page().reader;
  std::uint64_t tail = reader.tail.load(std::memory_order_relaxed);  // only this side stores it
  const std::uint64_t head = page().writer.head.load(std::memory_order_acquire);
  while (tail != head) {
    const RecordHeader& header = checked_header(tail, head);
    if (header.kind == RecordKind::kRecord) {
      held_ = header.span;
      return Record{Meta{header.sample, header.epoch, header.status, header.tokens},
                    Span{mapping_, at(tail) + kLine, header.bytes}};
    }
    tail += header.span;
    reader.tail.store(tail, std::memory_order_release);
  }
  return std::nullopt;
}

void Ring::release() {
  expect(false, "release");
  if (held_ == 0) throw std::invalid_argument("ring " + name_ + ": release() without a peek() that gave a record");
  auto& reader = page().reader;
  reader.tail.store(reader.tail.load(std::memory_order_relaxed) + held_, std::memory_order_release);
  reader.released.fetch_add(1, std::memory_order_release);
  held_ = 0;
}

void Ring::set_reader_mark(std::uint64_t mark) {
  expect(false, "reader_mark");
  page().reader.mark.store(mark, std::memory_order_release);
}

std::uint64_t Ring::reader_mark() const { return page().reader.mark.load(std::memory_order_acquire); }
std::uint64_t Ring::writer_beat() const { return page().writer.beat.load(std::memory_order_relaxed); }
std::uint64_t Ring::committed() const { return page().writer.committed.load(std::memory_order_acquire); }
std::uint64_t Ring::released() const { return page().reader.released.load(std::memory_order_acquire); }

std::size_t Ring::free_bytes() const {
  const std::uint64_t tail = page().reader.tail.load(std::memory_order_acquire);
  const std::uint64_t head = page().writer.head.load(std::memory_order_acquire);
  return capacity_ - static_cast<std::size_t>(head - tail);
}

int Ring::peer_pid() const {
  return process_pid(is_writer_ ? page().reader.process.load() : page().writer.process.load());
}

bool Ring::peer_attached() const { return peer_pid() != 0; }

bool Ring::peer_alive() const {
  const HeaderPage& p = page();
  const bool closed = is_writer_ ? p.reader.closed.load() != 0 : p.writer.closed.load() != 0;
  const std::uint64_t peer = is_writer_ ? p.reader.process.load() : p.writer.process.load();
  return !closed && peer != 0 && process_id(process_pid(peer)) == peer;
}

void Ring::close() {
  if (!mapping_) return;
  // A forked child that drops its copy of this object must not speak for its parent.
  const auto& process = is_writer_ ? page().writer.process : page().reader.process;
  if (process_pid(process.load()) == ::getpid()) {
    (is_writer_ ? page().writer.closed : page().reader.closed).store(1, std::memory_order_release);
  }
  reservation_.reset();
  held_ = 0;
  mapping_.reset();  // views that are still held keep the bytes mapped
}

void Ring::unlink() {
  if (::shm_unlink(name_.c_str()) != 0 && errno != ENOENT) fail(errno, "ring " + name_ + ": shm_unlink");
}

std::size_t record_span(std::size_t payload) { return kLine + round_up(payload); }

}  // namespace dflash::ring
