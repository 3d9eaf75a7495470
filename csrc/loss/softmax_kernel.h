// One row of logits per thread block: an online softmax over the row, then the gradient in its place.
//
// Threads read chunks of 16 bytes, chunk i of thread i modulo the block. A row is read twice and written once; a
// third time where reverse_kl or tv is wanted, because their gradients need sums over p and q, which need both norms.
// Sums are combined in one fixed order, so that the result repeats bit for bit.
#pragma once

#include <cmath>

#include "chunks.h"
#include "loss/softmax.h"

namespace dflash::gpu {

// More threads than a short row has chunks would only wait for each other.
inline constexpr int kLongRow = 8192, kLongRowThreads = 256, kShortRowThreads = 128;
inline constexpr float kLowest = -3.402823466e38f;  // not -inf: the difference of two stays a number

DFLASH_DEVICE float exp_fast(float x) { return exp2_fast(x * kLog2E); }

// The numbers of a row of any length.
template <Number kNumber>
struct Logits : Numbers<kNumber> {
  using N = Numbers<kNumber>;
  static constexpr int kBytes = N::kBytes, kCount = N::kCount;

  DFLASH_DEVICE static float load_one(const char* row, int64_t column) {
    if constexpr (N::kFull) return reinterpret_cast<const float*>(row)[column];
    float value, unused;
    unpack<N::kHalf>(reinterpret_cast<const uint16_t*>(row)[column], value, unused);
    return value;
  }
  // The chunk at `column`, -inf past the row's end; memory past the end is not touched.
  DFLASH_DEVICE static void load(const char* row, int column, int vocabulary, float (&x)[kCount]) {
    if (column + kCount <= vocabulary) {
      N::load_chunk(row, column, x);
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = column + i < vocabulary ? load_one(row, column + i) : -INFINITY;
  }
  DFLASH_DEVICE static void store(char* row, int column, int vocabulary, const float (&x)[kCount]) {
    if (column + kCount <= vocabulary) {
      N::store_chunk(row, column, x);
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (column + i < vocabulary) N::store_one(row, column + i, x[i]);
  }
};

// Sum of exponentials of the numbers seen so far, relative to the largest.
struct Softmax {
  float peak = kLowest, sum = 0.0f;

  template <int kCount>
  DFLASH_DEVICE void see(const float (&x)[kCount]) {
    float highest = peak;
#pragma unroll
    for (int i = 0; i < kCount; ++i) highest = x[i] > highest ? x[i] : highest;
    sum *= exp_fast(peak - highest);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += exp_fast(x[i] - highest);
    peak = highest;
  }
  DFLASH_DEVICE void add(const Softmax& other) {
    const float highest = other.peak > peak ? other.peak : peak;
    sum = sum * exp_fast(peak - highest) + other.sum * exp_fast(other.peak - highest);
    peak = highest;
  }
  DFLASH_DEVICE Softmax shuffled(int mask) const { return {shuffle_xor(peak, mask), shuffle_xor(sum, mask)}; }
};

// After the first pass over a row.
struct Norms {
  Softmax drafter, verifier;
  int rank = 0;

  DFLASH_DEVICE void add(const Norms& other) {
    drafter.add(other.drafter);
    verifier.add(other.verifier);
    rank += other.rank;
  }
  DFLASH_DEVICE Norms shuffled(int mask) const {
    return {drafter.shuffled(mask), verifier.shuffled(mask), shuffle_xor(rank, mask)};
  }
};

// `side` is sum of p sign(p - q) / 2, the mean of tv's derivative by p.
struct Sums {
  float kl = 0.0f, reverse_kl = 0.0f, tv = 0.0f, side = 0.0f;

  DFLASH_DEVICE void add(const Sums& other) {
    kl += other.kl;
    reverse_kl += other.reverse_kl;
    tv += other.tv;
    side += other.side;
  }
  DFLASH_DEVICE Sums shuffled(int mask) const {
    return {shuffle_xor(kl, mask), shuffle_xor(reverse_kl, mask), shuffle_xor(tv, mask), shuffle_xor(side, mask)};
  }
};

struct SoftmaxShared {
  static constexpr int kMostWarps = kLongRowThreads / kWarpLanes;
  Norms norms[kMostWarps];
  Sums sums[2][kMostWarps];
};

// The block's total, the same bits in every thread. `parts` is used once in a kernel.
template <typename State>
DFLASH_DEVICE State block_total(State mine, State* parts) {
#pragma unroll
  for (int mask = kWarpLanes / 2; mask > 0; mask /= 2) mine.add(mine.shuffled(mask));
  if (thread_index() % kWarpLanes == 0) parts[thread_index() / kWarpLanes] = mine;
  sync_threads();
  State total = parts[0];
  for (int warp = 1; warp < block_threads() / kWarpLanes; ++warp) total.add(parts[warp]);
  return total;
}

// log p of a row: x - peak is exact where it matters, however large the logits are.
struct LogProb {
  float peak, log_sum;
  DFLASH_DEVICE static LogProb of(const Softmax& s) { return {s.peak, logf(s.sum)}; }
  DFLASH_DEVICE float operator()(float x) const { return (x - peak) - log_sum; }
};

DFLASH_DEVICE float half_sign(float p, float q) { return p > q ? 0.5f : p < q ? -0.5f : 0.0f; }
// p log(p / q), and 0 where p is 0, also where its logarithm is -inf.
DFLASH_DEVICE float divergence(float p, float log_p, float log_q) { return p > 0.0f ? p * (log_p - log_q) : 0.0f; }

template <Number kNumber, bool kSoft>
struct RowLoss {
  using N = Logits<kNumber>;
  static constexpr int kCount = N::kCount;

  const SoftmaxLoss& args;
  char* z;
  const char* u;
  int vocabulary, label;

  template <typename Visit>
  DFLASH_DEVICE void chunks(const Visit& visit) const {
#pragma unroll 2
    for (int column = thread_index() * kCount; column < vocabulary; column += block_threads() * kCount) {
      float x[kCount], y[kCount] = {};
      N::load(z, column, vocabulary, x);
      if constexpr (kSoft) N::load(u, column, vocabulary, y);
      visit(column, x, y);
    }
  }

  DFLASH_DEVICE Norms norms(float label_logit) const {
    Norms mine;
    chunks([&](int column, const float (&x)[kCount], const float (&y)[kCount]) {
      mine.drafter.see(x);
      if constexpr (kSoft) mine.verifier.see(y);
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        mine.rank += x[i] > label_logit || (x[i] == label_logit && column + i < label) ? 1 : 0;
    });
    return mine;
  }

  DFLASH_DEVICE Sums sums(const LogProb& log_p, const LogProb& log_q) const {
    Sums mine;
    chunks([&](int, const float (&x)[kCount], const float (&y)[kCount]) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float lp = log_p(x[i]), lq = log_q(y[i]), p = exp_fast(lp), q = exp_fast(lq);
        mine.reverse_kl += divergence(p, lp, lq);
        mine.tv += fabsf(p - q) * 0.5f;
        mine.side += p * half_sign(lp, lq);
      }
    });
    return mine;
  }

