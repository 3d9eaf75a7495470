// Which queries meet which keys on the CPU, and how rows get from tensors into scratch and back.
//
// The query rows of one kv head are numbered position by position, its G query heads side by side: packed row r is
// query head r % G of the kv head at position r / G. A block's S * G packed rows are consecutive. Keys are two
// sequences: the context, and the blocks' own rows. In both a block sees part of one interval, and neither end of the
// interval falls from block to block.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <new>

#include "attention/attention.h"
#include "attention/tile.h"

namespace dflash {

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

template <typename T, typename Acc>
T store(Acc x) {
  return x;
}
// Round to nearest even; a NaN keeps a mantissa bit.
template <>
inline Bf16 store<Bf16, float>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// A zeroed array on a cache line of its own. Each has its own allocation, so that a sanitizer sees every overrun.
template <typename X>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<X*>(::operator new(static_cast<size_t>(count) * sizeof(X), kAlign))) {
    std::fill_n(data_, count, X{0});
  }
  ~Buffer() { ::operator delete(data_, kAlign); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator X*() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  X* data_;
};

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

struct Layout {
  int group;       // query heads per kv head
  int block_rows;  // packed rows of one block
  int dp;          // row stride of a streamed tile: an odd number of cache lines, as kStride

  explicit Layout(const AttentionShape& s)
      : group(s.q_heads / s.kv_heads),
        block_rows(s.block_size * group),
        dp(static_cast<int>(padded(s.head_dim)) | kPad) {}

  // Packed rows to take at a time, `most` or a little less: whole blocks where one fits.
  int64_t step(int most) const { return block_rows <= most ? most / block_rows * block_rows : most; }
};

// Packed rows [first, last) of one kv head.
struct Rows {
  int head;
  int64_t first, last;
};

// One of the two sequences of keys.
template <typename T>
struct Keys {
  const T* k;  // (rows, Hkv, D)
  const T* v;
  const AttentionShape& s;
  bool own;

  // Block j sees nothing outside [start(j), end(j)).
  int64_t start(int64_t j) const { return own ? j * s.block_size : s.starts[j]; }
  int64_t end(int64_t j) const { return own ? (j + 1) * s.block_size : s.ends[j]; }
  int64_t at(int64_t row, int head) const { return (row * s.kv_heads + head) * s.head_dim; }
  int64_t rows() const { return own ? s.anchors * s.block_size : s.tokens; }
  // Own rows are seen by one block only, so a tile holds no more of them than fill a vector of its queries.
  int most(int block_rows) const {
    return own ? std::min(kRows, s.block_size * std::max(1, kPad / block_rows)) : kRows;
  }
};

template <typename T>
Keys<T> context(const AttentionShape& s, const AttentionInputs<T>& in) {
  return {in.k_ctx, in.v_ctx, s, false};
}
template <typename T>
Keys<T> own_rows(const AttentionShape& s, const AttentionInputs<T>& in) {
  return {in.k_blk, in.v_blk, s, true};
}

// Which keys each of some packed rows sees, counted from `origin`: lo <= key < hi.
template <typename Acc>
struct Bounds {
  using Index = typename IndexOf<Acc>::type;
  Buffer<Index> lo{kColumns}, hi{kColumns};

  template <typename T>
  void fill(const Layout& l, const Keys<T>& keys, const Rows& rows, int64_t origin) {
    const AttentionShape& s = keys.s;
    for (int64_t r = rows.first; r < rows.last; ++r) {
      const int64_t j = r / l.block_rows, slot = r % l.block_rows / l.group;
      const int64_t start = keys.start(j), end = keys.end(j);
      // The window counts back from the query itself, which stands at slot k of its block, the context's end at slot 0.
      const int64_t query = keys.own ? start + slot : end + slot;
      const int64_t first = s.window > 0 ? std::max(start, query - s.window + 1) : start;
      const int64_t last = keys.own && s.causal_block ? query + 1 : end;
      lo[r - rows.first] = static_cast<Index>(first - origin);
      hi[r - rows.first] = static_cast<Index>(last - origin);
    }
    std::fill(lo + (rows.last - rows.first), lo + kColumns, Index{0});
    std::fill(hi + (rows.last - rows.first), hi + kColumns, Index{0});
  }
};

// Row number of a packed row in a (A*S, Hq, D) or (A*S, Hq) tensor.
inline int64_t query_row(const AttentionShape& s, const Layout& l, int head, int64_t r) {
  return r / l.group * s.q_heads + head * l.group + r % l.group;
}

