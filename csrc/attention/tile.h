// How to do a tile on the CPU: dense arithmetic on packed scratch, no idea of anchors or documents.
//
// Queries are the vector dimension. A tile's scores are kept transposed, (keys, columns), one column per query row, so
// the softmax is a walk down columns with no horizontal sums, and rows of blocks with different anchors share vectors.
// Keys and values are then only ever read as scalars to broadcast, in whatever order a product needs them.
//
// D head dim · DP = D rounded up to kPad · C columns of the group's scratch, a multiple of kPad
#pragma once

#include <cstdint>

namespace dflash {

inline constexpr int kPad = 16;   // columns are padded to this many: one AVX-512 vector of float
inline constexpr int kKeys = 64;  // most keys in one tile

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

// Keys p0 .. p0 + n - 1 against columns [c0, c1): column c sees key p if lo[c] <= p < hi[c]. A column of padding has
// lo = hi = 0. c0 and c1 are multiples of kPad.
template <typename Acc>
struct Tile {
  using Index = typename IndexOf<Acc>::type;
  const Acc* k;  // (n, DP)
  const Acc* v;  // (n, DP)
  const Index* lo;
  const Index* hi;
  int64_t p0;
  int n, c0, c1;
};

// State of a group of query rows in the forward: online softmax over the tiles seen so far.
template <typename Acc>
struct ForwardGroup {
  int d, dp, c;
  const Acc* qt;   // (D, C) queries, scaled, transposed
  Acc* ot;         // (D, C) output so far, not normalised
  Acc* peak;       // (C,) largest score so far
  Acc* total;      // (C,) sum of exp(score - peak)
  Acc* scores;     // (kKeys, C)
  Acc* rescaling;  // (C,)
};

// A group of query rows in the backward.
template <typename Acc>
struct BackwardGroup {
  int d, dp, c;
  const Acc* qt;     // (D, C) scaled
  const Acc* q;      // (C, DP) scaled, padded with zeros
  const Acc* dot;    // (D, C) gradient of the output, transposed
  const Acc* dout;   // (C, DP)
  const Acc* lse;    // (C,)
  const Acc* delta;  // (C,) sum over D of output * its gradient
  Acc* dqt;          // (D, C) gradient of the scaled queries, accumulated
  Acc* scores;       // (kKeys, C)
  Acc* dscores;      // (kKeys, C)
};

// One instruction set's routines; cpu.cpp chooses the best one that this CPU has, once.
template <typename Acc>
struct TileRoutines {
  void (*forward)(const ForwardGroup<Acc>&, const Tile<Acc>&);
  // Adds to dk and dv, (n, DP).
  void (*backward)(const BackwardGroup<Acc>&, const Tile<Acc>&, Acc* dk, Acc* dv);
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
