// Writes and reads one head of one token in a paged cache of any type and layout, for every
// operator that does so.
#pragma once

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/fp4.h"
#include "common/layout.h"
#include "common/numeric.h"
#include "common/static_scales.h"
#include "cpu/convert.h"
#include "params/common.h"
#include "params/key_transform.h"

namespace fastattn::cpu {

inline constexpr int kMaxHeadDim = 256;

// A cache's type and the element type of its codes, as one template parameter.
template <CacheType kTypeValue, DType kCodeValue>
struct CacheFormat {
  static constexpr CacheType kType = kTypeValue;
  static constexpr DType kCode = kCodeValue;
  using Storage = typename Element<kCode>::Storage;
  // Codes of 4 bits are worked on a byte each, and share bytes in the cache.
  static constexpr bool kNibbles = CodesPerByte(kCode) == 2;
};

// Calls f(CacheFormat<type, code>{}) for the cache's type.
template <typename F>
void DispatchCache(const PagedCache& cache, F&& f) {
  dispatch<CacheType::kNone, CacheType::kInt8, CacheType::kFp8, CacheType::kBlockWiseInt8,
           CacheType::kBlockWiseFp8, CacheType::kBlockWiseInt4, CacheType::kBlockWiseMxfp4>(
      cache.type, "cache_quant_type", [&](auto type) {
        constexpr CacheType kType = decltype(type)::value;
        if constexpr (kType == CacheType::kNone) {
          dispatch<DType::kBFloat16, DType::kFloat16>(cache.dtype, "cache dtype", [&](auto code) {
            f(CacheFormat<kType, decltype(code)::value>{});
          });
        } else if constexpr (kType == CacheType::kFp8) {
          dispatch<DType::kE4M3, DType::kE5M2>(cache.dtype, "cache dtype", [&](auto code) {
            f(CacheFormat<kType, decltype(code)::value>{});
          });
        } else {
          f(CacheFormat<kType, CodeOf(kType)>{});
        }
      });
}

template <DType kCode>
inline constexpr float kCodeMax = kCode == DType::kInt8   ? kInt8Max
                                  : kCode == DType::kE5M2 ? kE5M2Max
                                                          : kE4M3Max;

// Where V of token r and channel d lies in a plane whose rows are `row_stride` elements apart.
template <CacheLayout kLayout>
int64_t ValueElement(int r, int d, int head_dim, int64_t row_stride) {
  if constexpr (kLayout == CacheLayout::kFastattn) return d * row_stride + TokenSlot(r);
  return ValueOffset<kLayout>(r, d, head_dim);
}

// K of a KV head as it is quantised: x[0 .. D) changes.
inline void TransformKey(const KeyTransform& transform, int head, int head_dim, float* x) {
  if (transform.center != nullptr) {
    const float* center = transform.center + static_cast<int64_t>(head) * head_dim;
    for (int d = 0; d < head_dim; ++d) x[d] = x[d] - center[d];
  }
  if (transform.rotation == KeyRotation::kHadamard) HadamardRotate(x, head_dim);
}

// The inverse: x[0 .. D) as a cache gives it back.
inline void RestoreKey(const KeyTransform& transform, int head, int head_dim, float* x) {
  if (transform.rotation == KeyRotation::kHadamard) HadamardRotate(x, head_dim);
  if (transform.center == nullptr) return;
  const float* center = transform.center + static_cast<int64_t>(head) * head_dim;
  for (int d = 0; d < head_dim; ++d) x[d] = x[d] + center[d];
}

// Index of the (first) dynamic scale of a token of a block and head of `head_dim` channels.
template <typename Format>
int64_t DynamicScaleIndex(const CacheStrides& strides, int head_dim, int block, int head,
                          int slot) {
  const int count = HasBlockScales(Format::kType) ? head_dim / kMxBlock : 1;
  return strides.Plane(block, head) + slot * count;
}

// Writes tokens into a cache: quantises, or rounds for type none.
//
// Threads may share a writer: Key and Value touch only the bytes and the scale of their own slot.
template <typename Format, CacheLayout kLayout = CacheLayout::kFastattn>
class CacheWriter {
 public:
  using Storage = typename Format::Storage;

