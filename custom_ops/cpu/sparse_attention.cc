// Attention of chosen keys on the CPU, one query token and KV head after the other.
//
// The kernel of paged_attention attends whole blocks in place, over a block table of their own.
// Other keys and values are gathered into rows of fp32, which the kernel of flash_attention
// attends.
//
// The bits of a query follow from the query and from the keys that it sees, in the order in which
// they are named: the first ones, the ones of the list, the last ones. So they depend neither on
// the other queries nor on the number of threads.
#include "cpu/sparse_attention.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "common/block_table.h"
#include "common/dispatch.h"
#include "common/normaliser.h"
#include "common/numeric.h"
#include "common/selected_keys.h"
#include "common/static_scales.h"
#include "cpu/attention_tile.h"
#include "cpu/cache_codec.h"
#include "cpu/parallel.h"
#include "cpu/partial_row.h"
#include "cpu/token_seqs.h"

namespace fastattn::cpu {

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Keys, and whole blocks of them, that are collected before they are attended: one pass of the
// kernel's softmax.
constexpr int kGathered = kTileKeys;
constexpr int kWholeBlocks = kMaxChunks;

// The kernels for rows that are gathered, and for blocks.
struct Kernels {
  TileFunction rows;
  TileFunction blocks;
};

// Gathers and attends the keys of one query token and KV head after the other. One for each thread.
template <typename Kv>
class Attender {
  using Reader = CacheReader<Kv, CacheLayout::kFastattn>;

 public:
  Attender(const SparseAttentionParams& p, const Kernels& kernels)
      : p_(p),
        kernels_(kernels),
        reader_(p.attention.cache),
        tile_(p.attention),
        blocks_(p.attention),
        group_(p.attention.num_heads / p.attention.num_kv_heads),
        dim_(p.attention.head_dim),
        value_dim_(ValueDim(p.attention.head_dim)),
        buffers_(p.attention.head_dim),
        keys_(static_cast<size_t>(kGathered) * dim_),
        values_(static_cast<size_t>(kGathered) * value_dim_),
        acc_(static_cast<size_t>(kMaxTileRows) * value_dim_),
        key_codes_(static_cast<size_t>(kBlockSize) * dim_),
        value_codes_(static_cast<size_t>(kBlockSize) * value_dim_) {
    tile_.paged = false;
    RaggedKv& rows = tile_.ragged;
    rows = {};
    rows.dtype = DType::kFloat32;
    rows.key = keys_.get();
    rows.value = values_.get();
    rows.key_token_stride = dim_;  // the rows are of one KV head, whichever it is
    rows.value_token_stride = value_dim_;
    rows.num_tokens = kGathered;
    blocks_.seqs.batch = 1;
    blocks_.seqs.block_tables = whole_;
  }

  // Attends for up to kMaxTileRows heads of a KV head, of which `first` is the first.
  void Attend(int64_t token, const QueryPlace& query, int kv_head, int first) {
    query_ = query;
    task_.kv_head = kv_head;
    task_.packed_begin = first;
    task_.packed_count = std::min(group_ - first, kMaxTileRows);
    seq_.q_begin = token;
    seq_.q_len = 1;
    count_ = num_whole_ = 0;
    TakeScales();
    std::fill_n(acc_.get(), task_.packed_count * value_dim_, 0.0f);
    for (int r = 0; r < task_.packed_count; ++r) {
      states_[2 * r] = -kInf;
      states_[2 * r + 1] = 0.0f;
    }
    const auto keys = SelectKeys<int64_t>(query.position, p_.window, p_.sink_tokens);
    Gather({0, keys.sink_end});
    const int* list = p_.lists.At(token, kv_head);
    const int length = LengthOf(token, kv_head);
    for (int i = 0; i < length; ++i) Gather(keys.Listed(list[i], p_.lists.granularity));
    Gather({keys.window_begin, keys.limit});
    FlushBlocks();
    Flush();
  }

