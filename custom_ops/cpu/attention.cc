// Attention on the CPU: cuts the step into tiles of packed rows and splits of the keys, runs
// these on all threads through the kernel of the best instruction set, merges the partial results
// and writes the output.
//
// The bits of a row follow from its query and from the keys that it sees. Splits begin at multiples
// of kSplitKeys of a sequence's positions and passes of the softmax at multiples of kTileKeys,
// whatever tile the row is in, and splits are added in order (AddSplit). Keys that a row does not
// see add 0 and rescale by 1. So it makes no difference how a prompt was cut into steps.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/dispatch.h"
#include "common/head_dims.h"
#include "common/holes.h"
#include "common/normaliser.h"
#include "common/numeric.h"
#include "common/seq_lengths.h"
#include "common/static_scales.h"
#include "common/visible_keys.h"
#include "cpu/attention_tile.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Keys of a split. Results depend neither on the number of threads nor on the tile.
constexpr int64_t kSplitKeys = 2048;
static_assert(kSplitKeys % kTileKeys == 0, "a pass is in one split");

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

// So much of the plan's cost, times channels, is one nanosecond of work (see parallel.h).
constexpr int64_t kCostPerWork = 16;

// The best instruction set that kernels may use; only tests lower it.
std::atomic<int> isa_limit{static_cast<int>(Isa::kAvx512)};

TileFunction ChooseTileFunction(const AttentionParams& p) {
  switch (ChosenIsa()) {
    case Isa::kAvx512:
      return avx512::FindTileFunction(p);
    case Isa::kAvx2:
      return avx2::FindTileFunction(p);
    case Isa::kBaseline:
      break;
  }
  return baseline::FindTileFunction(p);
}

// Lengths of a sequence. The CPU counts positions in 64 bits and so needs no upper bound on them.
AttentionSeq FindSeq(const AttentionParams& p, int batch_idx) {
  const SeqMeta& seqs = p.seqs;
  const int* cu_q = seqs.cu_seqlens_q + batch_idx;
  const TokenRange<int64_t> queries = RaggedTokens<int64_t>(cu_q[0], cu_q[1], seqs.num_tokens);
  AttentionSeq seq;
  seq.q_begin = queries.begin;
  if (p.paged) {
    seq.q_len = NewTokens(int64_t{seqs.seq_lens_this_time[batch_idx]}, queries.count);
    seq.k_len = PagedKeys(int64_t{seqs.seq_lens_decoder[batch_idx]}, seq.q_len, kUnlimited);
  } else {
    const int* cu_k = p.ragged.cu_seqlens_k + batch_idx;
    const auto keys = RaggedTokens<int64_t>(cu_k[0], cu_k[1], p.ragged.num_tokens);
    seq.q_len = queries.count;
    seq.k_begin = keys.begin;
    seq.k_len = keys.count;
  }
  return seq;
}

// A tile of packed rows of one sequence and KV head. Its tasks are the splits of its keys, or
// one task has all of them, where there is work enough without; its result is their sum.
struct OutputTile {
  int first_task = 0;
  int num_tasks = 0;
  int64_t partial = -1;  // offset of its partial results, in floats; -1: a single task
};

struct Plan {
  std::vector<AttentionSeq> seqs;
  std::vector<AttentionTask> tasks;
  std::vector<OutputTile> tiles;
  std::vector<int> tile_of_task;
  std::vector<int> order;  // tasks, the longest first
  int64_t partial_size = 0;
  int64_t work = 0;  // average of a task
};

int64_t PartialSize(const AttentionParams& p, const AttentionTask& task) {
  return static_cast<int64_t>(task.packed_count) * (ValueDim(p.head_dim) + 2);
}

// Bounds a task's keys by what causal mask and window let the first and the last query of its tile
// see.
void BoundKeys(const AttentionParams& p, const AttentionSeq& seq, AttentionTask* task) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t offset = seq.k_len - seq.q_len;
  const int64_t first = task->packed_begin / group + offset;
  const int64_t last = (task->packed_begin + task->packed_count - 1) / group + offset;
  int64_t num_keys = seq.k_len;
  if (p.paged) num_keys = std::min(num_keys, int64_t{p.seqs.max_blocks} * kBlockSize);
  KeyRange<int64_t> keys = VisibleKeys(p, first, num_keys);
  TakeHeadWindow(p.WindowOf(task->kv_head), first, kUnlimited, &keys);
  task->key_begin = keys.begin;
  task->key_end = std::max(task->key_begin, VisibleKeys(p, last, num_keys).end);
}

