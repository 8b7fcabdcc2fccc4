#include "cpu/convert_layout.h"

#include <cstring>
#include <vector>

#include "common/dispatch.h"
#include "common/layout.h"
#include "cpu/cache_codec.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

// offsets[r * D + d]: where element (r, d) of a block and head lies.
std::vector<int> Offsets(CacheLayout layout, bool is_value, int head_dim) {
  std::vector<int> offsets(kBlockSize * head_dim);
  dispatch<CacheLayout::kFastattn, CacheLayout::kFastDeploy, CacheLayout::kLogical>(
      layout, "layout", [&](auto tag) {
        constexpr CacheLayout kLayout = decltype(tag)::value;
        for (int r = 0; r < kBlockSize; ++r) {
          for (int d = 0; d < head_dim; ++d) {
            offsets[r * head_dim + d] = is_value ? ValueOffset<kLayout>(r, d, head_dim)
                                                 : KeyOffset<kLayout>(r, d, head_dim);
          }
        }
      });
  return offsets;
}

}  // namespace

void ConvertLayout(const ConvertLayoutParams& p) {
  const int64_t elements = int64_t{kBlockSize} * p.row_elements;
  const bool in_place = p.src == p.dst;
  if (in_place && (p.type == CacheType::kNone || p.src_layout == p.dst_layout)) return;
  if (p.type == CacheType::kNone) {
    ParallelFor(p.num_planes, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(static_cast<uint16_t*>(p.dst) + p.DstPlane(i),
                    static_cast<const uint16_t*>(p.src) + p.SrcPlane(i),
                    elements * sizeof(uint16_t));
      }
    });
    return;
  }
  const std::vector<int> from = Offsets(p.src_layout, p.is_value, p.row_elements);
  const std::vector<int> to = Offsets(p.dst_layout, p.is_value, p.row_elements);
  std::vector<int> source(elements);  // source[i]: where byte i of the result comes from
  for (int64_t i = 0; i < elements; ++i) source[to[i]] = from[i];
  // FastDeploy adds 128 to int8 codes; for 8 bits that flips the top bit.
  const bool flips = IsInt8(p.type) && (p.src_layout == CacheLayout::kFastDeploy) !=
                                           (p.dst_layout == CacheLayout::kFastDeploy);
  const uint8_t flip = flips ? 0x80 : 0;
  const uint8_t* src = static_cast<const uint8_t*>(p.src);
  uint8_t* dst = static_cast<uint8_t*>(p.dst);
  ParallelFor(p.num_planes, elements, [&](int64_t begin, int64_t end) {
    uint8_t block[kBlockSize * kMaxHeadDim];
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* in = src + p.SrcPlane(b);
      if (in_place) {
        std::memcpy(block, in, elements);
        in = block;
      }
      uint8_t* out = dst + p.DstPlane(b);
      for (int64_t i = 0; i < elements; ++i) out[i] = in[source[i]] ^ flip;
    }
  });
}

}  // namespace fastattn::cpu
