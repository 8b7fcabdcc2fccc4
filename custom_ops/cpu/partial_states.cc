#include "cpu/partial_states.h"

#include "common/dispatch.h"
#include "common/mla_scale.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

// Values that change their type get one NaN for all, as a GPU's conversion has it.
template <DType kIn, DType kState>
typename Element<kState>::Storage Converted(typename Element<kIn>::Storage x) {
  if constexpr (kIn == kState) {
    return x;
  } else if constexpr (kState == DType::kBFloat16) {
    return ComputedBFloat16(Element<kIn>::Load(x));
  } else {
    return Element<kIn>::Load(x);
  }
}

template <DType kIn, DType kState>
void SaveToken(const PartialStatesParams& p, int64_t token) {
  using In = Element<kIn>;
  using State = Element<kState>;
  const int64_t slot = p.slots.At(token), position = p.positions.At(token);
  if (slot < 0 || slot / p.state_block >= p.num_blocks || position < 0) return;
  const auto* kv = static_cast<const typename In::Storage*>(p.kv_score) + token * p.kv_stride;
  auto* state = static_cast<typename State::Storage*>(p.state) +
                slot / p.state_block * p.block_stride + slot % p.state_block * p.row_stride;
  const int64_t ape = position % p.ratio * p.width;
  for (int d = 0; d < p.width; ++d) {
    state[d] = Converted<kIn, kState>(kv[d]);
    const float bias = LoadScale(p.ape, p.ape_dtype, ape + d);
    state[p.width + d] = State::Store(PartialScore(In::Load(kv[p.width + d]), bias));
  }
}

}  // namespace

void SavePartialStates(const PartialStatesParams& p) {
  dispatch<DType::kFloat32, DType::kBFloat16>(p.kv_dtype, "kv_score dtype", [&](auto in) {
    dispatch<DType::kFloat32, DType::kBFloat16>(p.state_dtype, "state dtype", [&](auto state) {
      ParallelFor(p.num_slots, 2LL * p.width, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          SaveToken<decltype(in)::value, decltype(state)::value>(p, t);
        }
      });
    });
  });
}

}  // namespace fastattn::cpu