// Takes from the keys that a row of the tile sees those that its head's window hides, and finds the
// holes among the rest.
void FindHoles(const AttentionParams& p, const AttentionSeq& seq, const AttentionTask& task, int r,
               int64_t query, KeyRange<int64_t>* keys, TileBuffers* buffers) {
  const int64_t new_begin = seq.k_len - seq.q_len;
  const KeyRange<int64_t> gap =
      TakeHeadWindow(p.WindowOf(task.kv_head), query + new_begin, kUnlimited, keys);
  const bool has_tree = p.tree.data != nullptr && seq.q_len <= p.tree.size;
  buffers->tree_begin = new_begin;
  buffers->gap_begin[r] = gap.begin;
  buffers->gap_end[r] = gap.end;
  buffers->tree[r] = has_tree ? p.tree.Row(task.batch_idx, query) : nullptr;
  buffers->holes |= has_tree || gap.begin < gap.end;
}
// Where the split that has this key ends.
int64_t SplitEnd(int64_t key) { return (key / kSplitKeys + 1) * kSplitKeys; }

// Fills the keys of a task that each row of its tile sees.
void FindVisible(const AttentionParams& p, const AttentionSeq& seq, const AttentionTask& task,
                 TileBuffers* buffers) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  buffers->holes = false;
  for (int r = 0; r < task.packed_count; ++r) {
    const int64_t query = (task.packed_begin + r) / group;
    KeyRange<int64_t> keys = VisibleKeys(p, query + seq.k_len - seq.q_len, seq.k_len);
    if (p.IsGeneral()) FindHoles(p, seq, task, r, query, &keys, buffers);
    keys = Intersect(keys, {task.key_begin, task.key_end});
    if (p.mask_offsets != nullptr) {
      const int* offsets = p.mask_offsets + 2 * (seq.q_begin + query);
      keys = Intersect(keys, {offsets[0], offsets[1]});
    }
    buffers->visible_begin[r] = keys.begin;
    buffers->visible_end[r] = keys.end;
  }
}

void PlanTile(const AttentionParams& p, AttentionTask task, bool split, Plan* plan) {
  OutputTile tile;
  tile.first_task = static_cast<int>(plan->tasks.size());
  BoundKeys(p, plan->seqs[task.batch_idx], &task);
  const int64_t end = task.key_end;
  do {
    if (split) task.key_end = std::min(end, SplitEnd(task.key_begin));
    plan->tasks.push_back(task);
    plan->tile_of_task.push_back(static_cast<int>(plan->tiles.size()));
    ++tile.num_tasks;
    task.key_begin = task.key_end;
  } while (task.key_end < end);
  if (tile.num_tasks > 1) {
    tile.partial = plan->partial_size;
    plan->partial_size += tile.num_tasks * PartialSize(p, task);
  }
  plan->tiles.push_back(tile);
}

Plan MakePlan(const AttentionParams& p) {
  Plan plan;
  const int64_t group = p.num_heads / p.num_kv_heads;
  for (int b = 0; b < p.seqs.batch; ++b) {
    plan.seqs.push_back(FindSeq(p, b));
    const int64_t packed = plan.seqs[b].q_len * group;
    for (int h = 0; h < p.num_kv_heads; ++h) {
      for (int64_t begin = 0; begin < packed; begin += kMaxTileRows) {
        AttentionTask task;
        task.batch_idx = b;
        task.kv_head = h;
        task.packed_begin = begin;
        task.packed_count = static_cast<int>(std::min<int64_t>(packed - begin, kMaxTileRows));
        PlanTile(p, task, packed <= kMaxTileRows, &plan);
      }
    }
  }
  // Reading a key costs about as much as using it for four packed rows.
  const auto cost = [&](int i) {
    return (plan.tasks[i].packed_count + 4) * (plan.tasks[i].key_end - plan.tasks[i].key_begin);
  };
  plan.order.resize(plan.tasks.size());
  for (size_t i = 0; i < plan.order.size(); ++i) plan.order[i] = static_cast<int>(i);
  std::stable_sort(plan.order.begin(), plan.order.end(),
                   [&](int a, int b) { return cost(a) > cost(b); });
  int64_t total = 0;
  for (int i : plan.order) total += cost(i);
  const int64_t tasks = std::max<int64_t>(plan.tasks.size(), 1);
  plan.work = total / tasks * p.head_dim / kCostPerWork;
  return plan;
}

