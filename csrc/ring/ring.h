// A lock-free ring of records in POSIX shared memory: one writer process, one reader process, no copy on either side.
//
// The bytes of a segment (every line of 64 bytes has one writing side, so the two never share a cache line):
//
//   0          64           128          192        4096                                      4096 + capacity
//   +----------+------------+------------+----------+----------------------------------------+
//   | identity | writer's   | reader's   | unused   | records, each 64-aligned and contiguous |
//   | magic,   | head, beat | tail, mark |          |                                        |
//   | version, | pid+start  | pid+start  |          | +--------+---------+--------+-------+  |
//   | capacity |            |            |          | | header | payload | header | ...   |  |
//   +----------+------------+------------+----------+-+--------+---------+--------+-------+--+
//
// `head` and `tail` count bytes since the segment was made; they never wrap, the offset is count % capacity.
// head - tail bytes are published and unread. A record that would cross the end is put at the beginning, behind a skip
// record that covers the rest:
//
//            tail                 head         end                     head                tail          end
//   +---------+--------------------+-----------+      +-----------------+------------------+------+------+
//   |  free   | record | record    |   free    |      | record          |       free       | rec. | skip |
//   +---------+--------------------+-----------+      +-----------------+------------------+------+------+
//
// The states of the bytes behind `head`, seen by the writer:
//
//   free --reserve()--> reserved --(caller fills in place)--> commit() --> published: head moves, with release order
//                          '------------------------------> abandon() --> free: nothing was ever visible
//
// and of a published record, seen by the reader:
//
//   published --read()--> held (head was read with acquire order: the bytes are there) --release()--> free: tail moves
//
// The reader may read ahead of what it releases: any number of records are held, in the order in which they were read,
// and release() gives back the oldest. Where read() goes on is the reader's own knowledge and not in the segment, so
// the next reader begins with the first record that was not released.
//
// A writer that dies between reserve() and commit() leaves nothing behind: `head` did not move. Each side can tell that
// the other is gone by its pid and start time (a pid alone is used again), to which close() adds a bit. A record may
// take half of the capacity: a larger one could wait for an end that is never free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>

#include "memory.h"
#include "segment.h"

namespace dflash::ring {

inline constexpr std::uint64_t kMagic = 0x31474E4952464C44ull;  // "DLFRING1" in memory order
inline constexpr std::uint32_t kVersion = 2;
inline constexpr std::size_t kLine = 64;
inline constexpr std::size_t kPage = 4096;

static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "the ring needs lock-free 64-bit atomics");
static_assert(sizeof(Word<std::uint64_t>) == sizeof(std::uint64_t));

struct alignas(kLine) IdentityLine {
  Word<std::uint64_t> magic;  // stored last by the maker: a segment without it is still being made
  std::uint32_t version;
  std::uint32_t header_bytes;
  std::uint64_t capacity;
};

struct alignas(kLine) WriterLine {
  Word<std::uint64_t> head;
  Word<std::uint64_t> committed;  // records, not bytes; one more than `head` says while it is being published
  Word<std::uint64_t> beat;       // moves as long as the writer's loop does: the reader tells a stuck writer by it
  Word<std::uint64_t> process;    // see process_id(); another number once this side has closed
};

struct alignas(kLine) ReaderLine {
  Word<std::uint64_t> tail;
  Word<std::uint64_t> released;  // records, not bytes; counted after `tail` has moved
  Word<std::uint64_t> mark;      // the reader's own progress, in units that the two sides agree on
  Word<std::uint64_t> process;
};

struct HeaderPage {
  IdentityLine identity;
  WriterLine writer;
  ReaderLine reader;
};
static_assert(sizeof(HeaderPage) == 3 * kLine && sizeof(HeaderPage) <= kPage);

enum class RecordKind : std::uint32_t { kRecord = 0x44434552, kSkip = 0x50494B53 };

struct alignas(kLine) RecordHeader {
  RecordKind kind;
  std::uint32_t status;
  std::uint64_t span;   // bytes up to the next record: this header, the payload, the padding
  std::uint64_t bytes;  // of the payload
  std::uint64_t sample;
  std::uint64_t epoch;
  std::uint64_t tokens;
};
static_assert(sizeof(RecordHeader) == kLine);

// What the writer says about a payload when it publishes it.
struct Meta {
  std::uint64_t sample = 0;
  std::uint64_t epoch = 0;
  std::uint32_t status = 0;
  std::uint64_t tokens = 0;
};

struct Span {
  std::shared_ptr<Mapping> owner;
  std::byte* data;
  std::size_t bytes;
};

struct Record {
  Meta meta;
  Span payload;
  std::size_t offset;  // of the payload in records()
};

class Ring {
 public:
  // Throws std::invalid_argument for a bad name or capacity, std::system_error for what the system refuses (ENOSPC:
  // /dev/shm is too small).
  static std::unique_ptr<Ring> create(const std::string& name, std::size_t capacity);
  // Throws std::system_error(ENOENT) when the segment is not there or not ready yet, std::invalid_argument when it is
  // not a ring of this version or has a living reader already.
  static std::unique_ptr<Ring> open(const std::string& name);
  ~Ring();

  // Writer. One reservation at a time.
  std::optional<Span> reserve(std::size_t bytes);  // none while the ring is too full
  void commit(const Meta& meta);
  void abandon();
  void beat();

  // Reader. Any number of held records; release() is for the oldest, after the last access to its payload.
  std::optional<Record> read();  // the record behind the last one read
  void release();
  void set_reader_mark(std::uint64_t mark);
  Span records() const;  // all that payloads lie in, for a reader that locks these pages

  std::uint64_t reader_mark() const;
  std::uint64_t writer_beat() const;
  std::uint64_t committed() const;
  std::uint64_t released() const;
  std::size_t capacity() const { return capacity_; }
  const std::string& name() const { return name_; }
  bool peer_attached() const;
  bool peer_alive() const;  // attached, its process runs, and it has not closed
  int peer_pid() const;
  void close();
  void unlink();

 private:
  struct Reservation {
    std::uint64_t start;  // count of the record's first byte
    std::size_t bytes;
    std::size_t span;
    std::size_t skip;  // bytes that a skip record covers in front of it
  };

  // `lock` is the writer's hold on the file, and empty for the reader.
  Ring(std::string name, Descriptor lock, std::shared_ptr<Mapping> mapping, std::size_t capacity);
  HeaderPage& page() const;
  std::byte* at(std::uint64_t count) const;
  RecordHeader& header_at(std::uint64_t count) const;
  RecordHeader checked_header(std::uint64_t count, std::uint64_t head) const;
  void expect(bool writer, const char* call) const;
  std::uint64_t peer() const;

  std::string name_;
  Descriptor lock_;
  std::shared_ptr<Mapping> mapping_;
  std::size_t capacity_;
  bool is_writer_;
  std::optional<Reservation> reservation_;
  std::uint64_t next_ = 0;          // of the reader: count of the first byte that it has not read
  std::deque<std::uint64_t> held_;  // counts of the ends of the records that were read and not released
};

// Bytes of the ring that a record of `payload` bytes takes: what a caller subtracts from capacity().
std::size_t record_span(std::size_t payload);

}  // namespace dflash::ring
