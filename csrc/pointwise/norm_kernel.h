// RMSNorm of long rows, a thread block each, and of heads, a few lanes of a warp each, with their rotation.
//
// Both backwards walk over their rows with a fixed number of thread blocks, each of which sums what its rows add to the
// weight's gradient; `norm_weight` adds these sums up. Every sum has one fixed order, so that the result repeats bit
// for bit.
#pragma once

#include <cmath>

#include "chunks.h"
#include "pointwise/pointwise.h"

namespace dflash::gpu {

inline constexpr int kNormThreads = 256, kNormWarps = kNormThreads / kWarpLanes;
inline constexpr int kWeightColumns = kWarpLanes, kWeightGroups = kNormWarps;

DFLASH_DEVICE float rms_scale(float squares, const Norm& args) {
  return 1.0f / sqrtf(squares / static_cast<float>(args.size) + args.eps);
}

// The block's sum, the same bits in every thread. `parts` may be used again behind the next sync_threads.
DFLASH_DEVICE float block_sum(float mine, float* parts) {
#pragma unroll
  for (int mask = kWarpLanes / 2; mask > 0; mask /= 2) mine += shuffle_xor(mine, mask);
  if (thread_index() % kWarpLanes == 0) parts[thread_index() / kWarpLanes] = mine;
  sync_threads();
  float sum = parts[0];
  for (int warp = 1; warp < block_threads() / kWarpLanes; ++warp) sum += parts[warp];
  return sum;
}

// Calls visit(column) for the chunks of a row that are this thread's.
template <int kCount, typename Visit>
DFLASH_DEVICE void own_chunks(int size, const Visit& visit) {
#pragma unroll 2
  for (int column = thread_index() * kCount; column < size; column += block_threads() * kCount) visit(column);
}

template <Number kNumber>
DFLASH_GLOBAL void DFLASH_BOUNDS(kNormThreads, 6) norm_rows(const DFLASH_PARAMETER Norm args) {
  using N = Numbers<kNumber>;
  const int size = static_cast<int>(args.size);
  const int64_t row = block_index(), from = row * args.stride, to = row * args.size;
  float squares = 0.0f;
  own_chunks<N::kCount>(size, [&](int column) {
    float x[N::kCount];
    N::load_chunk(args.x, from + column, x);
#pragma unroll
    for (int i = 0; i < N::kCount; ++i) squares += x[i] * x[i];
  });
  const float scale = rms_scale(block_sum(squares, reinterpret_cast<float*>(shared_memory())), args);
  own_chunks<N::kCount>(size, [&](int column) {
    float x[N::kCount], weight[N::kCount];
    N::load_chunk(args.x, from + column, x);
    N::load_chunk(args.weight, column, weight);
#pragma unroll
    for (int i = 0; i < N::kCount; ++i) x[i] = x[i] * scale * weight[i];
    N::store_chunk(args.out, to + column, x);
  });
  if (thread_index() == 0) args.scales[row] = scale;
}

// Shared memory: two rows of partial sums, which take turns, and dweight: number i of all chunks, then number i + 1.
template <Number kNumber>
DFLASH_GLOBAL void DFLASH_BOUNDS(kNormThreads, 4) norm_rows_backward(const DFLASH_PARAMETER Norm args) {
  using N = Numbers<kNumber>;
  constexpr int kCount = N::kCount;
  const int size = static_cast<int>(args.size), chunks = size / kCount;
  float* parts = reinterpret_cast<float*>(shared_memory());
  float* dweight = parts + 2 * kNormWarps;
  own_chunks<kCount>(size, [&](int column) {
    for (int i = 0; i < kCount; ++i) dweight[i * chunks + column / kCount] = 0.0f;
  });
  int turn = 0;
  for (int64_t row = block_index(); row < args.rows; row += args.blocks, turn ^= 1) {
    const int64_t from = row * args.stride, to = row * args.size;
    const float scale = args.scales[row];
    float x[kCount], dout[kCount], weight[kCount], product = 0.0f;
    const auto load = [&](int column) {
      N::load_chunk(args.x, from + column, x);
      N::load_chunk(args.dout, to + column, dout);
      N::load_chunk(args.weight, column, weight);
    };
    own_chunks<kCount>(size, [&](int column) {
      load(column);
#pragma unroll
      for (int i = 0; i < kCount; ++i) product += dout[i] * weight[i] * (x[i] * scale);
    });
    const float mean = block_sum(product, parts + turn * kNormWarps) / static_cast<float>(size);
    own_chunks<kCount>(size, [&](int column) {
      load(column);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float unit = x[i] * scale;
        dweight[i * chunks + column / kCount] += dout[i] * unit;
        x[i] = (dout[i] * weight[i] - unit * mean) * scale;
      }
      N::store_chunk(args.dx, to + column, x);
    });
  }
  float* sums = args.partials + int64_t(block_index()) * size;
  own_chunks<kCount>(size, [&](int column) {
    for (int i = 0; i < kCount; ++i) sums[column + i] = dweight[i * chunks + column / kCount];
  });
}

