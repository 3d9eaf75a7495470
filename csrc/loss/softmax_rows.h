// One build of softmax_isa.cpp per instruction set; cpu.cpp chooses one.
#pragma once

#include "loss/softmax.h"

namespace dflash {

// Rows [first, last).
namespace baseline {
void softmax_rows(const SoftmaxLoss& args, int64_t first, int64_t last);
}
namespace avx2 {
void softmax_rows(const SoftmaxLoss& args, int64_t first, int64_t last);
}
namespace avx512 {
void softmax_rows(const SoftmaxLoss& args, int64_t first, int64_t last);
}

}  // namespace dflash
