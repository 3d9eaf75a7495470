// How to do a tile on the CPU: dense arithmetic on packed scratch, no idea of anchors or documents.
//
// One side of a product stays and is the vector dimension: kColumns queries in the forward and for their gradient,
// kColumns keys for theirs. It is kept transposed, (D, kStride). The other side streams past in tiles of up to kRows
// rows, (n, DP), and is only ever read element by element to broadcast, in whatever order a product needs it. So no
// product needs a horizontal sum, and rows of blocks with different anchors share vectors.
//
// D head dim · DP row stride of a streamed tile
#pragma once

#include <cstdint>

namespace dflash {

inline constexpr int kPad = 16;       // tiles are cut at multiples of this many columns: one AVX-512 vector of float
inline constexpr int kColumns = 128;  // a streamed row is unpacked once for all, and scratch fits the L2 cache
inline constexpr int kStride = kColumns + kPad;  // an odd number of cache lines, or columns would share cache sets
inline constexpr int kRows = 64;

template <typename Acc>
struct IndexOf;
template <>
struct IndexOf<float> {
  using type = int32_t;
};
template <>
struct IndexOf<double> {
  using type = int64_t;
};

// Keys p0 .. p0 + n - 1 streaming past columns [c0, c1) of queries: column c sees key p if lo[c] <= p < hi[c]. A column
// of padding has lo = hi. c0 and c1 are multiples of kPad.
template <typename Acc>
struct KeyTile {
  using Index = typename IndexOf<Acc>::type;
  const Acc* k;  // (n, DP)
  const Acc* v;  // (n, DP)
  const Index* lo;
  const Index* hi;
  int64_t p0;
  int n, c0, c1;
};

// n queries streaming past columns [c0, c1) of keys, of which column c is key p0 + c: row i sees it if
// lo[i] <= p0 + c < hi[i].
template <typename Acc>
struct QueryTile {
  using Index = typename IndexOf<Acc>::type;
  const Acc* q;     // (n, DP) scaled
  const Acc* dout;  // (n, DP) gradient of the output
  const Acc* lse;   // (n,)
  const Acc* delta;
  const Index* lo;
  const Index* hi;
  int64_t p0;
  int n, c0, c1;
};

// Queries in the forward: online softmax over the tiles seen so far.
template <typename Acc>
struct ForwardState {
  int d, dp;
  const Acc* qt;   // (D, kStride) scaled
  Acc* ot;         // (D, kStride) output so far, not normalised
  Acc* peak;       // (kColumns,) largest score so far
  Acc* total;      // (kColumns,) sum of exp(score - peak)
  Acc* rescaling;  // (kColumns,)
  Acc* scores;     // (kRows, kStride)
};

// Queries in the backward.
template <typename Acc>
struct QueryState {
  int d, dp;
  const Acc* qt;     // (D, kStride) scaled
  const Acc* dot;    // (D, kStride) gradient of the output
  const Acc* lse;    // (kColumns,)
  const Acc* delta;  // (kColumns,) sum over D of output * its gradient
  Acc* dqt;          // (D, kStride) gradient of the scaled queries, accumulated
  Acc* scores;       // (kRows, kStride)
  Acc* dscores;      // (kRows, kStride)
};

// Keys in the backward.
template <typename Acc>
struct KeyState {
  int d, dp;
  const Acc* kt;  // (D, kStride)
  const Acc* vt;  // (D, kStride)
  Acc* dkt;       // (D, kStride) accumulated
  Acc* dvt;       // (D, kStride) accumulated
  Acc* scores;    // (kRows, kStride)
  Acc* dscores;   // (kRows, kStride)
};

// One instruction set's routines; cpu.cpp chooses the best one that this CPU has, once.
template <typename Acc>
struct TileRoutines {
  void (*forward)(const ForwardState<Acc>&, const KeyTile<Acc>&);
  void (*query_gradient)(const QueryState<Acc>&, const KeyTile<Acc>&);
  void (*key_gradients)(const KeyState<Acc>&, const QueryTile<Acc>&);
};

// One per build of tile_isa.cpp (setup.py compiles it once per instruction set).
namespace baseline {
template <typename Acc>
TileRoutines<Acc> routines();
}
namespace avx2 {
template <typename Acc>
TileRoutines<Acc> routines();
}
namespace avx512 {
template <typename Acc>
TileRoutines<Acc> routines();
}

}  // namespace dflash