// `lanes` threads have a head, a power of two; each has one chunk of its first and one of its second half, or none.
struct HeadNorm {
  Norm norm;
  int lanes;
};

template <Number kNumber>
struct HeadPart {
  using N = Numbers<kNumber>;
  static constexpr int kCount = N::kCount;
  struct Pair {
    float first[kCount], second[kCount];
  };

  const HeadNorm& args;
  int64_t index, row, head;  // of the head among all, of its row, in its row
  int column, half;
  bool there;

  DFLASH_DEVICE HeadPart(const HeadNorm& all, int64_t first) : args(all) {
    const Norm& norm = args.norm;
    index = first + thread_index() / args.lanes;
    row = static_cast<uint32_t>(index) / static_cast<uint32_t>(norm.heads);
    head = index - row * norm.heads;
    column = thread_index() % args.lanes * kCount;
    half = static_cast<int>(norm.size) / 2;
    there = index < norm.rows * norm.heads && column < half;
  }
  DFLASH_DEVICE int64_t place() const { return index * args.norm.size; }
  DFLASH_DEVICE void load(const void* start, int64_t at, Pair& pair) const {
    if (there) {
      N::load_chunk(start, at + column, pair.first);
      N::load_chunk(start, at + half + column, pair.second);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) pair.first[i] = pair.second[i] = 0.0f;
    }
  }
  DFLASH_DEVICE void load_x(Pair& pair) const {
    load(args.norm.x, row * args.norm.stride + head * args.norm.size, pair);
  }
  DFLASH_DEVICE void store(void* start, const Pair& pair) const {
    if (!there) return;
    N::store_chunk(start, place() + column, pair.first);
    N::store_chunk(start, place() + half + column, pair.second);
  }
  // Over the head's lanes.
  DFLASH_DEVICE float sum(float mine) const {
    for (int mask = args.lanes / 2; mask > 0; mask /= 2) mine += shuffle_xor(mine, mask);
    return mine;
  }
};

template <Number kNumber>
DFLASH_GLOBAL void DFLASH_BOUNDS(kNormThreads, 4) norm_heads(const DFLASH_PARAMETER HeadNorm args) {
  using Part = HeadPart<kNumber>;
  const Norm& norm = args.norm;
  const Part part(args, int64_t(block_index()) * (kNormThreads / args.lanes));
  typename Part::Pair x, other, turned;
  part.load_x(x);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < Part::kCount; ++i) squares += x.first[i] * x.first[i] + x.second[i] * x.second[i];
  const float scale = rms_scale(part.sum(squares), norm);
  part.load(norm.weight, 0, other);
#pragma unroll
  for (int i = 0; i < Part::kCount; ++i) {
    x.first[i] *= scale * other.first[i];
    x.second[i] *= scale * other.second[i];
  }
  part.load(norm.cos, part.row * norm.size, other);
#pragma unroll
  for (int i = 0; i < Part::kCount; ++i) {
    turned.first[i] = x.first[i] * other.first[i];
    turned.second[i] = x.second[i] * other.second[i];
  }
  part.load(norm.sin, part.row * norm.size, other);
#pragma unroll
  for (int i = 0; i < Part::kCount; ++i) {
    turned.first[i] -= x.second[i] * other.first[i];
    turned.second[i] += x.first[i] * other.second[i];
  }
  part.store(norm.out, turned);
  if (part.there && part.column == 0) norm.scales[part.index] = scale;
}

