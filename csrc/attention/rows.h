// Which rows of queries and keys a GPU kernel works on: packed rows, what each row sees, and the walk over key tiles.
//
// The G = Hq / Hkv query heads of one kv head are packed: row R of kv head h is position R / G (0 <= position < A*S,
// block position / S, slot position % S) of query head h*G + R % G. All of them read the same keys.
//   unit       floor(64 / G) consecutive positions in 64 rows; where G does not divide 64, the last rows are padding
//   work item  two consecutive units, 128 rows: what the plan orders (plan.h)
// Context and own block are one code path with two segments of keys: rows of k_ctx, and rows of k_blk. In each, a query
// row sees one interval of key rows.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "attention/plan.h"

namespace dflash {

inline constexpr int kUnitRows = 64;
inline constexpr int kItemRows = 2 * kUnitRows;
inline constexpr int kNoKey = 0x7fffffff;

DFLASH_HOST_DEVICE inline int smaller(int a, int b) { return a < b ? a : b; }
DFLASH_HOST_DEVICE inline int larger(int a, int b) { return a > b ? a : b; }

// x / by for 0 <= x < 2^26 and 1 <= by <= 64 with a multiplication: 2^32 / by rounded up is off by less than `by`, so
// the quotient by less than x * by / 2^32 / by < 1 / by.
struct Divisor {
  int by;
  uint64_t reciprocal;

  DFLASH_HOST_DEVICE static Divisor of(int by) { return {by, ((uint64_t{1} << 32) + by - 1) / by}; }
  DFLASH_HOST_DEVICE int quotient(int x) const {
    return static_cast<int>((static_cast<uint64_t>(x) * reciprocal) >> 32);
  }
  DFLASH_HOST_DEVICE int remainder(int x) const { return x - quotient(x) * by; }
};

// Key rows lo <= p < hi.
struct Interval {
  int lo, hi;
};

enum class Segment { kContext, kOwn };

// The rows of one problem, the same for every kernel; made on the host.
struct Rows {
  Divisor group;       // G
  Divisor block_size;  // S
  int unit_positions;
  int positions;  // A * S
  int tokens;     // T
  int window;     // 0 = none
  bool causal_block;
  const int32_t* starts;
  const int32_t* ends;

  static Rows of(const AttentionShape& s) {
    const int group = s.q_heads / s.kv_heads;
    return {Divisor::of(group),
            Divisor::of(s.block_size),
            kUnitRows / group,
            static_cast<int>(s.anchors) * s.block_size,
            static_cast<int>(s.tokens),
            s.window,
            s.causal_block,
            s.starts,
            s.ends};
  }

  // Position of row r (0 .. kItemRows - 1) of a work item, or -1 for a row of padding.
  DFLASH_HOST_DEVICE int item_position(int item, int r) const {
    const int in_unit = r % kUnitRows, offset = group.quotient(in_unit);
    const int position = (2 * item + r / kUnitRows) * unit_positions + offset;
    return offset < unit_positions && position < positions ? position : -1;
  }
  // Query head, within its kv head's group, of a row of a unit or of any packed row.
  DFLASH_HOST_DEVICE int group_head(int r) const { return group.remainder(r); }

  // What the query at `position` sees. Own rows are counted over all blocks, as the rows of k_blk are.
  DFLASH_HOST_DEVICE Interval sees(Segment segment, int position) const {
    const int block = block_size.quotient(position), first = block * block_size.by, slot = position - first;
    // The window counts back from the query itself, so slot k's lower bound is k above slot 0's.
    if (segment == Segment::kContext) {
      const int lo = starts[block], hi = ends[block];
      return {window > 0 ? larger(lo, hi + slot - window + 1) : lo, hi};
    }
    return {first + (window > 0 ? larger(0, slot - window + 1) : 0), first + (causal_block ? slot + 1 : block_size.by)};
  }
};

// What a set of rows sees of one segment: [first, last) holds all that any row sees; all rows see [from, until).
struct Cover {
  int first = kNoKey, last = 0, from = 0, until = kNoKey;

  DFLASH_HOST_DEVICE void add(const Interval& row) {
    // An empty interval leaves nothing that all rows see, as from >= lo >= hi >= until.
    from = larger(from, row.lo);
    until = smaller(until, row.hi);
    if (row.lo >= row.hi) return;
    first = smaller(first, row.lo);
    last = larger(last, row.hi);
  }
  DFLASH_HOST_DEVICE void add(const Cover& other) {
    first = smaller(first, other.first);
    last = larger(last, other.last);
    from = larger(from, other.from);
    until = smaller(until, other.until);
  }
  // No row sees any of the n keys from p on.
  DFLASH_HOST_DEVICE bool dead(int p, int n) const { return last <= p || p + n <= first; }
  // Every row sees all of them: no mask needed.
  DFLASH_HOST_DEVICE bool interior(int p, int n) const { return from <= p && p + n <= until; }
};

// The key tiles that the blocks of `count` positions from `position` on need, in ascending order: the context's, whose
// gaps between documents are left out, then the blocks' own. Tiles start where a block's interval does, at no
// particular multiple. A tile may reach beyond `limits()`, to rows that nobody here sees: a kernel that
// copies them needs them finite, as 0 * NaN is NaN.
struct KeyWalk {
  const int32_t* starts;
  const int32_t* ends;
  int first_block, last_block, block_size;  // blocks first .. last
  int block;                                // the first that may still need a tile
  int until;                                // where its interval ends: most steps need no look at memory
  Segment segment;
  int p;  // the tile's first key row

  DFLASH_HOST_DEVICE static KeyWalk of(const Rows& rows, int position, int count) {
    const int last = smaller(position + count, rows.positions) - 1;
    const int first_block = rows.block_size.quotient(position);
    KeyWalk walk{
        rows.starts,       rows.ends, first_block, rows.block_size.quotient(last), rows.block_size.by, first_block, 0,
        Segment::kContext, 0};
    walk.settle();
    return walk;
  }
  DFLASH_HOST_DEVICE void advance(int keys) {
    p += keys;
    if (segment == Segment::kContext && p >= until) settle();
  }
  DFLASH_HOST_DEVICE bool done() const { return segment == Segment::kOwn && p >= (last_block + 1) * block_size; }
  DFLASH_HOST_DEVICE Interval limits() const {
    if (segment == Segment::kContext) return {starts[first_block], ends[last_block]};
    return {first_block * block_size, (last_block + 1) * block_size};
  }

 private:
  // Moves p to the next context key that a block sees, or to the own rows where there is none.
  DFLASH_HOST_DEVICE void settle() {
    for (; block <= last_block; ++block) {
      p = larger(p, starts[block]);
      until = ends[block];
      if (p < until) return;
    }
    segment = Segment::kOwn;
    p = first_block * block_size;
  }
};

}  // namespace dflash
