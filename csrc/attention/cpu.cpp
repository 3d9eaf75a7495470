// Attention on the CPU: which tiles, and in what order. The arithmetic of a tile is in tile_isa.cpp.
//
// Forward: a unit is a group of consecutive blocks for one kv head. Backward: a unit is a run of blocks whose context
// intervals hang together, in practice one document, for one kv head. No other unit writes its rows of dk_ctx and
// dv_ctx, so one pass of five products gives all five gradients without atomics, and the result does not depend on
// the number of threads.
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <vector>

#include "attention/group.h"
#include "isa.h"

namespace dflash {
namespace {

template <typename Acc>
TileRoutines<Acc> choose_routines() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::kAvx512) return avx512::routines<Acc>();
  if (instruction_set() == InstructionSet::kAvx2) return avx2::routines<Acc>();
#endif
  return baseline::routines<Acc>();
}

template <typename Acc>
const TileRoutines<Acc>& tile_routines() {
  static const TileRoutines<Acc> chosen = choose_routines<Acc>();
  return chosen;
}

// Threads take units one by one, heaviest first: units differ by orders of magnitude.
template <typename Run>
void run_units(std::vector<Span>& units, const AttentionShape& s, const Run& run) {
  const auto keys = [&](const Span& u) {
    int64_t sum = 0;
    for (int64_t j = u.first; j < u.last; ++j) sum += s.ends[j] - s.starts[j] + s.block_size;
    return sum;
  };
  std::vector<std::pair<int64_t, size_t>> order;
  for (size_t i = 0; i < units.size(); ++i) order.emplace_back(-keys(units[i]), i);
  std::sort(order.begin(), order.end());
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, static_cast<int64_t>(units.size()), 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < order.size(); i = next++) run(units[order[i].second]);
  });
}

template <typename T, typename Acc>
void forward_group(const AttentionShape& s, const AttentionInputs<T>& in, const ForwardOutputs<T, Acc>& outputs,
                   const Span& span) {
  const GroupShape g(s);
  const int64_t square = int64_t(s.head_dim) * g.columns, tile = int64_t(g.keys) * g.dp;
  Arena arena(2 * Arena::bytes<Acc>(square) + 3 * Arena::bytes<Acc>(g.columns) + 2 * Arena::bytes<Acc>(tile) +
              Arena::bytes<Acc>(int64_t(g.keys) * g.columns) + Bounds<Acc>::bytes(g));
  Bounds<Acc> bounds(arena, g);
  bounds.fill(s, g, span);
  Acc *qt = arena.take<Acc>(square), *ot = arena.take<Acc>(square);
  Acc *peak = arena.take<Acc>(g.columns), *total = arena.take<Acc>(g.columns), *rescaling = arena.take<Acc>(g.columns);
  Acc *k = arena.take<Acc>(tile), *v = arena.take<Acc>(tile), *scores = arena.take<Acc>(int64_t(g.keys) * g.columns);
  std::fill_n(qt, square, Acc{0});
  std::fill_n(ot, square, Acc{0});
  std::fill_n(peak, g.columns, std::numeric_limits<Acc>::lowest());
  std::fill_n(total, g.columns, Acc{0});
  const Acc scale = static_cast<Acc>(s.scale);
  for_each_row(s, g, span, [&](int c, int64_t offset) {
    for (int d = 0; d < s.head_dim; ++d) qt[int64_t(d) * g.columns + c] = load(in.q[offset + d]) * scale;
  });

  const TileRoutines<Acc>& routines = tile_routines<Acc>();
  const ForwardGroup<Acc> state{s.head_dim, g.dp, g.columns, qt, ot, peak, total, scores, rescaling};
  for_each_tile(s, g, in, span, bounds, k, v, [&](const Tile<Acc>& t, bool, int64_t) { routines.forward(state, t); });

  for_each_row(s, g, span, [&](int c, int64_t offset) {
    const Acc inverse = Acc{1} / total[c];
    for (int d = 0; d < s.head_dim; ++d)
      outputs.out[offset + d] = store<T, Acc>(ot[int64_t(d) * g.columns + c] * inverse);
    outputs.lse[offset / s.head_dim] = peak[c] + std::log(total[c]);
  });
}

// Scratch of a backward unit, one arena for all its groups.
template <typename Acc>
struct BackwardScratch {
  Arena arena;
  Bounds<Acc> bounds;
  Acc *qt, *dot, *dqt, *q, *dout, *lse, *delta, *k, *v, *scores, *dscores, *dk_own, *dv_own, *dk, *dv;

  static size_t bytes(const AttentionShape& s, const GroupShape& g, int64_t keys) {
    return 3 * Arena::bytes<Acc>(int64_t(s.head_dim) * g.columns) + 2 * Arena::bytes<Acc>(int64_t(g.columns) * g.dp) +
           2 * Arena::bytes<Acc>(g.columns) + 4 * Arena::bytes<Acc>(int64_t(g.keys) * g.dp) +
           2 * Arena::bytes<Acc>(int64_t(g.keys) * g.columns) + 2 * Arena::bytes<Acc>(keys * g.dp) +
           Bounds<Acc>::bytes(g);
  }
  BackwardScratch(const AttentionShape& s, const GroupShape& g, int64_t keys)
      : arena(bytes(s, g, keys)), bounds(arena, g) {
    for (Acc** p : {&qt, &dot, &dqt}) *p = arena.take<Acc>(int64_t(s.head_dim) * g.columns);
    for (Acc** p : {&q, &dout}) *p = arena.take<Acc>(int64_t(g.columns) * g.dp);
    for (Acc** p : {&lse, &delta}) *p = arena.take<Acc>(g.columns);
    for (Acc** p : {&k, &v, &dk_own, &dv_own}) *p = arena.take<Acc>(int64_t(g.keys) * g.dp);
    for (Acc** p : {&scores, &dscores}) *p = arena.take<Acc>(int64_t(g.keys) * g.columns);
    for (Acc** p : {&dk, &dv}) {
      *p = arena.take<Acc>(keys * g.dp);
      std::fill_n(*p, keys * g.dp, Acc{0});
    }
  }
};

