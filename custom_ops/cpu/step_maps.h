#pragma once

#include "params/step_maps.h"

namespace fastattn::cpu {

void TokenMaps(const TokenMapsParams& p);
void QueryRows(const QueryRowsParams& p);

}  // namespace fastattn::cpu
