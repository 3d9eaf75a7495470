// Hopper's pieces one at a time, without torch: boxes copied by TMA and their swizzle, each form of wgmma that the
// kernels use, against exact integers; then how fast each form of product runs alone.
//
//   nvcc -std=c++20 -O3 -Icsrc -gencode arch=compute_90a,code=sm_90a tests/gpu/probe.cu -o probe && ./probe
//
// Prints one JSON object per test. A wrong one says which rows and columns are, and which row or column of the truth
// each of them holds instead. The pieces are the kernels' own (hopper.h, sm90_tile.h). On the emulated GPU the same
// tests are run by tests/ops/test_gpu_emulated.py.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "attention/sm90_tile.h"

namespace dflash::gpu {
namespace {

constexpr int kBoxRows = 64;

#ifdef DFLASH_EMULATE

template <typename T>
T* device(const std::vector<T>& host) {
  const size_t bytes = host.size() * sizeof(T);
  T* copy = static_cast<T*>(aligned_alloc(1024, (bytes + 1023) / 1024 * 1024));
  memcpy(copy, host.data(), bytes);
  return copy;
}
template <typename T>
void fetch(std::vector<T>& host, const T* from) {
  memcpy(host.data(), from, host.size() * sizeof(T));
}
const char* finish(int error) { return error != 0 ? "the launcher refused" : nullptr; }

#else

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  printf("{\"fatal\": \"%s: %s\"}\n", what, cudaGetErrorString(error));
  exit(3);
}
template <typename T>
T* device(const std::vector<T>& host) {
  T* copy;
  check(cudaMalloc(&copy, host.size() * sizeof(T)), "allocation");
  check(cudaMemcpy(copy, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "copy to the device");
  return copy;
}
template <typename T>
void fetch(std::vector<T>& host, const T* from) {
  check(cudaMemcpy(host.data(), from, host.size() * sizeof(T), cudaMemcpyDeviceToHost), "copy from the device");
}
// What went wrong with a launch, or nullptr.
const char* finish(int error) {
  const cudaError_t code = error != 0 ? static_cast<cudaError_t>(error) : cudaDeviceSynchronize();
  return code == cudaSuccess ? nullptr : cudaGetErrorString(code);
}

#endif

// --- numbers: small integers, of which every product and sum is exact ---

uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}
float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
std::vector<uint16_t> numbers(int count, unsigned seed) {
  std::vector<uint16_t> made(count);
  uint32_t state = seed * 2654435761u + 12345;
  for (uint16_t& x : made) {
    state = state * 1664525u + 1013904223u;
    x = to_bf16(static_cast<float>(static_cast<int>(state >> 24) % 9 - 4));
  }
  return made;
}

// --- the kernels ---

DFLASH_HOST_DEVICE constexpr int after(int bytes) { return (bytes + 1023) / 1024 * 1024; }

DFLASH_DEVICE void begin(uint32_t barrier) {
  if (thread_index() == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    async_fence();
  }
  sync_threads();
}

// Where register i of this thread's part of a (64, columns) accumulator belongs.
DFLASH_DEVICE int place(int i, int columns) {
  const int lane = thread_index() % 32, row = thread_index() / 32 * 16 + lane / 4 + 8 * sm90::register_row(i);
  return row * columns + sm90::register_column(lane, i);
}

struct CopyParameters {
  TensorMap map;
  float* out;  // (kBoxRows, kPanel)
  int at[3];
};

// A box, and what arrived where.
DFLASH_GLOBAL void DFLASH_BOUNDS(128, 1) copy_kernel(const DFLASH_PARAMETER CopyParameters p) {
#ifdef DFLASH_HOPPER
  char* shared = shared_memory();
  const uint32_t base = shared_address(shared), barrier = base + kBoxRows * kPanelRowBytes;
  begin(barrier);
  if (thread_index() == 0) {
    barrier_arrive_expect(barrier, kBoxRows * kPanelRowBytes);
    copy_box(base, &p.map, barrier, p.at[0], p.at[1], p.at[2]);
  }
  barrier_wait(barrier, 0);
  for (int i = thread_index(); i < kBoxRows * kPanel; i += 128) {
    const int byte = i / kPanel * kPanelRowBytes + i % kPanel * 2;
    float low, high;
    unpack<Half::kBf16>(*reinterpret_cast<uint16_t*>(shared + (byte ^ (byte >> 3 & 0x70))), low, high);
    p.out[i] = low;
  }
#endif
}

struct ScoreParameters {
  TensorMap left, right;
  float* out;  // (64, kN)
};

// (64, kD) times (kN, kD) transposed, both in shared memory: the forward's scores.
template <int kN, int kD>
DFLASH_GLOBAL void DFLASH_BOUNDS(128, 1) score_kernel(const DFLASH_PARAMETER ScoreParameters p) {
#ifdef DFLASH_HOPPER
  constexpr int kLeft = sm90::tile_bytes(kD, 64), kRight = sm90::tile_bytes(kD, kN);
  const uint32_t base = shared_address(shared_memory()), barrier = base + kLeft + after(kRight);
  begin(barrier);
  if (thread_index() == 0) {
    barrier_arrive_expect(barrier, kLeft + kRight);
    for (int panel = 0; panel < sm90::panels(kD); ++panel) {
      copy_box(base + panel * 64 * kPanelRowBytes, &p.left, barrier, panel * kPanel, 0, 0);
      copy_box(base + kLeft + panel * kN * kPanelRowBytes, &p.right, barrier, panel * kPanel, 0, 0);
    }
  }
  barrier_wait(barrier, 0);
  float d[kN / 2];
  products_fence();
  sm90::score<kN, kD, Half::kBf16>(d, base, 64, base + kLeft, kN);
  products_commit();
  products_wait<0>();
  settle(d);
  for (int i = 0; i < kN / 2; ++i) p.out[place(i, kN)] = d[i];
#endif
}

struct ValueParameters {
  TensorMap right;
  const uint16_t* left;  // (64, kK)
  float* out;            // (64, kD)
};

// (64, kK) in registers times (kK, kD) in shared memory: the forward's values.
template <int kK, int kD>
DFLASH_GLOBAL void DFLASH_BOUNDS(128, 1) value_kernel(const DFLASH_PARAMETER ValueParameters p) {
#ifdef DFLASH_HOPPER
  constexpr int kRight = sm90::tile_bytes(kD, kK);
  const uint32_t base = shared_address(shared_memory()), barrier = base + after(kRight);
  begin(barrier);
  if (thread_index() == 0) {
    barrier_arrive_expect(barrier, kRight);
    for (int panel = 0; panel < sm90::panels(kD); ++panel)
      copy_box(base + panel * kK * kPanelRowBytes, &p.right, barrier, panel * kPanel, 0, 0);
  }
  barrier_wait(barrier, 0);
  const int lane = thread_index() % 32, row = thread_index() / 32 * 16 + lane / 4;
  uint32_t a[kK / 4];
  for (int i = 0; i < kK / 4; ++i) {
    const uint16_t* pair = p.left + (row + i % 2 * 8) * kK + i / 4 * 16 + lane % 4 * 2 + i / 2 % 2 * 8;
    a[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  sm90::Sums<kD> d = {};
  products_fence();
#pragma unroll
  for (int step = 0; step < kK / 16; ++step) sm90::accumulate<kD, Half::kBf16>(d, a + 4 * step, base, kK, step);
  products_commit();
  products_wait<0>();
  settle(d);
  for (int i = 0; i < kD / 2; ++i) p.out[place(i, kD)] = d[i];
#endif
}

// --- what came, beside what was to come ---

void print_list(const char* name, const std::vector<int>& values) {
  printf(", \"%s\": [", name);
  for (size_t i = 0; i < values.size(); ++i) printf("%s%d", i > 0 ? "," : "", values[i]);
  printf("]");
}

struct Comparison {
  int rows, columns;
  const std::vector<float>&got, &wanted;

  float at(const std::vector<float>& x, int row, int column) const { return x[row * columns + column]; }
  bool right(int row, int column) const { return at(got, row, column) == at(wanted, row, column); }

  // Which row of the truth each row holds, -1 for none; columns likewise.
  std::vector<int> row_origins() const {
    std::vector<int> found(rows, -1);
    for (int r = 0; r < rows; ++r)
      for (int s = rows - 1; s >= 0; --s) {
        bool same = true;
        for (int c = 0; c < columns && same; ++c) same = at(got, r, c) == at(wanted, s, c);
        if (same) found[r] = s;
      }
    return found;
  }
  std::vector<int> column_origins() const {
    std::vector<int> found(columns, -1);
    for (int c = 0; c < columns; ++c)
      for (int s = columns - 1; s >= 0; --s) {
        bool same = true;
        for (int r = 0; r < rows && same; ++r) same = at(got, r, c) == at(wanted, r, s);
        if (same) found[c] = s;
      }
    return found;
  }

  bool report(const std::string& name, const char* error) const {
    std::vector<int> by_row(rows), by_column(columns);
    int wrong = 0, first = -1;
    for (int i = 0; i < rows * columns && error == nullptr; ++i)
      if (!right(i / columns, i % columns)) {
        if (first < 0) first = i;
        ++wrong, ++by_row[i / columns], ++by_column[i % columns];
      }
    const bool ok = wrong == 0 && error == nullptr;
    printf("{\"test\": \"%s\", \"ok\": %s, \"wrong\": %d, \"of\": %d", name.c_str(), ok ? "true" : "false", wrong,
           rows * columns);
    if (error != nullptr) printf(", \"error\": \"%s\"", error);
    if (wrong > 0) {
      printf(", \"first\": [%d, %d, %g, %g]", first / columns, first % columns, got[first], wanted[first]);
      print_list("by_row", by_row);
      print_list("by_column", by_column);
      print_list("row_is", row_origins());
      print_list("column_is", column_origins());
    }
    printf("}\n");
    fflush(stdout);
    return ok;
  }
};

// --- the tests ---

struct Tensor {
  int head_dim, heads, rows;
};
struct Box {
  int at[3], heads;  // kBoxRows / heads positions of so many heads
};

int encode_map(TensorMap* map, const void* base, const Tensor& t, int box_heads, int box_rows) {
  const uint64_t row = static_cast<uint64_t>(t.head_dim) * 2, heads = static_cast<uint64_t>(t.heads);
  return encode(map,
                {base,
                 {static_cast<uint64_t>(t.head_dim), heads, static_cast<uint64_t>(t.rows)},
                 {row, row * heads},
                 {kPanel, static_cast<uint32_t>(box_heads), static_cast<uint32_t>(box_rows)}},
                Half::kBf16);
}

bool test_copy(const Tensor& t, const Box& box) {
  const auto x = numbers(t.head_dim * t.heads * t.rows, 7);
  std::vector<float> got(kBoxRows * kPanel, -1), wanted(kBoxRows * kPanel, 0);
  CopyParameters p{};
  p.out = device(got);
  std::copy(box.at, box.at + 3, p.at);
  int error = encode_map(&p.map, device(x), t, box.heads, kBoxRows / box.heads);
  if (error == 0) error = launch(copy_kernel, Launch{1, 128, kBoxRows * kPanelRowBytes + 64}, p, nullptr);
  const char* why = finish(error);
  if (why == nullptr) fetch(got, p.out);
  for (int r = 0; r < kBoxRows; ++r)
    for (int c = 0; c < kPanel; ++c) {
      const int column = box.at[0] + c, head = box.at[1] + r % box.heads, row = box.at[2] + r / box.heads;
      if (column < t.head_dim && head < t.heads && row < t.rows)
        wanted[r * kPanel + c] = from_bf16(x[(row * t.heads + head) * t.head_dim + column]);
    }
  const std::string name = "copy D" + std::to_string(t.head_dim) + " rows " + std::to_string(t.rows) + " box of " +
                           std::to_string(box.heads) + " heads at row " + std::to_string(box.at[2]);
  return Comparison{kBoxRows, kPanel, got, wanted}.report(name, why);
}

template <int kN, int kD>
bool test_score() {
  const auto left = numbers(64 * kD, 1), right = numbers(kN * kD, 2);
  std::vector<float> got(64 * kN, -1), wanted(64 * kN, 0);
  ScoreParameters p{};
  p.out = device(got);
  int error = encode_map(&p.left, device(left), {kD, 1, 64}, 1, 64);
  if (error == 0) error = encode_map(&p.right, device(right), {kD, 1, kN}, 1, kN);
  constexpr size_t kShared = sm90::tile_bytes(kD, 64) + after(sm90::tile_bytes(kD, kN)) + 64;
  if (error == 0) error = launch(score_kernel<kN, kD>, Launch{1, 128, kShared}, p, nullptr);
  const char* why = finish(error);
  if (why == nullptr) fetch(got, p.out);
  for (int r = 0; r < 64; ++r)
    for (int n = 0; n < kN; ++n)
      for (int k = 0; k < kD; ++k) wanted[r * kN + n] += from_bf16(left[r * kD + k]) * from_bf16(right[n * kD + k]);
  return Comparison{64, kN, got, wanted}.report("score N" + std::to_string(kN) + " D" + std::to_string(kD), why);
}

template <int kK, int kD>
bool test_value() {
  const auto left = numbers(64 * kK, 3), right = numbers(kK * kD, 4);
  std::vector<float> got(64 * kD, -1), wanted(64 * kD, 0);
  ValueParameters p{};
  p.left = device(left);
  p.out = device(got);
  int error = encode_map(&p.right, device(right), {kD, 1, kK}, 1, kK);
  constexpr size_t kShared = after(sm90::tile_bytes(kD, kK)) + 64;
  if (error == 0) error = launch(value_kernel<kK, kD>, Launch{1, 128, kShared}, p, nullptr);
  const char* why = finish(error);
  if (why == nullptr) fetch(got, p.out);
  for (int r = 0; r < 64; ++r)
    for (int c = 0; c < kD; ++c)
      for (int k = 0; k < kK; ++k) wanted[r * kD + c] += from_bf16(left[r * kK + k]) * from_bf16(right[k * kD + c]);
  return Comparison{64, kD, got, wanted}.report("value K" + std::to_string(kK) + " D" + std::to_string(kD), why);
}

bool test_all() {
  bool ok = test_copy({128, 8, 300}, {{64, 3, 17}, 1});
  ok &= test_copy({128, 32, 300}, {{0, 8, 5}, 4});
  ok &= test_copy({96, 8, 300}, {{64, 2, 270}, 1});  // half of a panel, and rows past the end
  ok &= test_copy({64, 1, 3}, {{0, 0, 0}, 1});       // a box longer than the tensor
  ok &= test_score<128, 128>() & test_score<64, 128>() & test_score<16, 128>();
  ok &= test_score<128, 64>() & test_score<128, 96>();
  ok &= test_value<128, 128>() & test_value<64, 128>() & test_value<16, 128>();
  ok &= test_value<128, 64>() & test_value<128, 96>();
  return ok;
}

#ifndef DFLASH_EMULATE

// --- how fast each form of product runs: two warpgroups of every multiprocessor, on numbers without a pattern ---

enum class Form { kShared64, kShared128, kRegisters128 };

struct SpeedParameters {
  int rounds;
  float* out;
};

template <Form kForm>
__global__ void __launch_bounds__(256, 1) speed_kernel(const __grid_constant__ SpeedParameters p) {
#ifdef DFLASH_HOPPER
  char* shared = shared_memory();
  const uint32_t base = shared_address(shared);
  for (int i = threadIdx.x; i < 96 * 1024 / 2; i += 256)
    reinterpret_cast<uint16_t*>(shared)[i] = static_cast<uint16_t>(0x3c00 | ((i * 2654435761u) >> 20 & 0x83ff));
  async_fence();
  __syncthreads();
  const uint32_t left = base + threadIdx.x / 128 * 16384, right = base + 32768;
  constexpr int kN = kForm == Form::kShared64 ? 64 : 128;
  float d[kN / 2] = {};
  const uint32_t a[4] = {0x3c003c80u + threadIdx.x, 0x3c103c00u, 0x3c003d00u, 0xbc003c00u};
  for (int round = 0; round < p.rounds; ++round) {
    products_fence();
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      if constexpr (kForm == Form::kRegisters128)
        product_transposed<128, Half::kBf16>(d, a, operand_transposed(right, 128, step), true);
      else
        product<kN, Half::kBf16>(d, operand(left, 64, step), operand(right, kN, step), true);
    }
    products_commit();
    products_wait<0>();
    settle(d);
  }
  float sum = 0;
  for (int i = 0; i < kN / 2; ++i) sum += d[i];
  if (sum == 1234.5f) p.out[threadIdx.x] = sum;  // keeps the products
#endif
}

template <Form kForm>
void speed(const char* name, int columns) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "attribute");
  const SpeedParameters p{20000, device(std::vector<float>(256))};
  cudaEvent_t began, ended;
  check(cudaEventCreate(&began), "event");
  check(cudaEventCreate(&ended), "event");
  const Launch how{multiprocessors, 256, 96 * 1024};
  int error = launch(speed_kernel<kForm>, how, p, nullptr);
  check(cudaEventRecord(began), "event");
  if (error == 0) error = launch(speed_kernel<kForm>, how, p, nullptr);
  check(cudaEventRecord(ended), "event");
  const char* why = finish(error);
  float ms = 0;
  if (why == nullptr) check(cudaEventElapsedTime(&ms, began, ended), "event");
  const double flop = 2.0 * 64 * columns * 128 * p.rounds * 2 * multiprocessors;
  printf("{\"speed\": \"%s\", \"tflops\": %.1f, \"ms\": %.3f, \"error\": \"%s\"}\n", name,
         why == nullptr ? flop / ms * 1e-9 : 0.0, ms, why == nullptr ? "" : why);
  fflush(stdout);
}

#endif

}  // namespace
}  // namespace dflash::gpu

#ifndef DFLASH_EMULATE
int main() {
  using namespace dflash::gpu;
  check(cudaFree(nullptr), "no GPU");
  const bool ok = test_all();
  speed<Form::kShared64>("both operands in shared memory, m64n64k16", 64);
  speed<Form::kShared128>("both operands in shared memory, m64n128k16", 128);
  speed<Form::kRegisters128>("left operand in registers, m64n128k16", 128);
  return ok ? 0 : 1;
}
#endif