  explicit CacheWriter(const PagedCache& cache)
      : cache_(cache),
        k_inverse_(Inverses(cache, cache.k_scales, cache.k_granularity, cache.head_dim)),
        v_inverse_(Inverses(cache, cache.v_scales, cache.v_granularity, cache.ValueDim())) {}

  // Stores x[0 .. D), token `slot` (0..63) of a block, as K of one head.
  void Key(int block, int head, int slot, const float* x) const {
    Storage* base = static_cast<Storage*>(cache_.key) + cache_.key_strides.Plane(block, head);
    const int64_t scale =
        DynamicScaleIndex<Format>(cache_.k_scale_strides, cache_.head_dim, block, head, slot);
    if constexpr (Format::kNibbles) {
      Storage codes[kMaxHeadDim];
      EncodeKey(scale, head, x, codes);
      PackNibbles(codes, cache_.head_dim, base + slot * cache_.key_strides.row);
    } else if constexpr (kFastDeploy) {
      Storage codes[kMaxHeadDim];
      EncodeKey(scale, head, x, codes);
      for (int d = 0; d < cache_.head_dim; ++d) {
        base[KeyOffset<kLayout>(slot, d, cache_.head_dim)] = static_cast<Storage>(codes[d] ^ kFlip);
      }
    } else {
      EncodeKey(scale, head, x, base + slot * cache_.key_strides.row);
    }
  }

  // The same as V.
  void Value(int block, int head, int slot, const float* x) const {
    Storage* base = static_cast<Storage*>(cache_.value) + cache_.value_strides.Plane(block, head);
    const int64_t row_stride = cache_.value_strides.row;
    const int64_t scale =
        DynamicScaleIndex<Format>(cache_.v_scale_strides, cache_.ValueDim(), block, head, slot);
    if constexpr (Format::kType == CacheType::kNone) {
      EncodeValue(scale, head, x, base + slot * row_stride);
    } else {
      Storage codes[kMaxHeadDim];
      EncodeValue(scale, head, x, codes);
      const int elements = cache_.ValueElements();
      if constexpr (Format::kNibbles) PackNibbles(codes, cache_.ValueDim(), codes);
      for (int d = 0; d < elements; ++d) {
        base[ValueElement<kLayout>(slot, d, elements, row_stride)] =
            static_cast<Storage>(codes[d] ^ kFlip);
      }
    }
  }

 private:
  static constexpr bool kFastDeploy =
      kLayout == CacheLayout::kFastDeploy && IsQuantized(Format::kType);
  // FastDeploy adds 128 to int8 codes; for 8 bits that flips the top bit.
  static constexpr int kFlip = kFastDeploy && IsInt8(Format::kType) ? 0x80 : 0;

  // Reciprocals of static scales, one a channel for kChannel and else one a head.
  static std::vector<float> Inverses(const PagedCache& cache, const void* scales,
                                     ScaleGranularity granularity, int head_dim) {
    if constexpr (Format::kType == CacheType::kNone || IsDynamic(Format::kType)) return {};
    const int per_head = granularity == ScaleGranularity::kChannel ? head_dim : 1;
    std::vector<float> result(cache.num_kv_heads * per_head);
    for (int i = 0; i < static_cast<int>(result.size()); ++i) {
      const int64_t index = StaticScaleIndex(granularity, i / per_head, i % per_head, head_dim);
      result[i] = 1.0f / LoadScale(scales, cache.scale_dtype, index);
    }
    return result;
  }

