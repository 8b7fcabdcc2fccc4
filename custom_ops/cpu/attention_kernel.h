// Attention of one tile of packed rows over one range of keys. No include guard and no include:
// attention_baseline.cc, attention_avx2.cc and attention_avx512.cc each compile this text for their
// instruction set, in a namespace of their own, so that no inline function of one set can be merged
// by the linker with that of another. For the same reason nothing here instantiates a function
// template of a common header.
//
// Each row of the tile sees an interval of key positions, in which it may have holes. Scores of
// masked keys become -inf, and values of masked keys are never multiplied, because that memory may
// hold anything, NaN included.

// Kv: the formats of K and V (formats/kv_format.h), kByChannel: V is stored by channel.
template <int kDim, typename Kv, bool kByChannel>
class TileKernel {
 public:
  static void Run(const AttentionParams& p, const AttentionSeq& seq, const AttentionTask& task,
                  TileBuffers& buffers) {
    TileKernel(p, seq, task, buffers).Run();
  }

 private:
  using Key = typename Kv::Key;
  using Value = typename Kv::Value;
  using KeyCode = typename Element<Key::kCode>::Storage;
  using ValueCode = typename Element<Value::kCode>::Storage;
  // Codes of 4 bits are decoded before they are used, and multiplied by scales of groups of
  // channels then. Scales of whole tokens multiply scores and probabilities.
  static constexpr bool kKeyTokenScales = Key::kDynamic && !Key::kGrouped;
  static constexpr bool kValueTokenScales = Value::kDynamic && !Value::kGrouped;
  static constexpr int kKeyRow = kDim / CodesPerByte(Key::kCode);  // elements of a key
  static constexpr int kValueDim = ValueDim(kDim);
  static constexpr int kValueGroups = Value::TokenScales(kValueDim);

  struct Chunk {
    const KeyCode* key;
    const ValueCode* value;
    int64_t start;    // key position of the first token
    int64_t k_scale;  // index of its scales (dynamic types)
    int64_t v_scale;
    int valid;        // tokens that exist
    bool full;        // every row sees all of its 64 tokens
    bool from_codes;  // the codes of V are read, not decoded values
    bool poisoned;    // some of V is not finite and not visible to every row
  };

  TileKernel(const AttentionParams& p, const AttentionSeq& seq, const AttentionTask& task,
             TileBuffers& buffers)
      : p_(p), seq_(seq), task_(task), b_(buffers), rows_(task.packed_count) {
    if (p.paged) {
      key_stride_ = p.cache.key_strides.row;
      value_stride_ = p.cache.value_strides.row;
    } else {
      key_stride_ = p.ragged.key_token_stride;
      value_stride_ = p.ragged.value_token_stride;
    }
  }

  void Run() {
    LoadRows();
    std::memset(b_.acc, 0, sizeof(float) * rows_ * kValueDim);
    int64_t begin = task_.key_end, end = task_.key_begin;
    common_begin_ = task_.key_begin;
    common_end_ = task_.key_end;
    gap_begin_ = 0;
    gap_end_ = b_.holes ? task_.key_end : 0;
    for (int r = 0; r < rows_; ++r) {
      b_.row_max[r] = -__builtin_inff();
      b_.row_sum[r] = 0.0f;
      common_begin_ = b_.visible_begin[r] > common_begin_ ? b_.visible_begin[r] : common_begin_;
      common_end_ = b_.visible_end[r] < common_end_ ? b_.visible_end[r] : common_end_;
      if (b_.holes) NarrowCommon(r);
      if (b_.visible_begin[r] >= b_.visible_end[r]) continue;
      begin = b_.visible_begin[r] < begin ? b_.visible_begin[r] : begin;
      end = b_.visible_end[r] > end ? b_.visible_end[r] : end;
      if (b_.holes) NarrowGap(r);
    }
    any_begin_ = begin;
    any_end_ = end;
    for (int64_t start = begin / kBlockSize * kBlockSize; start < end;) {
      // Passes begin at multiples of kTileKeys, whatever the tile's rows see.
      const int64_t next = (start / kTileKeys + 1) * kTileKeys;
      num_chunks_ = 0;
      for (; start < next && start < end; start += kBlockSize) {
        if (FindChunk(start, &chunks_[num_chunks_])) ++num_chunks_;
      }
      // The chunk behind this tile's, which is prefetched while the tile is computed.
      if (!p_.paged || start >= end || !FindChunk(start, &chunks_[num_chunks_])) {
        chunks_[num_chunks_].key = nullptr;
      }
      if (num_chunks_ > 0) RunTile();
    }
  }

