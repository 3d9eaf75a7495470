#include "segment.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace dflash::ring {
namespace {

constexpr const char* kFolder = "/dev/shm";
constexpr std::size_t kLongestName = 200;

// What the file system of a file has left, and in all, in bytes; false where it does not say (a tmpfs without a limit).
bool room(int fd, std::size_t& left, std::size_t& all) {
  struct statvfs found{};
  if (::fstatvfs(fd, &found) != 0 || found.f_blocks == 0) return false;
  left = static_cast<std::size_t>(found.f_bavail) * found.f_frsize;
  all = static_cast<std::size_t>(found.f_blocks) * found.f_frsize;
  return true;
}

[[noreturn]] void refuse_full(int fd, const std::string& path, std::size_t bytes) {
  std::size_t left = 0, all = 0;
  const std::string have = room(fd, left, all) ? mebibytes(left) + " free of " + mebibytes(all) : "not enough";
  fail(ENOSPC, "ring " + path + " needs " + mebibytes(bytes) + " of shared memory, " + kFolder + " has " + have +
                   "; lower stream.ring_bytes or enlarge /dev/shm (docker run --shm-size=..., or mount -o "
                   "remount,size=... /dev/shm)");
}

// Whether the file is named as ours are, `PREFIX...-PID-START-RANK`. A run's id may hold dashes itself, so the fields
// are counted from the right.
bool named_as_a_ring(const std::string& file) {
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
  return std::sscanf(fields, "-%u-%llu-%u%n", &pid, &start, &rank, &used) == 3 &&
         static_cast<std::size_t>(used) == std::strlen(fields);
}

// Whether the name still leads to the file: nobody but its owner, or who holds its lock, takes the name away.
bool has_name(int fd) {
  struct stat info{};
  return ::fstat(fd, &info) == 0 && info.st_nlink != 0;
}

bool unlink_abandoned(const std::string& path) {
  const Descriptor fd(::shm_open(path.c_str(), O_RDWR | O_CLOEXEC, 0));
  if (fd.get() < 0) return false;  // another user's, or gone meanwhile
  return ::flock(fd.get(), LOCK_EX | LOCK_NB) == 0 && has_name(fd.get()) && ::shm_unlink(path.c_str()) == 0;
}

}  // namespace

Descriptor::~Descriptor() {
  if (fd_ >= 0) ::close(fd_);
}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

Mapping::Mapping(int fd, std::size_t bytes) : bytes_(bytes) {
  // The pages exist already; MAP_POPULATE enters them in the page table now instead of at the first lap's stores.
  void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  if (data == MAP_FAILED) fail(errno, "ring: mmap of " + mebibytes(bytes));
  data_ = static_cast<std::byte*>(data);
}

Mapping::~Mapping() { ::munmap(data_, bytes_); }

void fail(int error, const std::string& what) { throw std::system_error(error, std::generic_category(), what); }

std::string mebibytes(std::size_t bytes) {
  char text[48];
  std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(bytes) / (1024.0 * 1024.0));
  return text;
}

// The name becomes a file in /dev/shm, so nothing that could leave the folder may be in it.
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

Descriptor make_segment(const std::string& path) {
  for (;;) {
    Descriptor fd(::shm_open(path.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600));
    if (fd.get() < 0) fail(errno, "ring " + path + ": shm_open");
    while (::flock(fd.get(), LOCK_EX) != 0) {  // waits no longer than a reclaim() that looks at the file
      if (errno != EINTR) fail(errno, "ring " + path + ": flock");
    }
    if (has_name(fd.get())) return fd;
    // A reclaim() came between the two calls and took the file for an abandoned one: make it again.
  }
}

void allocate(int fd, const std::string& path, std::size_t bytes) {
  std::size_t left = 0, all = 0;
  if (room(fd, left, all) && left < bytes) refuse_full(fd, path, bytes);  // before a page is taken from the others
  int error;
  do {
    error = ::posix_fallocate(fd, 0, static_cast<off_t>(bytes));  // on tmpfs the size appears when all pages are there
  } while (error == EINTR);
  if (error == ENOSPC || error == ENOMEM) refuse_full(fd, path, bytes);
  if (error == EFBIG) {
    struct rlimit limit{};
    ::getrlimit(RLIMIT_FSIZE, &limit);
    fail(error, "ring " + path + " needs a file of " + mebibytes(bytes) + ", this process may make files of " +
                    mebibytes(limit.rlim_cur) + "; raise the limit (ulimit -f) or lower stream.ring_bytes");
  }
  if (error != 0) fail(error, "ring " + path + ": posix_fallocate");
}

Descriptor open_segment(const std::string& path) {
  Descriptor fd(::shm_open(path.c_str(), O_RDWR | O_CLOEXEC, 0));
  if (fd.get() < 0) fail(errno, "ring " + path + ": shm_open");
  return fd;
}

std::vector<std::string> reclaim(const std::string& prefix) {
  std::vector<std::string> gone;
  DIR* folder = ::opendir(kFolder);
  if (folder == nullptr) return gone;
  while (const dirent* entry = ::readdir(folder)) {
    const std::string file = entry->d_name;
    if (file.starts_with(prefix) && named_as_a_ring(file) && unlink_abandoned("/" + file)) gone.push_back("/" + file);
  }
  ::closedir(folder);
  return gone;
}

}  // namespace dflash::ring
