// Sparse latent attention of some heads of one query token. Compiled like attention_kernel.h, once
// for each instruction set, and under its rules.
//
// Selected tokens are dequantised once for all heads, a tile of them at a time. Those that are
// skipped are not in the tile, so that their memory is not read.

FASTATTN_INLINE void DecodeCodes(const uint8_t* codes, int n, float scale, float* out) {
  const Vec factor = Splat(scale);
  for (int i = 0; i < n; i += kLanes) {
    Store(out + i, LoadAs<DType::kE4M3>(codes + i) * factor);
  }
}

FASTATTN_INLINE void DecodeBf16(const uint8_t* bytes, int n, float* out) {
  uint16_t x[kMlaRopeDim];
  for (int begin = 0; begin < n; begin += kMlaRopeDim) {
    std::memcpy(x, bytes + begin * sizeof(uint16_t), sizeof(x));  // the address may be odd
    for (int i = 0; i < kMlaRopeDim; i += kLanes) {
      Store(out + begin + i, LoadAs<DType::kBFloat16>(x + i));
    }
  }
}

// Channels of a token in fp32: each is one product of a code and its scale.
inline void ReadToken(const MlaSelection& s, int slot, int dim, float* out) {
  const MlaCache& cache = s.cache;
  const int page = slot / cache.page_size, row = slot - page * cache.page_size;
  const MlaRow at = MlaRowOf(cache, cache.format, page, row);
  const uint8_t* codes = at.codes;
  const MlaFormatFacts facts = FactsOf(cache.format);
  switch (cache.format) {
    case MlaFormat::kBf16:
      DecodeBf16(codes, dim, out);
      return;
    case MlaFormat::kFp8:
      DecodeCodes(codes, dim, *s.scale, out);
      return;
    case MlaFormat::kFp8x656:
      for (int t = 0; t < facts.tiles; ++t) {
        float scale;
        std::memcpy(&scale, at.scales + t * sizeof(float), sizeof(scale));
        DecodeCodes(codes + t * facts.tile, facts.tile, scale, out + t * facts.tile);
      }
      break;
    case MlaFormat::kFp8x584:
    case MlaFormat::kFp8x528:
      for (int t = 0; t < facts.tiles; ++t) {
        DecodeCodes(codes + t * facts.tile, facts.tile, UE8M0ToFloat(at.scales[t]),
                    out + t * facts.tile);
      }
      if (cache.format == MlaFormat::kFp8x528) return;  // the rotated channels are codes, too
      break;
  }
  constexpr int kRopeBytes = kMlaRopeDim * 2;
  DecodeBf16(codes + facts.row_bytes - kRopeBytes, kMlaRopeDim, out + facts.latent);
}

