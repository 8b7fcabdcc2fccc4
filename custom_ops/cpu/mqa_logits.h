#pragma once

#include "params/mqa_logits.h"

namespace fastattn::cpu {

void MqaLogits(const LogitsParams& p);

}  // namespace fastattn::cpu
