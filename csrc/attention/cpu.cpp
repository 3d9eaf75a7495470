// Attention on the CPU: which tiles, and in what order. The arithmetic of a tile is in tile_isa.cpp.
//
// The forward and the queries' gradient take a unit of queries and stream the keys that it sees past it; the keys'
// gradients take a tile of keys and stream the queries that see it. So every row of every output is written by one unit
// alone, which sums it in one order: no atomics, no scratch that grows with the row, work for all threads also in one
// long document, and a result that does not depend on their number. The price is that the backward computes scores and
// the probabilities' gradients twice: 7 products where 5 would do.
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

// Work that one thread does alone: packed rows, or keys, [first, last) of one kv head.
struct Unit {
  int head;
  int64_t first, last;
  bool own;  // which sequence the keys are of
  int64_t weight;
};

// Each thread calls run(next), and next() hands it units until nullptr, heaviest first: units differ by orders of
// magnitude.
template <typename Run>
void run_units(std::vector<Unit>& units, const Run& run) {
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.weight > b.weight; });
  std::atomic<size_t> taken{0};
  torch::stable::parallel_for(0, static_cast<int64_t>(units.size()), 1, [&](int64_t, int64_t) {
    run([&]() -> const Unit* {
      const size_t i = taken++;
      return i < units.size() ? &units[i] : nullptr;
    });
  });
}

std::vector<Unit> query_units(const AttentionShape& s) {
  const Layout l(s);
  std::vector<Unit> units;
  const int64_t rows = s.anchors * l.block_rows, step = l.step(kColumns);
  for (int head = 0; head < s.kv_heads; ++head) {
    for (int64_t r = 0; r < rows; r += step) {
      const int64_t last = std::min(r + step, rows);
      const int64_t keys = s.ends[(last - 1) / l.block_rows] - s.starts[r / l.block_rows];
      units.push_back({head, r, last, false, (last - r) * (keys + s.block_size)});
    }
  }
  return units;
}

