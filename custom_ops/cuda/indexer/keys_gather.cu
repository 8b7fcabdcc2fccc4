// indexer_k_gather: copies of rows, in the widest words that all addresses allow. A CTA first finds
// where its rows lie, a thread a row, then copies them.
#include "common/dispatch.h"
#include "cuda/common/divisor.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/prefetch.cuh"
#include "cuda/common/unaligned.cuh"
#include "cuda/indexer/encode.cuh"
#include "cuda/indexer/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;
// Rows of a CTA, and of a call that is worth the larger number.
constexpr int kFewRows = 32;
constexpr int kRowsOfMany = 128;
constexpr int64_t kManyRows = 16384;

// Sequences that end at or before `row`, counted by the whole CTA.
__device__ __forceinline__ int SequencesBefore(const IndexerKGatherParams& p, int64_t row) {
  int before = 0;
  for (int base = 0; base < p.batch; base += kThreads) {
    const int seq = base + static_cast<int>(threadIdx.x);
    const bool ended = seq < p.batch && *(p.cu_seqlens + seq + 1) <= row;
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
  if (low < high && *(p.cu_seqlens + low + 1) > row) return low;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (*(p.cu_seqlens + middle + 1) <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// First byte of a row's codes in the cache, and of its scales; null for a row of no token.
struct RowSource {
  const uint8_t* codes;
  const uint8_t* scales;
};

template <IndexerQuant kQuant>
__device__ __forceinline__ RowSource SourceOf(const IndexerKGatherParams& p, int page, int64_t at) {
  if (page < 0 || page >= p.pages.num_pages) return {};
  constexpr int kCodeBytes = PageFormatOf(kQuant).code_bytes;
  const uint8_t* from = p.cache + page * p.pages.page_stride;
  return {from + at * kCodeBytes, from + p.pages.page_size * kCodeBytes + 4 * at};
}

template <IndexerQuant kQuant>
__device__ __forceinline__ RowSource FindRow(const IndexerKGatherParams& p,
                                             const Divisor& page_size, int64_t row, int least) {
  if (row >= p.num_rows) return {};
  const int seq = SequencesBefore(p, row, least);
  if (seq >= p.batch) return {};
  const int64_t token = row - *(p.cu_seqlens + seq);
  if (token < 0) return {};  // before the first sequence
  const int64_t index = token < 0x7FFFFFFF ? page_size.Quotient(static_cast<uint32_t>(token))
                                           : token / p.pages.page_size;
  if (index >= p.max_blocks) return {};
  const int page = *(p.block_tables + static_cast<int64_t>(seq) * p.max_blocks + index);
  return SourceOf<kQuant>(p, page, token - index * p.pages.page_size);
}

// Ends of sequences and block tables of a call that has few of both. A CTA reads all of them at
// once: otherwise where its rows lie is known after two accesses to memory, one after the other.
struct FewPages {
  static constexpr int kMost = 4 * kThreads;
  int32_t begins[kThreads];  // of the sequences, and the last one's end
  int32_t pages[kMost];

  __device__ __forceinline__ static bool Fit(const IndexerKGatherParams& p) {
    return p.batch < kThreads && int64_t{p.batch} * p.max_blocks <= kMost &&
           p.num_rows <= 0x7FFFFFFF;
  }

  // Sequences that end at or before `row`; by the whole CTA.
  __device__ __forceinline__ int Load(const IndexerKGatherParams& p, int64_t row) {
    const int thread = static_cast<int>(threadIdx.x), entries = p.batch * p.max_blocks;
    const int begin = thread <= p.batch ? *(p.cu_seqlens + thread) : 0;
    int32_t ids[kMost / kThreads] = {};
#pragma unroll
    for (int j = 0; j < kMost / kThreads; ++j) {
      if (thread + j * kThreads < entries) ids[j] = *(p.block_tables + thread + j * kThreads);
    }
    begins[thread] = begin;
#pragma unroll
    for (int j = 0; j < kMost / kThreads; ++j) pages[thread + j * kThreads] = ids[j];
    return __syncthreads_count(thread > 0 && thread <= p.batch && begin <= row);
  }

  template <IndexerQuant kQuant>
  __device__ __forceinline__ RowSource FindRow(const IndexerKGatherParams& p,
                                               const Divisor& page_size, int64_t row,
                                               int least) const {
    int seq = least;
    while (seq < p.batch && begins[seq + 1] <= row) ++seq;
    if (row >= p.num_rows || seq >= p.batch || row < begins[seq]) return {};
    const uint32_t token = static_cast<uint32_t>(row) - static_cast<uint32_t>(begins[seq]);
    const uint32_t index = page_size.Quotient(token);
    if (index >= static_cast<uint32_t>(p.max_blocks)) return {};
    return SourceOf<kQuant>(p, pages[seq * p.max_blocks + static_cast<int>(index)],
                            token - index * p.pages.page_size);
  }
};

__device__ __forceinline__ uint32_t LoadScales(const uint8_t* from, bool words) {
  if (words) return *(reinterpret_cast<const uint32_t*>(from));
  uint32_t bytes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) bytes |= static_cast<uint32_t>(*(from + i)) << (8 * i);
  return bytes;
}

// Asks for lines of the index tensors ahead of PdlWait, each by one warp: a line that every CTA
// asked for would be asked for one CTA after the other.
__device__ __forceinline__ void PrefetchIndices(const IndexerKGatherParams& p) {
  if (threadIdx.x % 32 != 0) return;
  const int64_t entry = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (entry <= p.batch) PrefetchL2(p.cu_seqlens + entry);
  if (entry < int64_t{p.batch} * p.max_blocks) PrefetchL2(p.block_tables + entry);
}

template <IndexerQuant kQuant, typename Word, int kRows>
__global__ void __launch_bounds__(kThreads)
    GatherKernel(const __grid_constant__ IndexerKGatherParams p, Divisor page_size) {
  static_assert(kRows <= kThreads);
  constexpr int kWords = PageFormatOf(kQuant).code_bytes / static_cast<int>(sizeof(Word));
  constexpr int kRounds = (kRows * kWords + kThreads - 1) / kThreads;
  constexpr int kAtOnce = kRounds < 4 ? kRounds : 4;
  __shared__ const uint8_t* sources[kRows];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  PrefetchIndices(p);
  PdlWait();
  __shared__ FewPages few;
  const bool is_few = FewPages::Fit(p);
  const int least = is_few ? few.Load(p, first) : SequencesBefore(p, first);
  constexpr bool kScaleWords = sizeof(Word) >= 4;
  const int64_t row = first + threadIdx.x;
  RowSource source = {};
  uint32_t scales = 0;  // stored behind the codes: nobody waits for them before
  if (threadIdx.x < kRows) {
    source = is_few ? few.template FindRow<kQuant>(p, page_size, row, least)
                    : FindRow<kQuant>(p, page_size, row, least);
    sources[threadIdx.x] = source.codes;
    if (source.codes != nullptr) scales = LoadScales(source.scales, kScaleWords);
  }
  __syncthreads();
  PdlLaunchDependents();
  Word* const to = reinterpret_cast<Word*>(p.codes) + first * kWords;
#pragma unroll 1
  for (int round = 0; round < kRounds; round += kAtOnce) {
    Word words[kAtOnce];
    bool there[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int word = (round + i) * kThreads + threadIdx.x;
      const uint8_t* from = word < kRows * kWords ? sources[word / kWords] : nullptr;
      there[i] = from != nullptr;
      if (there[i]) words[i] = *(reinterpret_cast<const Word*>(from) + word % kWords);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (there[i]) to[(round + i) * kThreads + threadIdx.x] = words[i];
    }
  }
  if (source.codes != nullptr) StoreWord(p.scales + 4 * row, scales, kScaleWords);
}

bool AllAligned(const IndexerKGatherParams& p, int bytes) {
  const int scale_bytes = bytes < 4 ? bytes : 4;
  return IsAligned(p.cache, bytes) && p.pages.page_stride % bytes == 0 &&
         IsAligned(p.codes, bytes) && IsAligned(p.scales, scale_bytes);
}

template <IndexerQuant kQuant, typename Word, int kRows>
cudaError_t LaunchVariant(const IndexerKGatherParams& p, cudaStream_t stream) {
  const auto size = p.pages.page_size < 0x7FFFFFFF ? p.pages.page_size : 0x7FFFFFFF;
  const dim3 ctas(GridSize((p.num_rows + kRows - 1) / kRows));
  return LaunchPdl(GatherKernel<kQuant, Word, kRows>, ctas, dim3(kThreads), stream, p,
                   Divisor(static_cast<uint32_t>(size)));
}

}  // namespace

cudaError_t LaunchIndexerKGather(const IndexerKGatherParams& p, cudaStream_t stream) {
  if (p.num_rows == 0 || p.batch == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  dispatch<IndexerQuant::kFp8, IndexerQuant::kMxfp4>(p.pages.quant, "quant", [&](auto quant) {
    constexpr IndexerQuant kQuant = decltype(quant)::value;
    if (!AllAligned(p, 4)) {
      status = LaunchVariant<kQuant, uint8_t, kFewRows>(p, stream);
    } else if (!AllAligned(p, 16)) {
      status = LaunchVariant<kQuant, uint32_t, kFewRows>(p, stream);
    } else if (p.num_rows < kManyRows) {
      status = LaunchVariant<kQuant, uint4, kFewRows>(p, stream);
    } else {
      status = LaunchVariant<kQuant, uint4, kRowsOfMany>(p, stream);
    }
  });
  return status;
}

}  // namespace fastattn::cuda
