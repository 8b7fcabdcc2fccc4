// Merges the parts of items that several CTAs of an attention kernel shared, as merge_attn_states
// merges two sides: by the weights and the values of cuda/merge.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/attention/clear.cuh"
#include "cuda/attention/finish.cuh"
#include "cuda/attention/launch.h"
#include "cuda/common/early_launch.cuh"
#include "cuda/merge/parts.cuh"
#include "cuda/merge/values.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kMergeColumns = 8;  // of a block, at most: 32 threads each
constexpr int kBatch = 4;         // parts that are loaded together

// Some parts of a column, 4 channels a thread.
struct Merged {
  uint4 out = make_uint4(0, 0, 0, 0);  // of fp32
  PartWeight weight = {kLowestMaximum, 0.0f};

  __device__ __forceinline__ void Join(const uint4& other, PartWeight other_weight) {
    const MergeWeights w = WeightsOfParts(weight, other_weight);
    float x[4];
    MergePack<DType::kFloat32>(out, other, w, x);
    out = make_uint4(FloatBits(x[0]), FloatBits(x[1]), FloatBits(x[2]), FloatBits(x[3]));
    weight = {w.max, w.sum};
  }
};

// A block merges some columns of the item that CTA blockIdx.x began. Parts are joined in a fixed
// order, so that the result does not depend on who finished first.
__global__ void __launch_bounds__(kThreads)
    MergePartsKernel(const __grid_constant__ AttentionParams p,
                     const __grid_constant__ AttentionTask task, int columns, int block_columns) {
  __shared__ uint4 outs[kThreads];
  __shared__ PartWeight weights[kThreads];
  TouchParameters(p);
  WaitForEarlierKernels();
  AllowNextKernel();
  // What the CTA says: CTAs that share the item, its row, KV head and tile of queries.
  const int4 header = __ldcg(reinterpret_cast<const int4*>(
      task.headers + static_cast<int64_t>(blockIdx.x) * kPartialHeader));
  const int parts = header.x;
  if (parts == 0) return;
  const int head_dim = p.head_dim, quads = head_dim / 4;
  const int quad = threadIdx.x % quads;
  const int column = blockIdx.y * block_columns + threadIdx.x / quads % block_columns;
  const int lanes = quads * block_columns;
  // The parts are dealt out over groups of threads that hold all columns of the block.
  const int groups = kThreads / lanes, group = threadIdx.x / lanes;
  const float* first_part = PartOf(task, columns, head_dim, blockIdx.x, 1);
  const int64_t part_size = static_cast<int64_t>(columns) * (head_dim + 2);
  Merged merged;
  for (int first = group; first < parts; first += groups * kBatch) {
    uint4 out[kBatch];
    PartWeight weight[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * groups;
      if (i < parts) {
        // The first part is its CTA's second one, the others are the first ones of the next CTAs.
        const float* part = first_part + (i == 0 ? 0 : (kPartsPerCta * i - 1) * part_size);
        out[b] = __ldcg(reinterpret_cast<const uint4*>(part + column * head_dim) + quad);
        const float2 state =
            __ldcg(reinterpret_cast<const float2*>(part + columns * head_dim) + column);
        weight[b] = {fmaxf(state.x, kLowestMaximum), state.y};
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * groups < parts) merged.Join(out[b], weight[b]);
    }
  }
  const RowShape shape = LoadRowShape(p, header.y);
  const Column info = ColumnOf(task, shape, header.z, header.w * columns + column);
  const float value_scale = ValueScale(p, header.y, header.z);
  if (groups > 1) {
    outs[threadIdx.x] = merged.out;
    weights[threadIdx.x] = merged.weight;
    __syncthreads();
    if (group > 0) return;
    for (int i = 1; i < groups; ++i) {
      merged.Join(outs[threadIdx.x + i * lanes], weights[threadIdx.x + i * lanes]);
    }
  }
  if (group > 0 || !info.valid) return;
  const float factor =
      FinishColumn(p, info, value_scale, merged.weight.max, merged.weight.sum, quad == 0);
  const int64_t out = (static_cast<int64_t>(info.token) * p.num_heads + info.head) * head_dim;
  const float4 values = make_float4(BitsFloat(merged.out.x), BitsFloat(merged.out.y),
                                    BitsFloat(merged.out.z), BitsFloat(merged.out.w));
  StoreOutput(p, header.z, out, 4 * quad, values, factor);
}

__global__ void __launch_bounds__(kThreads) ClearKernel(const __grid_constant__ AttentionParams p) {
  const int each = (p.rows.num_tokens + gridDim.x - 1) / gridDim.x;
  const int begin = static_cast<int>(
      min(static_cast<int64_t>(blockIdx.x) * each, static_cast<int64_t>(p.rows.num_tokens)));
  ClearTokens(p, begin, min(begin + each, p.rows.num_tokens));
}

}  // namespace

cudaError_t LaunchClear(const AttentionParams& p, cudaStream_t stream) {
  if (p.rows.num_tokens == 0 || (!p.clear_padding && p.lse == nullptr)) return cudaSuccess;
  ClearKernel<<<std::min(p.rows.num_tokens, 1024), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t LaunchMergeParts(const AttentionParams& p, const AttentionTask& task, int columns,
                             int grid, cudaStream_t stream) {
  // Where few items share many CTAs, each has many parts: then a block takes one column alone.
  const int items = task.num_rows * p.num_kv_heads;
  const int block_columns = 16 * items <= grid ? 1 : std::min(columns, kMergeColumns);
  return LaunchEarly(MergePartsKernel, dim3(grid, columns / block_columns), dim3(kThreads), stream,
                     p, task, columns, block_columns);
}

}  // namespace fastattn::cuda
