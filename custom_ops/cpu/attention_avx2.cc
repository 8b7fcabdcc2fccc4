// The attention kernel for x86-64 processors with AVX2.
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

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

// The pragma stands behind the headers: an inline function of theirs that was compiled for this
// instruction set could replace the one that other processors run.
#pragma GCC target("avx2,fma,f16c")

#define FASTATTN_SIMD_BITS 256

namespace fastattn::cpu::avx2 {
#include "cpu/attention_simd.h"
// The order of these matters.
#include "cpu/attention_codes.h"

#include "cpu/attention_kernel.h"
// Finds it.
#include "cpu/attention_dispatch.h"
}  // namespace fastattn::cpu::avx2

#else

namespace fastattn::cpu::avx2 {
TileFunction FindTileFunction(const AttentionParams&) { return nullptr; }
}  // namespace fastattn::cpu::avx2

#endif
