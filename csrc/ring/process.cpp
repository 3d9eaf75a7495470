// Which process is which, and which segments nobody owns any more: the part of the ring that reads /proc and /dev/shm.
#include <dirent.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "ring.h"

namespace dflash::ring {
namespace {

// `/PREFIX...-PID-START-RANK`: the run's id may hold dashes itself, so the fields are counted from the right.
bool owner_gone(const std::string& file) {
  std::size_t cut = file.size();
  for (int fields = 0; fields < 3; ++fields) {
    if (cut == 0) return false;
    cut = file.rfind('-', cut - 1);
    if (cut == std::string::npos) return false;
  }
  unsigned int pid = 0, rank = 0;
  unsigned long long start = 0;
  int used = 0;
  const char* fields = file.c_str() + cut;
  if (std::sscanf(fields, "-%u-%llu-%u%n", &pid, &start, &rank, &used) != 3 ||
      static_cast<std::size_t>(used) != std::strlen(fields) || pid == 0 || pid >= (1u << 24)) {
    return false;  // not a name that we make: leave it alone
  }
  const std::uint64_t running = process_id(static_cast<int>(pid));
  return running == 0 || process_start(running) != start;
}

}  // namespace

std::uint64_t process_id(int pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  const std::string stat((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto name_end = stat.rfind(')');  // field 2 is "(comm)", and comm may hold spaces and brackets
  if (name_end == std::string::npos) return 0;
  char state = 0;
  unsigned long long start = 0;
  const int read =
      std::sscanf(stat.c_str() + name_end + 1,
                  " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu", &state, &start);
  if (read != 2 || state == 'Z' || state == 'X') return 0;  // a zombie writes nothing any more
  return (static_cast<std::uint64_t>(start) << 24) | static_cast<std::uint64_t>(pid);
}

int process_pid(std::uint64_t process) { return static_cast<int>(process & 0xFFFFFF); }

std::uint64_t process_start(std::uint64_t process) { return process >> 24; }

std::vector<std::string> reclaim(const std::string& prefix) {
  std::vector<std::string> gone;
  DIR* folder = ::opendir("/dev/shm");
  if (folder == nullptr) return gone;
  while (const dirent* entry = ::readdir(folder)) {
    const std::string file = entry->d_name;
    if (file.starts_with(prefix) && owner_gone(file) && ::shm_unlink(("/" + file).c_str()) == 0) {
      gone.push_back("/" + file);
    }
  }
  ::closedir(folder);
  return gone;
}

}  // namespace dflash::ring
