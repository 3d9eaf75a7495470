// The GPU kernels on the emulated machine, callable from Python (tests/test_gpu_emulated.py). All memory is the host's.
#include "attention/sm80_backward.cu"
#include "attention/sm80_forward.cu"
#include "run.h"

using namespace dflash;

extern "C" {

struct Problem {
  int64_t tokens, anchors;
  int32_t block_size, q_heads, kv_heads, head_dim, window, causal_block, fp16, items;
  double scale;
  const int32_t *starts, *ends, *order, *tile_ranges, *tile_order;
  const void *q, *k_ctx, *v_ctx, *k_blk, *v_blk, *dout;
  void *out, *lse, *delta, *dq, *dk_ctx, *dv_ctx, *dk_blk, *dv_blk;

  AttentionShape shape() const {
    return {tokens, anchors, block_size, q_heads, kv_heads, head_dim, window, causal_block != 0, scale, starts, ends};
  }
  Half type() const { return fp16 != 0 ? Half::kFp16 : Half::kBf16; }
};

const char* sm80_forward(const Problem* p, unsigned seed) {
  return emulate(seed, [&] {
    return forward_sm80({p->shape(), p->order, p->items, p->type(), p->q, p->k_ctx, p->v_ctx, p->k_blk, p->v_blk,
                         p->out, static_cast<float*>(p->lse)},
                        nullptr);
  });
}

const char* sm80_backward(const Problem* p, unsigned seed) {
  return emulate(seed, [&] {
    return backward_sm80({p->shape(),
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
                          p->dq,
                          p->dk_ctx,
                          p->dv_ctx,
                          p->dk_blk,
                          p->dv_blk},
                         nullptr);
  });
}

}  // extern "C"
