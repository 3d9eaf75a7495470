// The types of number that operators take.
#pragma once

namespace dflash {

enum class Number { kFloat, kBf16, kFp16 };

}  // namespace dflash
