#pragma once

#include "params/indexer.h"

namespace fastattn::cpu {

void IndexerQRopeQuant(const IndexerQParams& p);
void IndexerKvCompressInsert(const IndexerKvParams& p);

}  // namespace fastattn::cpu
