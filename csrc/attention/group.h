// A group on the CPU: consecutive blocks whose query rows are packed side by side, for one kv head.
//
// Column b * block_columns + k * G + g holds slot k of the group's block b for query head g of the kv head; a block's
// columns are padded to kPad, and columns of padding see nothing.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
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

// One allocation, cut into arrays that each start on a cache line.
class Arena {
 public:
  explicit Arena(size_t bytes) : memory_(static_cast<char*>(::operator new(bytes, kAlign))) {}
  ~Arena() { ::operator delete(memory_, kAlign); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <typename X>
  X* take(int64_t count) {
    X* taken = reinterpret_cast<X*>(memory_ + used_);
    used_ += bytes<X>(count);
    return taken;
  }
  template <typename X>
  static size_t bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(X) + 63) / 64 * 64;
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  char* memory_;
  size_t used_ = 0;
};

inline int padded(int n) { return (n + kPad - 1) / kPad * kPad; }

struct GroupShape {
  int group;          // query heads per kv head
  int block_columns;  // columns of one block
  int blocks;         // most blocks in a group
  int columns;        // blocks * block_columns
  int dp;             // head dim padded
  int keys;           // most keys in a tile

  explicit GroupShape(const AttentionShape& s)
      : group(s.q_heads / s.kv_heads),
        block_columns(padded(s.block_size * group)),
        // 128 columns: keys are unpacked once for many rows, and a group's scratch still fits the second-level cache.
        blocks(std::max(1, 128 / block_columns)),
        columns(blocks * block_columns),
        dp(padded(s.head_dim)),
        keys(kKeys) {}
};

// Blocks [first, last) of one kv head.
struct Span {
  int head;
  int64_t first, last;
};

// Which keys each column sees: lo <= p < hi, once for the context and once for the block's own rows.
template <typename Acc>
struct Bounds {
  using Index = typename IndexOf<Acc>::type;
  Index *context_lo, *context_hi, *own_lo, *own_hi;

  static size_t bytes(const GroupShape& g) { return 4 * Arena::bytes<Index>(g.columns); }
  Bounds(Arena& arena, const GroupShape& g)
      : context_lo(arena.take<Index>(g.columns)),
        context_hi(arena.take<Index>(g.columns)),
        own_lo(arena.take<Index>(g.columns)),
        own_hi(arena.take<Index>(g.columns)) {}

  void fill(const AttentionShape& s, const GroupShape& g, const Span& span) {
    for (Index* bound : {context_lo, context_hi, own_lo, own_hi}) std::fill_n(bound, g.columns, Index{0});
    for (int64_t j = span.first; j < span.last; ++j) {
      for (int r = 0; r < s.block_size * g.group; ++r) {
        const int64_t c = (j - span.first) * g.block_columns + r;
        const int slot = r / g.group;
        context_hi[c] = s.ends[j];
        // The window counts back from the query itself, so slot k's bound is k above slot 0's.
        context_lo[c] = s.window > 0 ? std::max(s.starts[j], s.ends[j] + slot - s.window + 1) : s.starts[j];
        own_hi[c] = s.causal_block ? slot + 1 : s.block_size;
        own_lo[c] = s.window > 0 ? std::max(0, slot - s.window + 1) : 0;
      }
    }
  }
};

// Element offset of query row (block j, row r of its columns) in a (A*S, Hq, D) tensor; / D for (A*S, Hq).
inline int64_t query_offset(const AttentionShape& s, const GroupShape& g, int head, int64_t j, int r) {
  const int64_t slot = j * s.block_size + r / g.group;
  return (slot * s.q_heads + head * g.group + r % g.group) * s.head_dim;
}

// Calls visit(column, query_offset) for every query row of the span.
template <typename Visit>
void for_each_row(const AttentionShape& s, const GroupShape& g, const Span& span, const Visit& visit) {
  for (int64_t j = span.first; j < span.last; ++j)
    for (int r = 0; r < s.block_size * g.group; ++r)
      visit(static_cast<int>(j - span.first) * g.block_columns + r, query_offset(s, g, span.head, j, r));
}

// Unpacks n rows of (rows, Hkv, D) from `row` on into (n, DP), padded with zeros.
template <typename T, typename Acc>
void unpack(const AttentionShape& s, int dp, int head, const T* source, int64_t row, int n, Acc* target) {
  for (int i = 0; i < n; ++i) {
    const T* from = source + ((row + i) * s.kv_heads + head) * s.head_dim;
    for (int d = 0; d < s.head_dim; ++d) target[i * dp + d] = load(from[d]);
    std::fill(target + i * dp + s.head_dim, target + (i + 1) * dp, Acc{0});
  }
}

// The reverse: writes n rows from (n, DP).
template <typename T, typename Acc>
void pack(const AttentionShape& s, int dp, int head, const Acc* source, int64_t row, int64_t n, T* target) {
  for (int64_t i = 0; i < n; ++i) {
    T* to = target + ((row + i) * s.kv_heads + head) * s.head_dim;
    for (int d = 0; d < s.head_dim; ++d) to[d] = store<T, Acc>(source[i * dp + d]);
  }
}

// Calls visit(tile) for every tile of keys that the span sees: each block's own rows, then the context. `own` says
// whether tile rows are rows of k_blk or of k_ctx, from row `row` on. k and v are scratch that visit may not keep.
template <typename T, typename Acc, typename Visit>
void for_each_tile(const AttentionShape& s, const GroupShape& g, const AttentionInputs<T>& in, const Span& span,
                   const Bounds<Acc>& bounds, Acc* k, Acc* v, const Visit& visit) {
  for (int64_t j = span.first; j < span.last; ++j) {
    const int c0 = static_cast<int>(j - span.first) * g.block_columns;
    for (int p = 0; p < s.block_size; p += g.keys) {
      const int n = std::min(g.keys, s.block_size - p);
      const int64_t row = j * s.block_size + p;
      unpack(s, g.dp, span.head, in.k_blk, row, n, k);
      unpack(s, g.dp, span.head, in.v_blk, row, n, v);
      visit(Tile<Acc>{k, v, bounds.own_lo, bounds.own_hi, p, n, c0, c0 + g.block_columns}, true, row);
    }
  }
  int64_t first = span.first, last = span.first;  // blocks that see the tile: both only move forward
  for (int64_t p = s.starts[span.first]; p < s.ends[span.last - 1];) {
    const int n = static_cast<int>(std::min<int64_t>(g.keys, s.ends[span.last - 1] - p));
    while (s.ends[first] <= p) ++first;
    while (last < span.last && s.starts[last] < p + n) ++last;
    if (first >= last) {  // a gap that no block sees
      p = s.starts[first];
      continue;
    }
    unpack(s, g.dp, span.head, in.k_ctx, p, n, k);
    unpack(s, g.dp, span.head, in.v_ctx, p, n, v);
    const int c0 = static_cast<int>(first - span.first) * g.block_columns;
    const int c1 = static_cast<int>(last - span.first) * g.block_columns;
    visit(Tile<Acc>{k, v, bounds.context_lo, bounds.context_hi, p, n, c0, c1}, false, p);
    p += n;
  }
}

}  // namespace dflash
