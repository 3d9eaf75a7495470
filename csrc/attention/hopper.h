// Hopper's own instructions (sm_90a), one function each: mbarriers, bulk tensor copies (TMA), warpgroup products
// (wgmma). Emulated like ptx.h by tests/emulator/emulator_hopper.h.
//
// Shared tiles that TMA fills and wgmma reads are (rows, 64) 16-bit numbers: 128 bytes a row, swizzled in 128-byte
// mode, that is bits 4..6 of an address are XORed with bits 7..9. A wider matrix is several such tiles ("panels"), one
// after another. Panels start at multiples of 1024 bytes.
#pragma once

#include "attention/ptx.h"

namespace dflash::gpu {

inline constexpr int kPanel = 64;  // columns
inline constexpr int kPanelRowBytes = 128;
inline constexpr int kSwizzleRows = 8;

// Shared-memory matrix descriptor of wgmma (PTX ISA, "Matrix descriptor"): address / 16 in bits 0-13, leading byte
// offset / 16 in 16-29, stride byte offset / 16 in 32-45, 128-byte swizzle = 1 in 62-63. The address is that of an
// aligned tile and `further` bytes from there. No sum of the two reaches 2^18 where blocks of threads form no clusters
// (a cluster's addresses carry the block's rank above that), so nothing is masked: where `further` and the offsets are
// constants, they are encoded when this is compiled, and a descriptor costs one addition.
DFLASH_DEVICE uint64_t descriptor(uint32_t tile, uint32_t further, uint32_t leading, uint32_t stride) {
  const uint32_t low = (tile >> 4) + ((further >> 4) + (leading >> 4 << 16));
  return static_cast<uint64_t>(stride >> 4 | 1u << 30) << 32 | low;
}

// Rows of the panels are rows of the operand (of A, or columns of B), depth runs along a row: step k of 16 starts 32
// bytes further in the same panel. The stride is from 8 rows to the next 8; the leading offset is not used.
DFLASH_DEVICE uint64_t operand(uint32_t panels, int panel_rows, int step) {
  const uint32_t further = static_cast<uint32_t>(step / 4 * panel_rows * kPanelRowBytes + step % 4 * 32);
  return descriptor(panels, further, 16, kSwizzleRows * kPanelRowBytes);
}

// Rows of the panels are the depth, columns are columns of B ("MN-major", transposed): step k of 16 starts 16 rows
// further. The stride is from 8 rows to the next 8, the leading offset from one panel to the next.
DFLASH_DEVICE uint64_t operand_transposed(uint32_t panels, int panel_rows, int step) {
  return descriptor(panels, static_cast<uint32_t>(step * 16 * kPanelRowBytes),
                    static_cast<uint32_t>(panel_rows * kPanelRowBytes), kSwizzleRows * kPanelRowBytes);
}

// A tensor as TMA sees it: up to three dimensions, the innermost contiguous. A box of it is copied at a time; what lies
// outside the tensor arrives as zeros.
struct TensorShape {
  const void* base;
  uint64_t sizes[3];    // elements
  uint64_t strides[2];  // bytes, of dimensions 1 and 2; multiples of 16
  uint32_t box[3];      // elements; box[0] = kPanel
};

}  // namespace dflash::gpu

#ifdef DFLASH_EMULATE
#include "emulator_hopper.h"
#else

#ifdef DFLASH_WATCHDOG
#include "attention/watchdog.h"
#endif

namespace dflash::gpu {

using TensorMap = CUtensorMap;

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Looked up at run time: linking libcuda would keep the library from loading on a machine without a driver.
inline EncodeTiled find_encode_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(function)
                                                                      : nullptr;
}