  template <DType kOut>
  void Write() const {
    const AttentionParams& a = p_.attention;
    const float inverse = a.out_scale == nullptr ? 1.0f : 1.0f / a.out_scale[0];
    for (int r = 0; r < task_.packed_count; ++r) {
      const int64_t token = seq_.q_begin;
      const int64_t head = int64_t{task_.kv_head} * group_ + task_.packed_begin + r;
      const float maximum = states_[2 * r], sum = states_[2 * r + 1];
      const bool empty = sum == 0.0f;
      const Normaliser found = NormaliserOf<0>(
          empty, maximum, sum, a.sinks, [&] { return LoadScale(a.sinks, a.sinks_dtype, head); });
      if (a.lse != nullptr) a.lse[head * a.seqs.num_tokens + token] = found.lse;
      auto* out = static_cast<typename Element<kOut>::Storage*>(a.out) +
                  (token * a.num_heads + head) * value_dim_;
      const float* acc = acc_.get() + r * value_dim_;
      for (int d = 0; d < value_dim_; ++d) {
        out[d] = Element<kOut>::Store(empty ? 0.0f : acc[d] * found.factor * inverse);
      }
    }
  }

 private:
  int LengthOf(int64_t token, int kv_head) const {
    const KeyLists& lists = p_.lists;
    if (lists.lengths == nullptr) return lists.width;
    const int64_t at = token * lists.groups + lists.GroupOf(kv_head);
    return ListLength(lists.lengths[at], lists.width);
  }

  // The query's scales by sequence, as the kernels' only sequence is the first; and the scales of V
  // that are constant over the keys, which the kernel of blocks leaves out.
  void TakeScales() {
    const AttentionParams& a = p_.attention;
    const Descale& descale = a.q_descale;
    if (descale.data != nullptr) {
      const int64_t bytes = query_.batch_idx * descale.batch_stride * SizeOf(descale.dtype);
      tile_.q_descale.data = static_cast<const char*>(descale.data) + bytes;
      blocks_.q_descale.data = tile_.q_descale.data;
    }
    const PagedCache& cache = a.cache;
    scales_values_ = IsQuantized(cache.type) && !IsDynamic(cache.type);
    for (int d = 0; d < value_dim_ && scales_values_; ++d) {
      value_scales_[d] =
          LoadScale(cache.v_scales, cache.scale_dtype,
                    StaticScaleIndex(cache.v_granularity, task_.kv_head, d, value_dim_));
    }
  }

  // Collects whole blocks, adds other keys and values to the rows, and attends either whenever they
  // are full.
  void Gather(KeyRange<int64_t> keys) {
    const SeqMeta& seqs = p_.attention.seqs;
    while (keys.begin < keys.end) {
      const int slot = static_cast<int>(keys.begin % kBlockSize);
      int n = static_cast<int>(std::min<int64_t>(keys.end - keys.begin, kBlockSize - slot));
      if (n < kBlockSize) n = std::min(n, kGathered - count_);
      const int block = BlockOf(seqs.block_tables, seqs.max_blocks, p_.attention.cache.num_blocks,
                                query_.batch_idx, keys.begin / kBlockSize);
      keys.begin += n;
      if (block < 0) continue;
      if (n == kBlockSize) {
        whole_[num_whole_++] = block;
        if (num_whole_ == kWholeBlocks) FlushBlocks();
      } else {
        Decode(block, slot, n);
        if (count_ == kGathered) Flush();
      }
    }
  }

  void Decode(int block, int slot, int n) {
    const int head = task_.kv_head;
    reader_.KeyCodes(block, head, slot, slot + n, key_codes_.data());
    reader_.ValueCodes(block, head, slot, slot + n, value_codes_.data());
    for (int i = 0; i < n; ++i, ++count_) {
      reader_.DecodeKey(block, head, slot + i, key_codes_.data() + i * dim_,
                        keys_.get() + count_ * dim_);
      reader_.DecodeValue(block, head, slot + i, value_codes_.data() + i * value_dim_,
                          values_.get() + count_ * value_dim_);
    }
  }

  void Flush() {
    if (count_ == 0) return;
    Run(tile_, kernels_.rows, count_, false);
    count_ = 0;
  }

