// Vectors of fp32 for one instruction set. Included by attention_kernel.h inside a namespace of
// that set, after a target pragma: everything here must be inlined into code of the same set, so
// nothing of this file may be used elsewhere. FASTATTN_SIMD_BITS is 128, 256 or 512.

using Vec = float __attribute__((vector_size(FASTATTN_SIMD_BITS / 8)));
using VecInt = int32_t __attribute__((vector_size(FASTATTN_SIMD_BITS / 8)));
// Four sums side by side.
using Quad = float __attribute__((vector_size(16)));
using QuadIndex = int32_t __attribute__((vector_size(16)));

inline constexpr int kLanes = FASTATTN_SIMD_BITS / 32;
// Packed rows of a register block. 4 rows * 4 accumulators fit 32 registers, but not 16.
inline constexpr int kBlockRows = kLanes == 16 ? 4 : 2;

#define FASTATTN_INLINE inline __attribute__((always_inline))

FASTATTN_INLINE Vec Load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

FASTATTN_INLINE VecInt LoadInt(const int32_t* p) {
  VecInt v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

FASTATTN_INLINE void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

FASTATTN_INLINE Vec Splat(float x) { return x - Vec{}; }

// The build forbids contraction, for the bit-exact operators; here the fused form is asked for.
FASTATTN_INLINE Vec Fma(Vec a, Vec b, Vec c) {
#if FASTATTN_SIMD_BITS == 512
  return _mm512_fmadd_ps(a, b, c);
#elif FASTATTN_SIMD_BITS == 256
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// a where it is the larger one; b where it is, and where a is NaN.
FASTATTN_INLINE Vec Max(Vec a, Vec b) { return a > b ? a : b; }

FASTATTN_INLINE float MaxLane(Vec v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  float result = lanes[0];
  for (int i = 1; i < kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

FASTATTN_INLINE Quad TransposedSum(Quad a, Quad b, Quad c, Quad d) {
  const Quad ab = __builtin_shuffle(a, b, QuadIndex{0, 4, 1, 5}) +
                  __builtin_shuffle(a, b, QuadIndex{2, 6, 3, 7});
  const Quad cd = __builtin_shuffle(c, d, QuadIndex{0, 4, 1, 5}) +
                  __builtin_shuffle(c, d, QuadIndex{2, 6, 3, 7});
  return __builtin_shuffle(ab, cd, QuadIndex{0, 1, 4, 5}) +
         __builtin_shuffle(ab, cd, QuadIndex{2, 3, 6, 7});
}

// The sums of the lanes of four vectors.
FASTATTN_INLINE Quad Sum4(const Vec (&v)[4]) {
#if FASTATTN_SIMD_BITS == 512
  const __m512 ab = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
  const __m512 cd = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
  const __m512 all =
      _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xEE);  // a b c d in each quarter
  const __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#elif FASTATTN_SIMD_BITS == 256
  const __m256 ab = _mm256_unpacklo_ps(v[0], v[1]) + _mm256_unpackhi_ps(v[0], v[1]);
  const __m256 cd = _mm256_unpacklo_ps(v[2], v[3]) + _mm256_unpackhi_ps(v[2], v[3]);
  const __m256 all = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xEE);
  return _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1);
#else
  return TransposedSum(v[0], v[1], v[2], v[3]);
#endif
}

FASTATTN_INLINE float SumLanes(Vec v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  float result = lanes[0];
  for (int i = 1; i < kLanes; ++i) result += lanes[i];
  return result;
}

// 2^x within 1.5 ulp; 0 below -126 (the result would be subnormal) and for -inf, NaN for NaN. x is
// at most 127.
//
// 2^x = 2^n 2^r with n = round(x) and |r| <= 1/2; the polynomial is the minimax one of degree 6
// for the relative error, 2e-9 before rounding.
FASTATTN_INLINE Vec Exp2(Vec x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer in the low bits
  const Vec shifted = x + kRound;
  const Vec r = x - (shifted - kRound);
  Vec p = Fma(Splat(0x1.41d31cp-13f), r, Splat(0x1.5f456ap-10f));
  p = Fma(p, r, Splat(0x1.3b2dbcp-7f));
  p = Fma(p, r, Splat(0x1.c6aed4p-5f));
  p = Fma(p, r, Splat(0x1.ebfbdap-3f));
  p = Fma(p, r, Splat(0x1.62e430p-1f));
  p = Fma(p, r, Splat(1.0f));
  // Unsigned: for NaN and far below -126 the sum overflows, and its value is not used.
  uint32_t __attribute__((vector_size(FASTATTN_SIMD_BITS / 8))) bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3F800000u;
  Vec power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -126.0f ? Vec{} : p * power;
}

// cap * tanh(x / cap); `inverse` is 1 / cap (see common/softcap.h). |t| beyond 20 would only
// overflow.
FASTATTN_INLINE Vec Softcap(Vec x, float cap, float inverse) {
  const Vec t = x * inverse;
  const Vec magnitude = t < 0.0f ? -t : t;
  const Vec limited = magnitude > 20.0f ? Splat(20.0f) : magnitude;
  const Vec e = Exp2(limited * 2.885390082f);
  const Vec large = (1.0f - 2.0f / (e + 1.0f)) * cap;
  const Vec u = t * t;
  Vec ratio = Fma(Splat(kSoftcapSeries4), u, Splat(kSoftcapSeries3));
  ratio = Fma(ratio, u, Splat(kSoftcapSeries2));
  ratio = Fma(ratio, u, Splat(kSoftcapSeries1));
  ratio = Fma(ratio, u, Splat(1.0f));
  return magnitude < kSoftcapSmall ? x * ratio : t < 0.0f ? -large : large;
}

// Loads kLanes elements of a type as fp32. NaN codes become NaN, unless the caller knows that there
// are none (kFinite).
//
// e4m3 goes through fp16: its magnitude shifted by 7 is the fp16 number 2^-8 as large, and the
// conversion takes subnormal fp16 numbers at full speed, whatever the denormal mode of the thread.
template <DType kDType, bool kFinite = false>
FASTATTN_INLINE Vec LoadAs(const typename Element<kDType>::Storage* p) {
  if constexpr (kDType == DType::kFloat32) {
    return Load(p);
  } else {
#if FASTATTN_SIMD_BITS == 512
    if constexpr (SizeOf(kDType) == 2) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      if constexpr (kDType == DType::kFloat16) return _mm512_cvtph_ps(x);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
    } else {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (kDType == DType::kInt8) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
      } else if constexpr (kDType == DType::kE5M2) {
        return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8));
      } else {
        __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
        half = _mm256_and_si256(half, _mm256_set1_epi16(static_cast<int16_t>(0xBFFF)));
        if constexpr (!kFinite) {
          const __m256i nan =
              _mm256_cmpeq_epi16(_mm256_slli_epi16(half, 1), _mm256_set1_epi16(0x7F00));
          half = _mm256_or_si256(half, nan);  // all ones is a NaN
        }
        return _mm512_cvtph_ps(half) * 256.0f;
      }
    }
