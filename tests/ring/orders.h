// csrc/ring/memory.h for stress.cpp: std::atomic, of which one access can be made relaxed, to see that this is noticed.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace dflash::ring {

struct Weakened {
  std::size_t word = 0;  // offset in the header page; 0: none
  bool store = false;    // its stores, or its loads
};
inline Weakened weakened;  // set before the threads start

// Inlined, so that the orders are constants: the compiler takes the strongest for one that it does not know.
template <typename T>
class Word {
 public:
  [[gnu::always_inline]] T load(std::memory_order order = std::memory_order_seq_cst) const {
    return is_weak(false) ? word_.load(std::memory_order_relaxed) : word_.load(order);
  }
  [[gnu::always_inline]] void store(T value, std::memory_order order = std::memory_order_seq_cst) {
    is_weak(true) ? word_.store(value, std::memory_order_relaxed) : word_.store(value, order);
  }
  [[gnu::always_inline]] T fetch_add(T value, std::memory_order order = std::memory_order_seq_cst) {
    return word_.fetch_add(value, order);
  }
  [[gnu::always_inline]] bool compare_exchange_strong(T& expected, T wanted) {
    return word_.compare_exchange_strong(expected, wanted);
  }

 private:
  bool is_weak(bool store) const {
    return weakened.word != 0 && reinterpret_cast<std::uintptr_t>(this) % 4096 == weakened.word &&
           weakened.store == store;
  }

  std::atomic<T> word_;
};

// Word by word, so that the sanitizer sees each: it does not look into a memcpy that the compiler expands.
template <typename Header>
void copy_header(Header& to, const Header& from) {
  using AnyWord [[gnu::may_alias]] = std::uint64_t;
  for (std::size_t i = 0; i < sizeof(Header) / sizeof(AnyWord); ++i) {
    reinterpret_cast<AnyWord*>(&to)[i] = reinterpret_cast<const AnyWord*>(&from)[i];
  }
}

}  // namespace dflash::ring
