// Gated SiLU and its gradients, one chunk of 16 bytes per thread.
#pragma once

#include <cmath>

#include "chunks.h"
#include "pointwise/pointwise.h"

namespace dflash::gpu {

inline constexpr int kSiluThreads = 256;

// Where this thread's chunk lies in gate and up, which may be parts of wider rows, and in all else.
template <Number kNumber>
struct SiluPlace {
  int64_t gate, up, dense;
  bool inside;

  DFLASH_DEVICE explicit SiluPlace(const SiluMul& args) {
    constexpr int kCount = Numbers<kNumber>::kCount;
    const uint32_t chunk = static_cast<uint32_t>(block_index()) * kSiluThreads + thread_index();
    const uint32_t in_row = static_cast<uint32_t>(args.columns / kCount);
    const int64_t row = chunk / in_row, column = int64_t(chunk % in_row) * kCount;
    gate = row * args.gate_stride + column;
    up = row * args.up_stride + column;
    dense = row * args.columns + column;
    inside = row < args.rows;
  }
};

DFLASH_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <Number kNumber>
DFLASH_GLOBAL void DFLASH_BOUNDS(kSiluThreads, 6) silu_mul(const DFLASH_PARAMETER SiluMul args) {
  using N = Numbers<kNumber>;
  const SiluPlace<kNumber> place(args);
  if (!place.inside) return;
  float gate[N::kCount], up[N::kCount];
  N::load_chunk(args.gate, place.gate, gate);
  N::load_chunk(args.up, place.up, up);
#pragma unroll
  for (int i = 0; i < N::kCount; ++i) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
  N::store_chunk(args.out, place.dense, gate);
}

template <Number kNumber>
DFLASH_GLOBAL void DFLASH_BOUNDS(kSiluThreads, 4) silu_mul_backward(const DFLASH_PARAMETER SiluMul args) {
  using N = Numbers<kNumber>;
  const SiluPlace<kNumber> place(args);
  if (!place.inside) return;
  float gate[N::kCount], up[N::kCount], dout[N::kCount];
  N::load_chunk(args.gate, place.gate, gate);
  N::load_chunk(args.up, place.up, up);
  N::load_chunk(args.dout, place.dense, dout);
#pragma unroll
  for (int i = 0; i < N::kCount; ++i) {
    const float share = sigmoid(gate[i]), silu = gate[i] * share;
    gate[i] = dout[i] * up[i] * (share + silu * (1.0f - share));
    up[i] = dout[i] * silu;
  }
  N::store_chunk(args.dgate, place.dense, gate);
  N::store_chunk(args.dup, place.dense, up);
}

}  // namespace dflash::gpu