  // Keeps the keys that every row sees clear of a row's holes.
  void NarrowCommon(int r) {
    if (b_.gap_begin[r] < b_.gap_end[r] && b_.gap_end[r] > common_begin_) {
      common_begin_ = b_.gap_end[r];
    }
    if (b_.tree[r] != nullptr && b_.tree_begin < common_end_) common_end_ = b_.tree_begin;
  }

  // Keeps the keys of every row's gap. Chunks there are left out as if their block were not
  // assigned, which it need not be, so that results do not depend on that.
  void NarrowGap(int r) {
    gap_begin_ = b_.gap_begin[r] > gap_begin_ ? b_.gap_begin[r] : gap_begin_;
    gap_end_ = b_.gap_end[r] < gap_end_ ? b_.gap_end[r] : gap_end_;
  }

  // Decodes the queries and finds each row's scale.
  void LoadRows() {
    const int group = p_.num_heads / p_.num_kv_heads;
    float key_scale = 1.0f;
    const void* channel_scales = nullptr;
    if (p_.paged && Key::kQuantized && !Key::kDynamic) {
      const PagedCache& cache = p_.cache;
      if (cache.k_granularity == ScaleScheme::kChannel) {
        channel_scales = cache.k_scales;
      } else {
        key_scale = LoadScale(cache.k_scales, cache.scale_dtype,
                              StaticScaleIndex(cache.k_granularity, task_.kv_head, 0, kDim));
      }
    } else if (!p_.paged && p_.ragged.k_descale.data != nullptr) {
      const Descale& scale = p_.ragged.k_descale;
      key_scale =
          LoadScale(scale.data, scale.dtype, scale.Index(0, task_.batch_idx, task_.kv_head, 0));
    }
    for (int r = 0; r < rows_; ++r) {
      const int64_t i = (task_.packed_begin + r) / group;
      const int head = task_.kv_head * group + static_cast<int>((task_.packed_begin + r) % group);
      const int64_t token = seq_.q_begin + i;
      LoadQuery(token * p_.q_token_stride + head * p_.q_head_stride, b_.q + r * kDim);
      if (channel_scales != nullptr) {
        for (int d = 0; d < kDim; ++d) {
          b_.q[r * kDim + d] *=
              LoadScale(channel_scales, p_.cache.scale_dtype,
                        StaticScaleIndex(ScaleScheme::kChannel, task_.kv_head, d, kDim));
        }
      }
      float scale = p_.softmax_scale * key_scale;
      if (p_.q_descale.data != nullptr) {
        scale *= LoadScale(p_.q_descale.data, p_.q_descale.dtype,
                           p_.q_descale.Index(token, task_.batch_idx, task_.kv_head, head));
      }
      b_.row_factor[r] = scale * kLog2E;
    }
  }

  void LoadQuery(int64_t offset, float* out) {
    switch (p_.q_dtype) {
      case DType::kFloat32:
        return DecodeRow<DType::kFloat32>(static_cast<const float*>(p_.q) + offset, out);
      case DType::kFloat16:
        return DecodeRow<DType::kFloat16>(static_cast<const uint16_t*>(p_.q) + offset, out);
      case DType::kBFloat16:
        return DecodeRow<DType::kBFloat16>(static_cast<const uint16_t*>(p_.q) + offset, out);
      default:
        return DecodeRow<DType::kE4M3>(static_cast<const uint8_t*>(p_.q) + offset, out);
    }
  }

