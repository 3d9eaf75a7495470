// Sixteen bytes of numbers of one type, as kernels read and write them, and the launch of the kernel for
// that type.
#pragma once

#include <cstring>

#include "attention/ptx.h"
#include "number.h"

namespace dflash::gpu {

inline constexpr int kWarpLanes = 32;

template <Number kNumber>
struct Numbers {
  static constexpr bool kFull = kNumber == Number::kFloat;
  static constexpr Half kHalf = kNumber == Number::kFp16 ? Half::kFp16 : Half::kBf16;
  static constexpr int kBytes = kFull ? 4 : 2;
  static constexpr int kCount = 16 / kBytes;  // in a chunk

  DFLASH_DEVICE static void unpack_all(const Chunk& chunk, float (&x)[kCount]) {
    if constexpr (kFull) {
      memcpy(x, chunk.words, 16);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) unpack<kHalf>(chunk.words[i], x[2 * i], x[2 * i + 1]);
    }
  }
  DFLASH_DEVICE static Chunk pack_all(const float (&x)[kCount]) {
    Chunk chunk;
    if constexpr (kFull) {
      memcpy(chunk.words, x, 16);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) chunk.words[i] = pack<kHalf>(x[2 * i], x[2 * i + 1]);
    }
    return chunk;
  }
  // A whole chunk, `at` numbers after `start`.
  DFLASH_DEVICE static void load_chunk(const void* start, int64_t at, float (&x)[kCount]) {
    unpack_all(*reinterpret_cast<const Chunk*>(static_cast<const char*>(start) + at * kBytes), x);
  }
  DFLASH_DEVICE static void store_chunk(void* start, int64_t at, const float (&x)[kCount]) {
    *reinterpret_cast<Chunk*>(static_cast<char*>(start) + at * kBytes) = pack_all(x);
  }
  DFLASH_DEVICE static void store_one(void* start, int64_t at, float value) {
    if constexpr (kFull) {
      static_cast<float*>(start)[at] = value;
    } else {
      static_cast<uint16_t*>(start)[at] = static_cast<uint16_t>(pack<kHalf>(value, 0.0f));
    }
  }
};

// Calls run.operator()<number>().
template <typename Run>
int for_number(Number number, const Run& run) {
  switch (number) {
    case Number::kFloat:
      return run.template operator()<Number::kFloat>();
    case Number::kBf16:
      return run.template operator()<Number::kBf16>();
    default:
      return run.template operator()<Number::kFp16>();
  }
}

}  // namespace dflash::gpu