// The gradient by the norm's result, before the rotation.
template <Number kNumber>
DFLASH_DEVICE void turn_back(const HeadPart<kNumber>& part, typename HeadPart<kNumber>::Pair& dy) {
  const Norm& norm = part.args.norm;
  typename HeadPart<kNumber>::Pair dout, other;
  part.load(norm.dout, part.place(), dout);
  part.load(norm.cos, part.row * norm.size, other);
#pragma unroll
  for (int i = 0; i < HeadPart<kNumber>::kCount; ++i) {
    dy.first[i] = dout.first[i] * other.first[i];
    dy.second[i] = dout.second[i] * other.second[i];
  }
  part.load(norm.sin, part.row * norm.size, other);
#pragma unroll
  for (int i = 0; i < HeadPart<kNumber>::kCount; ++i) {
    dy.first[i] += dout.second[i] * other.second[i];
    dy.second[i] -= dout.first[i] * other.first[i];
  }
}

// Writes dx of one head, and adds to dweight.
template <Number kNumber>
DFLASH_DEVICE void head_gradient(const HeadPart<kNumber>& part, typename HeadPart<kNumber>::Pair& dweight) {
  constexpr int kCount = HeadPart<kNumber>::kCount;
  const Norm& norm = part.args.norm;
  typename HeadPart<kNumber>::Pair x, dy, weight;
  part.load_x(x);
  turn_back(part, dy);
  part.load(norm.weight, 0, weight);
  const float scale = part.there ? norm.scales[part.index] : 0.0f;
  float product = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x.first[i] *= scale;
    x.second[i] *= scale;
    product += dy.first[i] * weight.first[i] * x.first[i] + dy.second[i] * weight.second[i] * x.second[i];
  }
  const float mean = part.sum(product) / static_cast<float>(norm.size);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    dweight.first[i] += dy.first[i] * x.first[i];
    dweight.second[i] += dy.second[i] * x.second[i];
    x.first[i] = (dy.first[i] * weight.first[i] - x.first[i] * mean) * scale;
    x.second[i] = (dy.second[i] * weight.second[i] - x.second[i] * mean) * scale;
  }
  part.store(norm.dx, x);
}

// Shared memory: each warp's dweight.
template <Number kNumber>
DFLASH_GLOBAL void DFLASH_BOUNDS(kNormThreads, 2) norm_heads_backward(const DFLASH_PARAMETER HeadNorm args) {
  constexpr int kCount = HeadPart<kNumber>::kCount;
  const Norm& norm = args.norm;
  const int size = static_cast<int>(norm.size), heads = kNormThreads / args.lanes;
  typename HeadPart<kNumber>::Pair dweight = {};
  for (int64_t first = int64_t(block_index()) * heads; first < norm.rows * norm.heads; first += norm.blocks * heads)
    head_gradient(HeadPart<kNumber>(args, first), dweight);
  for (int mask = args.lanes; mask < kWarpLanes; mask *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      dweight.first[i] += shuffle_xor(dweight.first[i], mask);
      dweight.second[i] += shuffle_xor(dweight.second[i], mask);
    }
  }
  float* parts = reinterpret_cast<float*>(shared_memory());
  const int column = thread_index() % args.lanes * kCount;
  if (thread_index() % kWarpLanes < args.lanes && column < size / 2) {
    float* mine = parts + thread_index() / kWarpLanes * size + column;
    for (int i = 0; i < kCount; ++i) {
      mine[i] = dweight.first[i];
      mine[size / 2 + i] = dweight.second[i];
    }
  }
  sync_threads();
  for (int i = thread_index(); i < size; i += kNormThreads) {
    float sum = parts[i];
    for (int warp = 1; warp < kNormWarps; ++warp) sum += parts[warp * size + i];
    norm.partials[int64_t(block_index()) * size + i] = sum;
  }
}

// dweight of kWeightColumns columns; each warp sums every kWeightGroups-th of the partial sums.
template <Number kNumber>
DFLASH_GLOBAL void DFLASH_BOUNDS(kNormThreads, 4) norm_weight(const DFLASH_PARAMETER Norm args) {
  float* parts = reinterpret_cast<float*>(shared_memory());
  const int64_t column = int64_t(block_index()) * kWeightColumns + thread_index() % kWeightColumns;
  const int group = thread_index() / kWeightColumns;
  float sum = 0.0f;
  if (column < args.size) {
#pragma unroll 8
    for (int64_t block = group; block < args.blocks; block += kWeightGroups)
      sum += args.partials[block * args.size + column];
  }
  parts[thread_index()] = sum;
  sync_threads();
  if (group != 0 || column >= args.size) return;
  for (int other = 1; other < kWeightGroups; ++other) sum += parts[other * kWeightColumns + thread_index()];
  Numbers<kNumber>::store_one(args.dweight, column, sum);
}

}  // namespace dflash::gpu
