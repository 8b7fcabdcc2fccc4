// The attention kernel for x86-64 processors with AVX512.
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

// GCC 12 takes the undefined inputs of its own AVX-512 intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
// The pragma stands behind the headers: an inline function of theirs that was compiled for this
// instruction set could replace the one that other processors run.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define FASTATTN_SIMD_BITS 512

namespace fastattn::cpu::avx512 {
#include "cpu/attention_simd.h"
// The order of these matters.
#include "cpu/attention_codes.h"

#include "cpu/attention_kernel.h"
// Finds it.
#include "cpu/attention_dispatch.h"
}  // namespace fastattn::cpu::avx512

#else

namespace fastattn::cpu::avx512 {
TileFunction FindTileFunction(const AttentionParams&) { return nullptr; }
}  // namespace fastattn::cpu::avx512

#endif
