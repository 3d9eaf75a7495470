#include "ring.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <stdexcept>
#include <utility>

#include "process.h"

namespace dflash::ring {
namespace {

std::size_t round_up(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// Added to a side's `process` when it closes: no process has this number, so it looks gone, and its place is free.
constexpr std::uint64_t kLeft = std::uint64_t{1} << 63;

bool runs(std::uint64_t process) { return process != 0 && process_id(process_pid(process)) == process; }

// Throws unless the segment is a finished ring of this version; gives its capacity.
std::size_t checked_capacity(const HeaderPage& page, std::size_t bytes, const std::string& path) {
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
  return capacity;
}

void take_readers_place(ReaderLine& reader, const std::string& path) {
  std::uint64_t old = reader.process.load(std::memory_order_acquire);
  if (runs(old) || !reader.process.compare_exchange_strong(old, own_process())) {
    throw std::invalid_argument("ring " + path + " already has a reader, pid " + std::to_string(process_pid(old)) +
                                "; a ring has one");
  }
}

}  // namespace

Ring::Ring(std::string name, Descriptor lock, std::shared_ptr<Mapping> mapping, std::size_t capacity)
    : name_(std::move(name)),
      lock_(std::move(lock)),
      mapping_(std::move(mapping)),
      capacity_(capacity),
      is_writer_(lock_.get() >= 0) {}

Ring::~Ring() { close(); }

std::unique_ptr<Ring> Ring::create(const std::string& name, std::size_t capacity) {
  const std::string path = checked_name(name);
  if (capacity < kPage || capacity % kLine != 0 || capacity > (std::size_t{1} << 46)) {
    throw std::invalid_argument("ring " + path + ": capacity " + std::to_string(capacity) +
                                " is not a multiple of 64 from 4096 to 2^46 bytes");
  }
  const std::uint64_t process = own_process();
  Descriptor lock = make_segment(path);
  try {
    allocate(lock.get(), path, kPage + capacity);
    auto mapping = std::make_shared<Mapping>(lock.get(), kPage + capacity);
    auto* page = new (mapping->data()) HeaderPage{};
    page->identity.version = kVersion;
    page->identity.header_bytes = kPage;
    page->identity.capacity = capacity;
    page->writer.process.store(process, std::memory_order_relaxed);
    page->identity.magic.store(kMagic, std::memory_order_release);
    return std::unique_ptr<Ring>(new Ring(path, std::move(lock), std::move(mapping), capacity));
  } catch (...) {
    ::shm_unlink(path.c_str());
    throw;
  }
}

std::unique_ptr<Ring> Ring::open(const std::string& name) {
  const std::string path = checked_name(name);
  const Descriptor fd = open_segment(path);
  struct stat info{};
  if (::fstat(fd.get(), &info) != 0) fail(errno, "ring " + path + ": fstat");
  const auto bytes = static_cast<std::size_t>(info.st_size);
  if (bytes == 0) fail(ENOENT, "ring " + path + " is still being made");
  if (bytes < 2 * kPage) {
    throw std::invalid_argument("ring " + path + " is a file of " + std::to_string(bytes) + " bytes, not a ring");
  }
  const Mapping header(fd.get(), kPage);  // the whole is mapped once the header is believed
  const std::size_t capacity = checked_capacity(*reinterpret_cast<const HeaderPage*>(header.data()), bytes, path);
  auto mapping = std::make_shared<Mapping>(fd.get(), bytes);
  take_readers_place(reinterpret_cast<HeaderPage*>(mapping->data())->reader, path);
  std::unique_ptr<Ring> ring(new Ring(path, Descriptor(), std::move(mapping), capacity));
  ring->next_ = ring->page().reader.tail.load(std::memory_order_relaxed);  // from here on only this side stores it
  return ring;
}

HeaderPage& Ring::page() const {
  if (!mapping_) throw std::invalid_argument("ring " + name_ + " is closed");
  return *reinterpret_cast<HeaderPage*>(mapping_->data());
}

std::byte* Ring::at(std::uint64_t count) const { return mapping_->data() + kPage + count % capacity_; }

RecordHeader& Ring::header_at(std::uint64_t count) const { return *reinterpret_cast<RecordHeader*>(at(count)); }

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
  // More than half may lie across the end however empty the ring is, and would be waited for without end.
  if (bytes > capacity_ || record_span(bytes) > capacity_ / 2) {
    throw std::invalid_argument("ring " + name_ + ": a record of " + mebibytes(bytes) + " never fits into half of " +
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
  if (r.skip != 0) {
    const RecordHeader skip{RecordKind::kSkip, 0, r.skip, 0, 0, 0, 0};
    copy_header(header_at(r.start - r.skip), skip);
  }
  const RecordHeader header{RecordKind::kRecord, meta.status, r.span, r.bytes, meta.sample, meta.epoch, meta.tokens};
  copy_header(header_at(r.start), header);
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

// The writer is a process of the same user, but a stray store must end in an error here, not in a wild read: a copy is
// checked, and only the copy is used.
RecordHeader Ring::checked_header(std::uint64_t count, std::uint64_t head) const {
  const std::size_t room = std::min<std::uint64_t>(head - count, capacity_ - count % capacity_);
  RecordHeader header{};
  if (room >= kLine) copy_header(header, header_at(count));
  const bool kind = header.kind == RecordKind::kRecord || header.kind == RecordKind::kSkip;
  if (!kind || header.span < kLine || header.span % kLine != 0 || header.span > room ||
      header.bytes > header.span - kLine) {
    throw std::runtime_error("ring " + name_ + " is damaged at byte " + std::to_string(count) +
                             ": something else wrote into it");
  }
  return header;
}

std::optional<Record> Ring::read() {
  expect(false, "read");
  const std::uint64_t head = page().writer.head.load(std::memory_order_acquire);
  if (next_ == head) return std::nullopt;
  std::uint64_t count = next_;
  RecordHeader header = checked_header(count, head);
  while (header.kind == RecordKind::kSkip) {  // published, and to be released, as one with the record behind it
    count += header.span;
    header = checked_header(count, head);
  }
  next_ = count + header.span;
  held_.push_back(next_);
  const Span payload{mapping_, at(count) + kLine, header.bytes};
  return Record{Meta{header.sample, header.epoch, header.status, header.tokens}, payload,
                static_cast<std::size_t>(count % capacity_) + kLine};
}

// Release order: whatever was read from the record, also by a device that this side has waited for, was read before
// the writer gets its bytes.
void Ring::release() {
  expect(false, "release");
  if (held_.empty()) throw std::invalid_argument("ring " + name_ + ": release() without a record that read() gave");
  auto& reader = page().reader;
  reader.tail.store(held_.front(), std::memory_order_release);
  reader.released.fetch_add(1, std::memory_order_release);
  held_.pop_front();
}

Span Ring::records() const {
  expect(false, "records");
  return Span{mapping_, mapping_->data() + kPage, capacity_};
}

void Ring::set_reader_mark(std::uint64_t mark) {
  expect(false, "reader_mark");
  page().reader.mark.store(mark, std::memory_order_release);
}

std::uint64_t Ring::reader_mark() const { return page().reader.mark.load(std::memory_order_acquire); }
std::uint64_t Ring::writer_beat() const { return page().writer.beat.load(std::memory_order_relaxed); }
std::uint64_t Ring::committed() const { return page().writer.committed.load(std::memory_order_acquire); }
std::uint64_t Ring::released() const { return page().reader.released.load(std::memory_order_acquire); }

std::uint64_t Ring::peer() const { return is_writer_ ? page().reader.process.load() : page().writer.process.load(); }

int Ring::peer_pid() const { return process_pid(peer()); }

bool Ring::peer_attached() const { return peer() != 0; }

bool Ring::peer_alive() const { return runs(peer()); }

void Ring::close() {
  if (!mapping_) return;
  // A forked child that drops its copy of this object must not speak for its parent.
  auto& process = is_writer_ ? page().writer.process : page().reader.process;
  const std::uint64_t own = process.load(std::memory_order_relaxed);
  if (process_pid(own) == ::getpid()) process.store(own | kLeft, std::memory_order_release);
  reservation_.reset();
  held_.clear();
  mapping_.reset();  // views that are still held keep the bytes mapped
  lock_ = Descriptor();
}

void Ring::unlink() {
  if (::shm_unlink(name_.c_str()) != 0 && errno != ENOENT) fail(errno, "ring " + name_ + ": shm_unlink");
}

std::size_t record_span(std::size_t payload) { return kLine + round_up(payload); }

}  // namespace dflash::ring
