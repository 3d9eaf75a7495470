#include "explorer.h"

#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <map>
#include <stdexcept>

#include "steps.h"

namespace explorer {
namespace {

constexpr int kPatience = 60;  // seconds that a side may take to its next step
Control* control = nullptr;
Side* me = nullptr;  // null in the explorer itself

std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15ull;
  return hash ^ hash >> 29;
}

// A side's process number differs from run to run; nothing depends on more than whose it is and what was added to it.
std::uint64_t anonymous(std::uint64_t value) {
  for (int i = 0; i < 2; ++i) {
    const std::uint64_t pid = static_cast<std::uint64_t>(control->side[i].pid);
    if (pid != 0 && value >> 24 != 0 && (value & 0xFFFFFF) == pid) return 1000 + 2 * i + (value >> 63);
  }
  return value;
}

void wait_for(Side& side, const char* what) {
  timespec until{};
  ::clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += kPatience;
  while (::sem_timedwait(&side.arrived, &until) != 0) {
    if (errno != EINTR) throw std::runtime_error(std::string("a side came to no step: ") + what);
  }
  if (side.failure[0] != '\0') throw std::runtime_error(side.failure);
}

class Run {
 public:
  Run(const Scenario& scenario, const std::vector<int>& schedule) {
    for (Side& side : control->side) {
      ::sem_init(&side.turn, 1, 0);
      ::sem_init(&side.arrived, 1, 0);
      side.pid = 0;
      side.history = 0;
      side.stepping = side.finished = false;
      side.failure[0] = '\0';
    }
    control->alone = false;
    control->published = control->released = control->opened = control->made = 0;
    try {
      for (int i = 0; i < 2; ++i) start(scenario, i);
      for (const int side : schedule) move(side);
    } catch (...) {
      end(0);
      end(1);
      throw;
    }
  }
  ~Run() {
    end(0);
    end(1);
    ::shm_unlink(control->name);
    if (segment_ >= 0) ::close(segment_);
  }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  void move(int side) {
    ::sem_post(&control->side[side].turn);
    wait_for(control->side[side], "it moved");
  }
  bool finished(int side) const { return control->side[side].finished; }
  void end(int side) {
    if (control->side[side].pid == 0) return;
    ::kill(control->side[side].pid, SIGKILL);
    ::waitpid(control->side[side].pid, nullptr, 0);
    control->side[side].pid = 0;
  }
  void finish_alone(int side) {
    control->alone = true;
    if (!finished(side)) move(side);
  }

  std::uint64_t state() {
    const int named = ::shm_open(control->name, O_RDONLY | O_CLOEXEC, 0);
    if (named >= 0) {
      if (segment_ >= 0) ::close(segment_);
      segment_ = named;
    }
    std::uint64_t hash = mix(named >= 0, 0);
    std::uint64_t words[2048];
    const ssize_t bytes = segment_ < 0 ? 0 : ::pread(segment_, words, sizeof words, 0);
    for (ssize_t i = 0; i < bytes / 8; ++i) hash = mix(hash, anonymous(words[i]));
    for (const Side& side : control->side) hash = mix(mix(hash, side.history), side.finished);
    return hash;
  }

 private:
  static void start(const Scenario& scenario, int index) {
    Side& side = control->side[index];
    side.pid = ::fork();
    if (side.pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      me = &side;
      side.pid = ::getpid();
      try {
        scenario.side[index](*control);
      } catch (const std::exception& error) {
        std::snprintf(side.failure, sizeof side.failure, "side %d: %s", index, error.what());
      }
      side.finished = true;
      ::sem_post(&side.arrived);
      for (;;) ::pause();  // alive, so that only its words say that it has closed
    }
    wait_for(side, "it started");
  }

  int segment_ = -1;
};

std::string text(const std::vector<int>& schedule) {
  std::string digits;
  for (const int side : schedule) digits += static_cast<char>('0' + side);
  return digits;
}

void die(const Scenario& scenario, const std::vector<int>& schedule, const std::set<int>& victims) {
  Run run(scenario, schedule);
  for (const int side : victims) run.end(side);
  for (int side = 0; side < 2; ++side) {
    if (!victims.contains(side)) run.finish_alone(side);
  }
  scenario.after_death(*control, victims);
}

// From every state there is a way to an end: nothing the sides can do locks them up.
void require_ends_everywhere(const std::map<std::uint64_t, std::set<std::uint64_t>>& sources,
                             const std::set<std::uint64_t>& states, std::vector<std::uint64_t> ends) {
  std::set<std::uint64_t> good(ends.begin(), ends.end());
  while (!ends.empty()) {
    const auto found = sources.find(ends.back());
    ends.pop_back();
    if (found == sources.end()) continue;
    for (const std::uint64_t source : found->second) {
      if (good.insert(source).second) ends.push_back(source);
    }
  }
  require(!good.empty() && good.size() == states.size(), "there are states from which the sides never come to an end");
}

}  // namespace

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

