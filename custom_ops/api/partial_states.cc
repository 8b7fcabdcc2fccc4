#include "cpu/partial_states.h"

#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/index_array.h"
#include "api/operator.h"
#include "api/paged_cache.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/indexer/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "save_partial_states";

const std::initializer_list<phi::DataType> kDtypes = {phi::DataType::FLOAT32,
                                                      phi::DataType::BFLOAT16};

// Checks ape [ratio, width] and the cache [num_blocks, state_block, 2 * width].
void SetState(const Tensor& ape, const Tensor& state, const phi::Place& place,
              PartialStatesParams* p) {
  Arg(kOp, "ape", ape).On(place).Dtype(kDtypes).Rank(2).Contiguous();
  const Sizes positions = SizesOf(ape);
  if (positions[0] == 0 || positions[1] == 0 || positions[1] % kStateVector != 0) {
    Fail("ValueError", kOp, "ape", "expected shape [ratio, width] with at least 1 row and a width ",
         "of a multiple of ", kStateVector, ", got ", ShapeText(positions));
  }
  for (const int64_t size : positions) RequireFits(kOp, "ape", size);
  RequireFits(kOp, "ape", CheckedProduct(kOp, "ape", {2, positions[1]}));
  Arg(kOp, "state_cache", state)
      .On(place)
      .Dtype(kDtypes)
      .Dims({-1, -1, 2 * positions[1]})
      .LastDimContiguous();
  RequireAligned(kOp, "state_cache", state, kVectorBytes);
  RequireNoOverlap(kOp, "state_cache", state);
  const Sizes shape = SizesOf(state), strides = StridesOf(state);
  p->ape = Data(ape);
  p->ape_dtype = ToDType(kOp, "ape", ape.dtype());
  p->ratio = static_cast<int>(positions[0]);
  p->width = static_cast<int>(positions[1]);
  p->state_dtype = ToDType(kOp, "state_cache", state.dtype());
  if (state.numel() == 0) return;  // no slot
  p->state = MutableAddress(state);
  p->num_blocks = shape[0];
  p->state_block = shape[1];
  p->block_stride = strides[0];
  p->row_stride = strides[1];
}

}  // namespace

FASTATTN_OPERATOR(void, kOp, SavePartialStates, NoResults,
                  (const Strided<Tensor>& kv_score, const Tensor& ape, const Tensor& positions,
                   Tensor& state_cache, const Tensor& state_slots)) {
  PartialStatesParams p;
  Arg(kOp, "ape", ape);  // never empty, so that it has a place
  const phi::Place place = ape.place();
  SetState(ape, state_cache, place, &p);
  Arg(kOp, "kv_score", kv_score)
      .On(place)
      .Dtype(kDtypes)
      .Dims({-1, 2 * int64_t{p.width}})
      .LastDimContiguous();
  RequireAligned(kOp, "kv_score", kv_score, kVectorBytes);
  const int64_t tokens = kv_score.dims()[0];
  p.positions = ToIndexArray(kOp, "positions", positions, place, tokens);
  p.slots = ToIndexArray(kOp, "state_slots", state_slots, place, -1);
  p.num_slots = state_slots.dims()[0];
  if (p.num_slots > tokens) {
    Fail("ValueError", kOp, "state_slots", "expected at most ", tokens,
         " slots, the tokens of kv_score, got ", p.num_slots);
  }
  RequireApart(kOp, "state_cache", state_cache,
               {{"kv_score", &kv_score},
                {"ape", &ape},
                {"positions", &positions},
                {"state_slots", &state_slots}});
  p.kv_score = Data(kv_score);
  p.kv_dtype = ToDType(kOp, "kv_score", kv_score.dtype());
  if (p.num_slots == 0 || p.num_blocks == 0) return;
  p.kv_stride = StridesOf(kv_score)[0];

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(ape)) {
    LaunchOnGpu(kOp, ape,
                [&](cudaStream_t stream) { return cuda::LaunchSavePartialStates(p, stream); });
    return;
  }
#endif
  RequireCpu(kOp, place);
  Guarded(kOp, [&] { cpu::SavePartialStates(p); });
}

}  // namespace fastattn::api