  template <DType kDType, int kChannels = kDim>
  static void DecodeRow(const typename Element<kDType>::Storage* in, float* out) {
    for (int d = 0; d < kChannels; d += kLanes) Store(out + d, LoadAs<kDType>(in + d));
  }

  // Addresses of the keys from `start` on; false if their block is not assigned.
  bool FindChunk(int64_t start, Chunk* chunk) const {
    chunk->start = start;
    chunk->valid = static_cast<int>(seq_.k_len - start < kBlockSize ? seq_.k_len - start
                                                                    : int64_t{kBlockSize});
    chunk->full = common_begin_ <= start && common_end_ >= start + kBlockSize;
    if (start >= gap_begin_ && start + kBlockSize <= gap_end_) return false;
    if (p_.paged) {
      const SeqMeta& seqs = p_.seqs;
      const PagedCache& cache = p_.cache;
      const int block = BlockOf(seqs.block_tables, seqs.max_blocks, cache.num_blocks,
                                seqs.TableOf(task_.batch_idx, task_.kv_head, cache.num_kv_heads),
                                start / kBlockSize);
      if (block < 0) return false;
      const int head = task_.kv_head;
      chunk->k_scale = cache.k_scale_strides.Plane(block, head);
      chunk->v_scale = cache.v_scale_strides.Plane(block, head);
      chunk->key = static_cast<const KeyCode*>(cache.key) + cache.key_strides.Plane(block, head);
      chunk->value =
          static_cast<const ValueCode*>(cache.value) + cache.value_strides.Plane(block, head);
      return true;
    }
    const RaggedKv& kv = p_.ragged;
    const int64_t token = seq_.k_begin + start;
    chunk->key = static_cast<const KeyCode*>(kv.key) + token * kv.key_token_stride +
                 task_.kv_head * kv.key_head_stride;
    chunk->value = static_cast<const ValueCode*>(kv.value) + token * kv.value_token_stride +
                   task_.kv_head * kv.value_head_stride;
    return true;
  }

  void RunTile() {
    for (int c = 0; c < num_chunks_; ++c) {
      LoadScales(c);
      Scores(c);
    }
    for (int r = 0; r < rows_; ++r) Softmax(r);
    if constexpr (kByChannel) {
      AddValuesByChannel();
    } else {
      AddValuesByToken();
    }
  }

  void LoadScales(int c) {
    const PagedCache& cache = p_.cache;
    if constexpr (kKeyTokenScales) {
      GatherAny(cache.k_scales, chunks_[c].k_scale, b_.key_scales + c * kBlockSize);
    }
    if constexpr (kValueTokenScales) {
      GatherAny(cache.v_scales, chunks_[c].v_scale, b_.value_scales + c * kBlockSize);
    }
  }

  void GatherAny(const void* scales, int64_t index, float* out) const {
    if (p_.cache.scale_dtype == DType::kFloat32) {
      GatherScales<DType::kFloat32>(scales, index, out);
    } else {
      GatherScales<DType::kBFloat16>(scales, index, out);
    }
  }

  // A block's scales in the order of the columns.
  template <DType kDType>
  static void GatherScales(const void* scales, int64_t index, float* out) {
    const auto* in = static_cast<const typename Element<kDType>::Storage*>(scales) + index;
    float tokens[kBlockSize];
    for (int i = 0; i < kBlockSize; i += kLanes) Store(tokens + i, LoadAs<kDType>(in + i));
    for (int i = 0; i < kBlockSize; ++i) out[i] = tokens[kColumnOrder<kByChannel>.token[i]];
  }

