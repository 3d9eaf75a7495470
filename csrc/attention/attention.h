// The attention operator as the kernels see it: pointers and integers, no tensors.
//
// T tokens in a packed row · A anchors · S block size · Hq/Hkv query and key heads, G = Hq / Hkv · D head dim
#pragma once

#include <cstdint>

namespace dflash {

struct AttentionShape {
  int64_t tokens, anchors;
  int block_size, q_heads, kv_heads, head_dim;
  int window;  // 0 = none
  bool causal_block;
  double scale;
  const int32_t* starts;  // (A,) see plan.h
  const int32_t* ends;    // (A,)
};

// T is the element type; statistics are double for double, else float.
template <typename T>
struct AttentionInputs {
  const T* q;      // (A*S, Hq, D)
  const T* k_ctx;  // (T, Hkv, D)
  const T* v_ctx;  // (T, Hkv, D)
  const T* k_blk;  // (A*S, Hkv, D)
  const T* v_blk;  // (A*S, Hkv, D)
};

template <typename T, typename Acc>
struct ForwardOutputs {
  T* out;    // (A*S, Hq, D)
  Acc* lse;  // (A*S, Hq) natural logarithm of the sum of exponentials
};

template <typename T, typename Acc>
struct BackwardInputs {
  AttentionInputs<T> in;
  const T* dout;
  const T* out;
  const Acc* lse;
};

template <typename T>
struct Gradients {
  T* dq;
  T* dk_ctx;
  T* dv_ctx;
  T* dk_blk;
  T* dv_blk;
};

// bfloat16 as bits, so that this header needs no torch.
struct Bf16 {
  uint16_t bits;
};

template <typename T, typename Acc>
void attention_forward_cpu(const AttentionShape&, const AttentionInputs<T>&, const ForwardOutputs<T, Acc>&);
template <typename T, typename Acc>
void attention_backward_cpu(const AttentionShape&, const BackwardInputs<T, Acc>&, const Gradients<T>&);

// 16-bit element types of the GPU kernels.
enum class Half { kBf16, kFp16 };

// What the GPU kernels take: contiguous tensors that start at a multiple of 16 bytes, at least one anchor, fp32
// statistics. Outputs come as uninitialised memory and are written in full, zeros for keys that nobody sees included.
struct GpuForward {
  AttentionShape shape;
  const int32_t* order;  // (items,) see plan.h
  int32_t items;
  Half type;
  const void *q, *k_ctx, *v_ctx, *k_blk, *v_blk;
  void* out;
  float* lse;      // (A*S, Hq) natural logarithm of the sum of exponentials
  int32_t* taken;  // (1,) scratch: work items that blocks of threads have taken
};

struct GpuBackward {
  AttentionShape shape;
  const int32_t *order, *tile_ranges, *tile_order;  // see plan.h
  int32_t items;
  Half type;
  const void *dout, *q, *k_ctx, *v_ctx, *k_blk, *v_blk, *out;
  const float* lse;
  float* delta;    // (A*S, Hq) scratch: the row sums of dout * out
  int32_t* taken;  // (1,) scratch, as in the forward
  void *dq, *dk_ctx, *dv_ctx, *dk_blk, *dv_blk;
};

// On `stream`, a cudaStream_t, no host sync, no allocation. Each returns a cudaError_t.
int forward_sm80(const GpuForward& args, void* stream);
int backward_sm80(const GpuBackward& args, void* stream);
int forward_sm90(const GpuForward& args, void* stream);
int backward_sm90(const GpuBackward& args, void* stream);

}  // namespace dflash
