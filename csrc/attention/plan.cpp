// The plan on the CPU; plan_kernel.h computes the same integers.
#include "attention/plan.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace dflash {
namespace {

// order = 0..count-1 by falling weight, equal ones ascending.
template <typename Weight>
void heaviest_first(int32_t* order, int32_t count, const Weight& weight_of) {
  std::vector<int32_t> weights(count);
  for (int32_t i = 0; i < count; ++i) weights[i] = weight_of(i);
  std::iota(order, order + count, 0);
  std::stable_sort(order, order + count, [&](int32_t a, int32_t b) { return weights[a] > weights[b]; });
}

}  // namespace

void plan_cpu(const PlanArgs& args) {
  const int32_t tokens = args.num_tokens, anchors = args.num_anchors, tiles = tile_count(tokens);
  // Anchors ascend, so one walk over the row finds each anchor's document start.
  int32_t position = 0, document_start = 0;
  for (int32_t j = 0; j < anchors; ++j) {
    const int32_t anchor = std::clamp(args.anchors[j], 0, tokens);
    for (; position <= anchor && position < tokens; ++position) {
      if (position == 0 || args.doc_ids[position] != args.doc_ids[position - 1]) document_start = position;
    }
    const int32_t lower = args.window > 0 ? anchor - args.window + 1 : 0;
    args.ends[j] = anchor;
    // A window of 1 leaves slot 0 no context at all: its lower bound is the anchor itself.
    args.starts[j] = std::min(std::max(document_start, lower), anchor);
  }
  for (int32_t t = 0; t < tiles; ++t) {
    args.tile_ranges[2 * t] = first_above(args.ends, anchors, t * kTile);
    args.tile_ranges[2 * t + 1] = first_above(args.starts, anchors, std::min((t + 1) * kTile, tokens) - 1);
  }
  heaviest_first(args.order, item_count(anchors, args.block_size, args.group),
                 [&](int32_t item) { return item_weight(args, item); });
  heaviest_first(args.tile_order, tiles, [&](int32_t tile) { return tile_weight(args, tile); });
}

}  // namespace dflash
