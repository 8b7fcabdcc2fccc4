// For fastattn._host: which kernel of a table takes a call, and why the others do not.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "plan/attention.h"
#include "plan/kernel_row.h"
#include "plan/mla_attention.h"
#include "plan/mla_sparse_attention.h"
#include "plan/mqa_logits.h"

namespace fastattn::api {

// (kernel, why it does not take the call; empty: it takes it).
using KernelReasons = std::vector<std::pair<std::string, std::string>>;

inline std::string TextOf(Reason reason) { return reason == nullptr ? "" : reason; }

// Of a table of which one row takes the call.
template <typename Row, std::size_t kRows>
KernelReasons ReasonsOf(const Row (&rows)[kRows], const typename Row::RequestType& request,
                        int major) {
  const Row& chosen = ChooseKernel(rows, request, major);
  KernelReasons found;
  for (const Row& row : rows) {
    Reason reason = row.WhyNot(request, major);
    if (reason == nullptr && &row != &chosen) reason = kTakenBefore;
    found.emplace_back(row.name, TextOf(reason));
  }
  return found;
}

// (kernel, what it does, why it does not).
using RoleReasons = std::vector<std::tuple<std::string, std::string, std::string>>;

inline RoleReasons AttentionReasons(const AttentionParams& p, const AttentionDevice& device) {
  const AttentionDecision decision = DecideAttention(p, device);
  RoleReasons found;
  for (const WholeKernelRow& row : kWholeKernels) {
    found.emplace_back(row.name, "whole tiles", TextOf(WhyNotWhole(row, p, device, decision)));
  }
  bool splits = false;
  for (int i = 0; i < decision.plan.num_launches; ++i) splits |= decision.plan.launches[i].split;
  for (const auto& [name, reason] : ReasonsOf(kSplitKernels, p, device.major)) {
    const std::string text = reason.empty() && !splits ? kNothingSplit : reason;
    found.emplace_back(name, "split tiles", text);
  }
  found.emplace_back("dequantize_kv", "16-bit keys ahead", TextOf(decision.no_dequantize));
  return found;
}

// Rows of all tables: (operators, kernel, first and last compute capability by the first number).
using KernelTable = std::vector<std::tuple<std::string, std::string, int, int>>;

template <typename Row, std::size_t kRows>
void AddRows(const char* operators, const Row (&rows)[kRows], KernelTable* table) {
  for (const Row& row : rows) {
    table->emplace_back(operators, row.name, row.architectures.first, row.architectures.last);
  }
}

inline KernelTable AllKernels() {
  KernelTable table;
  AddRows("attention, whole tiles", kWholeKernels, &table);
  AddRows("attention, split tiles", kSplitKernels, &table);
  AddRows("mla_attention", kMlaAttentionKernels, &table);
  AddRows("mla_sparse_attention", kMlaSparseKernels, &table);
  AddRows("mqa_logits", kLogitsKernels, &table);
  return table;
}

// A cache of contiguous pages at an address that is never read.
inline MlaCache LatentCacheOf(const std::string& format, int page_size, int64_t num_pages) {
  for (int i = 0; i <= static_cast<int>(MlaFormat::kFp8x528); ++i) {
    const auto each = static_cast<MlaFormat>(i);
    if (format != NameOf(each)) continue;
    MlaCache cache;
    cache.data = reinterpret_cast<void*>(uintptr_t{4096});
    cache.format = each;
    cache.page_size = page_size;
    cache.num_pages = num_pages;
    cache.row_stride = FactsOf(each).row_bytes;
    cache.page_stride = int64_t{page_size} * FactsOf(each).token_bytes;
    return cache;
  }
  throw std::invalid_argument("unknown format of a latent cache " + format);
}

inline KernelReasons MlaAttentionReasons(const std::string& format, int heads, int max_seqlen_q,
                                         int page_size, int64_t num_pages, int major) {
  MlaAttentionParams p;
  p.cache = LatentCacheOf(format, page_size, num_pages);
  p.heads = heads;
  p.max_seqlen_q = max_seqlen_q;
  return ReasonsOf(kMlaAttentionKernels, p, major);
}

// `extra_format`: empty without a second cache.
inline KernelReasons MlaSparseReasons(const std::string& format, const std::string& extra_format,
                                      int dim, int heads, int page_size, int64_t num_pages,
                                      bool fp32_out, bool max_logits, int major) {
  float somewhere = 0.0f;
  MlaSparseParams p;
  p.keys.cache = LatentCacheOf(format, page_size, num_pages);
  p.keys.topk = 1;
  if (!extra_format.empty()) {
    p.extra.cache = LatentCacheOf(extra_format, page_size, num_pages);
    p.extra.topk = 1;
  }
  p.heads = heads;
  p.dim = p.q_head_stride = dim;
  p.q_token_stride = int64_t{heads} * dim;
  if (fp32_out) p.out_float = &somewhere;
  if (max_logits) p.max_logits = &somewhere;
  return ReasonsOf(kMlaSparseKernels, p, major);
}

// `page_size` 0: contiguous keys, of which `keys` counts them; else keys of a row, at most.
inline KernelReasons LogitsReasons(const std::string& quant, int head_dim, int heads, int64_t batch,
                                   int64_t next_n, int64_t keys, int64_t page_size,
                                   int64_t num_pages, int major) {
  auto* const somewhere = reinterpret_cast<uint8_t*>(uintptr_t{4096});
  LogitsParams p;
  p.quant = quant == "fp8" ? IndexerQuant::kFp8 : IndexerQuant::kMxfp4;
  p.q = p.keys = p.key_scales = p.cache = somewhere;
  p.head_dim = head_dim;
  p.num_heads = heads;
  p.rows = batch * next_n;
  p.paged = page_size > 0;
  p.columns = p.num_keys = keys;
  p.batch = batch;
  p.next_n = next_n;
  p.page_size = page_size;
  p.num_pages = num_pages;
  p.page_stride = (page_size * (p.CodeBytes() + kLogitsScaleBytes) + 15) / 16 * 16;
  return ReasonsOf(kLogitsKernels, p, major);
}

}  // namespace fastattn::api
