// csrc/ring/memory.h for deaths.cpp: before each access to shared memory the process waits until it is told to go on.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace dflash::ring {

void step();                    // waits for leave; returns at once in a process that is not a side
void saw(std::uint64_t value);  // a value that what the side does next may depend on

template <typename T>
class Word {
 public:
  T load(std::memory_order = std::memory_order_seq_cst) const {
    step();
    const T value = word_.load();
    saw(value);
    return value;
  }
  void store(T value, std::memory_order = std::memory_order_seq_cst) {
    step();
    word_.store(value);
  }
  T fetch_add(T value, std::memory_order = std::memory_order_seq_cst) {
    step();
    return word_.fetch_add(value);  // the ring drops what was there before
  }
  bool compare_exchange_strong(T& expected, T wanted) {
    step();
    const bool done = word_.compare_exchange_strong(expected, wanted);
    saw(expected);
    return done;
  }

 private:
  std::atomic<T> word_;
};

// In two halves, so that one may be there without the other.
template <typename Header>
void copy_header(Header& to, const Header& from) {
  for (const std::size_t begin : {std::size_t{0}, sizeof(Header) / 2}) {
    step();
    std::memcpy(reinterpret_cast<std::byte*>(&to) + begin, reinterpret_cast<const std::byte*>(&from) + begin,
                sizeof(Header) / 2);
  }
}

}  // namespace dflash::ring
