// token_maps and query_rows on a GPU: a thread for each token; a CTA for each row, whose threads
// copy its table.
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/index_maps/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    TokenMapsKernel(const __grid_constant__ TokenMapsParams p) {
  const int64_t token = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  PdlWait();
  PdlLaunchDependents();
  if (token < p.num_tokens) p.Write(token);
}

__global__ void __launch_bounds__(kThreads)
    QueryRowsKernel(const __grid_constant__ QueryRowsParams p) {
  const int64_t row = blockIdx.x;
  PdlWait();
  PdlLaunchDependents();
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t token = row * kThreads + threadIdx.x; token < p.num_tokens; token += stride) {
    p.WriteToken(token);
  }
  const int64_t seq = p.SeqOf(row);
  for (int64_t query = threadIdx.x; query < p.tile; query += kThreads) {
    p.WriteQuery(seq, row, query);
  }
  const int32_t* table = p.TableOf(seq);
  int32_t* to = p.row_tables + row * p.max_blocks;
  for (int64_t i = threadIdx.x; i < p.max_blocks; i += kThreads) {
    to[i] = table == nullptr ? kNoIndex : table[i];
  }
}

}  // namespace

cudaError_t LaunchTokenMaps(const TokenMapsParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  const dim3 ctas(GridSize((p.num_tokens + kThreads - 1) / kThreads));
  return LaunchPdl(TokenMapsKernel, ctas, dim3(kThreads), stream, p);
}

cudaError_t LaunchQueryRows(const QueryRowsParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return LaunchPdl(QueryRowsKernel, dim3(GridSize(p.rows)), dim3(kThreads), stream, p);
}

}  // namespace fastattn::cuda
