// The GPU kernels on the emulated machine, callable from Python (tests/ops/test_gpu_emulated.py). All memory is the
// host's.
#include "attention/sm80_backward.cu"
#include "attention/sm80_forward.cu"
#include "attention/sm90_backward.cu"
#include "attention/sm90_forward.cu"
#include "run.h"

using namespace dflash;

extern "C" {

struct Problem {
  int64_t tokens, anchors;
  int32_t block_size, q_heads, kv_heads, head_dim, window, causal_block, fp16, items;
  double scale;
  const int32_t *starts, *ends, *order, *tile_ranges, *tile_order;
  const void *q, *k_ctx, *v_ctx, *k_blk, *v_blk, *dout;
  void *out, *lse, *delta, *dq, *dk_ctx, *dv_ctx, *dk_blk, *dv_blk, *taken;

  AttentionShape shape() const {
    return {tokens, anchors, block_size, q_heads, kv_heads, head_dim, window, causal_block != 0, scale, starts, ends};
  }
  Half type() const { return fp16 != 0 ? Half::kFp16 : Half::kBf16; }
};

// kernel: 80 or 90.
const char* forward(const Problem* p, int kernel, unsigned seed) {
  const GpuForward args{p->shape(),
                        p->order,
                        p->items,
                        p->type(),
                        p->q,
                        p->k_ctx,
                        p->v_ctx,
                        p->k_blk,
                        p->v_blk,
                        p->out,
                        static_cast<float*>(p->lse),
                        static_cast<int32_t*>(p->taken)};
  return emulate(seed, [&] { return kernel == 90 ? forward_sm90(args, nullptr) : forward_sm80(args, nullptr); });
}

const char* backward(const Problem* p, int kernel, unsigned seed) {
  const GpuBackward args{p->shape(),
                         p->order,
                         p->tile_ranges,
                         p->tile_order,
                         p->items,
                         p->type(),
                         p->dout,
                         p->q,
                         p->k_ctx,
                         p->v_ctx,
                         p->k_blk,
                         p->v_blk,
                         p->out,
                         static_cast<const float*>(p->lse),
                         static_cast<float*>(p->delta),
                         static_cast<int32_t*>(p->taken),
                         p->dq,
                         p->dk_ctx,
                         p->dv_ctx,
                         p->dk_blk,
                         p->dv_blk};
  return emulate(seed, [&] { return kernel == 90 ? backward_sm90(args, nullptr) : backward_sm80(args, nullptr); });
}

// wgmma's descriptors: rows by depth, and depth by rows.
uint64_t operand(uint32_t address, int rows, int step) { return gpu::operand(address, rows, step); }
uint64_t operand_transposed(uint32_t address, int rows, int step) {
  return gpu::operand_transposed(address, rows, step);
}

// --- rows.h and sm80_tile.h by themselves ---

void divide(const int32_t* values, int count, int by, int32_t* quotients) {
  const Divisor divisor = Divisor::of(by);
  for (int i = 0; i < count; ++i) quotients[i] = divisor.quotient(values[i]);
}

int swizzle(int head_dim, int row, int chunk) {
  switch (head_dim) {
    case 64:
      return gpu::sm80::swizzled<64>(row, chunk);
    case 96:
      return gpu::sm80::swizzled<96>(row, chunk);
    case 128:
      return gpu::sm80::swizzled<128>(row, chunk);
    default:
      return gpu::sm80::swizzled<256>(row, chunk);
  }
}

// (items * kItemRows, 2): position, or -1, and head of each row of each item.
void item_rows(const Problem* p, int32_t* table) {
  const Rows rows = Rows::of(p->shape());
  for (int i = 0; i < p->items * kItemRows; ++i) {
    table[2 * i] = rows.item_position(i / kItemRows, i % kItemRows);
    table[2 * i + 1] = rows.group_head(i % kItemRows % kUnitRows);
  }
}

// (A * S, 4): each position's interval of the context, and of the own rows.
void intervals(const Problem* p, int32_t* table) {
  const Rows rows = Rows::of(p->shape());
  for (int position = 0; position < rows.positions; ++position) {
    const Interval context = rows.sees(Segment::kContext, position), own = rows.sees(Segment::kOwn, position);
    for (const int bound : {context.lo, context.hi, own.lo, own.hi}) *table++ = bound;
  }
}

// (tiles, 4): segment, first key and the limits of each tile of the walk over `count` positions; returns the tiles.
int key_walk(const Problem* p, int position, int count, int keys, int32_t* table, int most) {
  const Rows rows = Rows::of(p->shape());
  int tiles = 0;
  for (KeyWalk walk = KeyWalk::of(rows, position, count); !walk.done() && tiles < most; walk.advance(keys), ++tiles) {
    const Interval limits = walk.limits();
    for (const int x : {static_cast<int>(walk.segment), walk.p, limits.lo, limits.hi}) *table++ = x;
  }
  return tiles;
}

}  // extern "C"