// Scales of V that are constant over a sequence's keys. The epilogue applies them.
class ValueScales {
 public:
  ValueScales(const AttentionParams& p, int batch_idx, int kv_head) {
    if (p.paged) {
      const PagedCache& cache = p.cache;
      if (!IsQuantized(cache.type) || IsDynamic(cache.type)) return;
      dtype_ = cache.scale_dtype;
      const int64_t first = StaticScaleIndex(cache.v_granularity, kv_head, 0, cache.ValueDim());
      if (cache.v_granularity == ScaleScheme::kChannel) {
        channels_ = cache.v_scales;
        offset_ = first;
      } else {
        scale_ = LoadScale(cache.v_scales, dtype_, first);
      }
    } else if (p.ragged.v_descale.data != nullptr) {
      const Descale& scale = p.ragged.v_descale;
      scale_ = LoadScale(scale.data, scale.dtype, scale.Index(0, batch_idx, kv_head, 0));
    }
  }

  float At(int d) const {
    return channels_ == nullptr ? scale_ : LoadScale(channels_, dtype_, offset_ + d);
  }

 private:
  const void* channels_ = nullptr;  // one scale a channel
  DType dtype_ = DType::kFloat32;
  int64_t offset_ = 0;
  float scale_ = 1.0f;
};

// Epilogue of one packed row: adds the sink, normalises and writes. `maximum` is a base-2
// logarithm.
template <DType kOut>
void WriteRow(const AttentionParams& p, const AttentionSeq& seq, const AttentionTask& task, int r,
              const ValueScales& scales, const float* acc, float maximum, float sum) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t packed = task.packed_begin + r;
  const int64_t token = seq.q_begin + packed / group;
  const int64_t head = task.kv_head * group + packed % group;

  const bool empty = sum == 0.0f;  // no visible key: neither a sum nor an output to scale
  const Normaliser found = NormaliserOf<0>(empty, maximum, sum, p.sinks,
                                           [&] { return LoadScale(p.sinks, p.sinks_dtype, head); });
  if (p.lse != nullptr) p.lse[head * p.seqs.num_tokens + token] = found.lse;

  auto* out = static_cast<typename Element<kOut>::Storage*>(p.out) +
              (token * p.num_heads + head) * ValueDim(p.head_dim);
  const float inverse = p.out_scale == nullptr ? 1.0f : 1.0f / p.out_scale[0];
  for (int d = 0; d < ValueDim(p.head_dim); ++d) {
    const float o = empty ? 0.0f : acc[d] * found.factor * scales.At(d) * inverse;
    out[d] = Element<kOut>::Store(o);
  }
}

// The output of rows over some of their keys, not normalised.
struct PartialRows {
  float* acc;     // [rows, dim]
  float* states;  // [rows, 2]: maximum, sum
};

// A task's or a tile's place among the partial results.
PartialRows PartialAt(const AttentionParams& p, const AttentionTask& task, float* partial) {
  return {partial, partial + static_cast<int64_t>(task.packed_count) * ValueDim(p.head_dim)};
}

void SavePartial(const AttentionParams& p, const AttentionTask& task, const TileBuffers& buffers,
                 const PartialRows& to) {
  std::memcpy(to.acc, buffers.acc, (to.states - to.acc) * sizeof(float));
  for (int r = 0; r < task.packed_count; ++r) {
    to.states[2 * r] = buffers.row_max[r];
    to.states[2 * r + 1] = buffers.row_sum[r];
  }
}

void Restore(const AttentionParams& p, const AttentionTask& task, const PartialRows& from,
             TileBuffers* buffers) {
  std::memcpy(buffers->acc, from.acc, (from.states - from.acc) * sizeof(float));
  for (int r = 0; r < task.packed_count; ++r) {
    buffers->row_max[r] = from.states[2 * r];
    buffers->row_sum[r] = from.states[2 * r + 1];
  }
}

// Adds a split to the splits before it. A split without visible keys, which has sum 0 and output 0,
// changes no bit. One with a NaN has NaN in both, and a weight of 0 leaves them NaN.
void AddSplit(const AttentionParams& p, const AttentionTask& task, const PartialRows& split,
              const PartialRows& total) {
  const int dim = ValueDim(p.head_dim);
  for (int r = 0; r < task.packed_count; ++r) {
    float* state = total.states + 2 * r;
    const float* added = split.states + 2 * r;
    const float largest = std::max(state[0], added[0]);
    const float shift = largest == -kInf ? 0.0f : largest;
    const float keep = std::exp2(state[0] - shift), weight = std::exp2(added[0] - shift);
    state[0] = largest;
    state[1] = state[1] * keep + added[1] * weight;
    float* acc = total.acc + r * dim;
    const float* out = split.acc + r * dim;
    for (int d = 0; d < dim; ++d) acc[d] = acc[d] * keep + out[d] * weight;
  }
}

