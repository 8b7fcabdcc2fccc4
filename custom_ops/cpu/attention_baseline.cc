// The attention kernel for any processor: vectors of four fp32 lanes.
#include <cstdint>
#include <cstring>
#include <new>

#include "common/block_table.h"
#include "common/dispatch.h"
#include "common/group_scale.h"
#include "common/head_dims.h"
#include "common/layout.h"
#include "common/numeric.h"
#include "common/softcap.h"
#include "common/static_scales.h"
#include "cpu/attention_tile.h"
#include "formats/kv_format.h"

#define FASTATTN_SIMD_BITS 128

namespace fastattn::cpu::baseline {
#include "cpu/attention_simd.h"
// The order of these matters.
#include "cpu/attention_codes.h"

#include "cpu/attention_kernel.h"
// Finds it.
#include "cpu/attention_dispatch.h"
}  // namespace fastattn::cpu::baseline
