// Runs an attention call whose arguments are checked, on the place of its tensors.
#pragma once

#include <vector>

#include "api/attention_arguments.h"

namespace fastattn::api {

// Allocates what was not given and runs. Tokens of no sequence become 0 in a new output and keep
// what is there in a given one; their LSE is -inf.
std::vector<Tensor> RunAttention(const char* op, const AttentionArgs& args, const phi::Place& place,
                                 AttentionParams* p);

}  // namespace fastattn::api
