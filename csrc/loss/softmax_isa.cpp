// One row of logits at a time on the CPU, compiled once per instruction set (simd.h). A row fits a cache, so the peak
// is found first and nothing is rescaled.
#include "loss/softmax_rows.h"
#include "simd.h"

namespace dflash::DFLASH_ISA {
namespace {

using Floats = Vec<float>;
using Integers = Ints<float>;
constexpr int kWidth = Simd<float>::kWidth;
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

inline Floats load(const float* p) { return at(p); }
inline void store(float* p, Floats x) { at(p) = x; }
// bf16 is the upper half of a float.
inline Floats load(const uint16_t* p) {
  return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}
inline void store(uint16_t* p, Floats x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Words quiet = (bits >> 16) | 0x40;
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(x == x ? rounded : quiet, Halves);
}

// Vector at `column`, -inf past the row's end.
template <typename T>
inline Floats load_at(const T* row, int64_t column, int64_t vocabulary) {
  if (column + kWidth <= vocabulary) return load(row + column);
  T inside[kWidth] = {};
  Floats x = Floats{} - INFINITY;
  for (int i = 0; column + i < vocabulary; ++i) inside[i] = row[column + i];
  const Floats values = load(inside);
  for (int i = 0; column + i < vocabulary; ++i) x[i] = values[i];
  return x;
}
template <typename T>
inline void store_at(T* row, int64_t column, int64_t vocabulary, Floats x) {
  if (column + kWidth <= vocabulary) return store(row + column, x);
  T inside[kWidth];
  store(inside, x);
  for (int i = 0; column + i < vocabulary; ++i) row[column + i] = inside[i];
}

// A sum over a row: in single precision for a while, then in double.
struct Sum {
  Floats part = {};
  int held = 0;
  double whole = 0;

  inline void add(Floats x) {
    part += x;
    if (++held == 256) flush();
  }
  inline void flush() {
    for (int i = 0; i < kWidth; ++i) whole += part[i];
    part = Floats{};
    held = 0;
  }
  inline double total() {
    flush();
    return whole;
  }
};

template <typename T>
struct Distribution {
  const T* row;
  int64_t vocabulary;
  float peak, log_sum;

  Distribution(const T* logits, int64_t count) : row(logits), vocabulary(count) {
    Floats highest = Floats{} - INFINITY;
    for (int64_t i = 0; i < count; i += kWidth) {
      const Floats x = load_at(row, i, count);
      highest = x > highest ? x : highest;
    }
    peak = highest[0];
    for (int i = 1; i < kWidth; ++i) peak = highest[i] > peak ? highest[i] : peak;
    Sum sum;
    for (int64_t i = 0; i < count; i += kWidth) sum.add(exponential(load_at(row, i, count) - peak));
    log_sum = (float)log(sum.total());
  }
  inline Floats log_at(int64_t column) const { return (load_at(row, column, vocabulary) - peak) - log_sum; }
};

inline Floats half_sign(Floats p, Floats q) {
  const Floats zero = {};
  return p > q ? zero + 0.5f : p < q ? zero - 0.5f : zero;
}
// p log(p / q), and 0 where p is 0, also where its logarithm is -inf.
inline Floats divergence(Floats p, Floats log_p, Floats log_q) { return p > 0.0f ? p * (log_p - log_q) : Floats{}; }

// Columns that come before the label in falling order, of equal ones the lower first.
template <typename T>
inline int32_t rank_of(const Distribution<T>& p, int32_t label, float label_logit) {
  Integers count = {}, column;
  for (int i = 0; i < kWidth; ++i) column[i] = i;
  for (int64_t i = 0; i < p.vocabulary; i += kWidth, column += kWidth) {
    const Floats x = load_at(p.row, i, p.vocabulary);
    count -= (x > label_logit) | ((x == label_logit) & (column < label));
  }
  int32_t rank = 0;
  for (int i = 0; i < kWidth; ++i) rank += count[i];
  return rank;
}

// What of a soft term's gradient or value needs a walk over the row before. `side` is sum of p sign(p - q) / 2.
struct Sums {
  float kl = 0, reverse_kl = 0, tv = 0, side = 0;
};

template <typename T>
inline Sums soft_sums(const Distribution<T>& p, const Distribution<T>& q) {
  Sum kl, reverse_kl, tv, side;
  for (int64_t i = 0; i < p.vocabulary; i += kWidth) {
    const Floats log_p = p.log_at(i), log_q = q.log_at(i);
    const Floats at_p = exponential(log_p), at_q = exponential(log_q), more = half_sign(log_p, log_q);
    kl.add(divergence(at_q, log_q, log_p));
    reverse_kl.add(divergence(at_p, log_p, log_q));
    tv.add((at_p > at_q ? at_p - at_q : at_q - at_p) * 0.5f);
    side.add(at_p * more);
  }
  return {(float)kl.total(), (float)reverse_kl.total(), (float)tv.total(), (float)side.total()};
}

// The soft terms' part of the gradient at one vector of columns.
inline Floats soft_gradient(const float* w, const Sums& sums, Floats log_p, Floats log_q) {
  const Floats p = exponential(log_p), q = exponential(log_q);
  Floats by_p = w[kTv] * (half_sign(log_p, log_q) - sums.side);
  if (w[kReverseKl] != 0) by_p += w[kReverseKl] * (log_p - log_q - sums.reverse_kl);
  return w[kKl] * (p - q) + (p > 0.0f ? p * by_p : Floats{});
}

template <typename T>
void softmax_row(const SoftmaxLoss& args, int64_t row) {
  const int64_t vocabulary = args.vocabulary;
  const int32_t label = args.labels[row];
  const float* w = args.weights;
  T* z = static_cast<T*>(args.logits) + row * args.stride;
  Distribution<T> p(z, vocabulary);
  const bool valid = label >= 0 && label < vocabulary;
  const float label_logit = valid ? load_at(z, label, vocabulary)[0] : NAN;
  if (!valid) p.log_sum = NAN;
  float* values = args.values + row * kTerms;
  values[kCe] = -((label_logit - p.peak) - p.log_sum);
  args.ranks[row] = rank_of(p, label, label_logit);
  const bool soft = args.verifier != nullptr;
  const T* u = soft ? static_cast<const T*>(args.verifier) + args.verifier_rows[row] * args.verifier_stride : z;
  const Distribution<T> q = soft ? Distribution<T>(u, vocabulary) : p;
  const Sums sums = soft ? soft_sums(p, q) : Sums{};
  values[kKl] = w[kKl] != 0 ? sums.kl : 0;
  values[kReverseKl] = w[kReverseKl] != 0 ? sums.reverse_kl : 0;
  values[kTv] = w[kTv] != 0 ? sums.tv : 0;
  for (int64_t i = 0; i < vocabulary; i += kWidth) {
    const Floats log_p = p.log_at(i);
    Floats g = w[kCe] * exponential(log_p);
    if (soft) g += soft_gradient(w, sums, log_p, q.log_at(i));
    if (valid && label >= i && label < i + kWidth) g[label - i] -= w[kCe];
    store_at(z, i, vocabulary, g);
  }
}

}  // namespace

void softmax_rows(const SoftmaxLoss& args, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    if (args.number == Number::kFloat) {
      softmax_row<float>(args, row);
    } else {
      softmax_row<uint16_t>(args, row);
    }
  }
}

}  // namespace dflash::DFLASH_ISA
