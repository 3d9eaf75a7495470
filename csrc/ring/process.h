// Which process is which: a pid alone is used again.
#pragma once

#include <cstdint>

namespace dflash::ring {

// (start time << 24 | pid): one number that names a process for as long as the machine is up. 0: no such process, or a
// zombie. The start time is field 22 of /proc/PID/stat, in clock ticks since boot (proc(5)); pids have at most 22 bits.
// Throws std::system_error where /proc cannot be read for another reason: a process that we cannot see is not dead.
std::uint64_t process_id(int pid);
// This process. Throws std::runtime_error where /proc does not show it.
std::uint64_t own_process();
int process_pid(std::uint64_t process);
std::uint64_t process_start(std::uint64_t process);

}  // namespace dflash::ring