// The first block for which `past` holds; it holds for all after that.
template <typename Past>
int64_t first_block(const AttentionShape& s, const Past& past) {
  int64_t low = 0, high = s.anchors;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (past(middle))
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Blocks that see keys [first, last), as a range; inside it there may be blocks that see nothing at all.
template <typename T>
std::pair<int64_t, int64_t> seeing_blocks(const Keys<T>& keys, int64_t first, int64_t last) {
  return {first_block(keys.s, [&](int64_t j) { return keys.end(j) > first; }),
          first_block(keys.s, [&](int64_t j) { return keys.start(j) >= last; })};
}

template <typename T>
std::vector<Unit> key_units(const AttentionShape& s, const AttentionInputs<T>& in) {
  std::vector<Unit> units;
  for (const Keys<T>& keys : {context(s, in), own_rows(s, in)}) {
    for (int64_t p = 0; p < keys.rows(); p += kColumns) {
      const int64_t last = std::min(p + kColumns, keys.rows());
      const auto [begin, end] = seeing_blocks(keys, p, last);
      for (int head = 0; head < s.kv_heads; ++head) units.push_back({head, p, last, keys.own, end - begin});
    }
  }
  return units;
}

template <typename T, typename Acc>
struct ForwardPass {
  const AttentionShape& s;
  const AttentionInputs<T>& in;
  const ForwardOutputs<T, Acc>& outputs;
  const Layout l{s};
  const int64_t square = int64_t(s.head_dim) * kStride;
  Transposer<Acc> transposer{s.head_dim, l.dp};
  Bounds<Acc> bounds{};
  Buffer<Acc> qt{square}, ot{square}, peak{kColumns}, total{kColumns}, rescaling{kColumns};
  Buffer<Acc> k{int64_t(kRows) * l.dp}, v{int64_t(kRows) * l.dp}, scores{int64_t(kRows) * kStride};

  void run(const Unit& unit) {
    const Rows rows{unit.head, unit.first, unit.last};
    const int64_t n = unit.last - unit.first;
    const auto row = [&](int64_t c) { return query_row(s, l, unit.head, unit.first + c); };
    transposer.template load<T>(
        n, static_cast<Acc>(s.scale), [&](int64_t c) { return in.q + row(c) * s.head_dim; }, qt);
    std::fill_n(ot + 0, square, Acc{0});
    std::fill_n(peak + 0, kColumns, std::numeric_limits<Acc>::lowest());
    std::fill_n(total + 0, kColumns, Acc{0});
    const TileRoutines<Acc>& routines = tile_routines<Acc>();
    const ForwardState<Acc> state{s.head_dim, l.dp, qt, ot, peak, total, rescaling, scores};
    for (const Keys<T>& keys : {own_rows(s, in), context(s, in)})
      for_each_tile<T, Acc>(l, keys, rows, bounds, k, v, [&](const KeyTile<Acc>& t) { routines.forward(state, t); });
    transposer.template store<T>(
        n, [&](int64_t c) { return Acc{1} / total[c]; }, [&](int64_t c) { return outputs.out + row(c) * s.head_dim; },
        ot);
    for (int64_t c = 0; c < n; ++c) outputs.lse[row(c)] = peak[c] + std::log(total[c]);
  }
};

template <typename T, typename Acc>
struct Backward {
  const AttentionShape& s;
  const BackwardInputs<T, Acc>& in;
  const Gradients<T>& out;
  Acc* delta;  // (A*S, Hq) from the queries' pass to the keys'
};

// dq and delta.
template <typename T, typename Acc>
struct QueryPass {
  const Backward<T, Acc>& x;
  const AttentionShape& s{x.s};
  const Layout l{s};
  const int64_t square = int64_t(s.head_dim) * kStride;
  Transposer<Acc> transposer{s.head_dim, l.dp};
  Bounds<Acc> bounds{};
  Buffer<Acc> qt{square}, dot{square}, dqt{square}, lse{kColumns}, delta{kColumns};
  Buffer<Acc> k{int64_t(kRows) * l.dp}, v{int64_t(kRows) * l.dp};
  Buffer<Acc> scores{int64_t(kRows) * kStride}, dscores{int64_t(kRows) * kStride};

  void run(const Unit& unit) {
    const Rows rows{unit.head, unit.first, unit.last};
    const int64_t n = unit.last - unit.first;
    const Acc scale = static_cast<Acc>(s.scale);
    const auto row = [&](int64_t c) { return query_row(s, l, unit.head, unit.first + c); };
    transposer.template load<T>(n, scale, [&](int64_t c) { return x.in.in.q + row(c) * s.head_dim; }, qt);
    transposer.template load<T>(n, Acc{1}, [&](int64_t c) { return x.in.dout + row(c) * s.head_dim; }, dot);
    for (int64_t c = 0; c < n; ++c) {
      const int64_t from = row(c) * s.head_dim;
      x.delta[row(c)] = delta[c] = inner_product<T, Acc>(s.head_dim, x.in.dout + from, x.in.out + from);
      lse[c] = x.in.lse[row(c)];
    }
    std::fill_n(dqt + 0, square, Acc{0});
    const TileRoutines<Acc>& routines = tile_routines<Acc>();
    const QueryState<Acc> state{s.head_dim, l.dp, qt, dot, lse, delta, dqt, scores, dscores};
    for (const Keys<T>& keys : {own_rows(s, x.in.in), context(s, x.in.in)})
      for_each_tile<T, Acc>(l, keys, rows, bounds, k, v,
                            [&](const KeyTile<Acc>& t) { routines.query_gradient(state, t); });
    transposer.template store<T>(
        n, [&](int64_t) { return scale; }, [&](int64_t c) { return x.out.dq + row(c) * s.head_dim; }, dqt);
  }
};

// dk_ctx and dv_ctx, dk_blk and dv_blk.
template <typename T, typename Acc>
struct KeyPass {
  const Backward<T, Acc>& x;
  const AttentionShape& s{x.s};
  const Layout l{s};
  const int64_t square = int64_t(s.head_dim) * kStride;
  Transposer<Acc> transposer{s.head_dim, l.dp};
  Bounds<Acc> bounds{};
  Buffer<Acc> kt{square}, vt{square}, dkt{square}, dvt{square};
  Buffer<Acc> q{int64_t(kRows) * l.dp}, dout{int64_t(kRows) * l.dp}, lse{kRows}, delta{kRows};
  Buffer<Acc> scores{int64_t(kRows) * kStride}, dscores{int64_t(kRows) * kStride};

  void run(const Unit& unit) {
    const Keys<T> keys = unit.own ? own_rows(s, x.in.in) : context(s, x.in.in);
    const int64_t n = unit.last - unit.first;
    const auto at = [&](int64_t c) { return keys.at(unit.first + c, unit.head); };
    transposer.template load<T>(n, Acc{1}, [&](int64_t c) { return keys.k + at(c); }, kt);
    transposer.template load<T>(n, Acc{1}, [&](int64_t c) { return keys.v + at(c); }, vt);
    std::fill_n(dkt + 0, square, Acc{0});
    std::fill_n(dvt + 0, square, Acc{0});
    const auto [begin, end] = seeing_blocks(keys, unit.first, unit.last);
    const int64_t step = l.step(kRows), rows = end * l.block_rows;
    for (int64_t r = begin * l.block_rows; r < rows; r += step)
      stream(keys, unit, {unit.head, r, std::min(r + step, rows)});
    T *dk = unit.own ? x.out.dk_blk : x.out.dk_ctx, *dv = unit.own ? x.out.dv_blk : x.out.dv_ctx;
    const auto one = [](int64_t) { return Acc{1}; };
    transposer.template store<T>(n, one, [&](int64_t c) { return dk + at(c); }, dkt);
    transposer.template store<T>(n, one, [&](int64_t c) { return dv + at(c); }, dvt);
  }

  void stream(const Keys<T>& keys, const Unit& unit, const Rows& rows) {
    const int64_t from = keys.start(rows.first / l.block_rows), to = keys.end((rows.last - 1) / l.block_rows);
    const int64_t c0 = std::max<int64_t>(0, from - unit.first) / kPad * kPad;
    const int64_t c1 = padded(std::min(to, unit.last) - unit.first);
    if (c0 >= c1) return;
    bounds.fill(l, keys, rows, unit.first);
    const int n = static_cast<int>(rows.last - rows.first);
    const auto row = [&](int64_t i) { return query_row(s, l, rows.head, rows.first + i); };
    load_rows<T, Acc>(
        s.head_dim, l.dp, n, static_cast<Acc>(s.scale), [&](int64_t i) { return x.in.in.q + row(i) * s.head_dim; }, q);
    load_rows<T, Acc>(s.head_dim, l.dp, n, Acc{1}, [&](int64_t i) { return x.in.dout + row(i) * s.head_dim; }, dout);
    for (int i = 0; i < n; ++i) {
      lse[i] = x.in.lse[row(i)];
      delta[i] = x.delta[row(i)];
    }
    const KeyState<Acc> state{s.head_dim, l.dp, kt, vt, dkt, dvt, scores, dscores};
    tile_routines<Acc>().key_gradients(
        state, {q, dout, lse, delta, bounds.lo, bounds.hi, 0, n, static_cast<int>(c0), static_cast<int>(c1)});
  }
};

}  // namespace

template <typename T, typename Acc>
void attention_forward_cpu(const AttentionShape& s, const AttentionInputs<T>& in,
                           const ForwardOutputs<T, Acc>& outputs) {
  std::vector<Unit> units = query_units(s);
  run_units(units, [&](const auto& next) {
    ForwardPass<T, Acc> pass{s, in, outputs};
    while (const Unit* unit = next()) pass.run(*unit);
  });
}

template <typename T, typename Acc>
void attention_backward_cpu(const AttentionShape& s, const BackwardInputs<T, Acc>& in, const Gradients<T>& out) {
  const Buffer<Acc> delta(s.anchors * s.block_size * s.q_heads);
  const Backward<T, Acc> x{s, in, out, delta};
  std::vector<Unit> queries = query_units(s);
  run_units(queries, [&](const auto& next) {
    QueryPass<T, Acc> pass{x};
    while (const Unit* unit = next()) pass.run(*unit);
  });
  std::vector<Unit> keys = key_units(s, in.in);
  run_units(keys, [&](const auto& next) {
    KeyPass<T, Acc> pass{x};
    while (const Unit* unit = next()) pass.run(*unit);
  });
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