std::string prefix() {
  static const std::string name = "dflash-deaths" + std::to_string(::getpid()) + "-";
  return name;
}

void begin_steps() { me->stepping = true; }

bool ask(Control& shared, const std::function<bool()>& done) {
  for (;;) {
    const bool last = shared.alone;  // looked up first: the other side may have acted just before it died
    const std::uint64_t before = me->history;
    if (done()) return true;
    if (last) return false;
    me->history = before;
  }
}

Totals explore(const Scenario& scenario) {
  Totals totals;
  std::set<std::uint64_t> states;
  std::map<std::uint64_t, std::set<std::uint64_t>> sources;
  std::vector<std::uint64_t> ends;
  std::vector<std::pair<std::vector<int>, std::uint64_t>> open{
      {{}, 0}};  // schedules to follow, and from which state (0: the first)
  std::vector<int> schedule;
  try {
    while (!open.empty()) {
      auto [next, from] = std::move(open.back());
      open.pop_back();
      schedule = std::move(next);
      std::vector<std::vector<int>> fresh;
      {
        Run run(scenario, schedule);
        for (;;) {
          const std::uint64_t state = run.state();
          if (from != 0) sources[state].insert(from);
          if (!states.insert(state).second) break;
          fresh.push_back(schedule);
          if (run.finished(0) && run.finished(1)) {
            scenario.complete(*control);
            ends.push_back(state);
            break;
          }
          const int mover = run.finished(0) ? 1 : 0;
          if (!run.finished(1 - mover)) {
            open.emplace_back(schedule, state);
            open.back().first.push_back(1 - mover);
          }
          from = state;
          run.move(mover);
          schedule.push_back(mover);
        }
      }
      for (const std::vector<int>& reached : fresh) {
        schedule = reached;
        for (const std::set<int>& victims : {std::set<int>{0}, {1}, {0, 1}}) {
          die(scenario, schedule, victims);
          ++totals.deaths;
        }
      }
    }
    require_ends_everywhere(sources, states, ends);
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string(scenario.name) + ", schedule " + text(schedule) + ": " + error.what());
  }
  totals.states = states.size();
  return totals;
}

// One processor for all: exactly one of the three processes runs at a time, and a switch is cheaper that way.
struct Setup {
  Setup() {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(::sched_getcpu(), &one);
    ::sched_setaffinity(0, sizeof one, &one);
    void* memory = ::mmap(nullptr, sizeof(Control), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    require(memory != MAP_FAILED, "no memory for the explorer");
    control = static_cast<Control*>(memory);
    prefix();  // before the first fork: it carries this process' pid
  }
} setup;

}  // namespace explorer

namespace dflash::ring {

using explorer::control;
using explorer::me;

void step() {
  if (me == nullptr || !me->stepping || control->alone) return;
  me->history = explorer::mix(me->history, 1);
  ::sem_post(&me->arrived);
  while (::sem_wait(&me->turn) != 0) {
  }
}

void saw(std::uint64_t value) {
  if (me != nullptr) me->history = explorer::mix(me->history, explorer::anonymous(value));
}

}  // namespace dflash::ring

// The system calls about a segment, as the linker's --wrap gives them to the ring: each is a step.
extern "C" {

using dflash::ring::saw;
using dflash::ring::step;

int __real_shm_open(const char* name, int flags, mode_t mode);
int __wrap_shm_open(const char* name, int flags, mode_t mode) {
  step();
  const int fd = __real_shm_open(name, flags, mode);
  if (fd >= 0 && (flags & O_CREAT) != 0) ++explorer::control->made;
  saw(fd < 0 ? 0 : explorer::control->made);  // which of the files that had the name
  return fd;
}

int __real_shm_unlink(const char* name);
int __wrap_shm_unlink(const char* name) {
  step();
  const int status = __real_shm_unlink(name);
  saw(status == 0);
  return status;
}

int __real_posix_fallocate(int fd, off_t offset, off_t bytes);
int __wrap_posix_fallocate(int fd, off_t offset, off_t bytes) {
  step();
  return __real_posix_fallocate(fd, offset, bytes);
}

int __real_fstat(int fd, struct stat* info);
int __wrap_fstat(int fd, struct stat* info) {
  step();
  const int status = __real_fstat(fd, info);
  saw(info->st_nlink);
  saw(info->st_size);
  return status;
}

DIR* __real_opendir(const char* path);
DIR* __wrap_opendir(const char* path) {
  step();
  return __real_opendir(path);
}

int __real_flock(int fd, int operation);
int __wrap_flock(int fd, int operation) {
  int status = -1;
  const auto locked = [&] {
    step();
    status = __real_flock(fd, operation | LOCK_NB);
    saw(status == 0);
    return status == 0 || (operation & LOCK_NB) != 0;
  };
  // The kernel would let a waiting side sleep; here it asks, so that the explorer keeps hold of it.
  if (explorer::me == nullptr) return __real_flock(fd, operation);
  explorer::ask(*explorer::control, locked);
  return status;
}
}
