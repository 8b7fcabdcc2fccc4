// Transposes ragged V into the order of a cache block, [blocks, KV, D, 64] in TokenSlot order: the
// product P * V wants the tokens of a channel together. The kernel runs ahead of the attention.
#include <algorithm>

#include "common/layout.h"
#include "cuda/attention/shared/seq_lengths.cuh"
#include "cuda/attention/wgmma_sm90/fp8/variant.h"
#include "cuda/common/launch.cuh"

namespace fastattn::cuda::wgmma_fp8 {

namespace {

// Byte i of word c is byte c of word i.
__device__ __forceinline__ void TransposeBytes(uint32_t (&w)[4]) {
  const uint32_t a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
  const uint32_t c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
  w[0] = __byte_perm(a, b, 0x5410);
  w[1] = __byte_perm(a, b, 0x7632);
  w[2] = __byte_perm(c, d, 0x5410);
  w[3] = __byte_perm(c, d, 0x7632);
}

// A thread takes four channels of 16 tokens: their codes become 16 consecutive bytes a channel.
__device__ void TransposePiece(const AttentionParams& p, const uint8_t* in, uint8_t* out,
                               int tokens) {
  uint32_t words[16];
#pragma unroll
  for (int t = 0; t < 16; ++t) {
    words[t] =
        t < tokens ? *reinterpret_cast<const uint32_t*>(in + t * p.ragged.value_token_stride) : 0;
  }
  uint32_t channels[4][4];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = words[TokenOfSlot(4 * s + i)];
    TransposeBytes(w);
#pragma unroll
    for (int c = 0; c < 4; ++c) channels[c][s] = w[c];
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    *reinterpret_cast<uint4*>(out + c * kBlockSize) =
        make_uint4(channels[c][0], channels[c][1], channels[c][2], channels[c][3]);
  }
}

// A CTA of D threads takes a block of one KV head at a time.
template <int kDim>
__global__ void __launch_bounds__(kDim) TransposeValues(const AttentionParams p, uint8_t* out) {
  const int head = blockIdx.y;
  const int channel = 4 * (threadIdx.x % (kDim / 4)), piece = threadIdx.x / (kDim / 4);
  for (int seq = blockIdx.z; seq < p.seqs.batch; seq += gridDim.z) {
    const TokenRange<int> keys = LoadRaggedKeys(p, seq);
    for (int block = blockIdx.x; block * kBlockSize < keys.count; block += gridDim.x) {
      const int token = block * kBlockSize + 16 * piece;
      const int64_t plane =
          static_cast<int64_t>(FirstBlock(keys.begin, seq) + block) * p.num_kv_heads + head;
      const auto* in = static_cast<const uint8_t*>(p.ragged.value) +
                       (keys.begin + static_cast<int64_t>(token)) * p.ragged.value_token_stride +
                       head * p.ragged.value_head_stride + channel;
      TransposePiece(p, in, out + (plane * kDim + channel) * kBlockSize + 16 * piece,
                     keys.count - token);
    }
  }
}

}  // namespace

cudaError_t LaunchTranspose(const AttentionParams& p, uint8_t* out, cudaStream_t stream) {
  // The largest length sizes the grid only: longer sequences take more rounds.
  const int blocks = std::max(1, std::min(p.max_seqlen_k / kBlockSize + 1, 65535));
  const dim3 grid(blocks, p.num_kv_heads, std::min(p.seqs.batch, 65535));
  switch (ValueDim(p.head_dim)) {
    case 64:
      return LaunchKernel(TransposeValues<64>, grid, dim3(64), stream, p, out);
    case 96:
      return LaunchKernel(TransposeValues<96>, grid, dim3(96), stream, p, out);
    case 128:
      return LaunchKernel(TransposeValues<128>, grid, dim3(128), stream, p, out);
    default:
      return LaunchKernel(TransposeValues<256>, grid, dim3(256), stream, p, out);
  }
}

}  // namespace fastattn::cuda::wgmma_fp8