template <typename T, typename Acc>
void load_group(const AttentionShape& s, const GroupShape& g, const BackwardInputs<T, Acc>& in, const Span& span,
                const BackwardScratch<Acc>& x) {
  for (Acc* p : {x.qt, x.dot, x.dqt}) std::fill_n(p, int64_t(s.head_dim) * g.columns, Acc{0});
  for (Acc* p : {x.q, x.dout}) std::fill_n(p, int64_t(g.columns) * g.dp, Acc{0});
  for (Acc* p : {x.lse, x.delta}) std::fill_n(p, g.columns, Acc{0});
  const Acc scale = static_cast<Acc>(s.scale);
  for_each_row(s, g, span, [&](int c, int64_t offset) {
    Acc delta = 0;
    for (int d = 0; d < s.head_dim; ++d) {
      const Acc q = load(in.in.q[offset + d]) * scale, dout = load(in.dout[offset + d]);
      x.q[int64_t(c) * g.dp + d] = x.qt[int64_t(d) * g.columns + c] = q;
      x.dout[int64_t(c) * g.dp + d] = x.dot[int64_t(d) * g.columns + c] = dout;
      delta += dout * load(in.out[offset + d]);
    }
    x.delta[c] = delta;
    x.lse[c] = in.lse[offset / s.head_dim];
  });
}

template <typename T, typename Acc>
void backward_unit(const AttentionShape& s, const BackwardInputs<T, Acc>& in, const Gradients<T>& out,
                   const Span& unit) {
  const GroupShape g(s);
  const TileRoutines<Acc>& routines = tile_routines<Acc>();
  const int64_t base = s.starts[unit.first], keys = s.ends[unit.last - 1] - base;
  BackwardScratch<Acc> x(s, g, keys);
  const BackwardGroup<Acc> state{s.head_dim, g.dp,  g.columns, x.qt,  x.q,      x.dot,
                                 x.dout,     x.lse, x.delta,   x.dqt, x.scores, x.dscores};
  for (int64_t first = unit.first; first < unit.last; first += g.blocks) {
    const Span span{unit.head, first, std::min(first + g.blocks, unit.last)};
    x.bounds.fill(s, g, span);
    load_group(s, g, in, span, x);
    for_each_tile(s, g, in.in, span, x.bounds, x.k, x.v, [&](const Tile<Acc>& t, bool own, int64_t row) {
      if (!own) {
        routines.backward(state, t, x.dk + (row - base) * g.dp, x.dv + (row - base) * g.dp);
        return;
      }
      for (Acc* p : {x.dk_own, x.dv_own}) std::fill_n(p, int64_t(t.n) * g.dp, Acc{0});
      routines.backward(state, t, x.dk_own, x.dv_own);
      pack(s, g.dp, span.head, x.dk_own, row, t.n, out.dk_blk);
      pack(s, g.dp, span.head, x.dv_own, row, t.n, out.dv_blk);
    });
    const Acc scale = static_cast<Acc>(s.scale);
    for_each_row(s, g, span, [&](int c, int64_t offset) {
      for (int d = 0; d < s.head_dim; ++d)
        out.dq[offset + d] = store<T, Acc>(x.dqt[int64_t(d) * g.columns + c] * scale);
    });
  }
  pack(s, g.dp, unit.head, x.dk, base, keys, out.dk_ctx);
  pack(s, g.dp, unit.head, x.dv, base, keys, out.dv_ctx);
}

}  // namespace

template <typename T, typename Acc>
void attention_forward_cpu(const AttentionShape& s, const AttentionInputs<T>& in,
                           const ForwardOutputs<T, Acc>& outputs) {
  const int64_t step = GroupShape(s).blocks;
  std::vector<Span> units;
  for (int head = 0; head < s.kv_heads; ++head)
    for (int64_t j = 0; j < s.anchors; j += step) units.push_back({head, j, std::min(j + step, s.anchors)});
  run_units(units, s, [&](const Span& span) { forward_group(s, in, outputs, span); });
}

template <typename T, typename Acc>
void attention_backward_cpu(const AttentionShape& s, const BackwardInputs<T, Acc>& in, const Gradients<T>& out) {
  // Context that no block sees has no unit, and a gradient of zero.
  const int64_t context = s.tokens * s.kv_heads * s.head_dim;
  for (T* p : {out.dk_ctx, out.dv_ctx}) std::fill_n(p, context, T{});
  std::vector<Span> units;
  for (int head = 0; head < s.kv_heads; ++head) {
    for (int64_t first = 0, j = 1; first < s.anchors; ++j) {
      if (j < s.anchors && s.starts[j] < s.ends[j - 1]) continue;
      units.push_back({head, first, j});
      first = j;
    }
  }
  run_units(units, s, [&](const Span& unit) { backward_unit(s, in, out, unit); });
}

#define DFLASH_INSTANTIATE(T, Acc)                                                                   \
  template void attention_forward_cpu<T, Acc>(const AttentionShape&, const AttentionInputs<T>&,      \
                                              const ForwardOutputs<T, Acc>&);                        \
  template void attention_backward_cpu<T, Acc>(const AttentionShape&, const BackwardInputs<T, Acc>&, \
                                               const Gradients<T>&);
DFLASH_INSTANTIATE(float, float)
DFLASH_INSTANTIATE(Bf16, float)
DFLASH_INSTANTIATE(double, double)

}  // namespace dflash
