// Prefill: two kinds of CTA in one launch.
//
// Streaming CTAs take 128 / (D / 8) tokens and all Q and K heads, or a share of them. A thread
// keeps 8 channels of one token and walks over the heads: cos and sin are read once a token, and
// the loads of the next heads are in flight while the present ones are worked on.
//
// V CTAs take one KV head of up to 64 tokens of a row that share a cache block. All of their loads
// are issued at once; codes gather in shared memory, token-major, and leave transposed: a thread
// turns 4 channels x 16 tokens into four 16-byte pieces of V rows. A group of 16 tokens that is not
// wholly new is written byte by byte, so that what other steps wrote beside it stays.
#pragma once

#include "cuda/cache/rope_write/cache_store.cuh"
#include "cuda/cache/shared/block_pieces.cuh"
#include "cuda/cache/shared/token_lookup.cuh"

namespace fastattn::cuda {

inline constexpr int kPrefillThreads = 128;
inline constexpr int kHeadBatch = 4;  // heads whose loads are in flight together

// How the streaming part is cut; V CTAs follow after `stream_ctas` others.
struct PrefillGrid {
  int stream_ctas;
  int head_shares;      // CTAs that share the heads of the same tokens
  int heads_per_share;  // a multiple of kHeadBatch
};

template <typename Traits>
__device__ __forceinline__ void LoadHeads(const StepParams& p, int64_t token, int channel,
                                          int first_head, int end_head, bool active,
                                          Raw<Traits::kIn> (&raw)[kHeadBatch]) {
#pragma unroll
  for (int i = 0; i < kHeadBatch; ++i) {
    const int head = first_head + i;
    const bool is_q = Traits::kRope && head < p.rope.num_heads;
    const int64_t element =
        static_cast<int64_t>(is_q ? head : head - p.rope.num_heads) * Traits::kHeadDim + channel +
        token * (is_q ? p.q_stride : p.k_stride);
    raw[i] = LoadRaw<Traits::kIn>(is_q ? p.q : p.k, element, active && head < end_head);
  }
}

template <typename Traits>
__device__ __forceinline__ void StreamHeads(const StepParams& p, const PrefillGrid& grid) {
  constexpr int kLanes = Traits::kLanes;
  constexpr int kTokens = kPrefillThreads / kLanes;
  const RopeWriteCacheParams& rope = p.rope;
  const PagedCache& cache = rope.cache;
  const int share = blockIdx.x % grid.head_shares;
  const int64_t base = static_cast<int64_t>(blockIdx.x / grid.head_shares) * kTokens;
  const int64_t token = base + threadIdx.x / kLanes;
  const int channel = threadIdx.x % kLanes * kChunk;
  const int first_head = share * grid.heads_per_share;
  const int end_head = min(first_head + grid.heads_per_share, rope.num_heads + cache.num_kv_heads);
  const bool inside = token < rope.seqs.num_tokens;

  // The values do not depend on the row: start loading before looking it up.
  Raw<Traits::kIn> raw[kHeadBatch];
  LoadHeads<Traits>(p, token, channel, first_head, end_head, inside, raw);

  const TokenPlace place = FindToken(rope.seqs, base, token);
  const bool owned = place.batch_idx >= 0;
  Angles angles;
  int block = -1;
  if (owned) {
    if constexpr (Traits::kRope) LoadAngles(rope, place.position, channel, angles);
    if (end_head > rope.num_heads) {
      block = FindBlock(rope.seqs, cache.num_blocks, place.batch_idx, place.position / kBlockSize);
    }
  }
  const int slot = static_cast<int>(place.position % kBlockSize);
  const float q_inverse =
      rope.q_quant == QQuant::kPerTensor ? Div(1.0f, __ldg(rope.q_scale)) : 0.0f;

  for (int h0 = first_head; h0 < end_head; h0 += kHeadBatch) {
    Raw<Traits::kIn> next[kHeadBatch];
    LoadHeads<Traits>(p, token, channel, h0 + kHeadBatch, end_head, inside, next);
#pragma unroll
    for (int i = 0; i < kHeadBatch; ++i) {
      const int head = h0 + i;
      if (head >= end_head) break;
      float x[kChunk];
      Unpack<Traits::kIn>(raw[i], x);
      if (Traits::kRope && rope.bias != nullptr) {
        AddBias(rope.bias, rope.bias_dtype, static_cast<int64_t>(head) * Traits::kHeadDim + channel,
                x);
      }
      if (Traits::kRope && head < rope.num_heads) {
        Transform<Traits>(rope, rope.q_norm_weight, rope.q_norm_dtype, angles, channel, x);
        if (!owned) {
#pragma unroll
          for (int c = 0; c < kChunk; ++c) x[c] = 0.0f;
        }
        StoreQ<Traits>(rope, x, q_inverse, token, head, channel, inside);
      } else {
        const int kv_head = head - rope.num_heads;
        if constexpr (Traits::kRope) {
          Transform<Traits>(rope, rope.k_norm_weight, rope.k_norm_dtype, angles, channel, x);
        }
        RoundToInput<Traits::kIn>(x);
        Inverses inverse;
        LoadInverses<Traits>(cache, cache.k_scales, cache.k_granularity, kv_head, channel, inverse);
        StoreKey<Traits>(cache, x, inverse, block, kv_head, slot, channel, owned && block >= 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kHeadBatch; ++i) raw[i] = next[i];
  }
}

// V of one block in shared memory.
template <int kHeadDim>
struct ValueTile : TokenMajorTile<kHeadDim> {
  alignas(16) uint8_t valid[kBlockSize];  // 1: this token is new
};

// The bytes of a piece whose tokens are new (flags: a byte a token, 1 where it is), a word or half
// a word at a time where neighbours are.
__device__ __forceinline__ void StoreNewTokens(uint8_t* out, uint4 piece, uint4 flags) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
  const uint32_t valid[4] = {flags.x, flags.y, flags.z, flags.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    // Tokens 2w, 2w + 1, 2w + 8, 2w + 9 of the group.
    const uint32_t pairs = __byte_perm(valid[w / 2], valid[w / 2 + 2], w % 2 ? 0x7632 : 0x5410);
    if (pairs == 0x01010101u) {
      *reinterpret_cast<uint32_t*>(out + 4 * w) = words[w];
      continue;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t pair = pairs >> (16 * half) & 0xFFFFu;
      const uint32_t codes = words[w] >> (16 * half);
      uint8_t* to = out + 4 * w + 2 * half;
      if (pair == 0x0101u) {
        *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(codes);
      } else {
        if (pair & 0x0001u) to[0] = static_cast<uint8_t>(codes);
        if (pair & 0x0100u) to[1] = static_cast<uint8_t>(codes >> 8);
      }
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void StoreValueTile(const ValueTile<kHeadDim>& tile, uint8_t* plane,
                                               int64_t row) {
  const int group = threadIdx.x % 4;        // tokens [16 group, +16)
  const int channel = threadIdx.x / 4 * 4;  // channels [channel, +4)
  if (channel >= kHeadDim) return;
  const uint4 flags = *reinterpret_cast<const uint4*>(tile.valid + 16 * group);
  if ((flags.x | flags.y | flags.z | flags.w) == 0) return;
  uint4 pieces[4];  // [channel]
  GatherPieces<kHeadDim>(tile, channel, group, pieces);
  const bool whole = (flags.x & flags.y & flags.z & flags.w) == 0x01010101u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint8_t* out = plane + (channel + i) * row + group * 16;
    if (whole) {
      *reinterpret_cast<uint4*>(out) = pieces[i];
    } else {
      StoreNewTokens(out, pieces[i], flags);
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void WriteValues(const StepParams& p, int64_t index) {
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kLanes = Traits::kLanes;
  constexpr int kTokens = kPrefillThreads / kLanes;
  constexpr int kPasses = kBlockSize / kTokens;
  __shared__ ValueTile<kHeadDim> tile;

  const RopeWriteCacheParams& rope = p.rope;
  const SeqMeta& seqs = rope.seqs;
  const PagedCache& cache = rope.cache;
  const int kv_heads = cache.num_kv_heads;
  const int head = static_cast<int>(index % kv_heads);
  const int64_t tile_slot = index / kv_heads;
  const int channel = threadIdx.x % kLanes * kChunk;

  const int row = FindSeq(seqs.cu_seqlens_q, seqs.batch, tile_slot, kBlockSize, 2);
  if (row < 0) return;
  const int64_t first = seqs.cu_seqlens_q[row];
  if (first < 0) return;
  const int64_t end = min(seqs.cu_seqlens_q[row + 1], seqs.num_tokens);
  const int64_t count = min(static_cast<int64_t>(seqs.seq_lens_this_time[row]), end - first);
  const int64_t start = max(seqs.seq_lens_decoder[row], 0);
  const int64_t block_index =
      start / kBlockSize + tile_slot - FirstSlot(static_cast<int>(first), row, kBlockSize, 2);
  const int64_t base = block_index * kBlockSize;  // position of the block's first token
  const int64_t low = max(start - base, int64_t{0});
  const int64_t high = min(start + count - base, int64_t{kBlockSize});
  if (high <= low) return;
  const int block = FindBlock(seqs, cache.num_blocks, row, block_index);
  if (block < 0) return;
  const int64_t plane = cache.value_strides.Plane(block, head);

  Raw<Traits::kIn> raw[kPasses];
  bool owned[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int slot = i * kTokens + threadIdx.x / kLanes;
    const int64_t token = first + base + slot - start;
    owned[i] =
        slot >= low && slot < high &&
        (seqs.batch_id_per_token == nullptr || __ldg(seqs.batch_id_per_token + token) == row);
    raw[i] = LoadRaw<Traits::kIn>(
        p.v, token * p.v_stride + static_cast<int64_t>(head) * kHeadDim + channel, owned[i]);
  }
  Inverses inverse;
  LoadInverses<Traits>(cache, cache.v_scales, cache.v_granularity, head, channel, inverse);
  const int64_t bias_channel =
      static_cast<int64_t>(rope.num_heads + kv_heads + head) * kHeadDim + channel;
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int slot = i * kTokens + threadIdx.x / kLanes;
    float x[kChunk];
    Unpack<Traits::kIn>(raw[i], x);
    if (Traits::kRope && rope.bias != nullptr) {
      AddBias(rope.bias, rope.bias_dtype, bias_channel, x);
    }
    RoundToInput<Traits::kIn>(x);
    if constexpr (Traits::kQuantized) {
      const uint2 codes =
          Quantize<Traits>(x, inverse, cache.v_scales, cache.scale_dtype,
                           cache.v_scale_strides.Plane(block, head) + slot, channel, owned[i]);
      *reinterpret_cast<uint2*>(tile.codes + tile.Offset(slot) + channel) = codes;
      if (channel == 0) tile.valid[slot] = owned[i];
    } else {
      const uint4 bits = RoundTo<Traits::kCode>(x);
      const int64_t element = plane + slot * cache.value_strides.row + channel;
      if (owned[i]) {
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(cache.value) + element) = bits;
      }
    }
  }
  if constexpr (Traits::kQuantized) {
    __syncthreads();
    StoreValueTile<kHeadDim>(tile, static_cast<uint8_t*>(cache.value) + plane,
                             cache.value_strides.row);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kPrefillThreads, Traits::kRope ? 4 : 7)
    StepPrefillKernel(const __grid_constant__ StepParams p, PrefillGrid grid) {
  if (blockIdx.x < grid.stream_ctas) {
    StreamHeads<Traits>(p, grid);
  } else {
    WriteValues<Traits>(p, blockIdx.x - grid.stream_ctas);
  }
}

}  // namespace fastattn::cuda
