// Codes of keys and values as a tile of attention reads them. Like attention_kernel.h, this text
// has no include guard and no include: each instruction set compiles it in a namespace of its own.

// A key's 4-bit codes as fp32: the first of a byte's two is the even channel's. Those of groups
// are multiplied by the groups' scales.
template <typename Side, int kDim>
FASTATTN_INLINE void DecodeNibbles(const uint8_t* in, const uint8_t* scales, float* out) {
  for (int d = 0; d < kDim; d += 2 * kLanes) {
    const Vec even = NibblesAsFloats<Side::kCode, false>(in + d / 2);
    const Vec odd = NibblesAsFloats<Side::kCode, true>(in + d / 2);
    for (int i = 0; i < kLanes; ++i) out[d + 2 * i] = even[i], out[d + 2 * i + 1] = odd[i];
  }
  if constexpr (Side::kGrouped) {
    static_assert(Side::kGroup % kLanes == 0, "a vector of channels has one scale");
    for (int d = 0; d < kDim; d += Side::kGroup) {
      const float scale = GroupScale<Side::kScaleType>::Value(scales[d / Side::kGroup]);
      for (int i = d; i < d + Side::kGroup; i += kLanes) Store(out + i, Load(out + i) * scale);
    }
  }
}

// Scales of a token's groups, in a block whose first one has the index `plane`.
template <typename Side, int kChannels>
FASTATTN_INLINE const uint8_t* ScaleBytes(const void* scales, int64_t plane, int token) {
  constexpr int kCount = Side::TokenScales(kChannels);
  return Side::kGrouped ? static_cast<const uint8_t*>(scales) + plane + token * kCount : nullptr;
}

// Whether a block of codes, kRows rows of kRow, may be read by the faster conversion.
template <typename Side, int kRow, int kRows, typename Code>
FASTATTN_INLINE bool IsFinite(const Code* codes, int64_t stride) {
  if constexpr (Side::kCode != DType::kE4M3) return false;
  return !HasNaNCode<kRow>(reinterpret_cast<const uint8_t*>(codes), kRows, stride);
}
