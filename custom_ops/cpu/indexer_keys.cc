#include "cpu/indexer_keys.h"

#include <algorithm>
#include <cstring>

#include "common/dispatch.h"
#include "cpu/indexer_encode.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

// Writes the codes of a key with an arbitrary scale, and returns that.
float EncodeFp8Amax(const float* x, IndexerScaleRule rule, uint8_t* codes) {
  const float scale = IndexerAmaxScale(AmaxBits(x, kIndexerHeadDim));
  const bool divides = rule == IndexerScaleRule::kAmaxDiv;
  const float inverse = Div(1.0f, scale);
  for (int i = 0; i < kIndexerHeadDim; ++i) {
    codes[i] = FloatToE4M3(divides ? Div(x[i], scale) : Mul(x[i], inverse));
  }
  return scale;
}

template <DType kDType>
void WriteToken(const IndexerKWriteParams& p, int64_t token) {
  using E = Element<kDType>;
  const int64_t slot = p.slots.At(token);
  if (slot < 0 || slot / p.pages.page_size >= p.pages.num_pages) return;
  const auto* key = static_cast<const typename E::Storage*>(p.key) + token * p.key_stride;
  float x[kIndexerHeadDim];
  for (int d = 0; d < kIndexerHeadDim; ++d) x[d] = E::Load(key[d]);
  const int64_t page = slot / p.pages.page_size, row = slot % p.pages.page_size;
  uint8_t* codes = p.cache + p.pages.Codes(page, row);
  uint8_t* scales = p.cache + p.pages.Scales(page, row);
  if (p.pages.quant == IndexerQuant::kMxfp4) {
    EncodeMxfp4(x, kIndexerHeadDim, codes, scales);
    return;
  }
  const float scale = p.scale_rule == IndexerScaleRule::kPow2
                          ? EncodeFp8(x, kIndexerHeadDim, codes)
                          : EncodeFp8Amax(x, p.scale_rule, codes);
  std::memcpy(scales, &scale, sizeof(scale));
}

void GatherRow(const IndexerKGatherParams& p, int64_t row) {
  const int32_t* end = p.cu_seqlens + p.batch + 1;
  // The last sequence that starts at or before the row: those without tokens are passed over.
  const int64_t seq = std::upper_bound(p.cu_seqlens, end, row) - p.cu_seqlens - 1;
  if (seq < 0 || seq >= p.batch) return;
  const int64_t token = row - p.cu_seqlens[seq], index = token / p.pages.page_size;
  if (index >= p.max_blocks) return;
  const int64_t page = p.block_tables[seq * p.max_blocks + index];
  if (page < 0 || page >= p.pages.num_pages) return;
  const IndexerPageFormat format = PageFormatOf(p.pages.quant);
  const int64_t at = token % p.pages.page_size;
  std::memcpy(p.codes + row * format.code_bytes, p.cache + p.pages.Codes(page, at),
              format.code_bytes);
  std::memcpy(p.scales + row * format.scale_bytes, p.cache + p.pages.Scales(page, at),
              format.scale_bytes);
}

}  // namespace

void IndexerKWrite(const IndexerKWriteParams& p) {
  dispatch<DType::kFloat32, DType::kBFloat16, DType::kFloat16>(
      p.key_dtype, "key dtype", [&](auto dtype) {
        ParallelFor(p.num_tokens, 2 * kIndexerHeadDim, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) WriteToken<decltype(dtype)::value>(p, t);
        });
      });
}

void IndexerKGather(const IndexerKGatherParams& p) {
  if (p.batch == 0) return;
  ParallelFor(p.num_rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) GatherRow(p, row);
  });
}

}  // namespace fastattn::cpu