  // scores[r][column] = q[r] . key code of the column's token.
  void Scores(int c) {
    const Chunk& chunk = chunks_[c];
    const KeyCode* key[kBlockSize];
    for (int i = 0; i < kBlockSize; ++i) {
      const int token = kColumnOrder<kByChannel>.token[i];
      // Past the last token there may be no memory: its column repeats the last one and is masked.
      key[i] = chunk.key + (token < chunk.valid ? token : chunk.valid - 1) * key_stride_;
    }
    if constexpr (Key::kNibbles) {
      for (int i = 0; i < kBlockSize; ++i) {
        const int token = kColumnOrder<kByChannel>.token[i];
        const int valid = token < chunk.valid ? token : chunk.valid - 1;
        const uint8_t* scales = ScaleBytes<Key, kDim>(p_.cache.k_scales, chunk.k_scale, valid);
        DecodeNibbles<Key, kDim>(key[i], scales, b_.keys + i * kDim);
      }
    } else if (Key::kCode == DType::kFloat32 || rows_ <= kBlockRows) {
      if (kByChannel && IsFinite<Key, kDim, kBlockSize>(chunk.key, key_stride_)) {
        ScoreColumns<Key::kCode, true>(c, key);
      } else {
        ScoreColumns<Key::kCode, false>(c, key);
      }
      return;
    }
    const float* decoded[kBlockSize];
    for (int i = 0; i < kBlockSize; ++i) {
      decoded[i] = b_.keys + i * kDim;
      if constexpr (!Key::kNibbles) DecodeRow<Key::kCode>(key[i], b_.keys + i * kDim);
    }
    ScoreColumns<DType::kFloat32, true>(c, decoded);
  }

  // Blocks lie anywhere, and the hardware's prefetchers stop at a page. So while some keys are
  // computed, this prefetches as many of the next chunk's keys and of this chunk's values.
  FASTATTN_INLINE void Prefetch(int c, int i) const {
    if (!p_.paged) return;
    if (chunks_[c + 1].key != nullptr)
      PrefetchRows<KeyCode, kKeyRow, 4>(chunks_[c + 1].key, key_stride_, i);
    if constexpr (kByChannel) {
      // Of as many codes.
      constexpr int kRows = kValueDim / CodesPerByte(Value::kCode) / (kBlockSize / 4);
      PrefetchRows<ValueCode, kBlockSize, kRows>(chunks_[c].value, value_stride_, i / 4 * kRows);
    } else {
      PrefetchRows<ValueCode, kValueDim, 4>(chunks_[c].value, value_stride_, i);
    }
  }

  template <DType kB, bool kFinite>
  void ScoreColumns(int c, const typename Element<kB>::Storage* const (&key)[kBlockSize]) {
    float* out = b_.scores + c * kBlockSize;
    for (int i = 0; i < kBlockSize; i += 4) {
      Prefetch(c, i);
      const typename Element<kB>::Storage* const b[4] = {key[i], key[i + 1], key[i + 2],
                                                         key[i + 3]};
      int r = 0;
      for (; r + 4 <= rows_; r += 4) ScoreRows<4, kB, kFinite>(r, b, out + i);
      if (r + 2 <= rows_) ScoreRows<2, kB, kFinite>(r, b, out + i), r += 2;
      if (r < rows_) ScoreRows<1, kB, kFinite>(r, b, out + i);
    }
  }

  template <int kRows, DType kB, bool kFinite>
  FASTATTN_INLINE void ScoreRows(int r, const typename Element<kB>::Storage* const (&b)[4],
                                 float* out) {
    constexpr int kStep = kRows < kBlockRows ? kRows : kBlockRows;
    for (int i = r; i < r + kRows; i += kStep) {
      DotBlock<kStep, kDim, kB, kFinite>(b_.q + i * kDim, kDim, b, out + i * kTileKeys, kTileKeys);
    }
  }