  void EncodeKey(int64_t scale_index, int head, const float* x, Storage* out) const {
    Encode(cache_.k_scales, scale_index, k_inverse_, cache_.k_granularity, head, cache_.head_dim, x,
           out);
  }
  void EncodeValue(int64_t scale_index, int head, const float* x, Storage* out) const {
    Encode(cache_.v_scales, scale_index, v_inverse_, cache_.v_granularity, head, cache_.ValueDim(),
           x, out);
  }

  // n channels. `scale_index` is that of the token's first dynamic scale.
  void Encode(void* scales, int64_t scale_index, const std::vector<float>& inverses,
              ScaleGranularity granularity, int head, int n, const float* x, Storage* out) const {
    if constexpr (Format::kType == CacheType::kNone) {
      StoreRow<Format::kCode>(x, n, out);
    } else if constexpr (HasBlockScales(Format::kType)) {
      uint8_t* bytes = static_cast<uint8_t*>(scales) + scale_index;
      for (int d = 0; d < n; d += kMxBlock) {
        const uint8_t byte = MxScaleByte(MxAmaxBits(x + d));
        bytes[d / kMxBlock] = byte;
        EncodeRow<Format::kCode>(x + d, kMxBlock, UE8M0Inverse(byte), out + d);
      }
    } else if constexpr (IsDynamic(Format::kType)) {
      const uint32_t amax = AmaxBits(x, n);
      float scale;
      if constexpr (Format::kNibbles) {
        scale = Int4Scale(amax, ReachesBelow(x, n, amax), kCacheAmaxFloor);
      } else {
        scale = DynamicScale(amax, kCacheAmaxFloor, kCodeMax<Format::kCode>);
      }
      if (cache_.scale_dtype == DType::kFloat32) {
        static_cast<float*>(scales)[scale_index] = scale;
      } else {
        const uint16_t rounded = FloatToBFloat16(scale);
        static_cast<uint16_t*>(scales)[scale_index] = rounded;
        scale = BFloat16ToFloat(rounded);  // the reader's scale, so that the codes fit it
      }
      EncodeRow<Format::kCode>(x, n, 1.0f / scale, out);
    } else if (granularity == ScaleGranularity::kChannel) {
      EncodeRow<Format::kCode>(x, n, inverses.data() + static_cast<int64_t>(head) * n, out);
    } else {
      EncodeRow<Format::kCode>(x, n, inverses[head], out);
    }
  }

  PagedCache cache_;
  std::vector<float> k_inverse_;
  std::vector<float> v_inverse_;
};

// Reads tokens of a quantised cache of any layout as x = code * scale in fp32.
template <typename Format, CacheLayout kLayout>
class CacheReader {
 public:
  using Storage = typename Format::Storage;

  explicit CacheReader(const PagedCache& cache)
      : cache_(cache), value_dim_(cache.ValueDim()), value_elements_(cache.ValueElements()) {
    for (int d = 0; d < cache.RowElements(); ++d) {
      k_channel_[d] = KeyOffset<kLayout>(0, d, cache.RowElements());
    }
    for (int d = 0; d < value_elements_; ++d) {
      v_channel_[d] = ValueElement<kValueLayout>(0, d, value_elements_, cache.value_strides.row);
    }
  }

  // Codes of tokens [begin, end) of one block and head, in token order: codes[(r - begin) * D + d].
  void KeyCodes(int block, int head, int begin, int end, Storage* codes) const {
    const Storage* base =
        static_cast<const Storage*>(cache_.key) + cache_.key_strides.Plane(block, head);
    for (int r = begin; r < end; ++r, codes += cache_.head_dim) {
      if constexpr (Format::kNibbles) {
        UnpackNibbles(base + r * cache_.key_strides.row, cache_.head_dim, codes);
      } else if constexpr (kLayout == CacheLayout::kFastDeploy) {
        Gather(base + KeyOffset<kLayout>(r, 0, cache_.head_dim), k_channel_, cache_.head_dim,
               codes);
      } else {
        std::copy_n(base + r * cache_.key_strides.row, cache_.head_dim, codes);
      }
    }
  }

