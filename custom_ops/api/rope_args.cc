#include "api/rope_args.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace fastattn::api {

namespace {

constexpr std::initializer_list<phi::DataType> kFloats = {
    phi::DataType::FLOAT32, phi::DataType::BFLOAT16, phi::DataType::FLOAT16};

// What the shape of rotary_embs says. A table is [2, 1, positions, 1, columns] or [2, positions,
// columns]; one dimension more in front counts the sequences, each of which has its own.
struct RotaryShape {
  int64_t tables;  // -1: all sequences share one
  int64_t positions;
  int64_t columns;

  RotaryShape(const char* op, const Sizes& shape) {
    const size_t rank = shape.size();
    const size_t first = rank == 4 || rank == 6 ? 1 : 0;
    const bool long_form = rank >= 5;
    bool known = rank >= 3 && rank <= 6 && shape[first] == 2;
    if (known && long_form) known = shape[first + 1] == 1 && shape[first + 3] == 1;
    if (!known) {
      Fail("ValueError", op, "rotary_embs", "expected shape [2, 1, max_seq, 1, columns] or [2, ",
           "max_seq, columns], or for tables of their own [sequences, 2, 1, max_seq, 1, columns] ",
           "or [sequences, 2, max_seq, columns], got ", ShapeText(shape));
    }
    tables = first == 0 ? -1 : shape[0];
    positions = shape[first + (long_form ? 2 : 1)];
    columns = shape.back();
  }
};

}  // namespace

void RequireEqualDims(const char* op, const PagedCache& cache) {
  if (HeadDims::Has(cache.head_dim)) return;
  Fail("NotImplementedError", op, "key_cache", "head_dim ", cache.head_dim,
       " is not supported here; supported: ", HeadDims::Text(), "; write_cache_kv takes it");
}

int64_t FusedHeadDim(const Tensor& qkv, int num_heads, int num_kv_heads) {
  const int64_t heads = num_heads + 2LL * num_kv_heads;
  if (qkv.dims().size() != 2 || heads <= 0 || qkv.dims()[1] % heads != 0) return 0;
  return qkv.dims()[1] / heads;
}

void ParseQkv(const char* op, const Tensor& qkv, int num_heads, int num_kv_heads,
              RopeWriteCacheParams& p) {
  const Arg arg(op, "qkv", qkv);
  arg.Dtype({phi::DataType::BFLOAT16, phi::DataType::FLOAT16}).Rank(2).LastDimContiguous();
  if (num_heads <= 0) Fail("ValueError", op, "num_heads", "expected at least 1, got ", num_heads);
  if (num_kv_heads != p.cache.num_kv_heads) {
    Fail("ValueError", op, "num_kv_heads", "key_cache holds ", p.cache.num_kv_heads,
         " KV heads, got ", num_kv_heads);
  }
  if (num_heads % num_kv_heads != 0) {
    Fail("ValueError", op, "num_heads", "expected a multiple of num_kv_heads = ", num_kv_heads,
         ", got ", num_heads);
  }
  const int64_t width = (num_heads + 2LL * num_kv_heads) * p.cache.head_dim;
  arg.Dims({-1, width});
  if (p.cache.type == CacheType::kNone && qkv.dtype() != phi::DataType::BFLOAT16 &&
      p.cache.dtype == DType::kBFloat16) {
    Fail("TypeError", op, "qkv", "expected the dtype of key_cache, bfloat16, got ", qkv.dtype());
  }
  if (p.cache.type == CacheType::kNone && qkv.dtype() != phi::DataType::FLOAT16 &&
      p.cache.dtype == DType::kFloat16) {
    Fail("TypeError", op, "qkv", "expected the dtype of key_cache, float16, got ", qkv.dtype());
  }
  p.num_heads = num_heads;
  p.dtype = ToDType(op, "qkv", qkv.dtype());
  p.qkv = Data(qkv);
  p.qkv_stride = StridesOf(qkv)[0];
}

// A per-channel parameter of any floating point type, or null.
const void* ParseVector(const char* op, const char* name, const Tensor* tensor, int64_t size,
                        const phi::Place& place, DType& dtype) {
  if (tensor == nullptr) return nullptr;
  Arg(op, name, *tensor).On(place).Dtype(kFloats).Dims({size}).Contiguous();
  dtype = ToDType(op, name, tensor->dtype());
  return Data(*tensor);
}

void ParseRotary(const char* op, const Tensor* table, bool neox, int rotary_dim,
                 const phi::Place& place, RopeWriteCacheParams& p) {
  const int head_dim = p.cache.head_dim;
  if (rotary_dim == -1) rotary_dim = head_dim;
  if (rotary_dim <= 0 || rotary_dim > head_dim || rotary_dim % 2 != 0) {
    Fail("ValueError", op, "rotary_dim", "expected an even number in [2, ", head_dim,
         "] (head_dim), got ", rotary_dim);
  }
  if (table == nullptr) return;
  Arg arg(op, "rotary_embs", *table);
  arg.On(place).Dtype({phi::DataType::FLOAT32}).Contiguous();
  const RotaryShape shape(op, SizesOf(*table));
  const int64_t columns = shape.columns;
  if (columns != rotary_dim && columns != rotary_dim / 2) {
    Fail("ValueError", op, "rotary_embs", "expected ", rotary_dim / 2, " or ", rotary_dim,
         " columns for rotary_dim ", rotary_dim, ", got shape ", ShapeText(SizesOf(*table)));
  }
  if (shape.tables >= 0 && shape.tables < p.seqs.batch) {
    Fail("ValueError", op, "rotary_embs", "expected a table for each of the ", p.seqs.batch,
         " sequences of the step, got shape ", ShapeText(SizesOf(*table)));
  }
  if (shape.positions == 0) {
    Fail("ValueError", op, "rotary_embs", "expected at least 1 position, got 0");
  }
  const int64_t table_size = shape.positions * columns;
  p.style = neox ? RotaryStyle::kNeox : RotaryStyle::kInterleaved;
  p.rotary_dim = rotary_dim;
  p.rotary_step = !neox && columns == rotary_dim ? 2 : 1;
  p.rotary_stride = static_cast<uint32_t>(columns);
  p.rotary_seq_stride = shape.tables < 0 ? 0 : 2 * table_size;
  p.last_position = static_cast<uint32_t>(std::min<int64_t>(shape.positions - 1, UINT32_MAX));
  if (table->numel() == 0) return;  // no sequences
  p.cos = Data<float>(*table);
  p.sin = p.cos + table_size;
}

float ParseEps(const char* op, float rms_norm_eps) {
  if (!std::isfinite(rms_norm_eps) || rms_norm_eps < 0) {
    Fail("ValueError", op, "rms_norm_eps", "expected a finite number of at least 0, got ",
         rms_norm_eps);
  }
  return rms_norm_eps;
}

}  // namespace fastattn::api
