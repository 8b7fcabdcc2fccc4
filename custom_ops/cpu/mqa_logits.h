#pragma once

#include <cstdint>

#include "params/mqa_logits.h"

namespace fastattn::cpu {

// With `lengths` [rows] a row has as many columns from the first one of its keys on (column 0 where
// each row begins there), and the others are left as they are: a top-k does not read them.
void MqaLogits(const LogitsParams& p, const int32_t* lengths = nullptr);

}  // namespace fastattn::cpu
