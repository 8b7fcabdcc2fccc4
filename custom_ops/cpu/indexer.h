#pragma once

#include "params/indexer.h"

namespace fastattn::cpu {

void IndexerQRopeQuant(const IndexerQParams& p);
void IndexerQQuant(const IndexerQQuantParams& p);
void IndexerKvCompressInsert(const IndexerKvParams& p);

}  // namespace fastattn::cpu
