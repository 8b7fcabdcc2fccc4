// Shared memory of the narrow kernel, its fragments of codes, and the copies of its tiles.
#pragma once

#include <cstdint>

#include "cuda/common/divisor.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/mla/attention/schedule.cuh"
#include "cuda/mla/attention/token.cuh"

namespace fastattn::cuda::mla_attention::narrow {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kStages = 2;    // of tiles of kTileKeys
inline constexpr int kQuarters = 4;  // of the channels, each with warps of its own for the scores
// A warp's four columns of scores lie in banks of their own, rows of weights begin 16 bytes
// further.
inline constexpr int kScorePitch = kTileKeys + 4;
inline constexpr int kWeightPitch = kTileKeys + 8;

inline constexpr DType kHalf = DType::kFloat16;
// Weights are at most 2^kUnit, so that fp16 holds small ones too. Times a scale, less than two of
// its units, they stay below 2^14.
inline constexpr float kUnit = 13.0f;

// kTiles: of eight rows, heads of new tokens.
template <MlaFormat kFormat, int kRowTiles>
struct Config {
  static constexpr MlaFormat kCache = kFormat;
  static constexpr int kTiles = kRowTiles;
  static constexpr int kRows = 8 * kTiles;
  // Scales of a token beside its codes, each for a quarter of its latent channels.
  static constexpr bool kScaled = kFormat == MlaFormat::kFp8x656;
  static constexpr int kScales = kScaled ? kQuarters : 1;
  static constexpr int kChunks = FactsOf(kFormat).row_bytes / 16;
  // Keys lie in shared memory as they do in a page, so that 16-byte chunks of one line of memory
  // become a line again: others would be copied in more requests. Of an odd number of chunks, the
  // same one of eight keys shares no bank as it is, else by Swizzle.
  static constexpr int kPitch = kChunks * 16;
  static_assert(kPitch * kTileKeys % 128 == 0 && (kChunks % 2 == 1 || kChunks % 8 == 4));

  // What the offset of a chunk in its key is xored with.
  __device__ __forceinline__ static uint32_t Swizzle(uint32_t key) {
    return kChunks % 2 == 1 ? 0 : (key >> 1 & 3) * 16;
  }
};

template <class C>
struct __align__(128) Shared {
  uint8_t keys[kStages][kTileKeys * C::kPitch];
  float scores[kQuarters][C::kRows][kScorePitch];        // of a quarter of the channels
  uint16_t weights[C::kScales][C::kRows][kWeightPitch];  // fp16
  __align__(16) float inverse[C::kRows][kQuarters];      // not kScaled: what a quarter's scores are
                                                         // multiplied with
  __align__(16) float keep[C::kRows][C::kScales];        // factor of the output so far
  float factor[C::kRows][C::kScales];                    // of the output at last
  uint8_t assigned[kStages][kTileKeys];
  int64_t sums[kWarps];
  Share share;
  __align__(8) uint8_t walker[sizeof(Walker<true>)];
  Segment segment;
  int more;  // whether there is such a segment
};

__device__ __forceinline__ float PowerOfTwo(int exponent) {
  return __int_as_float(max(exponent + 127, 0) << 23);
}

// Two 8x8 matrices as LoadMatrices has four, of the addresses of lanes 0 to 15.
__device__ __forceinline__ uint2 LoadTwoMatrices(uint32_t address) {
  uint2 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "r"(address));
  return v;
}

// Four e4m3 codes as fp16, which holds every one of them. The halves of the register are named as
// such: shifted, the upper one would cost an instruction more.
__device__ __forceinline__ uint2 HalvesOf(uint32_t codes) {
  uint2 v;
  asm("{\n\t.reg .b16 low, high;\n\t"
      "mov.b32 {low, high}, %2;\n\t"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n\t"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n\t}"
      : "=r"(v.x), "=r"(v.y)
      : "r"(codes));
  return v;
}

// Copies tiles; eight lanes a key, two keys a lane. A tile's pages are looked up one tile before it
// is copied.
template <class C>
class Copier {
 public:
  __device__ __forceinline__ Copier(const MlaAttentionParams& p, const Divisor& page_size,
                                    Shared<C>& shared)
      : p_(p),
        page_size_(page_size),
        shared_(shared),
        policy_(CachePolicy(true)),
        first_(SharedAddress(shared.keys[0]) + Key(0) * C::kPitch +
               (Sub() * 16 ^ C::Swizzle(Key(0)))),  // of Key(1) as well
        target_(first_) {}

  // The next tile copied is the first one of a segment, and goes to stage 0.
  __device__ __forceinline__ void Begin() { target_ = first_; }

  // Keys of tile `tile`, which need not exist.
  __device__ __forceinline__ void Look(int batch_idx, int limit, int tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = tile * kTileKeys + Key(i);
      page_[i] = -1;
      if (key >= limit) continue;
      const uint32_t index = page_size_.Quotient(static_cast<uint32_t>(key));
      row_[i] = static_cast<uint32_t>(key) - index * page_size_.divisor;
      if (index >= static_cast<uint32_t>(p_.seqs.max_blocks)) continue;
      page_[i] = __ldg(BlockEntry(p_.seqs.block_tables, p_.seqs.max_blocks, batch_idx, index));
    }
  }

  // The tile that Look found; keys without a page are zeros. Stages alternate.
  __device__ __forceinline__ void Copy(int stage) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = IsAssignedBlock(page_[i], static_cast<int>(p_.cache.num_pages));
      const uint8_t* source = static_cast<const uint8_t*>(p_.cache.data);
      if (there) source = MlaRowOf(p_.cache, C::kCache, page_[i], row_[i]).codes;
      source += Sub() * 16;  // nothing is read there if `bytes` is 0
      const uint32_t target = target_ + 32 * i * C::kPitch;
      const int bytes = there ? 16 : 0;
#pragma unroll
      for (int j = 0; j < C::kChunks / 8; ++j) {
        CopyAsync16(target + 128 * j, source + 128 * j, policy_, bytes);
      }
      if (Sub() < C::kChunks % 8) {
        constexpr int kLast = C::kChunks / 8;
        CopyAsync16(target + 128 * kLast, source + 128 * kLast, policy_, bytes);
      }
      if (Sub() == 0) shared_.assigned[stage][Key(i)] = there;
    }
    // Not an address made of `stage`: ptxas 13.0 adds a uniform register in the copy itself then,
    // and an H100 knows no such instruction.
    target_ = 2 * first_ + kTileKeys * C::kPitch - target_;
  }

 private:
  __device__ __forceinline__ static int Key(int i) { return 32 * i + threadIdx.x / 8; }
  __device__ __forceinline__ static int Sub() { return threadIdx.x % 8; }

  const MlaAttentionParams& p_;
  const Divisor& page_size_;
  Shared<C>& shared_;
  uint64_t policy_;
  uint32_t first_, target_;  // of this lane in stage 0, and in the next tile's
  uint32_t row_[2] = {};
  int page_[2] = {-1, -1};
};

}  // namespace fastattn::cuda::mla_attention::narrow
