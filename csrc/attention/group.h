// Which queries meet which keys on the CPU, and how rows get from tensors into scratch and back.
//
// The query rows of one kv head are numbered position by position, its G query heads side by side: packed row r is query
// head r % G of the kv head at position r / G. A block's S * G packed rows are consecutive.
// Keys are two sequences: the context, and the blocks' own rows. In both a block sees part of one interval, and neither
// end of the interval falls from block to block.
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

// Calls visit(i, row) with the row number in a (A*S, Hq, D) or (A*S, Hq) tensor of each packed row.
template <typename Visit>
void for_each_row(const AttentionShape& s, const Layout& l, const Rows& rows, const Visit& visit) {
  for (int64_t r = rows.first; r < rows.last; ++r)
    visit(r - rows.first, r / l.group * s.q_heads + rows.head * l.group + r % l.group);
}

// Unpacks n rows of one kv head from `row` on into (n, DP).
template <typename T, typename Acc>
void stream_keys(const AttentionShape& s, int dp, const T* source, int head, int64_t row, int64_t n, Acc* target) {
  for (int64_t i = 0; i < n; ++i) {
    const T* from = source + ((row + i) * s.kv_heads + head) * s.head_dim;
    for (int d = 0; d < s.head_dim; ++d) target[i * dp + d] = load(from[d]);
  }
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
    stream_keys(keys.s, l.dp, keys.k, rows.head, p, n, k);
    stream_keys(keys.s, l.dp, keys.v, rows.head, p, n, v);
    const int64_t c0 = std::max<int64_t>(0, first * l.block_rows - rows.first) / kPad * kPad;
    const int64_t c1 = padded(std::min(last * l.block_rows, rows.last) - rows.first);
    visit(KeyTile<Acc>{k, v, bounds.lo, bounds.hi, p - origin, n, static_cast<int>(c0), static_cast<int>(c1)});
    p += n;
  }
}

}  // namespace dflash
