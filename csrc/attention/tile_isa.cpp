// How to do a tile, compiled once per instruction set (simd.h).
#include "attention/tile.h"
#include "simd.h"

namespace dflash::DFLASH_ISA {
namespace {

// Rows and vectors of one register block: accumulators, operands and one broadcast fit 32 or 16 registers.
constexpr int kRows = DFLASH_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kVectors = 2;

template <typename Acc>
using Index = typename IndexOf<Acc>::type;

template <typename Acc>
struct Product {
  // c (rows, cols) += a (rows, depth) * b (depth, cols). a is read element by element, at row * a_row + k * a_depth.
  int rows, cols, depth;
  const Acc* a;
  int64_t a_row, a_depth;
  const Acc* b;
  int64_t b_stride;
  Acc* c;
  int64_t c_stride;
};

template <typename Acc, int R, int V>
inline void register_block(const Product<Acc>& g, int row, int col) {
  constexpr int kWidth = Simd<Acc>::kWidth;
  Acc* c = g.c + row * g.c_stride + col;
  const Acc* a = g.a + row * g.a_row;
  const Acc* b = g.b + col;
  Vec<Acc> sum[R][V];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) sum[i][j] = at(c + i * g.c_stride + j * kWidth);
  for (int k = 0; k < g.depth; ++k) {
    Vec<Acc> right[V];
    for (int j = 0; j < V; ++j) right[j] = at(b + k * g.b_stride + j * kWidth);
    for (int i = 0; i < R; ++i) {
      const Acc left = a[i * g.a_row + k * g.a_depth];
      for (int j = 0; j < V; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) at(c + i * g.c_stride + j * kWidth) = sum[i][j];
}

template <typename Acc, int V>
inline void columns(const Product<Acc>& g, int col) {
  int row = 0;
  for (; row + kRows <= g.rows; row += kRows) register_block<Acc, kRows, V>(g, row, col);
  for (; row < g.rows; ++row) register_block<Acc, 1, V>(g, row, col);
}

template <typename Acc>
void multiply_add(const Product<Acc>& g) {
  constexpr int kWidth = Simd<Acc>::kWidth;
  int col = 0;
  for (; col + kVectors * kWidth <= g.cols; col += kVectors * kWidth) columns<Acc, kVectors>(g, col);
  for (; col < g.cols; col += kWidth) columns<Acc, 1>(g, col);
}

// scores (n, C) = keys (n, DP) * queries (D, C), in columns [0, c1 - c0) of the scratch.
template <typename Acc>
void score(const Tile<Acc>& t, const Acc* keys, int d, int dp, int c, const Acc* queries, Acc* scores) {
  const int cols = t.c1 - t.c0;
  for (int i = 0; i < t.n; ++i)
    for (int x = 0; x < cols; x += Simd<Acc>::kWidth) at(scores + int64_t(i) * c + x) = Vec<Acc>{};
  multiply_add<Acc>({t.n, cols, d, keys, dp, 1, queries + t.c0, c, scores, c});
}

template <typename Acc>
void forward(const ForwardGroup<Acc>& g, const Tile<Acc>& t) {
  score<Acc>(t, t.k, g.d, g.dp, g.c, g.qt, g.scores);
  const Vec<Acc> hidden = Vec<Acc>{} - (Acc)INFINITY;
  for (int c = t.c0; c < t.c1; c += Simd<Acc>::kWidth) {
    Acc* column = g.scores + (c - t.c0);
    const Ints<Acc> lo = *reinterpret_cast<const Ints<Acc>*>(t.lo + c);
    const Ints<Acc> hi = *reinterpret_cast<const Ints<Acc>*>(t.hi + c);
    const Vec<Acc> old_peak = at(g.peak + c);
    Vec<Acc> peak = old_peak;
    for (int i = 0; i < t.n; ++i) {
      const Ints<Acc> p = Ints<Acc>{} + (Index<Acc>)(t.p0 + i);
      Vec<Acc> s = at(column + int64_t(i) * g.c);
      s = ((p >= lo) & (p < hi)) ? s : hidden;
      at(column + int64_t(i) * g.c) = s;
      peak = s > peak ? s : peak;
    }
    const Vec<Acc> rescaling = exponential(old_peak - peak);
    Vec<Acc> total = at(g.total + c) * rescaling;
    for (int i = 0; i < t.n; ++i) {
      const Vec<Acc> e = exponential(at(column + int64_t(i) * g.c) - peak);
      at(column + int64_t(i) * g.c) = e;
      total += e;
    }
    at(g.peak + c) = peak;
    at(g.total + c) = total;
    at(g.rescaling + c) = rescaling;
  }
  for (int x = 0; x < g.d; ++x)
    for (int c = t.c0; c < t.c1; c += Simd<Acc>::kWidth) at(g.ot + int64_t(x) * g.c + c) *= at(g.rescaling + c);
  // ot (D, C) += values transposed (D, n) * probabilities (n, C)
  multiply_add<Acc>({g.d, t.c1 - t.c0, t.n, t.v, 1, g.dp, g.scores, g.c, g.ot + t.c0, g.c});
}

template <typename Acc>
void backward(const BackwardGroup<Acc>& g, const Tile<Acc>& t, Acc* dk, Acc* dv) {
  const int cols = t.c1 - t.c0;
  score<Acc>(t, t.k, g.d, g.dp, g.c, g.qt, g.scores);
  score<Acc>(t, t.v, g.d, g.dp, g.c, g.dot, g.dscores);
  for (int i = 0; i < t.n; ++i) {
    const Ints<Acc> p = Ints<Acc>{} + (Index<Acc>)(t.p0 + i);
    for (int c = t.c0; c < t.c1; c += Simd<Acc>::kWidth) {
      const Ints<Acc> lo = *reinterpret_cast<const Ints<Acc>*>(t.lo + c);
      const Ints<Acc> hi = *reinterpret_cast<const Ints<Acc>*>(t.hi + c);
      Acc* s = g.scores + int64_t(i) * g.c + (c - t.c0);
      Acc* ds = g.dscores + int64_t(i) * g.c + (c - t.c0);
      const Vec<Acc> seen = exponential(at(s) - at(g.lse + c));
      const Vec<Acc> probability = ((p >= lo) & (p < hi)) ? seen : Vec<Acc>{};
      at(s) = probability;
      at(ds) = probability * (at(ds) - at(g.delta + c));
    }
  }
  multiply_add<Acc>({t.n, g.dp, cols, g.scores, g.c, 1, g.dout + int64_t(t.c0) * g.dp, g.dp, dv, g.dp});
  multiply_add<Acc>({t.n, g.dp, cols, g.dscores, g.c, 1, g.q + int64_t(t.c0) * g.dp, g.dp, dk, g.dp});
  multiply_add<Acc>({g.d, cols, t.n, t.k, 1, g.dp, g.dscores, g.c, g.dqt + t.c0, g.c});
}

}  // namespace

template <>
TileRoutines<float> routines<float>() {
  return {forward<float>, backward<float>};
}
template <>
TileRoutines<double> routines<double>() {
  return {forward<double>, backward<double>};
}

}  // namespace dflash::DFLASH_ISA
