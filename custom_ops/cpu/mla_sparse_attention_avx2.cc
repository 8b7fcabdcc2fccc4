// The sparse latent attention kernel for x86-64 processors with AVX2.
#include <cstdint>
#include <cstring>

#include "common/fp4.h"
#include "common/numeric.h"
#include "common/softcap.h"
#include "cpu/mla_sparse_attention_tile.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

// The pragma stands behind the headers, as in attention_avx2.cc.
#pragma GCC target("avx2,fma,f16c")

#define FASTATTN_SIMD_BITS 256

namespace fastattn::cpu::avx2 {
#include "cpu/attention_simd.h"
// The order of these matters.
#include "cpu/mla_sparse_attention_kernel.h"
}  // namespace fastattn::cpu::avx2

#else

namespace fastattn::cpu::avx2 {
MlaSparseFunction FindMlaSparse() { return nullptr; }
}  // namespace fastattn::cpu::avx2

#endif