  void ValueCodes(int block, int head, int begin, int end, Storage* codes) const {
    const Storage* base =
        static_cast<const Storage*>(cache_.value) + cache_.value_strides.Plane(block, head);
    const int64_t row_stride = cache_.value_strides.row;
    for (int r = begin; r < end; ++r, codes += value_dim_) {
      const int64_t first = ValueElement<kValueLayout>(r, 0, value_elements_, row_stride);
      if constexpr (Format::kNibbles) {
        Storage bytes[kMaxHeadDim];
        Gather(base + first, v_channel_, value_elements_, bytes);
        UnpackNibbles(bytes, value_dim_, codes);
      } else if constexpr (kValueLayout == CacheLayout::kLogical) {
        std::copy_n(base + r * row_stride, value_dim_, codes);
      } else {
        Gather(base + first, v_channel_, value_elements_, codes);
      }
    }
  }

  // out[0 .. D) = the values of one token's codes.
  void DecodeKey(int block, int head, int slot, const Storage* codes, float* out) const {
    const int64_t scale =
        DynamicScaleIndex<Format>(cache_.k_scale_strides, cache_.head_dim, block, head, slot);
    Decode(cache_.k_scales, scale, cache_.k_granularity, head, cache_.head_dim, codes, out);
  }

  void DecodeValue(int block, int head, int slot, const Storage* codes, float* out) const {
    const int64_t scale =
        DynamicScaleIndex<Format>(cache_.v_scale_strides, cache_.ValueDim(), block, head, slot);
    Decode(cache_.v_scales, scale, cache_.v_granularity, head, value_dim_, codes, out);
  }

 private:
  static constexpr CacheLayout kValueLayout =
      Format::kType == CacheType::kNone ? CacheLayout::kLogical : kLayout;

  // Reads one token's codes: in every layout the offset of (r, d) is that of (r, 0) plus that of
  // (0, d).
  template <typename Offset>
  void Gather(const Storage* token, const Offset* channel, int elements, Storage* codes) const {
    // FastDeploy adds 128 to int8 codes; for 8 bits that flips the top bit.
    constexpr int kFlip = kLayout == CacheLayout::kFastDeploy && IsInt8(Format::kType) ? 0x80 : 0;
    for (int d = 0; d < elements; ++d) {
      codes[d] = static_cast<Storage>(token[channel[d]] ^ kFlip);
    }
  }

  void Decode(const void* scales, int64_t scale_index, ScaleGranularity granularity, int head,
              int n, const Storage* codes, float* out) const {
    LoadRow<Format::kCode>(codes, n, out);
    if constexpr (Format::kType == CacheType::kNone) return;
    if constexpr (HasBlockScales(Format::kType)) {
      const uint8_t* bytes = static_cast<const uint8_t*>(scales) + scale_index;
      for (int d = 0; d < n; d += kMxBlock) {
        const float scale = UE8M0ToFloat(bytes[d / kMxBlock]);
        for (int i = 0; i < kMxBlock; ++i) out[d + i] *= scale;
      }
      return;
    }
    if constexpr (!IsDynamic(Format::kType)) {
      if (granularity == ScaleGranularity::kChannel) {
        const int64_t first = StaticScaleIndex(granularity, head, 0, n);
        for (int d = 0; d < n; ++d) out[d] *= LoadScale(scales, cache_.scale_dtype, first + d);
        return;
      }
    }
    const int64_t index =
        IsDynamic(Format::kType) ? scale_index : StaticScaleIndex(granularity, head, 0, n);
    const float scale = LoadScale(scales, cache_.scale_dtype, index);
    for (int d = 0; d < n; ++d) out[d] *= scale;
  }

  PagedCache cache_;
  int value_dim_;
  int value_elements_;  // of a token's V
  int k_channel_[kMaxHeadDim];
  int64_t v_channel_[kMaxHeadDim];
};

}  // namespace fastattn::cpu
