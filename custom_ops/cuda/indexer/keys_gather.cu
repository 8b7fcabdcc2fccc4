// indexer_k_gather: copies of rows, in the widest words that all addresses allow.
#include "common/dispatch.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/unaligned.cuh"
#include "cuda/indexer/encode.cuh"
#include "cuda/indexer/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;

// How a row's codes are dealt out to lanes.
template <IndexerQuant kQuant, typename Word>
struct RowLanes {
  static constexpr int kWords = PageFormatOf(kQuant).code_bytes / static_cast<int>(sizeof(Word));
  static constexpr int kLanes = kWords < 32 ? kWords : 32;
  static constexpr int kRows = kThreads / kLanes;  // of a CTA
};

// Sequences that end at or before `row`, counted by the whole CTA.
__device__ __forceinline__ int SequencesBefore(const IndexerKGatherParams& p, int64_t row) {
  int before = 0;
  for (int base = 0; base < p.batch; base += kThreads) {
    const int seq = base + static_cast<int>(threadIdx.x);
    const bool ended = seq < p.batch && __ldg(p.cu_seqlens + seq + 1) <= row;
    const int count = __syncthreads_count(ended);
    before += count;
    if (count < kThreads) break;  // ends ascend
  }
  return before;
}

// The same, from a number that is not too large: most rows of a CTA lie in its first's sequence.
__device__ __forceinline__ int SequencesBefore(const IndexerKGatherParams& p, int64_t row,
                                               int least) {
  int low = least, high = p.batch;
  if (low < high && __ldg(p.cu_seqlens + low + 1) > row) return low;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (__ldg(p.cu_seqlens + middle + 1) <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <IndexerQuant kQuant, typename Word>
__global__ void __launch_bounds__(kThreads)
    GatherKernel(const __grid_constant__ IndexerKGatherParams p) {
  using Lanes = RowLanes<kQuant, Word>;
  constexpr int kCodeBytes = PageFormatOf(kQuant).code_bytes;
  const int lane = threadIdx.x % Lanes::kLanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Lanes::kRows;
  const int64_t row = first + threadIdx.x / Lanes::kLanes;
  PdlWait();
  const int least = SequencesBefore(p, first);
  if (row >= p.num_rows) return;
  const int seq = SequencesBefore(p, row, least);
  if (seq >= p.batch) return;
  const int64_t token = row - __ldg(p.cu_seqlens + seq);
  if (token < 0) return;  // before the first sequence
  int64_t index, at;
  SplitSlot(token, p.pages.page_size, &index, &at);
  if (index >= p.max_blocks) return;
  const int page = __ldg(p.block_tables + static_cast<int64_t>(seq) * p.max_blocks + index);
  PdlLaunchDependents();
  if (page < 0 || page >= p.pages.num_pages) return;
  const uint8_t* from = p.cache + page * p.pages.page_stride;
  const Word* codes = reinterpret_cast<const Word*>(from + at * kCodeBytes);
  Word* to = reinterpret_cast<Word*>(p.codes + row * kCodeBytes);
#pragma unroll
  for (int i = lane; i < Lanes::kWords; i += Lanes::kLanes) to[i] = __ldg(codes + i);
  const uint8_t* scales = from + p.pages.page_size * kCodeBytes + 4 * at;
  if constexpr (sizeof(Word) >= 4) {
    if (lane == 0) {
      reinterpret_cast<uint32_t*>(p.scales)[row] = __ldg(reinterpret_cast<const uint32_t*>(scales));
    }
  } else if (lane < 4) {
    p.scales[4 * row + lane] = __ldg(scales + lane);
  }
}

bool AllAligned(const IndexerKGatherParams& p, int bytes) {
  const int scale_bytes = bytes < 4 ? bytes : 4;
  return IsAligned(p.cache, bytes) && p.pages.page_stride % bytes == 0 &&
         IsAligned(p.codes, bytes) && IsAligned(p.scales, scale_bytes);
}

template <IndexerQuant kQuant, typename Word>
cudaError_t LaunchVariant(const IndexerKGatherParams& p, cudaStream_t stream) {
  constexpr int kRows = RowLanes<kQuant, Word>::kRows;
  const dim3 ctas(GridSize((p.num_rows + kRows - 1) / kRows));
  return LaunchPdl(GatherKernel<kQuant, Word>, ctas, dim3(kThreads), stream, p);
}

}  // namespace

cudaError_t LaunchIndexerKGather(const IndexerKGatherParams& p, cudaStream_t stream) {
  if (p.num_rows == 0 || p.batch == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  dispatch<IndexerQuant::kFp8, IndexerQuant::kMxfp4>(p.pages.quant, "quant", [&](auto quant) {
    constexpr IndexerQuant kQuant = decltype(quant)::value;
    if (AllAligned(p, 16)) {
      status = LaunchVariant<kQuant, uint4>(p, stream);
    } else if (AllAligned(p, 4)) {
      status = LaunchVariant<kQuant, uint32_t>(p, stream);
    } else {
      status = LaunchVariant<kQuant, uint8_t>(p, stream);
    }
  });
  return status;
}

}  // namespace fastattn::cuda