// Runs a task, split by split.
void RunTask(const AttentionParams& p, TileFunction run, const AttentionSeq& seq,
             const AttentionTask& task, TileBuffers* buffers, std::vector<float>* memory) {
  if (task.key_end <= SplitEnd(task.key_begin)) {
    FindVisible(p, seq, task, buffers);
    run(p, seq, task, *buffers);
    return;
  }
  memory->resize(2 * PartialSize(p, task));
  const PartialRows total = PartialAt(p, task, memory->data());
  const PartialRows split = PartialAt(p, task, memory->data() + PartialSize(p, task));
  AttentionTask part = task;
  do {
    part.key_end = std::min(task.key_end, SplitEnd(part.key_begin));
    FindVisible(p, seq, part, buffers);
    run(p, seq, part, *buffers);
    const bool first = part.key_begin == task.key_begin;
    SavePartial(p, task, *buffers, first ? total : split);
    if (!first) AddSplit(p, task, split, total);
    part.key_begin = part.key_end;
  } while (part.key_begin < task.key_end);
  Restore(p, task, total, buffers);
}

template <DType kOut>
void Execute(const AttentionParams& p, TileFunction run, const Plan& plan) {
  AlignedFloats partial(std::max<int64_t>(plan.partial_size, 1));
  const auto write = [&](const AttentionTask& task, const TileBuffers& buffers) {
    const ValueScales scales(p, task.batch_idx, task.kv_head);
    for (int r = 0; r < task.packed_count; ++r) {
      WriteRow<kOut>(p, plan.seqs[task.batch_idx], task, r, scales,
                     buffers.acc + r * ValueDim(p.head_dim), buffers.row_max[r],
                     buffers.row_sum[r]);
    }
  };
  // Tasks differ in length, so every thread takes the next one when it is done with its own.
  std::atomic<int64_t> next{0};
  const int64_t num_tasks = static_cast<int64_t>(plan.order.size());
  ParallelFor(num_tasks, plan.work, [&](int64_t, int64_t) {
    TileBuffers buffers(p.head_dim);
    std::vector<float> memory;
    for (int64_t i = next++; i < num_tasks; i = next++) {
      const int index = plan.order[i];
      const AttentionTask& task = plan.tasks[index];
      const OutputTile& tile = plan.tiles[plan.tile_of_task[index]];
      const AttentionSeq& seq = plan.seqs[task.batch_idx];
      RunTask(p, run, seq, task, &buffers, &memory);
      if (tile.partial < 0) {
        write(task, buffers);
      } else {
        const int64_t at = tile.partial + (index - tile.first_task) * PartialSize(p, task);
        SavePartial(p, task, buffers, PartialAt(p, task, partial.get() + at));
      }
    }
  });
  if (plan.partial_size == 0) return;
  const int64_t num_tiles = static_cast<int64_t>(plan.tiles.size());
  ParallelFor(num_tiles, plan.partial_size / num_tiles, [&](int64_t begin, int64_t end) {
    TileBuffers buffers(p.head_dim);
    for (int64_t i = begin; i < end; ++i) {
      const OutputTile& tile = plan.tiles[i];
      if (tile.partial < 0) continue;
      const AttentionTask& task = plan.tasks[tile.first_task];
      float* const first = partial.get() + tile.partial;
      const PartialRows total = PartialAt(p, task, first);
      for (int split = 1; split < tile.num_tasks; ++split) {
        AddSplit(p, task, PartialAt(p, task, first + split * PartialSize(p, task)), total);
      }
      Restore(p, task, total, &buffers);
      write(task, buffers);
    }
  });
}

}  // namespace

Isa ChosenIsa() {
  return static_cast<Isa>(std::min(static_cast<int>(DetectIsa()), isa_limit.load()));
}

void Attention(const AttentionParams& p) {
  const TileFunction run = ChooseTileFunction(p);
  const Plan plan = MakePlan(p);
  dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kE4M3>(
      p.out_dtype, "out_dtype", [&](auto dtype) { Execute<decltype(dtype)::value>(p, run, plan); });
}

}  // namespace fastattn::cpu

// For tests, which reach it through ctypes: every kernel must be right on a processor that has a
// better one. Returns the instruction set that is used from now on.
extern "C" __attribute__((visibility("default"))) int fastattn_limit_isa(int isa) {
  fastattn::cpu::isa_limit = isa;
  return static_cast<int>(fastattn::cpu::ChosenIsa());
}
