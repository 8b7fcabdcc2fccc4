#include "cpu/mxfp4.h"

#include "common/dispatch.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

// Elements that are converted at a time: whole blocks, which fit the L1 cache.
constexpr int64_t kChunk = 32 * kMxBlock;

template <DType kDType>
void Quantize(const Mxfp4QuantizeParams& p) {
  using E = Element<kDType>;
  const auto* x = static_cast<const typename E::Storage*>(p.x);
  ParallelFor(p.rows, p.cols, [&](int64_t begin, int64_t end) {
    float values[kChunk];
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < p.cols; c += kChunk) {
        const int64_t n = std::min(kChunk, p.cols - c);
        const auto* in = x + r * p.x_row_stride + c;
        for (int64_t i = 0; i < n; ++i) values[i] = E::Load(in[i]);
        const int64_t at = r * p.cols + c;
        EncodeMxfp4(values, n, p.codes + at / 2, p.scales + at / kMxBlock);
      }
    }
  });
}

template <DType kDType>
void Dequantize(const Mxfp4DequantizeParams& p) {
  using E = Element<kDType>;
  auto* x = static_cast<typename E::Storage*>(p.x);
  ParallelFor(p.rows, p.cols, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin * p.cols / kMxBlock; block < end * p.cols / kMxBlock; ++block) {
      const float scale = UE8M0ToFloat(p.scales[block]);
      const uint8_t* codes = p.codes + block * (kMxBlock / 2);
      auto* out = x + block * kMxBlock;
      for (int i = 0; i < kMxBlock / 2; ++i) {
        out[2 * i] = E::Store(E2M1ToFloat(codes[i] & 0xFu) * scale);
        out[2 * i + 1] = E::Store(E2M1ToFloat(codes[i] >> 4) * scale);
      }
    }
  });
}

}  // namespace

void Mxfp4Quantize(const Mxfp4QuantizeParams& p) {
  dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16>(
      p.dtype, "dtype", [&](auto dtype) { Quantize<decltype(dtype)::value>(p); });
}

void Mxfp4Dequantize(const Mxfp4DequantizeParams& p) {
  dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16>(
      p.dtype, "dtype", [&](auto dtype) { Dequantize<decltype(dtype)::value>(p); });
}

}  // namespace fastattn::cpu