#elif FASTATTN_SIMD_BITS == 256
    if constexpr (SizeOf(kDType) == 2) {
      const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (kDType == DType::kFloat16) return _mm256_cvtph_ps(x);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
    } else {
      const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      if constexpr (kDType == DType::kInt8) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
      } else if constexpr (kDType == DType::kE5M2) {
        return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(codes), 8));
      } else {
        __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7);
        half = _mm_and_si128(half, _mm_set1_epi16(static_cast<int16_t>(0xBFFF)));
        if constexpr (!kFinite) {
          const __m128i nan = _mm_cmpeq_epi16(_mm_slli_epi16(half, 1), _mm_set1_epi16(0x7F00));
          half = _mm_or_si128(half, nan);
        }
        return _mm256_cvtph_ps(half) * 256.0f;
      }
    }
#else
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = Element<kDType>::Load(p[i]);
    return Load(lanes);
#endif
  }
}

// kLanes bytes, of which the low (high) nibbles are 4-bit codes, as fp32.
template <DType kCode, bool kHigh>
FASTATTN_INLINE Vec NibblesAsFloats(const uint8_t* p) {
  uint8_t __attribute__((vector_size(kLanes))) bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  const VecInt wide = __builtin_convertvector(bytes, VecInt);
  const VecInt code = kHigh ? wide >> 4 : wide & 0xF;
  if constexpr (kCode == DType::kInt4) {
    return __builtin_convertvector(code - kInt4Bias, Vec);
  } else {
    // From 1 on a magnitude's bits are an fp32's exponent and mantissa, less a bias.
    const VecInt magnitude = code & 7;
    const VecInt large = (magnitude << 22) + (126 << 23);
    const Vec small = __builtin_convertvector(magnitude, Vec) * 0.5f;
    VecInt bits;
    std::memcpy(&bits, &small, sizeof(bits));
    bits = (magnitude < 2 ? bits : large) | (code & 8) << 28;
    Vec value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
}

// out[r][0..3] = a[r] . b[0..3] for kRows rows of n elements.
template <int kRows, int kLength, DType kB, bool kFinite>
FASTATTN_INLINE void DotBlock(const float* a, int a_stride,
                              const typename Element<kB>::Storage* const (&b)[4], float* out,
                              int out_stride) {
  Vec sum[kRows][4] = {};
  for (int n = 0; n < kLength; n += kLanes) {
    Vec x[4];
    for (int c = 0; c < 4; ++c) x[c] = LoadAs<kB, kFinite>(b[c] + n);
    for (int r = 0; r < kRows; ++r) {
      const Vec y = Load(a + r * a_stride + n);
      for (int c = 0; c < 4; ++c) sum[r][c] = Fma(y, x[c], sum[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const Quad total = Sum4(sum[r]);
    std::memcpy(out + r * out_stride, &total, sizeof(total));
  }
}

// Whether one of n e4m3 codes in each of `rows` rows is NaN.
template <int n>
FASTATTN_INLINE bool HasNaNCode(const uint8_t* codes, int rows, int64_t stride) {
  static_assert(n % 32 == 0, "a row is read in whole vectors, the last of which may overlap");
  using Bytes = uint8_t __attribute__((vector_size(FASTATTN_SIMD_BITS / 8)));
  Bytes found{};
  for (int r = 0; r < rows; ++r, codes += stride) {
    constexpr int kBytes = static_cast<int>(sizeof(Bytes));
    for (int i = 0; i < n; i += kBytes) {
      Bytes x;
      std::memcpy(&x, codes + (i + kBytes <= n ? i : n - kBytes), sizeof(x));
      found |= static_cast<Bytes>((x & 0x7F) == 0x7F);
    }
  }
  uint64_t words[sizeof(Bytes) / 8];
  std::memcpy(words, &found, sizeof(found));
  uint64_t any = 0;
  for (uint64_t word : words) any |= word;
  return any != 0;
}

// Prefetches kRows rows of kRow elements from the `first` on.
template <typename Code, int kRow, int kRows>
FASTATTN_INLINE void PrefetchRows(const Code* codes, int64_t stride, int first) {
  constexpr int kBytes = kRow * static_cast<int>(sizeof(Code));
  const char* from = reinterpret_cast<const char*>(codes + first * stride);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r, from += stride * sizeof(Code)) {
    for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(from + line, 0, 2);
  }
}
