#pragma once

#include "params/query_transform.h"

namespace fastattn::cpu {

void TransformQuery(const QueryTransformParams& p);
void ShiftScores(const ScoreShiftParams& p);

}  // namespace fastattn::cpu