  // Turns a row's scores into probabilities (times the value's scale) and rescales its output.
  void Softmax(int r) {
    constexpr float kInf = __builtin_inff();
    float* row = b_.scores + r * kTileKeys;
    const float factor = b_.row_factor[r];
    // A base-2 logarithm, like the scores. The largest caps would not be finite as one.
    const float cap = p_.softcap < 2e38f ? p_.softcap * kLog2E : 3e38f;
    const float inverse = 1.0f / cap;
    Vec largest = Splat(-kInf);
    for (int c = 0; c < num_chunks_; ++c) {
      const bool full = IsFull(r, chunks_[c]);
      for (int i = 0; i < kBlockSize; i += kLanes) {
        float* s = row + c * kBlockSize + i;
        Vec x = Load(s);
        if (kKeyTokenScales) x = x * Load(b_.key_scales + c * kBlockSize + i);
        x = x * factor;
        if (cap > 0.0f) x = Softcap(x, cap, inverse);
        if (!full) x = Visible(r, chunks_[c], i) ? x : Splat(-kInf);
        Store(s, x);
        largest = Max(x, largest);
      }
    }
    const float before = b_.row_max[r];
    const float tile = MaxLane(largest);
    const float now = tile > before ? tile : before;
    // While no visible score is above -inf, there is nothing to subtract or to rescale.
    const float shift = now == -kInf ? 0.0f : now;
    Vec sum{};
    for (int c = 0; c < num_chunks_; ++c) {
      const bool full = IsFull(r, chunks_[c]);
      for (int i = 0; i < kBlockSize; i += kLanes) {
        float* s = row + c * kBlockSize + i;
        Vec x = Exp2(Load(s) - shift);
        sum = sum + x;
        if (kValueTokenScales) {
          x = x * Load(b_.value_scales + c * kBlockSize + i);
          if (!full) x = Visible(r, chunks_[c], i) ? x : Vec{};
        }
        Store(s, x);
      }
    }
    b_.row_max[r] = now;
    if (now == before) {
      b_.row_sum[r] += SumLanes(sum);
      return;
    }
    const float alpha = Exp2(Splat(before - shift))[0];
    b_.row_sum[r] = b_.row_sum[r] * alpha + SumLanes(sum);
    float* acc = b_.acc + r * kValueDim;
    for (int d = 0; d < kValueDim; d += kLanes) Store(acc + d, Load(acc + d) * alpha);
  }

  bool IsFull(int r, const Chunk& chunk) const {
    const int64_t end = chunk.start + kBlockSize;
    if (chunk.full) return true;
    if (b_.visible_begin[r] > chunk.start || b_.visible_end[r] < end) return false;
    if (!b_.holes) return true;
    const bool in_gap = b_.gap_begin[r] < end && b_.gap_end[r] > chunk.start;
    return !in_gap && (b_.tree[r] == nullptr || b_.tree_begin >= end);
  }

  // Whether row r sees a key.
  bool Sees(int r, int64_t key) const {
    if (key < b_.visible_begin[r] || key >= b_.visible_end[r]) return false;
    if (!b_.holes) return true;
    if (key >= b_.gap_begin[r] && key < b_.gap_end[r]) return false;
    return b_.tree[r] == nullptr || key < b_.tree_begin || b_.tree[r][key - b_.tree_begin] != 0;
  }

  // Row r's interval in tokens of a chunk, within [0, 64].
  int First(int64_t begin, const Chunk& chunk) const {
    const int64_t i = begin - chunk.start;
    return static_cast<int>(i < 0 ? 0 : i > kBlockSize ? kBlockSize : i);
  }

  // All ones in the lanes of columns i, i + 1, ... that row r sees.
  FASTATTN_INLINE VecInt Visible(int r, const Chunk& chunk, int i) const {
    if (b_.holes) return VisibleBesideHoles(r, chunk, i);
    const VecInt token = LoadInt(kColumnOrder<kByChannel>.token + i);
    return (token >= First(b_.visible_begin[r], chunk)) & (token < First(b_.visible_end[r], chunk));
  }

  VecInt VisibleBesideHoles(int r, const Chunk& chunk, int i) const {
    alignas(64) int32_t seen[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      seen[lane] = Sees(r, chunk.start + kColumnOrder<kByChannel>.token[i + lane]) ? -1 : 0;
    }
    return LoadInt(seen);
  }

  // --- values stored by token, [64, D]: a token's values are read only where it is visible -------

