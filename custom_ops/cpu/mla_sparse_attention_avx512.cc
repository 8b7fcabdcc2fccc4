// The sparse latent attention kernel for x86-64 processors with AVX512.
#include <cstdint>
#include <cstring>

#include "common/fp4.h"
#include "common/numeric.h"
#include "common/softcap.h"
#include "cpu/mla_sparse_attention_tile.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

// GCC 12 takes the undefined inputs of its own AVX-512 intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
// The pragma stands behind the headers, as in attention_avx512.cc.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define FASTATTN_SIMD_BITS 512

namespace fastattn::cpu::avx512 {
#include "cpu/attention_simd.h"
// The order of these matters.
#include "cpu/mla_sparse_attention_kernel.h"
}  // namespace fastattn::cpu::avx512

#else

namespace fastattn::cpu::avx512 {
MlaSparseFunction FindMlaSparse() { return nullptr; }
}  // namespace fastattn::cpu::avx512

#endif