// Between tensors and scratch, D = s.head_dim elements at a time; row_of(i) is where row i starts in the tensor.
template <typename T, typename Acc, typename RowOf>
void load_rows(int d, int dp, int64_t n, Acc scale, const RowOf& row_of, Acc* target) {
  for (int64_t i = 0; i < n; ++i) {
    const T* from = row_of(i);
    for (int x = 0; x < d; ++x) target[i * dp + x] = load(from[x]) * scale;
  }
}

// Transposes four rows at a time: writes of four neighbours, and (de)coding of contiguous elements, vectorise.
template <typename Acc>
struct Transposer {
  static constexpr int kStep = 4;
  int d, dp;
  Buffer<Acc> stage{int64_t(kStep) * dp};

  // Rows into columns [0, n) of (D, kStride).
  template <typename T, typename RowOf>
  void load(int64_t n, Acc scale, const RowOf& row_of, Acc* target) {
    for (int64_t c = 0; c < n; c += kStep) {
      load_rows<T, Acc>(d, dp, std::min<int64_t>(kStep, n - c), scale, [&](int64_t i) { return row_of(c + i); }, stage);
      for (int x = 0; x < d; ++x)
        for (int i = 0; i < kStep; ++i) target[int64_t(x) * kStride + c + i] = stage[i * dp + x];
    }
  }

  // The reverse; scale_of(c) is what column c is multiplied by.
  template <typename T, typename ScaleOf, typename RowOf>
  void store(int64_t n, const ScaleOf& scale_of, const RowOf& row_of, const Acc* source) {
    for (int64_t c = 0; c < n; c += kStep) {
      for (int x = 0; x < d; ++x)
        for (int i = 0; i < kStep; ++i) stage[i * dp + x] = source[int64_t(x) * kStride + c + i];
      for (int64_t i = 0; i < std::min<int64_t>(kStep, n - c); ++i) {
        T* to = row_of(c + i);
        const Acc scale = scale_of(c + i);
        for (int x = 0; x < d; ++x) to[x] = dflash::store<T, Acc>(stage[i * dp + x] * scale);
      }
    }
  }
};

// Sum over D of the products, in eight sums side by side: one alone would wait for each addition.
template <typename T, typename Acc>
Acc inner_product(int d, const T* a, const T* b) {
  constexpr int kSums = 8;
  Acc sums[kSums] = {};
  for (int x = 0; x < d; x += kSums)
    for (int i = 0; i < std::min(kSums, d - x); ++i) sums[i] += Acc{load(a[x + i])} * load(b[x + i]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Calls visit(tile) for every tile of the sequence that the rows see. k and v are scratch for the tile.
template <typename T, typename Acc, typename Visit>
void for_each_tile(const Layout& l, const Keys<T>& keys, const Rows& rows, Bounds<Acc>& bounds, Acc* k, Acc* v,
                   const Visit& visit) {
  const int64_t begin = rows.first / l.block_rows, end = (rows.last - 1) / l.block_rows + 1;
  const int64_t origin = keys.start(begin), limit = keys.end(end - 1);
  bounds.fill(l, keys, rows, origin);
  int64_t first = begin, last = begin;  // blocks that see the tile: both only move forward
  for (int64_t p = origin; p < limit;) {
    const int n = static_cast<int>(std::min<int64_t>(keys.most(l.block_rows), limit - p));
    while (keys.end(first) <= p) ++first;
    while (last < end && keys.start(last) < p + n) ++last;
    if (first >= last) {  // a gap that no block sees
      p = keys.start(first);
      continue;
    }
    load_rows<T, Acc>(
        keys.s.head_dim, l.dp, n, Acc{1}, [&](int64_t i) { return keys.k + keys.at(p + i, rows.head); }, k);
    load_rows<T, Acc>(
        keys.s.head_dim, l.dp, n, Acc{1}, [&](int64_t i) { return keys.v + keys.at(p + i, rows.head); }, v);
    const int64_t c0 = std::max<int64_t>(0, first * l.block_rows - rows.first) / kPad * kPad;
    const int64_t c1 = padded(std::min(last * l.block_rows, rows.last) - rows.first);
    visit(KeyTile<Acc>{k, v, bounds.lo, bounds.hi, p - origin, n, static_cast<int>(c0), static_cast<int>(c1)});
    p += n;
  }
}

}  // namespace dflash
