// Which instruction set's build of a *_isa.cpp runs.
#pragma once

#include <cstdlib>
#include <string_view>

namespace dflash {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The widest that this CPU has, or less where ATEN_CPU_CAPABILITY says so: torch's own variable, so that one setting
// holds for torch and for us.
inline InstructionSet instruction_set() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = variable != nullptr ? variable : "avx512";
  // The same features as the flags that setup.py compiles *_isa.cpp with.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && limit != "avx2" && limit != "default") return InstructionSet::kAvx512;
  if (avx2 && limit != "default") return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

}  // namespace dflash
