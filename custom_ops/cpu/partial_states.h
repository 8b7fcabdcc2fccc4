#pragma once

#include "params/partial_states.h"

namespace fastattn::cpu {

void SavePartialStates(const PartialStatesParams& p);

}  // namespace fastattn::cpu
