// What the GPU kernels ask of the machine, one function per instruction: PTX under nvcc, and an emulated machine
// (tests/emulator) where DFLASH_EMULATE is defined, so that the same kernel source also runs, and is tested, on a CPU.
//
// Fragment layouts are the PTX ISA's ("Matrix fragments for mma.m16n8k16", "Asynchronous warpgroup level matrix
// instructions"). With g = lane / 4 and c = lane % 4:
//   a[0] row g, columns 2c, 2c+1 · a[1] row g+8 · a[2], a[3] the same rows, columns + 8     (16 x 16, two per register)
//   d[4j + 0], d[4j + 1] row g, columns 8j + 2c, 8j + 2c + 1 · d[4j + 2], d[4j + 3] row g+8  (fp32)
// so the accumulator of one product, packed in pairs, is the left operand of the next. A warpgroup's accumulator is the
// same per warp, warp w holding rows 16w .. 16w + 15.
#pragma once

#include <cstdint>

#include "attention/attention.h"

#ifdef DFLASH_EMULATE
#include "emulator.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DFLASH_DEVICE __device__ __forceinline__
#define DFLASH_GLOBAL __global__
#define DFLASH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define DFLASH_PARAMETER __grid_constant__
// wgmma, TMA and setmaxnreg exist only where the code is compiled for sm_90a: kernels that use them have no body
// elsewhere.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DFLASH_HOPPER 1
#endif

namespace dflash::gpu {

inline constexpr unsigned kAllLanes = 0xffffffffu;
// Swizzled tiles need 1024-byte alignment, which the start of dynamic shared memory does not promise.
inline constexpr int kSharedAlign = 1024;

DFLASH_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// For a loop's body: what is worked out from this is not kept in registers from one turn to the next.
DFLASH_DEVICE int fresh_thread_index() {
  int index = thread_index();
  asm volatile("" : "+r"(index));
  return index;
}
DFLASH_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
DFLASH_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
DFLASH_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
DFLASH_DEVICE char* shared_memory() {
  extern __shared__ char dflash_shared[];
  const uint32_t at = shared_address(dflash_shared);
  return dflash_shared + ((at + kSharedAlign - 1) / kSharedAlign * kSharedAlign - at);
}

DFLASH_DEVICE void sync_threads() { __syncthreads(); }
DFLASH_DEVICE void sync_warp() { __syncwarp(); }
// Barrier number `id` (1 .. 15) among `threads` threads of the block, whole warps.
DFLASH_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DFLASH_DEVICE int shuffle(int value, int lane) { return __shfl_sync(kAllLanes, value, lane); }
DFLASH_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(kAllLanes, value, mask); }
DFLASH_DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(kAllLanes, value, mask); }
DFLASH_DEVICE int shuffle_up(int value, int delta) { return __shfl_up_sync(kAllLanes, value, delta); }
DFLASH_DEVICE unsigned ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }
DFLASH_DEVICE unsigned match_any(int value) { return __match_any_sync(kAllLanes, value); }
// Shared or device memory; returns what was there.
DFLASH_DEVICE int atomic_add(int* p, int value) { return atomicAdd(p, value); }
DFLASH_DEVICE int popc(unsigned bits) { return __popc(bits); }
DFLASH_DEVICE int clz(unsigned bits) { return __clz(static_cast<int>(bits)); }

// 2^x to 2 ulp; 0 for -inf.
DFLASH_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers in one register, `low` in the low half; round to nearest even.
template <Half kType>
DFLASH_DEVICE uint32_t pack(float low, float high) {
  if constexpr (kType == Half::kBf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}
// bf16 is the upper half of an fp32: one instruction a number, where the conversion of a pair takes two.
template <Half kType>
DFLASH_DEVICE void unpack(uint32_t bits, float& low, float& high) {
  if constexpr (kType == Half::kBf16) {
    low = __uint_as_float(bits << 16);
    high = __uint_as_float(bits & 0xffff0000u);
  } else {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&bits));
    low = pair.x;
    high = pair.y;
  }
}

// Four 8 x 8 matrices of 16-bit numbers: lane l gives the address of row l % 8 of matrix l / 8, and gets of matrix m in
// r[m] row lane / 4, columns 2 (lane % 4) and + 1; transposed: of its transpose.
DFLASH_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
DFLASH_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8). b0 holds rows 2c, 2c+1 of column g, b1 the rows 8 further.
template <Half kType>
DFLASH_DEVICE void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kType == Half::kBf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// 16 bytes from global to shared memory in the background; zeros where not `valid` (global is then not read).
DFLASH_DEVICE void copy_async(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
DFLASH_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's committed groups are on their way.
template <int kPending>
DFLASH_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Multiprocessors of the current device. Returns a cudaError_t.
inline int count_multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return static_cast<int>(error);
  return static_cast<int>(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}
// Zeros in device memory, in the stream's order. Returns a cudaError_t.
inline int clear(void* memory, size_t bytes, void* stream) {
  return static_cast<int>(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}

struct Launch {
  int64_t blocks;
  int threads;
  int shared;  // bytes of dynamic shared memory
};

// Returns a cudaError_t.
template <typename Parameters>
int launch(void (*kernel)(Parameters), const Launch& how, const Parameters& parameters, void* stream) {
  const int shared = how.shared + kSharedAlign;
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  return static_cast<int>(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(how.blocks), dim3(how.threads),
                                           arguments, shared, static_cast<cudaStream_t>(stream)));
}

}  // namespace dflash::gpu

#endif

namespace dflash::gpu {

inline constexpr float kLog2E = 1.4426950408889634f;
// What a launcher answers when it cannot run the arguments; cudaErrorInvalidValue.
inline constexpr int kInvalidValue = 1;

// Sixteen bytes, as they are read and written; as 16-bit numbers, eight.
struct alignas(16) Chunk {
  uint32_t words[4];
};

// By value: from references the chunks would be read word by word.
template <Half kType>
DFLASH_DEVICE float dot(Chunk a, Chunk b) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float a0, a1, b0, b1;
    unpack<kType>(a.words[i], a0, a1);
    unpack<kType>(b.words[i], b0, b1);
    sum += a0 * b0 + a1 * b1;
  }
  return sum;
}

}  // namespace dflash::gpu
