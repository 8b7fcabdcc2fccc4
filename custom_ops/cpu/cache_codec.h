// Writes and reads one head of one token in a paged cache of any type and layout, for every
// operator that does so.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/group_scale.h"
#include "common/key_feedback.h"
#include "common/layout.h"
#include "common/numeric.h"
#include "common/static_scales.h"
#include "cpu/convert.h"
#include "cpu/encode_feedback.h"
#include "formats/kv_format.h"
#include "params/common.h"
#include "params/key_transform.h"

namespace fastattn::cpu {

inline constexpr int kMaxHeadDim = 256;

// Calls f(KvFormat<...>{}) for the cache's type and codes.
template <typename F>
void DispatchCache(const PagedCache& cache, F&& f) {
  if (!DispatchFormat(cache.type, cache.dtype, f)) {
    throw std::invalid_argument(std::string("cache dtype = ") + NameOf(cache.dtype) +
                                " is not supported for " + NameOf(cache.type));
  }
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

// K or V of a token of one head: from values to codes, and back.
template <typename Side>
class SideCodec {
 public:
  using Storage = typename Element<Side::kCode>::Storage;

  // Index of the (first) dynamic scale of a token of a block and head of `n` channels.
  static int64_t ScaleIndex(const CacheStrides& strides, int n, int block, int head, int slot) {
    return strides.Plane(block, head) + slot * Side::TokenScales(n);
  }

  // Reciprocals of static scales, one a channel for kChannel and else one a head.
  static std::vector<float> Inverses(const PagedCache& cache, const void* scales,
                                     ScaleScheme scheme, int head_dim) {
    if constexpr (!Side::kQuantized || Side::kDynamic) return {};
    const int per_head = scheme == ScaleScheme::kChannel ? head_dim : 1;
    std::vector<float> result(cache.num_kv_heads * per_head);
    for (int i = 0; i < static_cast<int>(result.size()); ++i) {
      const int64_t index = StaticScaleIndex(scheme, i / per_head, i % per_head, head_dim);
      result[i] = 1.0f / LoadScale(scales, cache.scale_dtype, index);
    }
    return result;
  }

  // n channels. `scale_index` is that of the token's first dynamic scale.
  static void Encode(DType scale_dtype, void* scales, int64_t scale_index,
                     const std::vector<float>& inverses, ScaleScheme scheme, int head, int n,
                     const float* x, const KeyFeedback& feedback, Storage* out) {
    if constexpr (!Side::kQuantized) {
      StoreRow<Side::kCode>(x, n, out);
    } else if constexpr (Side::kGrouped) {
      using Scale = GroupScale<Side::kScaleType>;
      uint8_t* bytes = static_cast<uint8_t*>(scales) + scale_index;
      for (int d = 0; d < n; d += Side::kGroup) {
        const uint8_t byte = Scale::Byte(GroupAmaxBits<Side::kGroup>(x + d));
        bytes[d / Side::kGroup] = byte;
        EncodeRow<Side::kCode>(x + d, Side::kGroup, Scale::Inverse(byte), out + d);
      }
    } else if constexpr (Side::kDynamic) {
      float scale = TokenScale(x, n);
      if (scale_dtype == DType::kFloat32) {
        static_cast<float*>(scales)[scale_index] = scale;
      } else {
        const uint16_t rounded = FloatToBFloat16(scale);
        static_cast<uint16_t*>(scales)[scale_index] = rounded;
        scale = BFloat16ToFloat(rounded);  // the reader's scale, so that the codes fit it
      }
      EncodeHead(x, n, 1.0f / scale, feedback, out);
    } else if (scheme == ScaleScheme::kChannel) {
      EncodeRow<Side::kCode>(x, n, inverses.data() + static_cast<int64_t>(head) * n, out);
    } else {
      EncodeHead(x, n, inverses[head], feedback, out);
    }
  }

  static void Decode(DType scale_dtype, const void* scales, int64_t scale_index, ScaleScheme scheme,
                     int head, int n, const Storage* codes, float* out) {
    LoadRow<Side::kCode>(codes, n, out);
    if constexpr (!Side::kQuantized) return;
    if constexpr (Side::kGrouped) {
      const uint8_t* bytes = static_cast<const uint8_t*>(scales) + scale_index;
      for (int d = 0; d < n; d += Side::kGroup) {
        const float scale = GroupScale<Side::kScaleType>::Value(bytes[d / Side::kGroup]);
        for (int i = 0; i < Side::kGroup; ++i) out[d + i] *= scale;
      }
      return;
    }
    if constexpr (!Side::kDynamic) {
      if (scheme == ScaleScheme::kChannel) {
        const int64_t first = StaticScaleIndex(scheme, head, 0, n);
        for (int d = 0; d < n; ++d) out[d] *= LoadScale(scales, scale_dtype, first + d);
        return;
      }
    }
    const int64_t index = Side::kDynamic ? scale_index : StaticScaleIndex(scheme, head, 0, n);
    const float scale = LoadScale(scales, scale_dtype, index);
    for (int d = 0; d < n; ++d) out[d] *= scale;
  }

 private:
  // Channels that share a scale.
  static void EncodeHead(const float* x, int n, float inverse, const KeyFeedback& feedback,
                         Storage* out) {
    if (feedback.matrix == nullptr) {
      EncodeRow<Side::kCode>(x, n, inverse, out);
    } else {
      EncodeWithFeedback<Side::kCode>(x, n, inverse, feedback, out);
    }
  }

  static float TokenScale(const float* x, int n) {
    const uint32_t amax = AmaxBits(x, n);
    if constexpr (Side::kCode == DType::kInt4) {
      return Int4Scale(amax, ReachesBelow(x, n, amax), kCacheAmaxFloor);
    } else {
      return DynamicScale(amax, kCacheAmaxFloor, kCodeMax<Side::kCode>);
    }
  }
};

// Writes tokens into a cache: quantises, or rounds for type none.
//
// Threads may share a writer: Key and Value touch only the bytes and the scale of their own slot.
template <typename Kv, CacheLayout kLayout = CacheLayout::kFastattn>
class CacheWriter {
  using KeyCodec = SideCodec<typename Kv::Key>;
  using ValueCodec = SideCodec<typename Kv::Value>;

 public:
  explicit CacheWriter(const PagedCache& cache)
      : cache_(cache),
        k_inverse_(KeyCodec::Inverses(cache, cache.k_scales, cache.k_granularity, cache.head_dim)),
        v_inverse_(
            ValueCodec::Inverses(cache, cache.v_scales, cache.v_granularity, cache.ValueDim())) {}

  // Stores x[0 .. D), token `slot` (0..63) of a block, as K of one head.
  void Key(int block, int head, int slot, const float* x, const KeyFeedback& feedback = {}) const {
    using Side = typename Kv::Key;
    using Storage = typename KeyCodec::Storage;
    Storage* base = static_cast<Storage*>(cache_.key) + cache_.key_strides.Plane(block, head);
    const int64_t scale =
        KeyCodec::ScaleIndex(cache_.k_scale_strides, cache_.head_dim, block, head, slot);
    const auto encode = [&](Storage* out) {
      KeyCodec::Encode(cache_.scale_dtype, cache_.k_scales, scale, k_inverse_, cache_.k_granularity,
                       head, cache_.head_dim, x, feedback, out);
    };
    if constexpr (Side::kNibbles) {
      Storage codes[kMaxHeadDim];
      encode(codes);
      PackNibbles(codes, cache_.head_dim, base + slot * cache_.key_strides.row);
    } else if constexpr (kFastDeploy<Side>) {
      Storage codes[kMaxHeadDim];
      encode(codes);
      for (int d = 0; d < cache_.head_dim; ++d) {
        base[KeyOffset<kLayout>(slot, d, cache_.head_dim)] =
            static_cast<Storage>(codes[d] ^ kFlip<Side>);
      }
    } else {
      encode(base + slot * cache_.key_strides.row);
    }
  }

  // The same as V.
  void Value(int block, int head, int slot, const float* x) const {
    using Side = typename Kv::Value;
    using Storage = typename ValueCodec::Storage;
    Storage* base = static_cast<Storage*>(cache_.value) + cache_.value_strides.Plane(block, head);
    const int64_t row_stride = cache_.value_strides.row;
    const int64_t scale =
        ValueCodec::ScaleIndex(cache_.v_scale_strides, cache_.ValueDim(), block, head, slot);
    const auto encode = [&](Storage* out) {
      ValueCodec::Encode(cache_.scale_dtype, cache_.v_scales, scale, v_inverse_,
                         cache_.v_granularity, head, cache_.ValueDim(), x, {}, out);
    };
    if constexpr (!Side::kQuantized) {
      encode(base + slot * row_stride);
    } else {
      Storage codes[kMaxHeadDim];
      encode(codes);
      const int elements = cache_.ValueElements();
      if constexpr (Side::kNibbles) PackNibbles(codes, cache_.ValueDim(), codes);
      for (int d = 0; d < elements; ++d) {
        base[ValueElement<kLayout>(slot, d, elements, row_stride)] =
            static_cast<Storage>(codes[d] ^ kFlip<Side>);
      }
    }
  }

 private:
  template <typename Side>
  static constexpr bool kFastDeploy = kLayout == CacheLayout::kFastDeploy && Side::kQuantized;
  // FastDeploy adds 128 to int8 codes; for 8 bits that flips the top bit.
  template <typename Side>
  static constexpr int kFlip = kFastDeploy<Side> && Side::kCode == DType::kInt8 ? 0x80 : 0;

  PagedCache cache_;
  std::vector<float> k_inverse_;
  std::vector<float> v_inverse_;
};

// Reads tokens of a quantised cache of any layout as x = code * scale in fp32.
template <typename Kv, CacheLayout kLayout>
class CacheReader {
  using KeyCodec = SideCodec<typename Kv::Key>;
  using ValueCodec = SideCodec<typename Kv::Value>;

 public:
  using KeyStorage = typename KeyCodec::Storage;
  using ValueStorage = typename ValueCodec::Storage;

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
  void KeyCodes(int block, int head, int begin, int end, KeyStorage* codes) const {
    const KeyStorage* base =
        static_cast<const KeyStorage*>(cache_.key) + cache_.key_strides.Plane(block, head);
    for (int r = begin; r < end; ++r, codes += cache_.head_dim) {
      if constexpr (Kv::Key::kNibbles) {
        UnpackNibbles(base + r * cache_.key_strides.row, cache_.head_dim, codes);
      } else if constexpr (kLayout == CacheLayout::kFastDeploy) {
        Gather<typename Kv::Key>(base + KeyOffset<kLayout>(r, 0, cache_.head_dim), k_channel_,
                                 cache_.head_dim, codes);
      } else {
        std::copy_n(base + r * cache_.key_strides.row, cache_.head_dim, codes);
      }
    }
  }

  void ValueCodes(int block, int head, int begin, int end, ValueStorage* codes) const {
    using Side = typename Kv::Value;
    const ValueStorage* base =
        static_cast<const ValueStorage*>(cache_.value) + cache_.value_strides.Plane(block, head);
    const int64_t row_stride = cache_.value_strides.row;
    for (int r = begin; r < end; ++r, codes += value_dim_) {
      const int64_t first = ValueElement<kValueLayout>(r, 0, value_elements_, row_stride);
      if constexpr (Side::kNibbles) {
        ValueStorage bytes[kMaxHeadDim];
        Gather<Side>(base + first, v_channel_, value_elements_, bytes);
        UnpackNibbles(bytes, value_dim_, codes);
      } else if constexpr (kValueLayout == CacheLayout::kLogical) {
        std::copy_n(base + r * row_stride, value_dim_, codes);
      } else {
        Gather<Side>(base + first, v_channel_, value_elements_, codes);
      }
    }
  }

  // out[0 .. D) = the values of one token's codes.
  void DecodeKey(int block, int head, int slot, const KeyStorage* codes, float* out) const {
    const int64_t scale =
        KeyCodec::ScaleIndex(cache_.k_scale_strides, cache_.head_dim, block, head, slot);
    KeyCodec::Decode(cache_.scale_dtype, cache_.k_scales, scale, cache_.k_granularity, head,
                     cache_.head_dim, codes, out);
  }

  void DecodeValue(int block, int head, int slot, const ValueStorage* codes, float* out) const {
    const int64_t scale =
        ValueCodec::ScaleIndex(cache_.v_scale_strides, value_dim_, block, head, slot);
    ValueCodec::Decode(cache_.scale_dtype, cache_.v_scales, scale, cache_.v_granularity, head,
                       value_dim_, codes, out);
  }

 private:
  static constexpr CacheLayout kValueLayout =
      Kv::Value::kQuantized ? kLayout : CacheLayout::kLogical;

  // Reads one token's codes: in every layout the offset of (r, d) is that of (r, 0) plus that of
  // (0, d).
  template <typename Side, typename Storage, typename Offset>
  void Gather(const Storage* token, const Offset* channel, int elements, Storage* codes) const {
    // FastDeploy adds 128 to int8 codes; for 8 bits that flips the top bit.
    constexpr int kFlip =
        kLayout == CacheLayout::kFastDeploy && Side::kCode == DType::kInt8 ? 0x80 : 0;
    for (int d = 0; d < elements; ++d) {
      codes[d] = static_cast<Storage>(token[channel[d]] ^ kFlip);
    }
  }

  PagedCache cache_;
  int value_dim_;
  int value_elements_;  // of a token's V
  int k_channel_[kMaxHeadDim];
  int64_t v_channel_[kMaxHeadDim];
};

}  // namespace fastattn::cpu
