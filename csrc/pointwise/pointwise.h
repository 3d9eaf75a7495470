// RMSNorm, rotary embedding and gated SiLU, as the kernels see them: pointers and numbers, no tensors.
//
// All tensors of a call hold one type of number; arithmetic is in fp32. Rows and tensors start at multiples of 16
// bytes.
#pragma once

#include <cstdint>

#include "number.h"

namespace dflash {

// y = x / sqrt(mean(x^2) + eps) * weight over the last dimension of x, and then, where it is to be rotated, of each
// head
//   out = y * cos + (-second half of y, first half of y) * sin.
struct Norm {
  int64_t rows, heads, size;  // not rotated: one head
  int64_t stride;             // of x, from row to row, in numbers; all else has no gaps
  Number number;
  float eps;
  bool rotated;           // not told by a cos: it is nullptr too where there are no rows
  const void* x;          // (rows, heads, size)
  const void* weight;     // (size,)
  const void *cos, *sin;  // (rows, size), or nullptr
  float* scales;          // (rows, heads) 1 / sqrt(mean(x^2) + eps), from the forward to the backward
  void* out;              // (rows, heads, size), of the forward
  const void* dout;       // the rest is of the backward
  void *dx, *dweight;     // (rows, heads, size), (size,)
  int64_t blocks;         // thread blocks of the backward
  float* partials;        // (blocks, size) workspace: what each of them adds to dweight
};

struct SiluMul {
  int64_t rows, columns;
  int64_t gate_stride, up_stride;  // from row to row, in numbers
  Number number;
  const void *gate, *up;  // (rows, columns)
  void* out;              // of the forward
  const void* dout;       // of the backward, as the next two
  void *dgate, *dup;
};

// On `stream` (a cudaStream_t), no host sync, no allocation, the same bits on every run. A cudaError_t.
int norm_cuda(const Norm& args, void* stream);
int norm_backward_cuda(const Norm& args, void* stream);
int silu_mul_cuda(const SiluMul& args, void* stream);
int silu_mul_backward_cuda(const SiluMul& args, void* stream);

// What `blocks` should be. It follows from the shape alone, and with it the order of dweight's sums.
int64_t norm_blocks(const Norm& args);

}  // namespace dflash
