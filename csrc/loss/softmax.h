// The loss of rows of logits and its gradient, as the kernels see it: pointers and numbers, no tensors.
//
// A row has logits z, p = softmax(z) and a label y; where soft terms are wanted also the verifier's logits, which give
// q. Terms: ce -log p[y] · kl sum of q log(q / p) · reverse_kl sum of p log(p / q) · tv sum of |p - q| / 2.
// The logits are overwritten with the gradient of the weighted sum of the terms. It has no row weight in it: that may
// depend on the labels' probabilities of a whole block (D-PACE), and the gradient is linear in it, so the caller
// multiplies rows after the product with the head.
//
// V vocabulary · U rows of the verifier's logits.
#pragma once

#include <cstdint>

#include "number.h"

namespace dflash {

enum Term { kCe, kKl, kReverseKl, kTv, kTerms };

struct SoftmaxLoss {
  int64_t rows, vocabulary;
  int64_t stride, verifier_stride;  // from row to row, in numbers
  Number number;
  void* logits;                  // (rows, V)
  const int32_t* labels;         // (rows,); a label that is no column makes its row NaN
  const void* verifier;          // (U, V), or nullptr: no soft term
  const int32_t* verifier_rows;  // (rows,) each row's row of `verifier`
  float weights[kTerms];
  float* values;   // (rows, kTerms), each unweighted; 0 for a soft term whose weight is 0
  int32_t* ranks;  // (rows,) columns that come before the label in falling order, of equal ones the lower first
};

// Any stride and alignment; bf16 and float. Multi-threaded over rows; the result does not depend on the threads.
void softmax_loss_cpu(const SoftmaxLoss& args);

// On `stream` (a cudaStream_t), no host sync, no allocation. Rows start at multiples of 16 bytes. A cudaError_t.
int softmax_loss_cuda(const SoftmaxLoss& args, void* stream);

}  // namespace dflash
