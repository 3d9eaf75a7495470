// How to do a tile with mma.sync: swizzled tiles in shared memory, copies into them, warp-wide products, rows out.
//
// A tile holds rows of D 16-bit numbers in chunks of 16 bytes. ldmatrix reads one chunk of each of 8 rows at a time;
// the chunks of a row are permuted by the row so that these 8 lie in different banks, which for D = 96 (12 chunks, half
// as many again as the banks have) takes a permutation of its own.
//
// D = kDim head dim · a warp owns 16 * kM rows of the left operand · kSteps steps of 16 rows of the right operand
#pragma once

#include "attention/launch.h"

namespace dflash::gpu::sm80 {

// Byte offset of a chunk in a tile.
template <int kDim>
DFLASH_HOST_DEVICE constexpr int swizzled(int row, int chunk) {
  static_assert(kDim % 32 == 0, "a row must be a multiple of 64 bytes");
  const int flip = kDim % 64 == 0 ? row % 8 : row / 2 % 4;
  return row * kDim * 2 + (chunk ^ flip) * 16;
}
// Chunks are permuted among this many neighbours.
template <int kDim>
inline constexpr int kPermuted = kDim % 64 == 0 ? 8 : 4;

template <int kDim>
DFLASH_HOST_DEVICE constexpr int tile_bytes(int rows) {
  return rows * kDim * 2;
}

DFLASH_DEVICE int lane() { return thread_index() % 32; }
DFLASH_DEVICE int warp() { return thread_index() / 32; }

// Where this lane points ldmatrix for the 16 x 16 numbers at (row0, 8 * chunk0), row0 a multiple of 8, chunk0 even: the
// lane's row and chunk are fixed, and the flip depends on the lane's row alone.
//   by_rows     matrices: rows 0-7, rows 8-15, then the same with columns + 8. A left operand; transposed, a right one
//               whose tile rows are the summed index.
//   by_columns  matrices: columns 0-7, columns 8-15 of rows 0-7, then of rows 8-15. A right operand whose tile columns
//               are the summed index.
template <int kDim>
struct LaneAddress {
  uint32_t row, flip;

  DFLASH_DEVICE static LaneAddress by_rows() { return at(lane() % 16, lane() / 16); }
  DFLASH_DEVICE static LaneAddress by_columns() { return at(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2); }
  DFLASH_DEVICE uint32_t operator()(uint32_t tile, int row0, int chunk0) const {
    constexpr int kNear = kPermuted<kDim>;
    // Only the near part depends on the lane: few addresses, and immediate offsets from them.
    return tile + row + ((static_cast<uint32_t>(chunk0 % kNear) * 16) ^ flip) +
           static_cast<uint32_t>(row0 * kDim * 2 + chunk0 / kNear * kNear * 16);
  }

