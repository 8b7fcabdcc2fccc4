// The epilogue: from a packed row's maximum, sum and unnormalised output to what is stored. The
// attention kernel and the one that merges partial results share it.
#pragma once

#include <cstdint>

#include "common/normaliser.h"
#include "common/numeric.h"
#include "common/static_scales.h"
#include "cuda/attention/split_kv/shared/packed_rows.cuh"
#include "cuda/common/mma.cuh"

#include "cuda/common/convert.cuh"

namespace fastattn::cuda {

// Writes a packed row's LSE, if `write_lse`, and returns what its output is multiplied by.
// `sum` is in units of 2^kShift relative to `maximum`, which is in log2 units.
__device__ __forceinline__ float FinishPackedRow(const AttentionParams& p,
                                                 const PackedRow& packed_row, float value_scale,
                                                 float maximum, float sum, bool write_lse = true) {
  const bool empty = sum == 0.0f;
  const Normaliser found = NormaliserOf<kLog2Unit>(empty, maximum, sum, p.sinks, [&] {
    return LoadScale(p.sinks, p.sinks_dtype, packed_row.head);
  });
  float factor = found.factor;
  if (p.lse != nullptr && write_lse) {
    p.lse[static_cast<int64_t>(packed_row.head) * p.seqs.num_tokens + packed_row.token] = found.lse;
  }
  // Without a visible key the output is 0, whatever the scales are.
  if (empty) return 0.0f;
  if (p.out_scale != nullptr) factor *= 1.0f / p.out_scale[0];
  return factor * value_scale;
}

// Stores 4 neighbouring channels from d on of the output `packed_row` elements from its start.
__device__ __forceinline__ void StoreOutput(const AttentionParams& p, int kv_head,
                                            int64_t packed_row, int d, float4 values,
                                            float factor) {
  float out[4] = {values.x * factor, values.y * factor, values.z * factor, values.w * factor};
  if (p.paged && p.cache.v_granularity == ScaleScheme::kChannel && factor != 0.0f) {
    const int64_t first = ChannelScaleIndex<int64_t>(kv_head, d, p.cache.ValueDim());
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] *= LoadScale(p.cache.v_scales, p.cache.scale_dtype, first + i);
    }
  }
  const int64_t offset = packed_row + d;
  switch (p.out_dtype) {
    case DType::kFloat32:
      *reinterpret_cast<float4*>(static_cast<float*>(p.out) + offset) =
          make_float4(out[0], out[1], out[2], out[3]);
      break;
    case DType::kFloat16:
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + offset) = make_uint2(
          PackPair<DType::kFloat16>(out[0], out[1]), PackPair<DType::kFloat16>(out[2], out[3]));
      break;
    case DType::kBFloat16:
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + offset) = make_uint2(
          PackPair<DType::kBFloat16>(out[0], out[1]), PackPair<DType::kBFloat16>(out[2], out[3]));
      break;
    default:
      *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.out) + offset) =
          PackCodes<DType::kE4M3>(out[0], out[1], out[2], out[3]);
  }
}

// A partial result: output [packed rows, D], then the packed rows' (maximum, sum).
__device__ __forceinline__ float* PartialOf(const AttentionTask& task, int tile_rows, int head_dim,
                                            int64_t cta, int partial) {
  return task.partials + (cta * kPartialsPerCta + partial) * tile_rows * (head_dim + 2);
}

}  // namespace fastattn::cuda
