// merge_prefill_decode_output: one warp copies one token if it belongs to a decode sequence.
#include "cuda/cache/shared/token_lookup.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/compat/merge_decode/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;

template <typename Piece>
__device__ __forceinline__ void CopyToken(const MergeDecodeParams& p, int64_t token, int lane) {
  const int64_t pieces = p.row_bytes / static_cast<int64_t>(sizeof(Piece));
  const auto* from = static_cast<const Piece*>(p.decode) + token * pieces;
  auto* to = static_cast<Piece*>(p.prefill) + token * pieces;
  for (int64_t i = lane; i < pieces; i += kWarp) to[i] = __ldg(from + i);
}

__global__ void __launch_bounds__(kThreads)
    MergeDecodeKernel(const __grid_constant__ MergeDecodeParams p, bool aligned) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (token >= p.seqs.num_tokens) return;
  const TokenPlace<int64_t> place = FindToken(p.seqs, token, token);
  if (place.batch_idx < 0) return;
  if (p.seq_lens_encoder[place.batch_idx] > 0 || p.seqs.seq_lens_decoder[place.batch_idx] <= 0)
    return;
  const int lane = threadIdx.x % kWarp;
  if (aligned) {
    CopyToken<uint4>(p, token, lane);
  } else {
    CopyToken<uint8_t>(p, token, lane);
  }
}

}  // namespace

cudaError_t LaunchMergeDecode(const MergeDecodeParams& p, cudaStream_t stream) {
  constexpr int kWarps = kThreads / kWarp;
  const auto addresses = reinterpret_cast<uintptr_t>(p.prefill) |
                         reinterpret_cast<uintptr_t>(p.decode) |
                         static_cast<uintptr_t>(p.row_bytes);
  const unsigned grid = GridSize((p.seqs.num_tokens + int64_t{kWarps} - 1) / kWarps);
  return LaunchKernel(MergeDecodeKernel, grid, kThreads, stream, p, addresses % sizeof(uint4) == 0);
}

}  // namespace fastattn::cuda
