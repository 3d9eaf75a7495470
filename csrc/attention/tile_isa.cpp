// How to do a tile, compiled once per instruction set (simd.h).
#include "attention/tile.h"
#include "simd.h"

namespace dflash::DFLASH_ISA {
namespace {

// Rows and vectors of one register block: accumulators, operands and one broadcast fit 32 or 16 registers.
constexpr int kBlockRows = DFLASH_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kBlockVectors = 2;

template <typename Acc>
using Index = typename IndexOf<Acc>::type;

// c (rows, cols) = or += a (rows, depth) * b (depth, cols). a is read element by element, at row * a_row + k * a_depth;
// rows of b and c are kStride apart.
template <typename Acc>
struct Product {
  int rows, cols, depth;
  const Acc* a;
  int64_t a_row, a_depth;
  const Acc* b;
  Acc* c;
  bool add;
};

template <typename Acc, int R, int V>
inline void register_block(const Product<Acc>& g, int row, int col) {
  constexpr int kWidth = Simd<Acc>::kWidth;
  Acc* c = g.c + int64_t(row) * kStride + col;
  const Acc* a = g.a + row * g.a_row;
  const Acc* b = g.b + col;
  Vec<Acc> sum[R][V];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) sum[i][j] = g.add ? at(c + i * kStride + j * kWidth) : Vec<Acc>{};
  for (int k = 0; k < g.depth; ++k) {
    Vec<Acc> right[V];
    for (int j = 0; j < V; ++j) right[j] = at(b + int64_t(k) * kStride + j * kWidth);
    for (int i = 0; i < R; ++i) {
      const Acc left = a[i * g.a_row + k * g.a_depth];
      for (int j = 0; j < V; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) at(c + i * kStride + j * kWidth) = sum[i][j];
}

// All rows from `row` on in blocks of R, the rest in smaller ones.
template <typename Acc, int R, int V>
inline void columns(const Product<Acc>& g, int row, int col) {
  for (; row + R <= g.rows; row += R) register_block<Acc, R, V>(g, row, col);
  if constexpr (R > 1) columns<Acc, R / 2, V>(g, row, col);
}

template <typename Acc>
void multiply(const Product<Acc>& g) {
  constexpr int kWidth = Simd<Acc>::kWidth;
  int col = 0;
  for (; col + kBlockVectors * kWidth <= g.cols; col += kBlockVectors * kWidth)
    columns<Acc, kBlockRows, kBlockVectors>(g, 0, col);
  for (; col < g.cols; col += kWidth) columns<Acc, kBlockRows, 1>(g, 0, col);
}

// (n, columns) = streamed (n, DP) * stationary (D, columns), in columns [c0, c1) of `result`.
template <typename Acc, typename State, typename Tile>
void score(const State& g, const Tile& t, const Acc* streamed, const Acc* stationary, Acc* result) {
  multiply<Acc>({t.n, t.c1 - t.c0, g.d, streamed, g.dp, 1, stationary + t.c0, result + t.c0, false});
}

// (D, columns) += streamed (n, DP) transposed * weights (n, columns), in columns [c0, c1) of `result`.
template <typename Acc, typename State, typename Tile>
void gather(const State& g, const Tile& t, const Acc* streamed, const Acc* weights, Acc* result) {
  multiply<Acc>({g.d, t.c1 - t.c0, t.n, streamed, 1, g.dp, weights + t.c0, result + t.c0, true});
}

template <typename Acc>
inline Ints<Acc> ints(const Index<Acc>* p) {
  return *reinterpret_cast<const Ints<Acc>*>(p);
}

template <typename Acc>
void forward(const ForwardState<Acc>& g, const KeyTile<Acc>& t) {
  score(g, t, t.k, g.qt, g.scores);
  const Vec<Acc> hidden = Vec<Acc>{} - (Acc)INFINITY;
  for (int c = t.c0; c < t.c1; c += Simd<Acc>::kWidth) {
    const Ints<Acc> lo = ints<Acc>(t.lo + c), hi = ints<Acc>(t.hi + c);
    const Vec<Acc> old_peak = at(g.peak + c);
    Vec<Acc> peak = old_peak;
    for (int i = 0; i < t.n; ++i) {
      const Ints<Acc> p = Ints<Acc>{} + (Index<Acc>)(t.p0 + i);
      Vec<Acc>& s = at(g.scores + i * kStride + c);
      s = ((p >= lo) & (p < hi)) ? s : hidden;
      peak = s > peak ? s : peak;
    }
    const Vec<Acc> rescaling = exponential(old_peak - peak);
    Vec<Acc> total = at(g.total + c) * rescaling;
    for (int i = 0; i < t.n; ++i) {
      Vec<Acc>& s = at(g.scores + i * kStride + c);
      s = exponential(s - peak);
      total += s;
    }
    at(g.peak + c) = peak;
    at(g.total + c) = total;
    at(g.rescaling + c) = rescaling;
  }
  for (int x = 0; x < g.d; ++x)
    for (int c = t.c0; c < t.c1; c += Simd<Acc>::kWidth) at(g.ot + int64_t(x) * kStride + c) *= at(g.rescaling + c);
  gather(g, t, t.v, g.scores, g.ot);
}

// Scores become probabilities, gradients of the probabilities become gradients of the scores.
template <typename Acc>
inline void softmax_gradient(Vec<Acc>& s, Vec<Acc>& ds, const Vec<Acc>& lse, const Vec<Acc>& delta,
                             const Ints<Acc>& seen) {
  s = seen ? exponential(s - lse) : Vec<Acc>{};
  ds = s * (ds - delta);
}

template <typename Acc>
void query_gradient(const QueryState<Acc>& g, const KeyTile<Acc>& t) {
  score(g, t, t.k, g.qt, g.scores);
  score(g, t, t.v, g.dot, g.dscores);
  for (int i = 0; i < t.n; ++i) {
    const Ints<Acc> p = Ints<Acc>{} + (Index<Acc>)(t.p0 + i);
    for (int c = t.c0; c < t.c1; c += Simd<Acc>::kWidth) {
      const Ints<Acc> seen = (p >= ints<Acc>(t.lo + c)) & (p < ints<Acc>(t.hi + c));
      const int at_c = i * kStride + c;
      softmax_gradient<Acc>(at(g.scores + at_c), at(g.dscores + at_c), at(g.lse + c), at(g.delta + c), seen);
    }
  }
  gather(g, t, t.k, g.dscores, g.dqt);
}

template <typename Acc>
void key_gradients(const KeyState<Acc>& g, const QueryTile<Acc>& t) {
  score(g, t, t.q, g.kt, g.scores);
  score(g, t, t.dout, g.vt, g.dscores);
  Ints<Acc> lanes;
  for (int i = 0; i < Simd<Acc>::kWidth; ++i) lanes[i] = i;
  for (int i = 0; i < t.n; ++i) {
    const Vec<Acc> lse = Vec<Acc>{} + t.lse[i], delta = Vec<Acc>{} + t.delta[i];
    for (int c = t.c0; c < t.c1; c += Simd<Acc>::kWidth) {
      const Ints<Acc> p = lanes + (Index<Acc>)(t.p0 + c);
      const Ints<Acc> seen = (p >= t.lo[i]) & (p < t.hi[i]);
      const int at_c = i * kStride + c;
      softmax_gradient<Acc>(at(g.scores + at_c), at(g.dscores + at_c), lse, delta, seen);
    }
  }
  gather(g, t, t.dout, g.scores, g.dvt);
  gather(g, t, t.q, g.dscores, g.dkt);
}

}  // namespace

template <>
TileRoutines<float> routines<float>() {
  return {forward<float>, query_gradient<float>, key_gradients<float>};
}
template <>
TileRoutines<double> routines<double>() {
  return {forward<double>, query_gradient<double>, key_gradients<double>};
}

}  // namespace dflash::DFLASH_ISA