// Returns a cudaError_t.
inline int encode(TensorMap* map, const TensorShape& shape, Half type) {
  static const EncodeTiled encode_tiled = find_encode_function();
  if (encode_tiled == nullptr) return static_cast<int>(cudaErrorNotSupported);
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result =
      encode_tiled(map, type == Half::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
                   const_cast<void*>(shape.base), reinterpret_cast<const cuuint64_t*>(shape.sizes),
                   reinterpret_cast<const cuuint64_t*>(shape.strides), shape.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<int>(result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue);
}

// --- mbarriers: 8 bytes of shared memory, used in phases ---

DFLASH_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the initialisations, before anybody else (copy engine included) uses the barriers.
DFLASH_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DFLASH_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// One arrival, and `bytes` that copies will bring in this phase.
DFLASH_DEVICE void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Returns once the phase of this parity (the first is 0) is over.
DFLASH_DEVICE void barrier_wait(uint32_t barrier, int parity) {
#ifdef DFLASH_WATCHDOG
  watched_wait(barrier, parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// --- bulk copies ---

// The box at (c0, c1, c2) to shared memory; counts its bytes on the barrier when it is there.
DFLASH_DEVICE void copy_box(uint32_t shared, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
// Between this thread's ordinary writes to shared memory and their use by wgmma or TMA (then a barrier).
DFLASH_DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- registers of a warpgroup ---

template <int kCount>
DFLASH_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
DFLASH_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --- warpgroup products ---
// d (64 x kN) = a b, plus d where `add`; depth 16; d is kN / 2 registers. Issued in the background: d and a left
// operand in registers must be left alone until products_wait.

DFLASH_DEVICE void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DFLASH_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending committed groups of products are on their way.
template <int kPending>
DFLASH_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Work that is to overlap with products ends here, before their wait; x >= 0 is a result of it. ptxas moves a wait to
// the start of its basic block, above the work; a branch on the result ends the block.
DFLASH_DEVICE void before_wait(float x) {
  if (x < 0) asm volatile("nanosleep.u32 0;" ::: "memory");
}
// Keeps the compiler from moving uses of d across a wait: it does not know that products write d in the background.
template <int kCount>
DFLASH_DEVICE void settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operand lists: numbers of the registers in the text, and the registers themselves.
#define DFLASH_TEXT_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DFLASH_TEXT_32                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DFLASH_TEXT_64                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DFLASH_D8(i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define DFLASH_DATA_8 DFLASH_D8(0)
#define DFLASH_DATA_16 DFLASH_DATA_8, DFLASH_D8(8)
#define DFLASH_DATA_32 DFLASH_DATA_16, DFLASH_D8(16), DFLASH_D8(24)
#define DFLASH_DATA_64 DFLASH_DATA_32, DFLASH_D8(32), DFLASH_D8(40), DFLASH_D8(48), DFLASH_D8(56)

// Left operand in shared memory: a, b descriptors at %COUNT and the next, the predicate's number after them.
#define DFLASH_SS(COUNT, N, TYPE, TRANSPOSED, A, B, ADD)                                               \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" ADD                                            \
               ", 0;\n"                                                                                \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" DFLASH_TEXT_##COUNT \
               "}, %" A ", %" B ", add, 1, 1, 0, " TRANSPOSED ";\n}"                                   \
               : DFLASH_DATA_##COUNT                                                                   \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))

// Left operand in four registers.
#define DFLASH_RS(COUNT, N, TYPE, TRANSPOSED, A0, A1, A2, A3, B, ADD)                                  \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" ADD                                            \
               ", 0;\n"                                                                                \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" DFLASH_TEXT_##COUNT \
               "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B ", add, 1, 1, " TRANSPOSED ";\n}"        \
               : DFLASH_DATA_##COUNT                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

// a (64 x 16) and b (kN x 16) both by rows, depth along the rows.
template <int kN, Half kType>
DFLASH_DEVICE void product(float* d, uint64_t a, uint64_t b, bool add) {
  static_assert(kN == 16 || kN == 64 || kN == 128);
  constexpr bool kBf16 = kType == Half::kBf16;
  if constexpr (kN == 16 && kBf16) DFLASH_SS(8, "16", "bf16", "0", "8", "9", "10");
  if constexpr (kN == 16 && !kBf16) DFLASH_SS(8, "16", "f16", "0", "8", "9", "10");
  if constexpr (kN == 64 && kBf16) DFLASH_SS(32, "64", "bf16", "0", "32", "33", "34");
  if constexpr (kN == 64 && !kBf16) DFLASH_SS(32, "64", "f16", "0", "32", "33", "34");
  if constexpr (kN == 128 && kBf16) DFLASH_SS(64, "128", "bf16", "0", "64", "65", "66");
  if constexpr (kN == 128 && !kBf16) DFLASH_SS(64, "128", "f16", "0", "64", "65", "66");
}

// a (64 x 16) in registers, b (16 x kN) by rows, columns along the rows.
template <int kN, Half kType>
DFLASH_DEVICE void product_transposed(float* d, const uint32_t* a, uint64_t b, bool add) {
  static_assert(kN == 64 || kN == 128);
  constexpr bool kBf16 = kType == Half::kBf16;
  if constexpr (kN == 64 && kBf16) DFLASH_RS(32, "64", "bf16", "1", "32", "33", "34", "35", "36", "37");
  if constexpr (kN == 64 && !kBf16) DFLASH_RS(32, "64", "f16", "1", "32", "33", "34", "35", "36", "37");
  if constexpr (kN == 128 && kBf16) DFLASH_RS(64, "128", "bf16", "1", "64", "65", "66", "67", "68", "69");
  if constexpr (kN == 128 && !kBf16) DFLASH_RS(64, "128", "f16", "1", "64", "65", "66", "67", "68", "69");
}

}  // namespace dflash::gpu

#endif
