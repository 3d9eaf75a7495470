#include "pointwise/norm_kernel.h"

namespace dflash {

namespace {

constexpr int64_t kMostBlocks = 512;     // of a backward: four for each SM of a large GPU
constexpr int64_t kMostColumns = 16384;  // dweight of a row has to fit shared memory
constexpr int64_t kMostHeads = int64_t{1} << 31;

int64_t chunk_numbers(const Norm& args) { return args.number == Number::kFloat ? 4 : 8; }

// Lanes of a head: enough for a chunk of each half.
int head_lanes(const Norm& args) {
  int lanes = 1;
  while (lanes * chunk_numbers(args) < args.size / 2) lanes *= 2;
  return lanes;
}

bool fits(const Norm& args) {
  if (args.rows * args.heads >= kMostHeads || args.size <= 0) return false;
  if (!args.rotated) return args.heads == 1 && args.size % chunk_numbers(args) == 0 && args.size <= kMostColumns;
  return args.size % (2 * chunk_numbers(args)) == 0 && head_lanes(args) <= gpu::kWarpLanes;
}

// Of a row: no more than it has chunks.
int row_threads(const Norm& args) {
  const int64_t warps = (args.size / chunk_numbers(args) + gpu::kWarpLanes - 1) / gpu::kWarpLanes;
  return static_cast<int>(warps < gpu::kNormWarps ? warps : gpu::kNormWarps) * gpu::kWarpLanes;
}

// Thread blocks that take all heads at once.
int64_t head_blocks(const Norm& args) {
  const int64_t heads = gpu::kNormThreads / head_lanes(args);
  return (args.rows * args.heads + heads - 1) / heads;
}

template <Number kNumber>
int launch_norm(const Norm& args, void* stream) {
  if (!args.rotated)
    return gpu::launch(gpu::norm_rows<kNumber>, {args.rows, row_threads(args), gpu::kNormWarps * int(sizeof(float))},
                       args, stream);
  return gpu::launch(gpu::norm_heads<kNumber>, {head_blocks(args), gpu::kNormThreads, 0},
                     gpu::HeadNorm{args, head_lanes(args)}, stream);
}

template <Number kNumber>
int launch_norm_backward(const Norm& args, void* stream) {
  int error = 0;
  const int numbers = static_cast<int>(args.size) * int(sizeof(float)), parts = gpu::kNormWarps * int(sizeof(float));
  if (args.blocks > 0 && !args.rotated)
    error = gpu::launch(gpu::norm_rows_backward<kNumber>, {args.blocks, row_threads(args), 2 * parts + numbers}, args,
                        stream);
  if (args.blocks > 0 && args.rotated)
    error = gpu::launch(gpu::norm_heads_backward<kNumber>, {args.blocks, gpu::kNormThreads, gpu::kNormWarps * numbers},
                        gpu::HeadNorm{args, head_lanes(args)}, stream);
  if (error != 0) return error;
  const int64_t blocks = (args.size + gpu::kWeightColumns - 1) / gpu::kWeightColumns;
  return gpu::launch(gpu::norm_weight<kNumber>, {blocks, gpu::kNormThreads, gpu::kNormThreads * int(sizeof(float))},
                     args, stream);
}

}  // namespace

int64_t norm_blocks(const Norm& args) {
  const int64_t blocks = !args.rotated ? args.rows : head_blocks(args);
  return blocks < kMostBlocks ? blocks : kMostBlocks;
}

int norm_cuda(const Norm& args, void* stream) {
  if (!fits(args)) return gpu::kInvalidValue;
  if (args.rows == 0) return 0;
  return gpu::for_number(args.number, [&]<Number kNumber>() { return launch_norm<kNumber>(args, stream); });
}

int norm_backward_cuda(const Norm& args, void* stream) {
  if (!fits(args)) return gpu::kInvalidValue;
  return gpu::for_number(args.number, [&]<Number kNumber>() { return launch_norm_backward<kNumber>(args, stream); });
}

}  // namespace dflash