  // Overwrites the row; returns kl, which needs no sum before.
  DFLASH_DEVICE Sums gradient(const LogProb& log_p, const LogProb& log_q, const Sums& sums) const {
    const float* w = args.weights;
    Sums mine;
    chunks([&](int column, float (&x)[kCount], const float (&y)[kCount]) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float lp = log_p(x[i]), p = exp_fast(lp);
        float g = w[kCe] * p;
        if constexpr (kSoft) {
          const float lq = log_q(y[i]), q = exp_fast(lq);
          mine.kl += divergence(q, lq, lp);
          const float side = w[kTv] * (half_sign(lp, lq) - sums.side);
          const float ratio = w[kReverseKl] != 0.0f ? w[kReverseKl] * (lp - lq - sums.reverse_kl) : 0.0f;
          g += w[kKl] * (p - q) + (p > 0.0f ? p * (side + ratio) : 0.0f);
        }
        x[i] = column + i == label ? g - w[kCe] : g;
      }
      N::store(z, column, vocabulary, x);
    });
    return mine;
  }

  DFLASH_DEVICE void run() const {
    SoftmaxShared& shared = *reinterpret_cast<SoftmaxShared*>(shared_memory());
    const float* w = args.weights;
    const bool valid = label >= 0 && label < vocabulary;
    const float label_logit = valid ? N::load_one(z, label) : NAN;  // before block_total, after which z is overwritten
    const Norms total = block_total(norms(label_logit), shared.norms);
    LogProb log_p = LogProb::of(total.drafter), log_q{};
    if (!valid) log_p.log_sum = NAN;
    Sums soft;
    if constexpr (kSoft) {
      log_q = LogProb::of(total.verifier);
      if (w[kReverseKl] != 0.0f || w[kTv] != 0.0f) soft = block_total(sums(log_p, log_q), shared.sums[0]);
    }
    const Sums last = gradient(log_p, log_q, soft);
    if constexpr (kSoft) soft.kl = block_total(last, shared.sums[1]).kl;
    if (thread_index() == 0) {
      float* values = args.values + int64_t(block_index()) * kTerms;
      values[kCe] = -log_p(label_logit);
      values[kKl] = w[kKl] != 0.0f ? soft.kl : 0.0f;
      values[kReverseKl] = w[kReverseKl] != 0.0f ? soft.reverse_kl : 0.0f;
      values[kTv] = w[kTv] != 0.0f ? soft.tv : 0.0f;
      args.ranks[block_index()] = total.rank;
    }
  }
};

// Bound by memory: registers are kept low, so that an SM holds enough threads to keep it busy.
template <Number kNumber, bool kSoft>
DFLASH_GLOBAL void DFLASH_BOUNDS(kLongRowThreads, (kSoft ? 3 : 5))
    softmax_loss(const DFLASH_PARAMETER SoftmaxLoss args) {
  constexpr int kBytes = Numbers<kNumber>::kBytes;
  const int64_t row = block_index();
  char* z = static_cast<char*>(args.logits) + row * args.stride * kBytes;
  const char* u = nullptr;
  if constexpr (kSoft)
    u = static_cast<const char*>(args.verifier) + args.verifier_rows[row] * args.verifier_stride * kBytes;
  RowLoss<kNumber, kSoft>{args, z, u, static_cast<int>(args.vocabulary), args.labels[row]}.run();
}

}  // namespace dflash::gpu
