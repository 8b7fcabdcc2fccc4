#include "cpu/quantize.h"

#include <vector>

#include "common/dispatch.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

template <DType kDType>
void Run(const QuantizeFp8Params& p) {
  using T = typename Element<kDType>::Storage;
  const T* x = static_cast<const T*>(p.x);

  if (p.granularity == QuantGranularity::kTensor) {
    std::vector<uint32_t> amax(p.rows, 0);
    ParallelFor(p.rows, p.cols, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        amax[r] = AmaxBits<kDType>(x + r * p.x_row_stride, p.cols);
      }
    });
    const uint32_t all = p.rows == 0 ? 0 : *std::max_element(amax.begin(), amax.end());
    p.scales[0] = DynamicScale(all, kActivationAmaxFloor, kE4M3Max);
  }

  const bool one_scale =
      p.granularity == QuantGranularity::kStatic || p.granularity == QuantGranularity::kTensor;
  const int64_t group = p.granularity == QuantGranularity::kGroup ? p.group_size : p.cols;
  const int64_t groups = group == 0 ? 0 : p.cols / group;
  ParallelFor(p.rows, p.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t g = 0; g < groups; ++g) {
        const T* in = x + r * p.x_row_stride + g * group;
        uint8_t* codes = p.codes + r * p.codes_row_stride + g * group;
        if (one_scale) {
          EncodeE4M3<kDType>(in, group, p.scales[0], codes);
        } else {
          p.scales[r * groups + g] = EncodeE4M3Dynamic<kDType>(in, group, codes);
        }
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
