// The sparse latent attention kernel for any processor: vectors of four fp32 lanes.
#include <cstdint>
#include <cstring>

#include "common/fp4.h"
#include "common/numeric.h"
#include "common/softcap.h"
#include "cpu/mla_sparse_attention_tile.h"

#define FASTATTN_SIMD_BITS 128

namespace fastattn::cpu::baseline {
#include "cpu/attention_simd.h"
// The order of these matters.
#include "cpu/mla_sparse_attention_kernel.h"
}  // namespace fastattn::cpu::baseline
