// The file of a ring in /dev/shm: its name, its pages, its mapping, and whether its owner still lives.
//
// The owner holds an exclusive flock() on the file for as long as it keeps the ring. The kernel drops that lock when
// the owner dies, however it dies, so an unlocked file is an abandoned one; that holds across pid namespaces that share
// /dev/shm, and a pid that is used again does not matter. (A child forked without exec shares the lock.)
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace dflash::ring {

// A file descriptor that closes itself; a mapping stays valid without it.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  ~Descriptor();
  Descriptor(Descriptor&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Descriptor& operator=(Descriptor&& other) noexcept;
  int get() const { return fd_; }

 private:
  int fd_;
};

// A mapped segment. Views of its bytes share the ownership, so a view outlives the ring that gave it.
class Mapping {
 public:
  Mapping(int fd, std::size_t bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* data_;
  std::size_t bytes_;
};

// "/NAME" for shm_open. Throws std::invalid_argument unless it is [/]dflash-... in plain characters.
std::string checked_name(const std::string& name);

// Makes the file, locked and empty. Throws std::system_error, EEXIST where the name is taken.
Descriptor make_segment(const std::string& path);

// Gives the file its size and all of its pages, so that no later store can raise SIGBUS. Throws std::system_error with
// what is wanted and what there is: ENOSPC (/dev/shm is too small), EFBIG (the process' file size limit).
void allocate(int fd, const std::string& path, std::size_t bytes);

// Throws std::system_error, ENOENT where there is no such file.
Descriptor open_segment(const std::string& path);

// Unlinks every segment `/PREFIX*-PID-START-RANK` in /dev/shm that nobody holds locked; gives the names.
std::vector<std::string> reclaim(const std::string& prefix);

std::string mebibytes(std::size_t bytes);

[[noreturn]] void fail(int error, const std::string& what);

}  // namespace dflash::ring
