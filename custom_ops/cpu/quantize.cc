#include "cpu/quantize.h"

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/numeric.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

// Smallest amax of a dynamic group: as in the serving stack's per-token quantiser.
constexpr float kAmaxFloor = 1e-10f;

template <DType kDType>
uint32_t AmaxBits(const typename Element<kDType>::Storage* x, int64_t n) {
  uint32_t amax = 0;
  for (int64_t i = 0; i < n; ++i) amax = std::max(amax, AbsBits(Element<kDType>::Load(x[i])));
  return amax;
}

template <DType kDType>
void Encode(const typename Element<kDType>::Storage* x, int64_t n, float scale, uint8_t* codes) {
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < n; ++i) codes[i] = FloatToE4M3(Element<kDType>::Load(x[i]) * inverse);
}

template <DType kDType>
void Run(const QuantizeFp8Params& p) {
  using T = typename Element<kDType>::Storage;
  const T* x = static_cast<const T*>(p.x);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(p.cols, 1));

  if (p.granularity == QuantGranularity::kTensor) {
    std::vector<uint32_t> amax(p.rows, 0);
    ParallelFor(p.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        amax[r] = AmaxBits<kDType>(x + r * p.x_row_stride, p.cols);
    });
    const uint32_t all = p.rows == 0 ? 0 : *std::max_element(amax.begin(), amax.end());
    p.scales[0] = DynamicScale(all, kAmaxFloor, kE4M3Max);
  }

  const bool one_scale =
      p.granularity == QuantGranularity::kStatic || p.granularity == QuantGranularity::kTensor;
  const int64_t group = p.granularity == QuantGranularity::kGroup ? p.group_size : p.cols;
  const int64_t groups = group == 0 ? 0 : p.cols / group;
  ParallelFor(p.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t g = 0; g < groups; ++g) {
        const T* in = x + r * p.x_row_stride + g * group;
        float scale = 0.0f;
        if (one_scale) {
          scale = p.scales[0];
        } else {
          scale = DynamicScale(AmaxBits<kDType>(in, group), kAmaxFloor, kE4M3Max);
          p.scales[r * groups + g] = scale;
        }
        Encode<kDType>(in, group, scale, p.codes + r * p.cols + g * group);
      }
    }
  });
}

}  // namespace

void QuantizeFp8(const QuantizeFp8Params& p) {
  dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16>(
      p.dtype, "dtype", [&](auto dtype) { Run<decltype(dtype)::value>(p); });
}

}  // namespace fastattn::cpu
