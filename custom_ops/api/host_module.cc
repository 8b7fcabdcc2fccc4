// fastattn._host: facts about the compiled code, which need neither Paddle nor a GPU.
//
// No Paddle type crosses this module; it is linked apart from the operators and works without them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "api/host_kernels.h"
#include "api/refused_bytes.h"
#include "common/head_dims.h"
#include "common/layout.h"
#include "common/types.h"
#include "cpu/isa.h"
#include "plan/attention.h"
#include "plan/indexer_topk.h"

namespace fastattn::api {

namespace {

std::vector<std::string> CacheTypes() {
  std::vector<std::string> names;
  for (const CacheFormat& format : kCacheFormats) names.emplace_back(format.name);
  return names;
}

const char* NameOf(ScaleScheme scheme) {
  constexpr const char* kNames[] = {"layer", "head", "channel", "token", "group", "none"};
  return kNames[static_cast<int>(scheme)];
}

// Rows of the table of cache types: (name, code of K, code of V, other code, bits of K's code and
// of V's, scheme of the scales, channels of a group, type of the scales).
using FormatRow = std::tuple<std::string, std::string, std::string, std::string, int, int,
                             std::string, int, std::string>;

std::vector<FormatRow> CacheFormats() {
  std::vector<FormatRow> rows;
  for (const CacheFormat& format : kCacheFormats) {
    const ScaleInfo& scale = InfoOf(format.scales);
    rows.emplace_back(format.name, NameOf(format.code), NameOf(format.value_code),
                      NameOf(format.other_code), InfoOf(format.code).bits,
                      InfoOf(format.value_code).bits, NameOf(format.scheme), scale.group,
                      NameOf(scale.type));
  }
  return rows;
}

std::vector<int> SupportedHeadDims() {
  return {std::begin(AttentionHeadDims::kDims), std::end(AttentionHeadDims::kDims)};
}

std::vector<std::string> Archs() {
  std::vector<std::string> archs;
  std::string entry;
  for (char c : std::string(FASTATTN_ARCHS) + ";") {
    if (c != ';') {
      entry += c;
    } else if (!entry.empty()) {
      archs.push_back(std::move(entry));
      entry.clear();
    }
  }
  return archs;
}

std::vector<int> TokenSlots() {
  std::vector<int> slots(kBlockSize);
  for (int r = 0; r < kBlockSize; ++r) slots[r] = TokenSlot(r);
  return slots;
}

using Launches = std::vector<std::map<std::string, int64_t>>;

Launches LaunchesOf(const AttentionPlan& plan) {
  Launches launches;
  for (int i = 0; i < plan.num_launches; ++i) {
    const AttentionLaunch& launch = plan.launches[i];
    launches.push_back({{"tile_rows", launch.tile_rows},
                        {"split", launch.split},
                        {"min_packed_rows", launch.min_packed_rows},
                        {"max_packed_rows", launch.max_packed_rows},
                        {"grid", launch.grid},
                        {"shares", launch.shares},
                        {"cluster", launch.cluster},
                        {"cluster_kv_tiles", launch.cluster_kv_tiles},
                        {"finds_seqs", launch.finds_seqs},
                        {"merges_in_kernel", launch.merges_in_kernel},
                        {"workspace", launch.workspace},
                        {"invariant_splits", launch.invariant_splits},
                        {"whole_tiles", launch.whole_tiles},
                        {"wide", launch.wide}});
  }
  return launches;
}

// The launches of an attention call on a GPU, in their order.
Launches PlanOf(int64_t num_tokens, int64_t batch, int64_t num_heads, int64_t num_kv_heads,
                int64_t head_dim, int64_t element_bytes, int64_t max_seqlen_q, int64_t max_seqlen_k,
                int64_t num_sms, int64_t max_cluster, int64_t long_seq, int64_t num_clusters) {
  return LaunchesOf(
      PlanAttention({num_tokens, batch, num_heads, num_kv_heads, head_dim, element_bytes,
                     max_seqlen_q, max_seqlen_k, num_sms, max_cluster, long_seq, num_clusters}));
}

DType NamedType(const std::string& name) {
  for (const DTypeInfo& info : kDTypes) {
    if (name == info.name) return info.type;
  }
  throw std::invalid_argument("unknown type " + name);
}

CacheType NamedCacheType(const std::string& name) {
  for (const CacheFormat& format : kCacheFormats) {
    if (name == format.name) return format.type;
  }
  throw std::invalid_argument("unknown cache type " + name);
}

// A call over contiguous tensors at addresses that are never read.
AttentionParams CallOf(const std::string& q_dtype, const std::string& k_dtype,
                       const std::string& cache_type, int num_tokens, int batch, int num_heads,
                       int num_kv_heads, int head_dim, int max_seqlen_q, int max_seqlen_k) {
  void* const somewhere = reinterpret_cast<void*>(uintptr_t{4096});
  AttentionParams p;
  p.q = p.out = somewhere;
  p.q_dtype = NamedType(q_dtype);
  p.q_head_stride = head_dim;
  p.q_token_stride = static_cast<int64_t>(num_heads) * head_dim;
  p.num_heads = num_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  p.max_seqlen_q = max_seqlen_q;
  p.max_seqlen_k = max_seqlen_k;
  p.seqs.batch = batch;
  p.seqs.num_tokens = num_tokens;
  p.seqs.max_blocks = max_seqlen_k / kBlockSize + 1;
  p.paged = cache_type != "ragged";
  if (!p.paged) {
    RaggedKv& kv = p.ragged;
    kv.key = kv.value = somewhere;
    kv.dtype = NamedType(k_dtype);
    kv.num_tokens = static_cast<int64_t>(batch) * max_seqlen_k;
    kv.key_token_stride = kv.value_token_stride = static_cast<int64_t>(num_kv_heads) * head_dim;
    kv.key_head_stride = kv.value_head_stride = head_dim;
    return p;
  }
  PagedCache& cache = p.cache;
  cache.type = NamedCacheType(cache_type);
  cache.dtype = NamedType(k_dtype);
  cache.value_dtype = HasTwoCodes(cache.type) ? CodeOf(cache.type, true) : cache.dtype;
  cache.num_blocks = batch * p.seqs.max_blocks;
  cache.num_kv_heads = num_kv_heads;
  cache.head_dim = head_dim;
  cache.key = cache.value = cache.k_scales = cache.v_scales = somewhere;
  const int64_t plane = int64_t{kBlockSize} * head_dim;
  cache.key_strides = {plane * num_kv_heads, plane, head_dim};
  cache.value_strides = {plane * num_kv_heads, plane,
                         IsQuantized(cache.type) ? kBlockSize : head_dim};
  cache.k_scale_strides =
      cache.v_scale_strides = {int64_t{kBlockSize} * num_kv_heads, kBlockSize, 1};
  return p;
}

// What the host decides about a call on a GPU: (prefill kernel, floats of workspace, launches).
std::tuple<std::string, int64_t, Launches> Decide(
    const std::string& q_dtype, const std::string& k_dtype, const std::string& cache_type,
    int num_tokens, int batch, int num_heads, int num_kv_heads, int head_dim, int max_seqlen_q,
    int max_seqlen_k, int compute_major, int num_sms, bool batch_invariant, bool general,
    bool split_invariant) {
  AttentionParams p = CallOf(q_dtype, k_dtype, cache_type, num_tokens, batch, num_heads,
                             num_kv_heads, head_dim, max_seqlen_q, max_seqlen_k);
  p.batch_invariant = batch_invariant;
  p.split_invariant = split_invariant;
  p.seqs.head_tables = general;  // stands for all that IsGeneral() looks at
  const AttentionDecision decision = DecideAttention(p, {compute_major, num_sms});
  const char* name = "";
  for (const WholeKernelRow& row : kWholeKernels) {
    if (row.kernel == decision.whole) name = row.name;
  }
  return {name, decision.workspace, LaunchesOf(decision.plan)};
}

// What becomes of the codes that a call's long sequences read.
std::map<std::string, int64_t> DequantizePlanOf(
    const std::string& q_dtype, const std::string& k_dtype, const std::string& cache_type,
    int num_tokens, int batch, int num_heads, int num_kv_heads, int head_dim, int max_seqlen_q,
    int max_seqlen_k, int compute_major, int window_left, bool batch_invariant, int64_t memory,
    double operations, bool general, bool split_invariant) {
  AttentionParams p = CallOf(q_dtype, k_dtype, cache_type, num_tokens, batch, num_heads,
                             num_kv_heads, head_dim, max_seqlen_q, max_seqlen_k);
  p.window_left = window_left;
  p.batch_invariant = batch_invariant;
  p.split_invariant = split_invariant;
  p.seqs.head_tables = general;
  const DequantizePlan plan =
      DecideAttention(p, {compute_major, 132, 0, {memory, operations}}).dequantize;
  return {{"blocks", plan.blocks},
          {"table_width", plan.table_width},
          {"min_tokens", plan.min_tokens},
          {"min_rows", plan.min_rows},
          {"bytes", DequantizedBytes(p, plan)}};
}

RoleReasons AttentionReasonsOf(const std::string& q_dtype, const std::string& k_dtype,
                               const std::string& cache_type, int num_tokens, int batch,
                               int num_heads, int num_kv_heads, int head_dim, int max_seqlen_q,
                               int max_seqlen_k, int compute_major, int num_sms, int window_left,
                               bool batch_invariant, int64_t memory, double operations,
                               bool general, bool split_invariant) {
  AttentionParams p = CallOf(q_dtype, k_dtype, cache_type, num_tokens, batch, num_heads,
                             num_kv_heads, head_dim, max_seqlen_q, max_seqlen_k);
  p.window_left = window_left;
  p.batch_invariant = batch_invariant;
  p.split_invariant = split_invariant;
  p.seqs.head_tables = general;
  return AttentionReasons(p, {compute_major, num_sms, 0, {memory, operations}});
}

}  // namespace

}  // namespace fastattn::api

