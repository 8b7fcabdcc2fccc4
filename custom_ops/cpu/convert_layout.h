#pragma once

#include "params/cache.h"

namespace fastattn::cpu {

void ConvertLayout(const ConvertLayoutParams& p);

}  // namespace fastattn::cpu