// scores[r][0..3] = factor * q[r] . keys[0..3] for kRows heads.
template <int kRows>
FASTATTN_INLINE void ScoreKeys(const float* q, const float* keys, int dim, float factor,
                               float* scores) {
  Vec sum[kRows][4] = {};
  for (int n = 0; n < dim; n += kLanes) {
    Vec x[4];
    for (int c = 0; c < 4; ++c) x[c] = Load(keys + c * dim + n);
    for (int r = 0; r < kRows; ++r) {
      const Vec y = Load(q + r * dim + n);
      for (int c = 0; c < 4; ++c) sum[r][c] = Fma(y, x[c], sum[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const Quad total = Sum4(sum[r]) * factor;
    std::memcpy(scores + r * kMlaTileKeys, &total, sizeof(total));
  }
}

// Scores of kTileKeys keys to their weights; the row's sum and output are rescaled to the new
// maximum.
FASTATTN_INLINE void Weigh(float* scores, float* acc, float* row_max, float* row_sum) {
  constexpr float kInf = __builtin_huge_valf();
  Vec best = Splat(*row_max);
  for (int n = 0; n < kMlaTileKeys; n += kLanes) best = Max(Load(scores + n), best);
  const float largest = MaxLane(best);
  const float base = largest == -kInf ? 0.0f : largest;
  const Vec rescale = Exp2(Splat(*row_max - base));
  Vec sum{};
  for (int n = 0; n < kMlaTileKeys; n += kLanes) {
    const Vec weight = Exp2(Load(scores + n) - base);
    Store(scores + n, weight);
    sum += weight;
  }
  *row_sum = *row_sum * rescale[0] + SumLanes(sum);
  if (rescale[0] != 1.0f) {
    for (int n = 0; n < kMlaValueDim; n += kLanes) Store(acc + n, Load(acc + n) * rescale);
  }
  *row_max = largest;
}

// acc[r] += weights[r] . values for kRows heads.
template <int kRows>
FASTATTN_INLINE void AddValues(const float* weights, const float* values, int dim, int count,
                               float* acc) {
  for (int n = 0; n < kMlaValueDim; n += 4 * kLanes) {
    Vec sum[kRows][4];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < 4; ++c) sum[r][c] = Load(acc + r * kMlaValueDim + n + c * kLanes);
    }
    for (int k = 0; k < count; ++k) {
      Vec x[4];
      for (int c = 0; c < 4; ++c) x[c] = Load(values + k * dim + n + c * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vec weight = Splat(weights[r * kMlaTileKeys + k]);
        for (int c = 0; c < 4; ++c) sum[r][c] = Fma(weight, x[c], sum[r][c]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < 4; ++c) Store(acc + r * kMlaValueDim + n + c * kLanes, sum[r][c]);
    }
  }
}

// One tile: scores, softmax and output of kRows heads from head `h` of the buffers on.
template <int kRows>
inline void AttendTile(const MlaSparseParams& p, int h, int count, MlaBuffers& buffers) {
  constexpr float kInf = __builtin_huge_valf();
  float* scores = buffers.scores + h * kMlaTileKeys;
  float* acc = buffers.acc + h * kMlaValueDim;
  const float factor = p.softmax_scale * 1.44269504f;  // log2(e)
  for (int k = 0; k < count; k += 4) {
    ScoreKeys<kRows>(buffers.q + h * p.dim, buffers.keys + k * p.dim, p.dim, factor, scores + k);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = count; k < kMlaTileKeys; ++k) scores[r * kMlaTileKeys + k] = -kInf;
    Weigh(scores + r * kMlaTileKeys, acc + r * kMlaValueDim, buffers.row_max + h + r,
          buffers.row_sum + h + r);
  }
  AddValues<kRows>(scores, buffers.keys, p.dim, count, acc);
}

inline void AttendTile(const MlaSparseParams& p, int heads, int count, MlaBuffers& buffers) {
  // Four keys are scored together.
  for (int k = count; k % 4 != 0; ++k) {
    for (int d = 0; d < p.dim; d += kLanes) Store(buffers.keys + k * p.dim + d, Vec{});
  }
  int h = 0;
  for (; h + kBlockRows <= heads; h += kBlockRows) AttendTile<kBlockRows>(p, h, count, buffers);
  for (; h < heads; ++h) AttendTile<1>(p, h, count, buffers);
}

void MlaSparse(const MlaSparseParams& p, int64_t token, int begin, int end, MlaBuffers& buffers) {
  const int heads = end - begin;
  for (int h = 0; h < heads; ++h) {
    const uint16_t* q = p.q + token * p.q_token_stride + (begin + h) * p.q_head_stride;
    for (int d = 0; d < p.dim; d += kLanes) {
      Store(buffers.q + h * p.dim + d, LoadAs<DType::kBFloat16>(q + d));
    }
    for (int d = 0; d < kMlaValueDim; d += kLanes) Store(buffers.acc + h * kMlaValueDim + d, Vec{});
    buffers.row_max[h] = -__builtin_huge_valf();
    buffers.row_sum[h] = 0.0f;
  }
  int count = 0;
  const MlaSelection* const selections[] = {&p.keys, &p.extra};
  for (const MlaSelection* s : selections) {
    if (s->topk == 0) continue;
    const int* indices = s->indices + token * s->index_stride;
    const int64_t slots = s->cache.num_pages * s->cache.page_size;
    const int length = s->lengths == nullptr ? s->topk : s->lengths[token];
    for (int i = 0; i < (length < s->topk ? length : s->topk); ++i) {
      if (indices[i] < 0 || indices[i] >= slots) continue;
      ReadToken(*s, indices[i], p.dim, buffers.keys + count * p.dim);
      if (++count < kMlaTileKeys) continue;
      AttendTile(p, heads, count, buffers);
      count = 0;
    }
  }
  if (count > 0) AttendTile(p, heads, count, buffers);
}

MlaSparseFunction FindMlaSparse() { return &MlaSparse; }