  void AddValuesByToken() {
    constexpr bool kPlain = Value::kCode == DType::kFloat32;
    const bool decode = !kPlain && rows_ > kBlockRows;
    if (decode) {
      for (int c = 0; c < num_chunks_; ++c) {
        const Chunk& chunk = chunks_[c];
        const int last = First(any_end_, chunk);
        for (int i = First(any_begin_, chunk); i < last; ++i) {
          DecodeRow<Value::kCode, kValueDim>(chunk.value + i * value_stride_,
                                             b_.values + (c * kBlockSize + i) * kValueDim);
        }
      }
    }
    for (int r = 0; r < rows_;) {
      const int n = SameInterval(r);
      if (decode) {
        AddRows<DType::kFloat32>(r, n, true);
      } else {
        AddRows<Value::kCode>(r, n, false);
      }
      r += n;
    }
  }

  // Number of rows (1, 2 or kBlockRows) from r on that see the same keys of the tile.
  int SameInterval(int r) const {
    if (b_.holes) return 1;
    const int64_t first = chunks_[0].start;
    const int64_t last = chunks_[num_chunks_ - 1].start + kBlockSize;
    const auto clip = [&](int64_t x) { return x < first ? first : x > last ? last : x; };
    int n = 1;
    while (n < kBlockRows && r + n < rows_ &&
           clip(b_.visible_begin[r + n]) == clip(b_.visible_begin[r]) &&
           clip(b_.visible_end[r + n]) == clip(b_.visible_end[r])) {
      ++n;
    }
    return n == kBlockRows ? n : n >= 2 ? 2 : 1;
  }

  template <DType kB>
  void AddRows(int r, int n, bool decoded) {
    if (n == 4) return AddBlock<4, kB>(r, decoded);
    if (n == 2) return AddBlock<2, kB>(r, decoded);
    AddBlock<1, kB>(r, decoded);
  }

  template <int kRows, DType kB>
  void AddBlock(int r, bool decoded) {
    using Storage = typename Element<kB>::Storage;
    static_assert(kValueDim % kLanes == 0, "a head is whole vectors");
    constexpr int kVectors = kValueDim / kLanes;
    constexpr int kWide = kVectors % 4 == 0 ? 4 : kVectors % 2 == 0 ? 2 : 1;  // at a time
    const bool holes = kRows == 1 && b_.holes;
    for (int d = 0; d < kValueDim; d += kWide * kLanes) {
      Vec acc[kRows][kWide];
      for (int i = 0; i < kRows; ++i) {
        for (int w = 0; w < kWide; ++w)
          acc[i][w] = Load(b_.acc + (r + i) * kValueDim + d + w * kLanes);
      }
      for (int c = 0; c < num_chunks_; ++c) {
        const int last = First(b_.visible_end[r], chunks_[c]);
        const float* p = b_.scores + r * kTileKeys + c * kBlockSize;
        const int64_t stride = decoded ? kValueDim : value_stride_;
        const Storage* values =
            (decoded ? reinterpret_cast<const Storage*>(b_.values + c * kBlockSize * kValueDim)
                     : reinterpret_cast<const Storage*>(chunks_[c].value)) +
            d;
        for (int j = First(b_.visible_begin[r], chunks_[c]); j < last; ++j) {
          if (holes && !Sees(r, chunks_[c].start + j)) continue;
          Vec v[kWide];
          for (int w = 0; w < kWide; ++w) v[w] = LoadAs<kB>(values + j * stride + w * kLanes);
          for (int i = 0; i < kRows; ++i) {
            const Vec x = Splat(p[i * kTileKeys + j]);
            for (int w = 0; w < kWide; ++w) acc[i][w] = Fma(x, v[w], acc[i][w]);
          }
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int w = 0; w < kWide; ++w)
          Store(b_.acc + (r + i) * kValueDim + d + w * kLanes, acc[i][w]);
      }
    }
  }

  // --- values stored by channel, [D, 64]: output channel = probabilities . its 64 codes ----------

