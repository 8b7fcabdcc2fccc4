#pragma once

#include "params/block_summaries.h"

namespace fastattn::cpu {

void UpdateBlockSummaries(const UpdateSummariesParams& p);

void SelectKeyBlocks(const SelectBlocksParams& p);

}  // namespace fastattn::cpu
