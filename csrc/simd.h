// Vectors of one instruction set, for sources that setup.py compiles once per set (*_isa.cpp) with -DDFLASH_ISA=<name>
// and that set's flags.
//
// Everything here sits in namespace dflash::<name>, and nothing inline from the standard library is used: a shared
// inline function compiled with AVX-512 here could be the copy that the linker keeps for the whole library.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define DFLASH_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DFLASH_VECTOR_BYTES 32
#else
#define DFLASH_VECTOR_BYTES 16
#endif

namespace dflash::DFLASH_ISA {
namespace {

template <typename Acc>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(DFLASH_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Ints __attribute__((vector_size(DFLASH_VECTOR_BYTES), aligned(4), may_alias));
  static constexpr int kWidth = DFLASH_VECTOR_BYTES / 4;
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(DFLASH_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Ints __attribute__((vector_size(DFLASH_VECTOR_BYTES), aligned(8), may_alias));
  static constexpr int kWidth = DFLASH_VECTOR_BYTES / 8;
};
template <typename Acc>
using Vec = typename Simd<Acc>::Vec;
template <typename Acc>
using Ints = typename Simd<Acc>::Ints;

template <typename Acc>
inline Vec<Acc>& at(Acc* p) {
  return *reinterpret_cast<Vec<Acc>*>(p);
}
template <typename Acc>
inline const Vec<Acc>& at(const Acc* p) {
  return *reinterpret_cast<const Vec<Acc>*>(p);
}

// e^x for x <= about 0, to 2 ulp; 0 below -87; NaN stays NaN. Cephes' expf: 2^n times a polynomial in the remainder.
inline Vec<float> exponential(Vec<float> x) {
  const Vec<float> zero = {};
  const Vec<float> rounder = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> n = (x * 1.44269504088896341f + rounder) - rounder;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // rounder's low mantissa bits hold n, also where it is negative.
  const Ints<float> bits = ((Ints<float>)(n + rounder) << 23) + (Ints<float>)(zero + 1.0f);
  return x < -87.0f ? zero : p * (Vec<float>)bits;
}

// For gradient checks: accuracy, not speed.
inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < Simd<double>::kWidth; ++i) x[i] = exp(x[i]);
  return x;
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
