// The ring's own code, run by two processes in every order of their accesses to shared memory, with a death (SIGKILL)
// of either or both at every one of them; see explorer.h. After each death a survivor goes on alone, and then a fresh
// look is taken: what was committed is there and whole, what was not is invisible, the dead side is seen as dead, and
// the segment is reclaimed when, and only when, its owner is gone.
//
// The orders are the sequentially consistent ones. Which weaker ones the memory orders in ring.cpp leave is
// stress.cpp's.
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <stdexcept>
#include <system_error>

#include "explorer.h"
#include "ring/process.h"
#include "ring/ring.h"

using dflash::ring::Meta;
using dflash::ring::Record;
using dflash::ring::Ring;
using explorer::ask;
using explorer::begin_steps;
using explorer::Control;
using explorer::require;

namespace {

constexpr std::size_t kCapacity = 4096;
constexpr std::size_t kBytes[] = {1856, 1856, 50, 1984};  // of the payload of record 0, 1, ...; 64 more with its header
constexpr int kWriter = 0, kReader = 1;

std::byte content(int record, std::size_t i) { return static_cast<std::byte>(37 * record + i % 251 + 1); }

void name_segment(Control& control) {
  const auto process = dflash::ring::own_process();
  std::snprintf(control.name, sizeof control.name, "/%s%d-%llu-0", explorer::prefix().c_str(), ::getpid(),
                static_cast<unsigned long long>(dflash::ring::process_start(process)));
}

bool put(Control& control, Ring& ring) {
  const int record = control.published;
  const std::size_t bytes = kBytes[record];
  std::optional<dflash::ring::Span> slot;
  bool reader_left = false;
  ask(control, [&] {
    slot = ring.reserve(bytes);
    reader_left = !slot && ring.peer_attached() && !ring.peer_alive();
    return slot || reader_left;
  });
  if (!slot) return false;
  for (std::size_t i = 0; i < bytes; ++i) {
    if (i == bytes / 2) dflash::ring::step();
    slot->data[i] = content(record, i);
  }
  ring.commit(Meta{static_cast<std::uint64_t>(record), 7, 0, bytes});
  ++control.published;
  return true;
}

void check_content(const Record& found, int record) {
  require(found.meta.sample == static_cast<std::uint64_t>(record) && found.meta.tokens == kBytes[record] &&
              found.payload.bytes == kBytes[record],
          "wanted record " + std::to_string(record) + ", found " + std::to_string(found.meta.sample));
  for (std::size_t i = 0; i < kBytes[record]; ++i) {
    if (i == kBytes[record] / 2) dflash::ring::step();
    require(found.payload.data[i] == content(record, i), "a wrong byte in record " + std::to_string(record));
  }
}

// As Ring.next_record() in Python waits: none when the writer is gone and nothing is left.
std::optional<Record> next_record(Control& control, Ring& ring) {
  std::optional<Record> found;
  ask(control, [&] {
    found = ring.read();
    if (found) return true;
    if (ring.peer_alive()) return false;
    found = ring.read();
    return true;
  });
  return found;
}

bool take(Control& control, Ring& ring) {
  const auto found = next_record(control, ring);
  if (!found) return false;
  check_content(*found, control.released);
  ring.release();
  ++control.released;
  return true;
}

std::unique_ptr<Ring> open(const Control& control) {
  try {
    return Ring::open(control.name);
  } catch (const std::system_error& error) {
    if (error.code().value() != ENOENT) throw;
    return nullptr;  // not there, or not ready
  }
}

std::unique_ptr<Ring> open_when_made(Control& control) {
  std::unique_ptr<Ring> ring;
  ask(control, [&] { return (ring = open(control)) != nullptr; });
  return ring;
}

bool named(const Control& control) {
  struct stat info{};
  return ::stat((std::string("/dev/shm") + control.name).c_str(), &info) == 0;
}

// Reads what a dead reader left, from the record after the last release that took effect.
void read_the_rest(Control& control, Ring& ring) {
  auto found = ring.read();
  // A reader that died inside of release() may have moved `tail` before it could know.
  const int first = found ? static_cast<int>(found->meta.sample) : control.published;
  if (first == control.released + 1) control.released = first;
  for (; found; found = ring.read()) {
    check_content(*found, control.released++);
    ring.release();
  }
  require(control.released == control.published, "committed records are lost, or there are more than were committed");
}

// Who is dead is seen as dead, all that was committed is read, and the name goes when its owner has gone.
void look(Control& control, const std::set<int>& victims) {
  const bool writer_dead = victims.contains(kWriter), reader_dead = victims.contains(kReader);
  require(writer_dead || control.side[kWriter].finished, "the surviving writer did not come to its end");
  if (!reader_dead) require(control.released == control.published, "the surviving reader did not get all records");
  const bool had_name = named(control);
  if (reader_dead) {
    if (const auto ring = open(control)) {
      require(!ring->peer_alive(), "a writer that is dead or has closed looks alive");
      read_the_rest(control, *ring);
    } else {
      require(!had_name || control.published == 0, "a ring with records cannot be opened");
    }
  }
  const auto gone = dflash::ring::reclaim(explorer::prefix());
  require(gone.size() == (had_name ? 1u : 0u) && !named(control), "the abandoned segment was not reclaimed");
}

void all_was_read(Control& control, int records) {
  require(control.published == records && control.released == records, "not all records were exchanged");
}

// From nothing: making, opening, two records, unlinking, closing.
void first_writer(Control& control) {
  name_segment(control);
  begin_steps();
  const auto ring = Ring::create(control.name, kCapacity);
  require(put(control, *ring), "no room in an empty ring");
  if (ask(control, [&] { return ring->peer_attached(); })) {
    require(dflash::ring::reclaim(explorer::prefix()).empty(), "a living owner's segment was reclaimed");
    ring->unlink();
  }
  put(control, *ring);
  ring->close();
}

void first_reader(Control& control) {
  begin_steps();
  const auto ring = open_when_made(control);
  if (!ring) return;  // the writer died before its ring was ready
  while (take(control, *ring)) {
  }
  require(!ring->peer_alive() && !ring->read(), "the end of the stream was not the end");
  ring->close();
}

// A ring with one record unread and its head 256 bytes before the end: record 2 takes 128 of them, record 3 begins at
// the beginning, behind a skip record, and has no room there until record 1 is released.
void wrapping_writer(Control& control) {
  name_segment(control);
  const auto ring = Ring::create(control.name, kCapacity);
  require(put(control, *ring) && put(control, *ring), "no room in an empty ring");
  begin_steps();
  if (put(control, *ring)) put(control, *ring);
  ring->close();
}

void wrapping_reader(Control& control) {
  const auto ring = Ring::open(control.name);
  require(take(control, *ring), "record 0 is not there");
  begin_steps();
  while (take(control, *ring)) {
  }
  ring->close();
}

// The same ring, whose reader holds all records that there are, and releases the oldest when it finds no other: what it
// holds stays as it is while the writer goes on.
void ahead_reader(Control& control) {
  const auto ring = Ring::open(control.name);
  require(take(control, *ring), "record 0 is not there");
  begin_steps();
  std::deque<Record> held;
  const auto release_oldest = [&] {
    check_content(held.front(), control.released);
    ring->release();
    held.pop_front();
    ++control.released;
  };
  for (;;) {
    if (const auto found = held.empty() ? next_record(control, *ring) : ring->read()) {
      held.push_back(*found);
    } else if (!held.empty()) {
      release_oldest();
    } else {
      break;
    }
  }
  ring->close();
}

// A ring is made, dropped, and made again under its name while the start of another run looks for abandoned ones.
void maker(Control& control) {
  name_segment(control);
  begin_steps();
  Ring::create(control.name, kCapacity)->unlink();
  auto ring = Ring::create(control.name, kCapacity);
  require(put(control, *ring), "no room in an empty ring");
  ring.release();  // kept to the end of the process
}

void cleaner(Control&) {
  begin_steps();
  dflash::ring::reclaim(explorer::prefix());
}

void made_ring_stands(Control& control) {
  require(dflash::ring::reclaim(explorer::prefix()).empty() && named(control), "a living owner's ring was reclaimed");
  const auto ring = Ring::open(control.name);
  require(ring->peer_alive(), "the maker lives and looks dead");
  read_the_rest(control, *ring);
}

void after_making(Control& control, const std::set<int>& victims) {
  if (!victims.contains(kWriter)) return made_ring_stands(control);
  if (const auto ring = open(control)) {
    require(!ring->peer_alive(), "a dead maker looks alive");
    read_the_rest(control, *ring);
  }
  dflash::ring::reclaim(explorer::prefix());
  require(!named(control), "a dead maker's segment is still there");
}

// Two processes want the place of a reader that has left.
void successor(Control& control) {
  begin_steps();
  try {
    auto ring = Ring::open(control.name);
    ++control.opened;
    ring.release();                         // kept to the end of the process
  } catch (const std::invalid_argument&) {  // the place is taken
  }
}

void maker_and_successor(Control& control) {
  name_segment(control);
  Ring::create(control.name, kCapacity).release();
  Ring::open(control.name)->close();
  successor(control);
}

void one_has_the_place(Control& control) { require(control.opened == 1, "one place, and not one reader"); }

void after_succession(Control& control, const std::set<int>& victims) {
  if (victims.size() == 2) Ring::open(control.name);  // throws if a dead reader keeps the place
  dflash::ring::reclaim(explorer::prefix());
}

}  // namespace

int main() {
  const explorer::Scenario scenarios[] = {
      {"from nothing", {first_writer, first_reader}, [](Control& c) { all_was_read(c, 2); }, look},
      {"full and wrapping", {wrapping_writer, wrapping_reader}, [](Control& c) { all_was_read(c, 4); }, look},
      {"reading ahead", {wrapping_writer, ahead_reader}, [](Control& c) { all_was_read(c, 4); }, look},
      {"made while another cleans", {maker, cleaner}, made_ring_stands, after_making},
      {"two readers for one place", {maker_and_successor, successor}, one_has_the_place, after_succession},
  };
  try {
    for (const explorer::Scenario& scenario : scenarios) {
      const auto totals = explorer::explore(scenario);
      std::printf("%s: %zu states, %zu deaths\n", scenario.name, totals.states, totals.deaths);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
