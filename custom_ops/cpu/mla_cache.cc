#include "cpu/mla_cache.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/block_table.h"
#include "common/exact.h"
#include "common/fp4.h"
#include "common/mla_scale.h"
#include "common/numeric.h"
#include "common/seq_lengths.h"
#include "cpu/mla_row.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

constexpr size_t kRopeBytes = kMlaRopeDim * sizeof(uint16_t);

// Division, not multiplication by the reciprocal: an arbitrary scale's rounds otherwise.
void Encode(const uint16_t* x, int n, float scale, uint8_t* codes) {
  for (int i = 0; i < n; ++i) codes[i] = FloatToE4M3(Div(BFloat16ToFloat(x[i]), scale));
}

float TileScale(const uint16_t* x, int n, MlaScaleRule rule) {
  uint32_t amax = 0;
  for (int i = 0; i < n; ++i) amax = std::max(amax, AbsBits(BFloat16ToFloat(x[i])));
  return rule == MlaScaleRule::kPow2 ? PowerOfTwoFp8Scale(amax) : AmaxFp8Scale(amax);
}

template <MlaFormat kFormat>
void WriteToken(const MlaWriteParams& p, const uint16_t* latent, const uint16_t* rope, MlaRow row) {
  constexpr MlaFormatFacts kFacts = FactsOf(kFormat);
  if constexpr (kFormat == MlaFormat::kBf16) {
    std::memcpy(row.codes, latent, kFacts.latent * sizeof(uint16_t));
    std::memcpy(row.codes + kFacts.latent * sizeof(uint16_t), rope, kRopeBytes);
  } else if constexpr (kFormat == MlaFormat::kFp8) {
    Encode(latent, kFacts.latent, *p.scale, row.codes);
    Encode(rope, kMlaRopeDim, *p.scale, row.codes + kFacts.latent);
  } else {
    for (int t = 0; t < kFacts.latent / kFacts.tile; ++t) {
      const uint16_t* x = latent + t * kFacts.tile;
      const float scale = TileScale(x, kFacts.tile, p.scale_rule);
      Encode(x, kFacts.tile, scale, row.codes + t * kFacts.tile);
      if constexpr (kFormat == MlaFormat::kFp8x656) {
        std::memcpy(row.scales + t * sizeof(float), &scale, sizeof(float));
      } else {
        row.scales[t] = PowerOfTwoToUe8m0(scale);
      }
    }
    if constexpr (kFormat == MlaFormat::kFp8x584) row.scales[kFacts.latent / kFacts.tile] = 0;
    std::memcpy(row.codes + kFacts.row_bytes - kRopeBytes, rope, kRopeBytes);
  }
}

// Tokens of one sequence that lie in one page.
struct PageTokens {
  int page;
  int count;
  int64_t out_token;
};

std::vector<PageTokens> FindPages(const MlaGatherParams& p) {
  const int64_t size = p.cache.page_size;
  std::vector<PageTokens> pages;
  for (int b = 0; b < p.batch; ++b) {
    const TokenRange<int64_t> out = WrittenTokens<int64_t>(p.cu_seqlens_k[b], p.cu_seqlens_k[b + 1],
                                                           p.seq_lens_decoder[b], p.num_out_tokens);
    const int64_t count = std::min(out.count, p.max_blocks * size);
    for (int64_t i = 0; i < count; i += size) {
      const int page =
          BlockOf(p.block_tables, p.max_blocks, static_cast<int>(p.cache.num_pages), b, i / size);
      if (page < 0) continue;
      pages.push_back({page, static_cast<int>(std::min(size, count - i)), out.begin + i});
    }
  }
  return pages;
}

}  // namespace

void MlaWriteToken(const MlaWriteParams& p, int64_t token, const uint16_t* latent,
                   const uint16_t* rope) {
  const int64_t slot = p.slots.At(token), size = p.cache.page_size;
  if (slot < 0 || slot >= p.cache.num_pages * size) return;
  DispatchMlaWritten(p.cache.format, [&](auto format) {
    constexpr MlaFormat kFormat = decltype(format)::value;
    WriteToken<kFormat>(p, latent, rope, MlaRowOf(p.cache, kFormat, slot / size, slot % size));
  });
}

void MlaWriteCache(const MlaWriteParams& p) {
  const int64_t work = FactsOf(p.cache.format).latent + kMlaRopeDim;
  ParallelFor(p.num_slots, work, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      MlaWriteToken(p, t, p.latent + t * p.latent_stride, p.rope + t * p.rope_stride);
    }
  });
}

void MlaGatherCache(const MlaGatherParams& p) {
  const std::vector<PageTokens> pages = FindPages(p);
  DispatchMlaFormat(p.cache.format, [&](auto format) {
    constexpr MlaFormat kFormat = decltype(format)::value;
    const int64_t work = int64_t{p.cache.page_size} * (FactsOf(kFormat).latent + kMlaRopeDim);
    ParallelFor(static_cast<int64_t>(pages.size()), work, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int r = 0; r < pages[i].count; ++r) {
          ReadMlaToken<kFormat>(MlaRowOf(p.cache, kFormat, pages[i].page, r), p.scale,
                                p.out + (pages[i].out_token + r) * p.out_stride);
        }
      }
    });
  });
}

}  // namespace fastattn::cpu
