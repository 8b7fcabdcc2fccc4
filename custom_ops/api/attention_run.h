// Runs an attention call whose arguments are checked, on the place of its tensors.
#pragma once

#include <vector>

#include "api/attention_arguments.h"
#include "params/key_transform.h"
#include "params/rope.h"

namespace fastattn::api {

// What writes the keys and values of the step, and its queries, before they are attended to.
struct StepWriter {
  RopeWriteCacheParams params;
  KeyTransform transform;
};

// Allocates what was not given and runs, the `writer` first where there is one. Tokens of no
// sequence become 0 in a new output and keep what is there in a given one; their LSE is -inf.
std::vector<Tensor> RunAttention(const char* op, const AttentionArgs& args, const phi::Place& place,
                                 AttentionParams* p, StepWriter* writer = nullptr);

}  // namespace fastattn::api
