#pragma once

#include "params/compact_tables.h"

namespace fastattn::cpu {

void CompactBlockTables(const CompactTablesParams& p);

}  // namespace fastattn::cpu
