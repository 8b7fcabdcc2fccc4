// Of a cache, two kernels: the first finds on the device which sequences take part and deals the
// room out to them, in their order; the second is append_cache_kv_c8's. A sequence for which no
// room is left is attended as it lies. Of contiguous tensors, one for all of K and V.
#include "cuda/attention/dequantize_kv/launch.h"

#include "common/block_table.h"
#include "common/ceil_div.h"
#include "common/numeric.h"
#include "cuda/attention/shared/scales.cuh"
#include "cuda/attention/shared/seq_lengths.cuh"
#include "cuda/cache/append/launch.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;

struct Lengths {
  int q_begin = 0;
  int q_len = 0;
  int k_len = 0;
};

// Blocks of a sequence's keys, or 0 if it does not take part. Follows from its lengths alone.
__device__ __forceinline__ int BlocksOf(const AttentionParams& p, const DequantizePlan& plan,
                                        const Lengths& seq) {
  if (seq.q_len < plan.min_tokens) return 0;
  // Rows that see a key, times the keys. Products of lengths that nobody has may not fit an
  // integer.
  const float seen = p.causal ? static_cast<float>(seq.k_len - seq.q_len) + 0.5f * seq.q_len
                              : static_cast<float>(seq.k_len);
  const float rows = static_cast<float>(p.num_heads / p.num_kv_heads) * seq.q_len;
  if (rows * seen < static_cast<float>(plan.min_rows) * seq.k_len) return 0;
  const int blocks = min((seq.k_len - 1) / kBlockSize + 1, p.seqs.max_blocks);
  return blocks <= plan.table_width ? blocks : 0;
}

__device__ __forceinline__ int BlocksOf(const AttentionParams& p, const DequantizePlan& plan,
                                        int b) {
  Lengths seq;
  LoadSeqLengths(p, b, &seq);
  return BlocksOf(p, plan, seq);
}

// A CTA takes a sequence, and counts the blocks of those before it.
__global__ void __launch_bounds__(kThreads)
    DealRoomKernel(const __grid_constant__ AttentionParams p,
                   const __grid_constant__ DequantizedKv kv) {
  __shared__ int64_t sums[kThreads / 32];
  const int b = blockIdx.x, thread = threadIdx.x;
  PdlWait();
  PdlLaunchDependents();
  int64_t before = 0;
  for (int i = thread; i < b; i += kThreads) before += BlocksOf(p, kv.plan, i);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) before += __shfl_xor_sync(kFullWarp, before, step);
  if (thread % 32 == 0) sums[thread / 32] = before;
  __syncthreads();
  before = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) before += sums[warp];

  Lengths seq;
  LoadSeqLengths(p, b, &seq);
  const int blocks = BlocksOf(p, kv.plan, seq);
  const int64_t end = before + blocks;
  const bool fits = blocks > 0 && end <= kv.plan.blocks;
  const auto start = [&kv](int64_t block) {
    return static_cast<int>(min(block, kv.plan.blocks)) * kBlockSize;
  };
  if (thread == 0) {
    kv.starts[b] = start(before);
    if (b + 1 == p.seqs.batch) kv.starts[b + 1] = start(end);
    kv.keys[b] = fits ? min(seq.k_len, blocks * kBlockSize) : 0;
    kv.new_tokens[b] = fits ? seq.q_len : 0;
    kv.other_tokens[b] = fits ? 0 : seq.q_len;
  }
  if (!fits) return;
  int* table = kv.block_tables + b * kv.plan.table_width;
  for (int i = thread; i < kv.plan.table_width; i += kThreads) {
    const int id = BlockOf(p.seqs.block_tables, p.seqs.max_blocks, p.cache.num_blocks, b, i);
    table[i] = i < blocks && id >= 0 ? static_cast<int>(before) + i : -1;
  }
}

// A thread takes 16 channels of a token's head, of K or, where blockIdx.y is 1, of V.
template <DType kCode>
__global__ void __launch_bounds__(kThreads)
    DequantizeRaggedKernel(const __grid_constant__ AttentionParams p,
                           const __grid_constant__ DequantizedKv kv) {
  constexpr int kChannels = 16;
  PdlWait();
  PdlLaunchDependents();
  const RaggedKv& ragged = p.ragged;
  const bool values = blockIdx.y == 1;
  const int dim = values ? ValueDim(p.head_dim) : p.head_dim, pieces = dim / kChannels;
  const auto index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / pieces;
  const int channel = static_cast<int>(index % pieces) * kChannels;
  const int64_t token = row / p.num_kv_heads;
  const int head = static_cast<int>(row % p.num_kv_heads);
  if (token >= ragged.num_tokens) return;
  const int64_t from = values ? token * ragged.value_token_stride + head * ragged.value_head_stride
                              : token * ragged.key_token_stride + head * ragged.key_head_stride;
  const void* data = values ? ragged.value : ragged.key;
  const uint4 codes =
      *reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(data) + from + channel);
  const Descale& descale = values ? ragged.v_descale : ragged.k_descale;
  const float scale = LoadDescale(descale, 0, head, DescaleAt{0, 0});  // of all sequences
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  uint32_t pairs[8];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float x[4];
    CodesToFloat<kCode>(words[w], x);
    pairs[2 * w] = PackPair<DType::kBFloat16>(x[0] * scale, x[1] * scale);
    pairs[2 * w + 1] = PackPair<DType::kBFloat16>(x[2] * scale, x[3] * scale);
  }
  auto* out = static_cast<uint16_t*>(values ? kv.value : kv.key) + row * dim + channel;
  reinterpret_cast<uint4*>(out)[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  reinterpret_cast<uint4*>(out)[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}

cudaError_t LaunchRagged(const AttentionParams& p, const DequantizedKv& kv, cudaStream_t stream) {
  const int64_t pieces = p.ragged.num_tokens * p.num_kv_heads * (p.head_dim / 16);
  const dim3 grid(GridSize(CeilDiv<int64_t>(pieces, kThreads)), 2);
  const auto kernel = p.ragged.dtype == DType::kE4M3   ? DequantizeRaggedKernel<DType::kE4M3>
                      : p.ragged.dtype == DType::kE5M2 ? DequantizeRaggedKernel<DType::kE5M2>
                                                       : DequantizeRaggedKernel<DType::kInt8>;
  return LaunchPdl(kernel, grid, dim3(kThreads), stream, p, kv);
}

}  // namespace

cudaError_t LaunchDequantizeKv(const AttentionParams& p, const DequantizedKv& kv,
                               cudaStream_t stream) {
  if (!p.paged) return LaunchRagged(p, kv, stream);
  const cudaError_t status =
      LaunchPdl(DealRoomKernel, dim3(GridSize(p.seqs.batch)), dim3(kThreads), stream, p, kv);
  if (status != cudaSuccess) return status;
  AppendCacheParams append;
  append.cache = p.cache;
  append.key = kv.key;
  append.value = kv.value;
  append.block_tables = p.seqs.block_tables;
  append.seq_lens_decoder = kv.keys;
  append.cu_seqlens_k = kv.starts;
  append.dtype = p.q_dtype;
  append.dynamic_quant = IsDynamic(p.cache.type);
  append.batch = p.seqs.batch;
  append.max_blocks = p.seqs.max_blocks;
  append.num_out_tokens = kv.plan.blocks * kBlockSize;
  append.key_token_stride = int64_t{p.num_kv_heads} * p.head_dim;
  append.value_token_stride = int64_t{p.num_kv_heads} * ValueDim(p.head_dim);
  return LaunchAppendCache(append, stream);
}

}  // namespace fastattn::cuda