  void FlushBlocks() {
    if (num_whole_ == 0) return;
    blocks_.seqs.max_blocks = num_whole_;
    Run(blocks_, kernels_.blocks, num_whole_ * kBlockSize, scales_values_);
    num_whole_ = 0;
  }

  // Attends `count` keys, all of which every row sees, and adds the result to the keys before.
  void Run(const AttentionParams& keys, TileFunction run, int count, bool scales_values) {
    seq_.k_len = task_.key_end = count;
    for (int r = 0; r < task_.packed_count; ++r) {
      buffers_.visible_begin[r] = 0;
      buffers_.visible_end[r] = count;
    }
    run(keys, seq_, task_, buffers_);
    for (int r = 0; r < task_.packed_count; ++r) {
      float* acc = buffers_.acc + r * value_dim_;
      for (int d = 0; d < value_dim_ && scales_values; ++d) acc[d] *= value_scales_[d];
      const float added[2] = {buffers_.row_max[r], buffers_.row_sum[r]};
      AddPartialRow(added, acc, value_dim_, states_ + 2 * r, acc_.get() + r * value_dim_);
    }
  }

  const SparseAttentionParams& p_;
  const Kernels kernels_;
  const Reader reader_;
  AttentionParams tile_;    // of the kernel whose K and V are the gathered rows
  AttentionParams blocks_;  // and of the one whose block table is whole_
  const int group_, dim_, value_dim_;
  TileBuffers buffers_;
  AlignedFloats keys_, values_;  // [kGathered, D]
  AlignedFloats acc_;            // [rows, D]
  float states_[2 * kMaxTileRows];
  std::vector<typename Reader::KeyStorage> key_codes_;
  std::vector<typename Reader::ValueStorage> value_codes_;
  QueryPlace query_;
  AttentionSeq seq_;
  AttentionTask task_;
  int count_ = 0;            // rows that are gathered
  int whole_[kWholeBlocks];  // physical blocks
  int num_whole_ = 0;
  bool scales_values_ = false;
  float value_scales_[kMaxHeadDim];
};

template <typename Kv, DType kOut>
void Run(const SparseAttentionParams& p, const Kernels& kernels) {
  const AttentionParams& a = p.attention;
  const std::vector<QueryPlace> queries = FindQueries(a.seqs);
  const int group = a.num_heads / a.num_kv_heads;
  const int64_t most = int64_t{a.seqs.max_blocks} * kBlockSize;
  const int64_t named =
      int64_t{p.lists.width} * p.lists.granularity + p.window + int64_t{p.sink_tokens};
  // About 2 ns to gather a channel of K and V, 1/8 ns for a product of a head.
  const int64_t work = std::min(named, most) * a.head_dim * (16 + group) / 8;
  // Queries differ in their keys, so every thread takes the next one when it is done with its own.
  std::atomic<int64_t> next{0};
  const int64_t count = int64_t{a.seqs.num_tokens} * a.num_kv_heads;
  ParallelFor(count, work, [&](int64_t, int64_t) {
    Attender<Kv> attender(p, kernels);
    for (int64_t i = next++; i < count; i = next++) {
      const int64_t token = i / a.num_kv_heads;
      if (queries[token].batch_idx < 0) continue;
      for (int first = 0; first < group; first += kMaxTileRows) {
        attender.Attend(token, queries[token], static_cast<int>(i % a.num_kv_heads), first);
        attender.template Write<kOut>();
      }
    }
  });
}

}  // namespace

void SparseAttention(const SparseAttentionParams& p) {
  AttentionParams rows = p.attention;  // the kernel attends gathered rows of fp32
  rows.paged = false;
  rows.ragged.dtype = DType::kFloat32;
  const Kernels kernels{ChooseTileFunction(rows), ChooseTileFunction(p.attention)};
  DispatchCache(p.attention.cache, [&](auto format) {
    dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kE4M3>(
        p.attention.out_dtype, "out_dtype",
        [&](auto dtype) { Run<decltype(format), decltype(dtype)::value>(p, kernels); });
  });
}

}  // namespace fastattn::cpu
