// Prefill: one CTA handles up to 64 tokens of a row that share a cache block, for one KV head and
// the query heads of its group.
//
// Lanes of a head own 8 channels of one token; a thread walks over the heads of its token, so cos
// and sin are read once a token. V codes gather in shared memory, token-major, and leave
// transposed: a thread turns 4 channels x 16 tokens (4x4 byte transpositions) into four 16-byte
// pieces of V rows. A group of 16 tokens that is not wholly new is written byte by byte, so that
// what other steps wrote beside it stays.
#pragma once

#include "cuda/common/pieces.cuh"
#include "cuda/common/row_tiles.cuh"
#include "cuda/rope_write/cache_store.cuh"

namespace fastattn::cuda {

inline constexpr int kTileThreads = 128;
inline constexpr int kQueryBatch = 4;  // query heads whose loads are in flight together

// V of one block in shared memory.
template <int kHeadDim>
struct ValueTile : TokenMajorTile<kHeadDim> {
  alignas(16) uint8_t valid[kBlockSize];  // 1: this token is new
};

// Tokens of a row's share of the packed input that no row uses get q = 0.
template <typename Traits>
__device__ __forceinline__ void ClearPadding(const StepParams& p, int64_t begin, int64_t end,
                                             int first_head, int num_heads, int channel) {
  constexpr int kTokens = kTileThreads / Traits::kLanes;
  float zero[kChunk] = {};
  for (int64_t base = begin; base < end; base += kTokens) {
    const int64_t token = base + threadIdx.x / Traits::kLanes;
    for (int i = 0; i < num_heads; ++i) {
      StoreQ<Traits>(p.rope, zero, 1.0f, token, first_head + i, channel, token < end);
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void StoreValueTile(const ValueTile<Traits::kHeadDim>& tile,
                                               uint8_t* block) {
  const int group = threadIdx.x % 4;        // tokens [16 group, +16)
  const int channel = threadIdx.x / 4 * 4;  // channels [channel, +4)
  if (channel >= Traits::kHeadDim) return;
  const uint4 flags = *reinterpret_cast<const uint4*>(tile.valid + 16 * group);
  if ((flags.x | flags.y | flags.z | flags.w) == 0) return;
  uint4 pieces[4];  // [channel]
  GatherPieces<Traits::kHeadDim>(tile, channel, group, pieces);
  const bool whole = (flags.x & flags.y & flags.z & flags.w) == 0x01010101u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint8_t* out = block + (channel + i) * kBlockSize + group * 16;
    if (whole) {
      *reinterpret_cast<uint4*>(out) = pieces[i];
    } else {
      const uint32_t words[4] = {pieces[i].x, pieces[i].y, pieces[i].z, pieces[i].w};
#pragma unroll
      for (int slot = 0; slot < 16; ++slot) {
        if (tile.valid[16 * group + TokenOfSlot(slot)]) {
          out[slot] = static_cast<uint8_t>(words[slot / 4] >> (8 * (slot % 4)));
        }
      }
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kTileThreads)
    StepTileKernel(const __grid_constant__ StepParams p) {
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kLanes = Traits::kLanes;
  constexpr int kTokens = kTileThreads / kLanes;  // a pass
  __shared__ ValueTile<kHeadDim> tile;

  const RopeWriteCacheParams& rope = p.rope;
  const RowMeta& rows = rope.rows;
  const PagedCache& cache = rope.cache;
  const int kv_heads = cache.num_kv_heads;
  const int head = blockIdx.x % kv_heads;
  const int64_t tile_slot = blockIdx.x / kv_heads;
  const int group_size = rope.num_heads / kv_heads;
  const int lane_token = threadIdx.x / kLanes;
  const int channel = threadIdx.x % kLanes * kChunk;

  const int row = FindRow(rows.cu_seqlens_q, rows.batch, tile_slot, kBlockSize, 2);
  if (row < 0) return;
  const int64_t first = rows.cu_seqlens_q[row];
  if (first < 0) return;
  const int64_t next = row + 1 < rows.batch ? rows.cu_seqlens_q[row + 1] : rows.num_tokens;
  const int64_t room =
      min(static_cast<int64_t>(rows.cu_seqlens_q[row + 1]), static_cast<int64_t>(rows.num_tokens)) -
      first;
  const int64_t count =
      max(int64_t{0}, min(static_cast<int64_t>(rows.seq_lens_this_time[row]), room));
  const int64_t start = max(rows.seq_lens_decoder[row], 0);
  const int64_t index = tile_slot - FirstSlot(static_cast<int>(first), row, kBlockSize, 2);
  if (index == 0 && group_size > 0) {
    if (row == 0)
      ClearPadding<Traits>(p, 0, min(first, static_cast<int64_t>(rows.num_tokens)),
                           head * group_size, group_size, channel);
    ClearPadding<Traits>(p, first + count, min(next, static_cast<int64_t>(rows.num_tokens)),
                         head * group_size, group_size, channel);
  }
  const int64_t block_index = start / kBlockSize + index;
  const int64_t base = block_index * kBlockSize;  // position of the block's first token
  const int low = static_cast<int>(max(start - base, int64_t{0}));
  const int high = static_cast<int>(min(start + count - base, int64_t{kBlockSize}));
  if (high <= low) return;
  int block = -1;
  if (block_index < rows.max_blocks) {
    block = rows.block_tables[static_cast<int64_t>(row) * rows.max_blocks + block_index];
    if (block >= cache.num_blocks) block = -1;
  }
  const int64_t block_head = static_cast<int64_t>(block) * kv_heads + head;

  Inverses k_inverse, v_inverse;
  LoadInverses<Traits>(cache, cache.k_scales, cache.k_granularity, head, channel, k_inverse);
  LoadInverses<Traits>(cache, cache.v_scales, cache.v_granularity, head, channel, v_inverse);
  const float q_inverse =
      rope.q_quant == QQuant::kPerTensor ? Div(1.0f, __ldg(rope.q_scale)) : 0.0f;
  if constexpr (Traits::kQuantized) {
    if (threadIdx.x < kBlockSize) tile.valid[threadIdx.x] = 0;
    __syncthreads();
  }

  for (int pass = low / kTokens * kTokens; pass < high; pass += kTokens) {
    const int slot = pass + lane_token;
    const int64_t position = base + slot;
    const int64_t token = first + position - start;
    const bool inside = slot >= low && slot < high;
    const bool owned = inside && (rows.batch_id_per_token == nullptr ||
                                  __ldg(rows.batch_id_per_token + token) == row);
    const bool store = owned && block >= 0;

    const int64_t kv_element = static_cast<int64_t>(head) * kHeadDim + channel;
    const auto k_raw = LoadRaw<Traits::kIn>(p.k, token * p.k_stride + kv_element, owned);
    const auto v_raw = LoadRaw<Traits::kIn>(p.v, token * p.v_stride + kv_element, owned);
    Angles angles;
    if (owned) LoadAngles(rope, position, channel, angles);

    for (int q0 = 0; q0 < group_size; q0 += kQueryBatch) {
      Raw<Traits::kIn> q_raw[kQueryBatch];
#pragma unroll
      for (int i = 0; i < kQueryBatch; ++i) {
        const int64_t element =
            static_cast<int64_t>(head * group_size + q0 + i) * kHeadDim + channel;
        q_raw[i] =
            LoadRaw<Traits::kIn>(p.q, token * p.q_stride + element, owned && q0 + i < group_size);
      }
#pragma unroll
      for (int i = 0; i < kQueryBatch; ++i) {
        if (q0 + i >= group_size) break;
        const int q_head = head * group_size + q0 + i;
        float x[kChunk];
        Unpack<Traits::kIn>(q_raw[i], x);
        if (rope.bias != nullptr) {
          AddBias(rope.bias, rope.bias_dtype, static_cast<int64_t>(q_head) * kHeadDim + channel, x);
        }
        Transform<Traits>(rope, rope.q_norm_weight, rope.q_norm_dtype, angles, channel, x);
        if (!owned) {
#pragma unroll
          for (int c = 0; c < kChunk; ++c) x[c] = 0.0f;
        }
        StoreQ<Traits>(rope, x, q_inverse, token, q_head, channel, inside);
      }
    }

    float x[kChunk];
    Unpack<Traits::kIn>(k_raw, x);
    const int64_t k_bias = static_cast<int64_t>(rope.num_heads + head) * kHeadDim + channel;
    if (rope.bias != nullptr) AddBias(rope.bias, rope.bias_dtype, k_bias, x);
    Transform<Traits>(rope, rope.k_norm_weight, rope.k_norm_dtype, angles, channel, x);
    RoundToInput<Traits::kIn>(x);
    StoreKey<Traits>(cache, x, k_inverse, block_head, slot, channel, store);

    Unpack<Traits::kIn>(v_raw, x);
    if (rope.bias != nullptr) {
      AddBias(rope.bias, rope.bias_dtype, k_bias + static_cast<int64_t>(kv_heads) * kHeadDim, x);
    }
    RoundToInput<Traits::kIn>(x);
    if constexpr (Traits::kQuantized) {
      const uint2 codes = Quantize<Traits>(x, v_inverse, cache.v_scales, cache.scale_dtype,
                                           block_head * kBlockSize + slot, channel, store);
      *reinterpret_cast<uint2*>(tile.codes + tile.Offset(slot) + channel) = codes;
      if (channel == 0) tile.valid[slot] = store;
    } else {
      const uint4 bits = RoundTo<Traits::kCode>(x);
      const int64_t element = (block_head * kBlockSize + slot) * kHeadDim + channel;
      if (store) *reinterpret_cast<uint4*>(static_cast<uint16_t*>(cache.value) + element) = bits;
    }
  }
  if constexpr (Traits::kQuantized) {
    __syncthreads();
    if (block >= 0) {
      StoreValueTile<Traits>(
          tile, static_cast<uint8_t*>(cache.value) + block_head * (kBlockSize * kHeadDim));
    }
  }
}

}  // namespace fastattn::cuda
