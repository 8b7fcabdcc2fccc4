// fastattn._host: facts about the compiled code, which need neither Paddle nor a GPU.
//
// No Paddle type crosses this module; it is linked apart from the operators and works without them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "common/layout.h"
#include "common/types.h"
#include "cpu/isa.h"
#include "params/attention_plan.h"

namespace fastattn::api {

namespace {

constexpr CacheType kCacheTypes[] = {
    CacheType::kNone,          CacheType::kInt8,         CacheType::kFp8,
    CacheType::kBlockWiseInt8, CacheType::kBlockWiseFp8,
};

// The same list as in every dispatch over head_dim, which a test compares.
constexpr int kHeadDims[] = {64, 128};

std::vector<std::string> CacheTypes() {
  std::vector<std::string> names;
  for (CacheType type : kCacheTypes) names.emplace_back(NameOf(type));
  return names;
}

std::vector<int> HeadDims() { return {std::begin(kHeadDims), std::end(kHeadDims)}; }

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

// The launches of an attention call on a GPU, in their order.
std::vector<std::map<std::string, int64_t>> PlanOf(int64_t num_tokens, int64_t batch,
                                                   int64_t num_heads, int64_t num_kv_heads,
                                                   int64_t head_dim, int64_t element_bytes,
                                                   int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                   int64_t num_sms, int64_t max_cluster,
                                                   int64_t long_seq) {
  const AttentionPlan plan =
      PlanAttention({num_tokens, batch, num_heads, num_kv_heads, head_dim, element_bytes,
                     max_seqlen_q, max_seqlen_k, num_sms, max_cluster, long_seq});
  std::vector<std::map<std::string, int64_t>> launches;
  for (int i = 0; i < plan.num_launches; ++i) {
    const AttentionLaunch& launch = plan.launches[i];
    launches.push_back({{"columns", launch.columns},
                        {"split", launch.split},
                        {"min_pairs", launch.min_pairs},
                        {"max_pairs", launch.max_pairs},
                        {"grid", launch.grid},
                        {"cluster", launch.cluster},
                        {"workspace", launch.workspace}});
  }
  return launches;
}

}  // namespace

}  // namespace fastattn::api

PYBIND11_MODULE(_host, m) {
  using namespace fastattn;
  m.doc() = "Facts about the compiled code.";
  m.def("block_size", [] { return kBlockSize; }, "Tokens of a cache block.");
  m.def("head_dims", &api::HeadDims, "Head sizes that attention and the caches support.");
  m.def("cache_types", &api::CacheTypes, "Names of the cache types.");
  m.def("token_slots", &api::TokenSlots,
        "Slot of each token of a block in the V cache of the fastattn layout.");
  m.def("plan_attention", &api::PlanOf, pybind11::arg("num_tokens"), pybind11::arg("batch"),
        pybind11::arg("num_heads"), pybind11::arg("num_kv_heads"), pybind11::arg("head_dim"),
        pybind11::arg("element_bytes"), pybind11::arg("max_seqlen_q"),
        pybind11::arg("max_seqlen_k"), pybind11::arg("num_sms"), pybind11::arg("max_cluster") = 1,
        pybind11::arg("long_seq") = kLongSeq,
        "Launches of an attention call on a GPU and how they share its work.");
  m.def("cuda_enabled", [] { return FASTATTN_CUDA != 0; }, "Whether CUDA kernels are compiled.");
  m.def("archs", &api::Archs, "CUDA architectures compiled for.");
  m.def(
      "cpu_isa", [] { return cpu::NameOf(cpu::DetectIsa()); },
      "Instruction set that vectorised CPU kernels use on this processor.");
}
