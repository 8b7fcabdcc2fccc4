// Lists of whole blocks as block tables, with which attention reads nothing but what they name.
#include <cuda_runtime.h>

#include "common/block_table.h"
#include "common/layout.h"
#include "common/selected_keys.h"
#include "cuda/attention/shared/seq_lengths.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/sparse_attention/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kNone = 0x7FFFFFFF;

// Block `slot` of a list, in the sequence; -1: none, or one from the query's own on.
__device__ __forceinline__ int ListedBlock(const KeyLists& lists, const int* list, int length,
                                           int slot, int own) {
  const int parts = lists.granularity / kBlockSize;
  const int entry = slot / parts < length ? list[slot / parts] : -1;
  // The product of a larger entry might not fit.
  if (entry < 0 || entry > own / parts) return -1;
  const int block = entry * parts + slot % parts;
  return block <= own ? block : -1;
}

// A CTA for each token. The query's own block comes last, since only a sequence's last block may be
// seen in part.
__global__ void __launch_bounds__(kThreads)
    ListTablesKernel(const __grid_constant__ SparseAttentionParams p,
                     const __grid_constant__ ListTables tables) {
  __shared__ int batch_idx;
  const AttentionParams& a = p.attention;
  const SeqMeta& seqs = a.seqs;
  const int token = blockIdx.x, slots = tables.slots;
  PdlWait();
  PdlLaunchDependents();
  if (threadIdx.x == 0) batch_idx = kNone;
  __syncthreads();
  for (int b = threadIdx.x; b < seqs.batch; b += kThreads) {
    const SeqShape seq = LoadSeqShape(a, b);
    if (token >= seq.q_begin && token < seq.q_begin + seq.q_len) atomicMin(&batch_idx, b);
  }
  __syncthreads();
  const bool found = batch_idx != kNone;
  int position = 0;
  if (found) {
    const SeqShape seq = LoadSeqShape(a, batch_idx);
    position = seq.k_len - seq.q_len + (token - seq.q_begin);
  }
  // With fewer keys than queries the first queries see nothing.
  const bool sees = found && position >= 0;
  const int own = position / kBlockSize;
  if (threadIdx.x == 0) {
    tables.cu_seqlens_q[token] = token;
    if (token + 1 == seqs.num_tokens) tables.cu_seqlens_q[token + 1] = token + 1;
    tables.seq_lens_this_time[token] = found;
    tables.seq_lens_decoder[token] = sees ? slots * kBlockSize + position % kBlockSize : 0;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int head = warp; head < a.num_kv_heads; head += kThreads / 32) {
    const int* list = p.lists.At(token, head);
    int length = p.lists.width;
    if (p.lists.lengths != nullptr) {
      const int64_t at = static_cast<int64_t>(token) * p.lists.groups + p.lists.GroupOf(head);
      length = ListLength(p.lists.lengths[at], p.lists.width);
    }
    int* table =
        tables.block_tables + (static_cast<int64_t>(token) * a.num_kv_heads + head) * (slots + 1);
    bool names_own = false;
    for (int slot = lane; slot < slots; slot += 32) {
      const int block = sees ? ListedBlock(p.lists, list, length, slot, own) : -1;
      names_own |= block == own && sees;
      table[slot] = block < 0 || block == own ? -1
                                              : BlockOf(seqs.block_tables, seqs.max_blocks,
                                                        a.cache.num_blocks, batch_idx, block);
    }
    names_own = __any_sync(0xFFFFFFFFu, names_own);
    if (lane == 0) {
      table[slots] = names_own ? BlockOf(seqs.block_tables, seqs.max_blocks, a.cache.num_blocks,
                                         batch_idx, own)
                               : -1;
    }
  }
}

}  // namespace

cudaError_t LaunchListTables(const SparseAttentionParams& p, const ListTables& tables,
                             cudaStream_t stream) {
  return LaunchPdl(ListTablesKernel, dim3(p.attention.seqs.num_tokens), dim3(kThreads), stream, p,
                   tables);
}

}  // namespace fastattn::cuda
