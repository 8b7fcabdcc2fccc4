#pragma once

#include "params/indexer_keys.h"

namespace fastattn::cpu {

void IndexerKWrite(const IndexerKWriteParams& p);
void IndexerKGather(const IndexerKGatherParams& p);

}  // namespace fastattn::cpu