  void AddValuesByChannel() {
    bool any_codes = false;
    for (int c = 0; c < num_chunks_; ++c) {
      Chunk& chunk = chunks_[c];
      chunk.poisoned = false;
      chunk.from_codes = !Value::kNibbles && chunk.full && rows_ <= kBlockRows &&
                         (Value::kCode != DType::kE4M3 ||
                          IsFinite<Value, kBlockSize, kValueDim>(chunk.value, value_stride_));
      if (!chunk.from_codes) chunk.poisoned = !DecodeChannels(c) && !chunk.full;
      any_codes |= chunk.from_codes;
    }
    if (any_codes) {
      AddChannels<true>();
    } else {
      AddChannels<false>();
    }
    for (int c = 0; c < num_chunks_; ++c) {
      if (chunks_[c].poisoned) AddNonFinite(c);
    }
  }

  // Decodes a chunk, with 0 for the tokens that no row sees and, where rows differ in what they
  // see, for values that are not finite. Returns whether all are finite.
  bool DecodeChannels(int c) {
    const Chunk& chunk = chunks_[c];
    const int first = First(any_begin_, chunk), last = First(any_end_, chunk);
    float* out = b_.values + c * kBlockSize * kValueDim;
    constexpr bool kFiniteNibbles = Value::kNibbles && !Value::kGrouped;
    const VecInt keep = VecInt{} - (chunk.full ? 1 : 0);
    Vec check{};
    if constexpr (Value::kGrouped) FindGroupScales(chunk);
    for (int i = 0; i < kBlockSize; i += kLanes) {
      const VecInt token = LoadInt(kColumnOrder<kByChannel>.token + i);
      const VecInt seen = (token >= first) & (token < last);
      if constexpr (kFiniteNibbles) {  // a row is two channels; every code is finite
        for (int d = 0; d < kValueDim; d += 2) {
          const uint8_t* codes = chunk.value + d / 2 * value_stride_ + i;
          const Vec even = NibblesAsFloats<Value::kCode, false>(codes);
          const Vec odd = NibblesAsFloats<Value::kCode, true>(codes);
          Store(out + d * kBlockSize + i, seen ? even : Vec{});
          Store(out + (d + 1) * kBlockSize + i, seen ? odd : Vec{});
        }
        continue;
      }
      for (int d = 0; d < (kFiniteNibbles ? 0 : kValueDim); ++d) {
        const Vec x = seen ? LoadChannel(chunk, d, i) : Vec{};
        const Vec zero = x * 0.0f;  // NaN if x is infinite or NaN
        check = check + zero;
        Store(out + d * kBlockSize + i, keep | (zero == 0.0f) ? x : Vec{});
      }
    }
    return SumLanes(check) == 0.0f;
  }

  // V of the columns from `column` on of a channel.
  FASTATTN_INLINE Vec LoadChannel(const Chunk& chunk, int d, int column) const {
    if constexpr (Value::kGrouped) {
      const uint8_t* codes = chunk.value + d / 2 * value_stride_ + column;
      const Vec x = d % 2 == 0 ? NibblesAsFloats<Value::kCode, false>(codes)
                               : NibblesAsFloats<Value::kCode, true>(codes);
      return x * Load(group_scales_[d / Value::kGroup] + column);
    } else {
      return LoadAs<Value::kCode>(chunk.value + d * value_stride_ + column);
    }
  }

  void FindGroupScales(const Chunk& chunk) {
    for (int i = 0; i < kBlockSize; ++i) {
      const int token = kColumnOrder<kByChannel>.token[i];
      const uint8_t* bytes = ScaleBytes<Value, kValueDim>(p_.cache.v_scales, chunk.v_scale, token);
      for (int group = 0; group < kValueGroups; ++group) {
        group_scales_[group][i] = GroupScale<Value::kScaleType>::Value(bytes[group]);
      }
    }
  }

  template <bool kAnyCodes>
  void AddChannels() {
    for (int d = 0; d < kValueDim; d += 4) {
      int r = 0;
      for (; r + kBlockRows <= rows_; r += kBlockRows) AddChannelBlock<kBlockRows, kAnyCodes>(r, d);
      if (kBlockRows > 2 && r + 2 <= rows_) AddChannelBlock<2, kAnyCodes>(r, d), r += 2;
      if (r < rows_) AddChannelBlock<1, kAnyCodes>(r, d);
    }
  }

