// The plan on the CPU; plan.cu computes the same integers.
#include "attention/plan.h"

#include <algorithm>
#include <numeric>

namespace dflash {

void plan_cpu(const PlanArgs& args) {
  const int32_t tokens = args.num_tokens, anchors = args.num_anchors;
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
  const int32_t tiles = (tokens + kTile - 1) / kTile;
  for (int32_t t = 0; t < tiles; ++t) {
    args.tile_ranges[2 * t] = first_above(args.ends, anchors, t * kTile);
    args.tile_ranges[2 * t + 1] = first_above(args.starts, anchors, std::min((t + 1) * kTile, tokens) - 1);
  }
  std::iota(args.order, args.order + anchors, 0);
  std::stable_sort(args.order, args.order + anchors, [&](int32_t a, int32_t b) {
    return weight(args.starts[a], args.ends[a]) > weight(args.starts[b], args.ends[b]);
  });
}

}  // namespace dflash
