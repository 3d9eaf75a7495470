#include "process.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "segment.h"

namespace dflash::ring {

std::uint64_t process_id(int pid) {
  const std::string path = "/proc/" + std::to_string(pid) + "/stat";
  const Descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  char stat[1024];
  const ssize_t bytes = fd.get() < 0 ? -1 : ::read(fd.get(), stat, sizeof stat - 1);
  if (bytes < 0 && (errno == ENOENT || errno == ESRCH)) return 0;
  if (bytes < 0) fail(errno, "ring: cannot tell from " + path + " whether the process runs");
  stat[bytes] = '\0';
  const char* name_end = std::strrchr(stat, ')');  // field 2 is "(comm)", and comm may hold spaces and brackets
  char state = 0;
  unsigned long long start = 0;
  const int fields =
      name_end == nullptr
          ? 0
          : std::sscanf(name_end + 1,
                        " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu", &state,
                        &start);
  if (fields != 2) throw std::runtime_error("ring: " + path + " is not of the form that proc(5) describes");
  if (state == 'Z' || state == 'X') return 0;  // a zombie writes nothing any more
  return (static_cast<std::uint64_t>(start) << 24) | static_cast<std::uint64_t>(pid);
}

std::uint64_t own_process() {
  const std::uint64_t process = process_id(::getpid());
  if (process == 0) throw std::runtime_error("ring: /proc does not show this process; mount /proc");
  return process;
}

int process_pid(std::uint64_t process) { return static_cast<int>(process & 0xFFFFFF); }

std::uint64_t process_start(std::uint64_t process) { return process >> 24; }

}  // namespace dflash::ring
