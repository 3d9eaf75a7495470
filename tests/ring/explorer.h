// Runs two real processes in every order of their steps, and ends either or both at every one of them.
//
// A step is an access to shared memory (steps.h) or a system call about the segment (the __wrap_ functions). One
// process moves at a time, as far as its next step. A run is a schedule, the list of who moved; it is made again from
// the start for each death. Two schedules that lead to the same state have the same future, and only one of them is
// followed: a state is the segment's bytes and, for each side, all that it did and saw. A side that asks again and
// again returns to the history it had before it asked (`ask`), so that waiting makes no new states.
#pragma once

#include <semaphore.h>
#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace explorer {

struct Side {
  sem_t turn;
  sem_t arrived;  // posted when the side waits for its turn, and when it has finished
  pid_t pid;
  std::uint64_t history;
  bool stepping;  // false while it prepares the state that the scenario begins with
  bool finished;
  char failure[256];  // what it threw, or empty
};

// Memory that the explorer and the two sides share beside the segment: what the sides know they have done.
struct Control {
  Side side[2];
  bool alone;  // the other side is dead: nobody is asked for leave any more
  char name[128];
  int published;  // commits that returned
  int released;   // releases that returned
  int opened;     // readers that got the place
  int made;       // files, also those that have no name any more
};

struct Scenario {
  const char* name;
  std::function<void(Control&)> side[2];
  std::function<void(Control&)> complete;                           // checks a state in which both have finished
  std::function<void(Control&, const std::set<int>&)> after_death;  // checks what is left behind the dead sides
};

// A side calls it when its preparation is done: from here on each of its accesses is a step.
void begin_steps();

// Sides call it around whatever is repeated until it succeeds. False: not yet, and the other side is dead.
bool ask(Control& control, const std::function<bool()>& done);

struct Totals {
  std::size_t states = 0, deaths = 0;
};

// Throws std::runtime_error with the schedule ("0" and "1": who moved) of the first check that fails.
Totals explore(const Scenario& scenario);

void require(bool holds, const std::string& what);

std::string prefix();  // of this process' segments

}  // namespace explorer