 private:
  DFLASH_DEVICE static LaneAddress at(int row, int chunk) {
    const uint32_t begin = static_cast<uint32_t>(row * kDim * 2);
    return {begin, static_cast<uint32_t>(swizzled<kDim>(row, chunk)) - begin};
  }
};

// Which of a tile's steps of 16 rows take part; the others' results are not touched.
struct Steps {
  int first, last;
  DFLASH_DEVICE bool has(int step) const { return first <= step && step < last; }
  // Those that hold a key of the cover, in a tile from p on.
  DFLASH_DEVICE static Steps of(const Cover& cover, int p) {
    return {larger(cover.first - p, 0) / 16, (larger(cover.last - p, 0) + 15) / 16};
  }
};

// d[m][.] += left rows (16 m ..) times right rows, transposed: sums over D. `left` is the address of the warp's rows.
template <Half kType, int kDim, bool kAll, int kM, int kColumns>
DFLASH_DEVICE void multiply_rows(float (&d)[kM][kColumns][4], uint32_t left, uint32_t right, const Steps& steps) {
  const LaneAddress<kDim> by_rows = LaneAddress<kDim>::by_rows(), by_columns = LaneAddress<kDim>::by_columns();
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_matrices(a[m], by_rows(left, 16 * m, 2 * k));
#pragma unroll
    for (int step = 0; step < kColumns / 2; ++step) {
      if (!kAll && !steps.has(step)) continue;
      uint32_t b[4];
      load_matrices(b, by_columns(right, 16 * step, 2 * k));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<kType>(d[m][2 * step], a[m], b[0], b[1]);
        mma<kType>(d[m][2 * step + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// d[m][.] += the 16-bit rounding of p[m][.] times right: sums over right's rows. p is an accumulator, whose layout,
// packed in pairs, is that of a left operand.
template <Half kType, int kDim, bool kAll, int kM, int kColumns>
DFLASH_DEVICE void multiply_columns(float (&d)[kM][kDim / 8][4], const float (&p)[kM][kColumns][4], uint32_t right,
                                    const Steps& steps) {
  const LaneAddress<kDim> by_rows = LaneAddress<kDim>::by_rows();
#pragma unroll
  for (int step = 0; step < kColumns / 2; ++step) {
    if (!kAll && !steps.has(step)) continue;
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &p[m][2 * step + i / 2][i % 2 * 2];
        a[m][i] = pack<kType>(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, by_rows(right, 16 * step, 2 * n));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<kType>(d[m][2 * n], a[m], b[0], b[1]);
        mma<kType>(d[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Starts copying kRows rows into a tile, by all kThreads threads. source(row) is the global address of a row, or
// nullptr for zeros.
template <int kDim, int kRows, int kThreads, typename Source>
DFLASH_DEVICE void copy_rows(uint32_t tile, const Source& source) {
  constexpr int kChunks = kDim / 8;
  // Not unrolled: addresses kept for all rounds are registers that the products need.
#pragma unroll 1
  for (int i = 0; i < (kRows * kChunks + kThreads - 1) / kThreads; ++i) {
    const int index = thread_index() + i * kThreads, row = index / kChunks, chunk = index % kChunks;
    if (kRows * kChunks % kThreads != 0 && row >= kRows) continue;
    const char* from = source(row);
    copy_async(tile + swizzled<kDim>(row, chunk), from != nullptr ? from + chunk * 16 : nullptr, from != nullptr);
  }
}

// Rows of (rows, Hkv, D) for one kv head.
struct KeyRows {
  const char* base;    // of the head's row 0
  int64_t row_stride;  // bytes

  template <int kDim>
  DFLASH_DEVICE static KeyRows of(const void* tensor, int kv_heads, int head) {
    return {static_cast<const char*>(tensor) + static_cast<int64_t>(head) * kDim * 2,
            static_cast<int64_t>(kv_heads) * kDim * 2};
  }
  DFLASH_DEVICE const char* at(int row) const { return base + row * row_stride; }
};

// The same for rows that lie `keys.row_stride` apart from `first` on, `valid` of them. Where a round of threads is a
// multiple of 8 rows, each thread's chunk and its place in the swizzle are the same in every round.
template <int kDim, int kRows, int kThreads>
DFLASH_DEVICE void copy_key_rows(uint32_t tile, const KeyRows& keys, int first, int valid) {
  constexpr int kChunks = kDim / 8, kStep = kThreads / kChunks;
  if constexpr (kThreads % kChunks == 0 && kStep % 8 == 0 && kRows % kStep == 0) {
    const int row = thread_index() / kChunks, chunk = thread_index() % kChunks;
    const uint32_t to = tile + swizzled<kDim>(row, chunk);
    const char* from = keys.at(first + row) + chunk * 16;
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i)
      copy_async(to + i * kStep * kDim * 2, from + i * kStep * keys.row_stride, row + i * kStep < valid);
  } else {
    copy_rows<kDim, kRows, kThreads>(tile, [&](int row) { return row < valid ? keys.at(first + row) : nullptr; });
  }
}

// Writes a warp's accumulators, times factor[m][half], as 16-bit rows of a tile that are the warp's own, from row0 on.
template <Half kType, int kDim, int kM>
DFLASH_DEVICE void stage_rows(char* tile, int row0, const float (&d)[kM][kDim / 8][4], const float (&factor)[kM][2]) {
  const int g = lane() / 4, c = lane() % 4;
  sync_warp();  // the tile's rows are still being read as an operand
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        const int at = swizzled<kDim>(row0 + 16 * m + 8 * half + g, j) + 4 * c;
        *reinterpret_cast<uint32_t*>(tile + at) =
            pack<kType>(d[m][j][2 * half] * factor[m][half], d[m][j][2 * half + 1] * factor[m][half]);
      }
    }
  }
  sync_warp();
}

// The warp copies kRows rows of a tile, from row0 on, to target(row - row0), where that is not nullptr.
template <int kDim, int kRows, typename Target>
DFLASH_DEVICE void store_rows(const char* tile, int row0, const Target& target) {
  constexpr int kChunks = kDim / 8;
#pragma unroll 4
  for (int index = lane(); index < kRows * kChunks; index += 32) {
    const int row = index / kChunks, chunk = index % kChunks;
    char* to = target(row);
    if (to == nullptr) continue;
    *reinterpret_cast<Chunk*>(to + chunk * 16) =
        *reinterpret_cast<const Chunk*>(tile + swizzled<kDim>(row0 + row, chunk));
  }
}

// Every kernel runs on every device from compute capability 8.0 on: 8.6 and 8.9 have the least shared memory.
inline constexpr int kLeastShared = 99 * 1024;

template <typename Traits, typename Parameters>
int launch_kernel(void (*kernel)(Parameters), int64_t blocks, const Parameters& parameters, void* stream) {
  static_assert(Traits::kShared + kSharedAlign <= kLeastShared);
  return launch(kernel, Launch{blocks, Traits::kThreads, Traits::kShared}, parameters, stream);
}

}  // namespace dflash::gpu::sm80