  // The sums go on from chunk to chunk whether a chunk's values are codes or decoded: which of them
  // they are depends on the other rows, and a row's bits may not.
  template <int kRows, bool kAnyCodes>
  FASTATTN_INLINE void AddChannelBlock(int r, int d) {
    Vec sum[kRows][4] = {};
    for (int k = 0; k < num_chunks_; ++k) {
      const float* p = b_.scores + r * kTileKeys + k * kBlockSize;
      if constexpr (kAnyCodes && !Value::kNibbles) {
        if (chunks_[k].from_codes) {
          AddProducts<kRows, Value::kCode>(chunks_[k].value + d * value_stride_, value_stride_, p,
                                           sum);
          continue;
        }
      }
      AddProducts<kRows, DType::kFloat32>(b_.values + (k * kValueDim + d) * kBlockSize, kBlockSize,
                                          p, sum);
    }
    for (int j = 0; j < kRows; ++j) {
      float* acc = b_.acc + (r + j) * kValueDim + d;
      Quad total;
      std::memcpy(&total, acc, sizeof(total));
      total = total + Sum4(sum[j]);
      std::memcpy(acc, &total, sizeof(total));
    }
  }

  // Adds the products of a chunk's probabilities and of four channels.
  template <int kRows, DType kB>
  static FASTATTN_INLINE void AddProducts(const typename Element<kB>::Storage* values,
                                          int64_t stride, const float* p, Vec (&sum)[kRows][4]) {
    for (int i = 0; i < kBlockSize; i += kLanes) {
      Vec x[4];
      // Codes come here only where the conversion needs no care for NaN (see from_codes).
      for (int c = 0; c < 4; ++c) x[c] = LoadAs<kB, true>(values + c * stride + i);
      for (int j = 0; j < kRows; ++j) {
        const Vec y = Load(p + j * kTileKeys + i);
        for (int c = 0; c < 4; ++c) sum[j][c] = Fma(y, x[c], sum[j][c]);
      }
    }
  }

  // NaN and infinite values that only some rows see are 0 in the matrix products, so that rows that
  // do not see them keep their bits. The rows that see them get them here.
  void AddNonFinite(int c) {
    if constexpr (Value::kGrouped) FindGroupScales(chunks_[c]);
    for (int i = 0; i < kBlockSize * kValueDim; i += kLanes) {
      const Vec values = LoadChannel(chunks_[c], i / kBlockSize, i % kBlockSize);
      if (SumLanes(values * 0.0f) == 0.0f) continue;
      for (int lane = i; lane < i + kLanes; ++lane) {
        const int column = lane % kBlockSize;
        const int64_t key = chunks_[c].start + kColumnOrder<kByChannel>.token[column];
        const float x = values[lane - i];
        for (int r = 0; r < rows_ && x * 0.0f != 0.0f; ++r) {
          if (!Sees(r, key)) continue;
          b_.acc[r * kValueDim + lane / kBlockSize] +=
              b_.scores[r * kTileKeys + c * kBlockSize + column] * x;
        }
      }
    }
  }

  static constexpr float kLog2E = 1.44269504f;

  const AttentionParams& p_;
  const AttentionSeq& seq_;
  const AttentionTask& task_;
  TileBuffers& b_;
  const int rows_;
  alignas(64) float group_scales_[kValueGroups][kBlockSize];  // of V, in the columns' order
  int64_t key_stride_;                                        // elements between tokens
  int64_t value_stride_;                       // elements between tokens or, by channel, channels
  int64_t any_begin_ = 0, any_end_ = 0;        // keys that some row sees
  int64_t common_begin_ = 0, common_end_ = 0;  // keys that every row sees
  int64_t gap_begin_ = 0, gap_end_ = 0;        // keys in every row's gap
  Chunk chunks_[kMaxChunks + 1];               // and the first one of the next tile
  int num_chunks_ = 0;
};
