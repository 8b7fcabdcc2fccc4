#pragma once

#include "params/quantize_query.h"

namespace fastattn::cpu {

void QuantizeQuery(const QuantizeQueryParams& p);

}  // namespace fastattn::cpu