PYBIND11_MODULE(_host, m) {
  using namespace fastattn;
  m.doc() = "Facts about the compiled code.";
  m.def("block_size", [] { return kBlockSize; }, "Tokens of a cache block.");
  m.def("head_dims", &api::SupportedHeadDims, "Head sizes that attention and the caches support.");
  m.def("cache_types", &api::CacheTypes, "Names of the cache types.");
  m.def("cache_formats", &api::CacheFormats,
        "Rows of the table of cache types: name, code, other code, bits, scheme of the scales, "
        "channels of a group, type of the scales.");
  m.def("token_slots", &api::TokenSlots,
        "Slot of each token of a block in the V cache of the fastattn layout.");
  m.def("plan_attention", &api::PlanOf, pybind11::arg("num_tokens"), pybind11::arg("batch"),
        pybind11::arg("num_heads"), pybind11::arg("num_kv_heads"), pybind11::arg("head_dim"),
        pybind11::arg("element_bytes"), pybind11::arg("max_seqlen_q"),
        pybind11::arg("max_seqlen_k"), pybind11::arg("num_sms"), pybind11::arg("max_cluster") = 1,
        pybind11::arg("long_seq") = kLongSeq, pybind11::arg("num_clusters") = 0,
        "Launches of an attention call on a GPU: how its work is shared out.");
  using pybind11::arg;
  m.def("decide_attention", &api::Decide, arg("q_dtype"), arg("k_dtype"), arg("cache_type"),
        arg("num_tokens"), arg("batch"), arg("num_heads"), arg("num_kv_heads"), arg("head_dim"),
        arg("max_seqlen_q"), arg("max_seqlen_k"), arg("compute_major") = 9, arg("num_sms") = 132,
        arg("batch_invariant") = false, arg("general") = false, arg("split_invariant") = false,
        "Kernel of a call's whole tiles, floats of workspace, and launches on a GPU; cache_type "
        "ragged: flash_attention; general: with a tree mask, or windows or block tables of heads.");
  m.def("dequantize_plan", &api::DequantizePlanOf, arg("q_dtype"), arg("k_dtype"),
        arg("cache_type"), arg("num_tokens"), arg("batch"), arg("num_heads"), arg("num_kv_heads"),
        arg("head_dim"), arg("max_seqlen_q"), arg("max_seqlen_k"), arg("compute_major") = 9,
        arg("window_left") = -1, arg("batch_invariant") = false, arg("memory") = kDequantizedBytes,
        arg("operations") = kDequantizedOperations, arg("general") = false,
        arg("split_invariant") = false,
        "Room for 16-bit keys and values of a call's long sequences over a cache of codes.");
  m.def("attention_kernels", &api::AttentionReasonsOf, arg("q_dtype"), arg("k_dtype"),
        arg("cache_type"), arg("num_tokens"), arg("batch"), arg("num_heads"), arg("num_kv_heads"),
        arg("head_dim"), arg("max_seqlen_q"), arg("max_seqlen_k"), arg("compute_major") = 9,
        arg("num_sms") = 132, arg("window_left") = -1, arg("batch_invariant") = false,
        arg("memory") = kDequantizedBytes, arg("operations") = kDequantizedOperations,
        arg("general") = false, arg("split_invariant") = false,
        "Kernels of an attention call: name, what it does, and why it does not take the call.");
  m.def("all_kernels", &api::AllKernels,
        "Rows of the tables of kernels: operators, kernel, first and last compute capability.");
  m.def("mla_attention_kernels", &api::MlaAttentionReasons, arg("cache_format"), arg("heads"),
        arg("max_seqlen_q"), arg("page_size"), arg("num_pages"), arg("compute_major") = 9,
        "Kernels of mla_attention: name, and why it does not take the call.");
  m.def("mla_sparse_attention_kernels", &api::MlaSparseReasons, arg("cache_format"),
        arg("extra_cache_format"), arg("dim"), arg("heads"), arg("page_size"), arg("num_pages"),
        arg("fp32_out") = false, arg("max_logits") = false, arg("compute_major") = 9,
        "Kernels of mla_sparse_attention: name, and why it does not take the call.");
  m.def("mqa_logits_kernels", &api::LogitsReasons, arg("quant"), arg("head_dim"), arg("heads"),
        arg("batch"), arg("next_n"), arg("keys"), arg("page_size") = 0, arg("num_pages") = 0,
        arg("compute_major") = 9,
        "Kernels of mqa_logits and paged_mqa_logits: name, and why it does not take the call.");
  m.def(
      "invariant_split",
      [](uint32_t key) {
        const int split = KeySplitOf(key);
        const KeySplit keys = KeySplitAt(split);
        return std::make_tuple(split, keys.begin, keys.keys);
      },
      arg("key"),
      "Number, first key and keys of the split that has a key, in a batch-invariant call.");
  m.attr("LONG_SEQ") = kLongSeq;
  m.def(
      "plan_indexer_topk",
      [](int64_t rows, int64_t columns, int64_t workspace_bytes, bool makes_lengths) {
        const IndexerTopkPlan plan = PlanIndexerTopk(rows, columns, workspace_bytes, makes_lengths);
        return std::make_tuple(plan.tile_rows, 4 * plan.Words());
      },
      arg("rows"), arg("columns"), arg("workspace_bytes"), arg("makes_lengths") = true,
      "Rows of a tile of indexer_topk, and bytes of its workspace.");
  pybind11::class_<RefusedBytes>(m, "RefusedBytes",
                                 "When to ask an allocator again; times are milliseconds.")
      .def(pybind11::init<>())
      .def("may_ask", [](const RefusedBytes& self, int64_t bytes,
                         int64_t now) { return self.MayAsk(bytes, RefusedBytes::Time(now)); })
      .def("refuse", [](RefusedBytes& self, int64_t bytes,
                        int64_t now) { self.Refuse(bytes, RefusedBytes::Time(now)); })
      .def("grant", &RefusedBytes::Grant);
  m.def("cuda_enabled", [] { return FASTATTN_CUDA != 0; }, "Whether CUDA kernels are compiled.");
  m.def("archs", &api::Archs, "CUDA architectures compiled for.");
  m.def(
      "cpu_isa", [] { return cpu::NameOf(cpu::DetectIsa()); },
      "Instruction set that vectorised CPU kernels use on this processor.");
}
