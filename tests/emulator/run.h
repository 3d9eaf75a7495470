// Runs a launcher on the emulated machine, for a caller behind a C ABI.
#pragma once

#include <string>

#include "emulator.h"

namespace dflash {

// On a machine whose choices follow from the seed; returns what went wrong, or nullptr.
template <typename Run>
const char* emulate(unsigned seed, const Run& run) {
  static std::string failure;
  try {
    gpu::machine().random.seed(seed);
    const int error = run();
    if (error == 0) return nullptr;
    failure = "the launcher returned " + std::to_string(error);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  return failure.c_str();
}

}  // namespace dflash
