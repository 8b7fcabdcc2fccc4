#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/index_array.h"
#include "api/indexer_quant.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/rotation.h"
#include "cpu/indexer.h"
#include "params/indexer.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/indexer/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kQOp = "indexer_q_rope_quant";
constexpr const char* kQuantOp = "indexer_q_quant";
constexpr const char* kKvOp = "indexer_kv_compress_insert";

const std::initializer_list<phi::DataType> kFloatDtypes = {phi::DataType::FLOAT32,
                                                           phi::DataType::BFLOAT16};

// [T, H, 128] of q to the shapes of codes, scales and weights.
std::vector<Shape> QueryShapes(const Shape& q, const std::string& quant) {
  if (q.size() != 3) Fail("ValueError", kQOp, "q", "expected 3 dimensions, got ", ShapeText(q));
  const int bytes = PageFormatOf(ParseIndexerQuant(kQOp, quant)).code_bytes;
  return {{q[0], q[1], bytes}, {q[0], q[1]}, {q[0], q[1]}};
}

phi::DataType QueryScaleDtype(const std::string& quant) {
  return quant == "fp8" ? phi::DataType::FLOAT32 : phi::DataType::INT32;
}

// Checks the page tensor [num_pages, ...bytes] and sets the page fields.
void SetPages(const Tensor& kv_cache, const phi::Place& place, int page_size,
              IndexerKvParams* params) {
  Arg(kKvOp, "kv_cache", kv_cache).On(place).Dtype({phi::DataType::UINT8}).Contiguous();
  const Shape shape = kv_cache.shape();
  if (shape.size() < 2) {
    Fail("ValueError", kKvOp, "kv_cache", "expected [num_pages, page_bytes], got shape ",
         ShapeText(shape));
  }
  if (page_size <= 0) {
    Fail("ValueError", kKvOp, "page_size", "expected a positive number of tokens, got ", page_size);
  }
  const IndexerPageFormat format = PageFormatOf(params->quant);
  const int64_t needed = int64_t{page_size} * (format.code_bytes + format.scale_bytes);
  const int64_t bytes = CheckedProduct(kKvOp, "kv_cache", shape, 1);
  if (bytes < needed || bytes % 4 != 0) {
    Fail("ValueError", kKvOp, "kv_cache", "expected pages of at least ", needed, " bytes (",
         page_size, " tokens of ", format.code_bytes + format.scale_bytes,
         "), a multiple of 4, got shape ", ShapeText(shape));
  }
  params->num_pages = shape[0];
  params->page_size = page_size;
  params->page_stride = bytes;
}

// Checks the state cache [num_blocks, state_block, 2 * SW] and sets its fields.
void SetState(const Tensor& state, const Tensor& block_tables, const phi::Place& place,
              int compress_ratio, IndexerKvParams* params) {
  if (compress_ratio != 4 && compress_ratio != 128) {
    Fail("NotImplementedError", kKvOp, "compress_ratio", "expected 4 or 128, got ", compress_ratio);
  }
  const int head_dim = PageFormatOf(params->quant).head_dim;
  const int64_t width = int64_t{2} * head_dim * (compress_ratio == 4 ? 2 : 1);
  Arg(kKvOp, "state_cache", state).On(place).Dtype(kFloatDtypes).Dims({-1, -1, width}).Contiguous();
  const Shape shape = state.shape();
  if (shape[1] == 0) {
    Fail("ValueError", kKvOp, "state_cache", "expected at least 1 position a block, got shape ",
         ShapeText(shape));
  }
  Arg(kKvOp, "block_tables", block_tables)
      .On(place)
      .Dtype({phi::DataType::INT32})
      .Rank(2)
      .Contiguous();
  for (int64_t size : block_tables.shape()) RequireFits(kKvOp, "block_tables", size);
  params->compress_ratio = compress_ratio;
  params->state = Data(state);
  params->state_dtype = ToDType(kKvOp, "state_cache", state.dtype());
  params->num_state_blocks = shape[0];
  params->state_block = shape[1];
  params->state_block_stride = CheckedProduct(kKvOp, "state_cache", {shape[1], width});
  params->block_tables = Data<int>(block_tables);
  params->batch = static_cast<int>(block_tables.shape()[0]);
  params->max_blocks = static_cast<int>(block_tables.shape()[1]);
}

Results QueryResults(const Known& in) {
  const Shape& q = in["q"].shape;
  const std::string quant = in.Text("quant");
  const std::vector<Shape> shapes = Inferred<std::vector<Shape>>(
      {q, {-1, -1}, in["weights"].shape}, [&] { return QueryShapes(q, quant); });
  return {{"codes", shapes[0], phi::DataType::UINT8},
          {"scales", shapes[1], QueryScaleDtype(quant)},
          {"weights_out", shapes[2], phi::DataType::FLOAT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kQOp, IndexerQRopeQuant, QueryResults,
                  (const Tensor& positions, const Tensor& q, const Tensor& cos_sin_cache,
                   const Tensor& weights, float softmax_scale, float head_scale,
                   const std::string& quant)) {
  CheckCosSin(kQOp, cos_sin_cache);
  const phi::Place place = cos_sin_cache.place();
  Arg(kQOp, "q", q)
      .On(place)
      .Dtype({phi::DataType::BFLOAT16})
      .Dims({-1, -1, kIndexerHeadDim})
      .LastDimContiguous();
  const Shape shape = q.shape();
  RequireFits(kQOp, "q", shape[1]);
  Arg(kQOp, "weights", weights)
      .On(place)
      .Dtype(kFloatDtypes)
      .Dims({shape[0], shape[1]})
      .Contiguous();

  IndexerQParams p;
  p.positions = ToIndexArray(kQOp, "positions", positions, place, shape[0]);
  p.quant = ParseIndexerQuant(kQOp, quant);
  const std::vector<Shape> shapes = QueryShapes(shape, quant);
  Tensor codes = paddle::empty(shapes[0], phi::DataType::UINT8, place);
  Tensor scales = paddle::empty(shapes[1], QueryScaleDtype(quant), place);
  Tensor weights_out = paddle::empty(shapes[2], phi::DataType::FLOAT32, place);
  const Sizes strides = StridesOf(q);
  p.q = Data<uint16_t>(q);
  p.q_token_stride = strides[0];
  p.q_head_stride = strides[1];
  p.cos_sin = Data(cos_sin_cache);
  p.cos_sin_dtype = ToDType(kQOp, "cos_sin_cache", cos_sin_cache.dtype());
  p.max_positions = cos_sin_cache.shape()[0];
  p.weights = Data(weights);
  p.weights_dtype = ToDType(kQOp, "weights", weights.dtype());
  p.codes = MutableData<uint8_t>(codes);
  p.scales = MutableData(scales);
  p.weights_out = MutableData<float>(weights_out);
  p.num_tokens = shape[0];
  p.num_heads = static_cast<int>(shape[1]);
  p.softmax_scale = softmax_scale;
  p.head_scale = head_scale;

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(cos_sin_cache)) {
    LaunchOnGpu(kQOp, cos_sin_cache,
                [&](cudaStream_t stream) { return cuda::LaunchIndexerQRopeQuant(p, stream); });
    return {codes, scales, weights_out};
  }
#endif
  RequireCpu(kQOp, place);
  Guarded(kQOp, [&] { cpu::IndexerQRopeQuant(p); });
  return {codes, scales, weights_out};
}

namespace {

Results QuantResults(const Known& in) {
  const KnownInput &q = in["q"], &map = in["token_of_query"];
  const int64_t queries = map.given() ? map.size(0) : q.size(0), heads = q.size(1);
  return {{"codes", {queries, heads, kIndexerHeadDim}, phi::DataType::UINT8},
          {"weights_out", {queries, heads}, phi::DataType::FLOAT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kQuantOp, IndexerQQuant, QuantResults,
                  (const Strided<Tensor>& q, const Tensor& weights,
                   const OptionalTensor& token_of_query, float factor)) {
  Arg(kQuantOp, "q", q)
      .Dtype({phi::DataType::BFLOAT16})
      .Dims({-1, -1, kIndexerHeadDim})
      .LastDimContiguous();
  const phi::Place place = q.place();
  const Shape shape = q.shape();
  RequireFits(kQuantOp, "q", shape[1]);
  Arg(kQuantOp, "weights", weights)
      .On(place)
      .Dtype(kFloatDtypes)
      .Dims({shape[0], shape[1]})
      .Contiguous();
  IndexerQQuantParams p;
  p.num_tokens = p.num_queries = shape[0];
  if (const Tensor* tokens = Get(token_of_query)) {
    Arg(kQuantOp, "token_of_query", *tokens)
        .On(place)
        .Dtype({phi::DataType::INT32})
        .Rank(1)
        .Contiguous();
    p.token_of_query = Data<int32_t>(*tokens);
    p.num_queries = SizesOf(*tokens)[0];
  }
  CheckedProduct(kQuantOp, "q", {p.num_queries, shape[1], kIndexerHeadDim});
  Tensor codes =
      paddle::empty({p.num_queries, shape[1], kIndexerHeadDim}, phi::DataType::UINT8, place);
  Tensor weights_out = paddle::empty({p.num_queries, shape[1]}, phi::DataType::FLOAT32, place);
  const Sizes strides = StridesOf(q);
  p.q = Data<uint16_t>(q);
  p.q_token_stride = strides[0];
  p.q_head_stride = strides[1];
  p.weights = Data(weights);
  p.weights_dtype = ToDType(kQuantOp, "weights", weights.dtype());
  p.codes = MutableData<uint8_t>(codes);
  p.weights_out = MutableData<float>(weights_out);
  p.num_heads = static_cast<int>(shape[1]);
  p.factor = factor;
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(q)) {
    LaunchOnGpu(kQuantOp, q,
                [&](cudaStream_t stream) { return cuda::LaunchIndexerQQuant(p, stream); });
    return {codes, weights_out};
  }
#endif
  RequireCpu(kQuantOp, place);
  cpu::IndexerQQuant(p);
  return {codes, weights_out};
}

FASTATTN_OPERATOR(void, kKvOp, IndexerKvCompressInsert, NoResults,
                  (const Strided<Tensor>& state_cache, const Tensor& block_tables,
                   const Tensor& batch_id_per_token, const Tensor& positions,
                   const Tensor& state_slots, const Tensor& kv_slots, const Tensor& rms_norm_weight,
                   const Tensor& cos_sin_cache, Tensor& kv_cache, int compress_ratio, int page_size,
                   float rms_norm_eps, const std::string& quant)) {
  CheckCosSin(kKvOp, cos_sin_cache);
  const phi::Place place = cos_sin_cache.place();
  IndexerKvParams p;
  p.quant = ParseIndexerQuant(kKvOp, quant, true);
  SetState(state_cache, block_tables, place, compress_ratio, &p);
  Arg(kKvOp, "batch_id_per_token", batch_id_per_token)
      .On(place)
      .Dtype({phi::DataType::INT32})
      .Rank(1)
      .Contiguous();
  p.num_tokens = batch_id_per_token.shape()[0];
  p.batch_ids = Data<int>(batch_id_per_token);
  p.positions = ToIndexArray(kKvOp, "positions", positions, place, p.num_tokens);
  p.state_slots = ToIndexArray(kKvOp, "state_slots", state_slots, place, p.num_tokens);
  p.kv_slots = ToIndexArray(kKvOp, "kv_slots", kv_slots, place, p.num_tokens);
  Arg(kKvOp, "rms_norm_weight", rms_norm_weight)
      .On(place)
      .Dtype(kFloatDtypes)
      .Dims({PageFormatOf(p.quant).head_dim})
      .Contiguous();
  p.rms_weight = Data(rms_norm_weight);
  p.rms_weight_dtype = ToDType(kKvOp, "rms_norm_weight", rms_norm_weight.dtype());
  p.rms_norm_eps = rms_norm_eps;
  p.cos_sin = Data(cos_sin_cache);
  p.cos_sin_dtype = ToDType(kKvOp, "cos_sin_cache", cos_sin_cache.dtype());
  p.max_positions = cos_sin_cache.shape()[0];
  SetPages(kv_cache, place, page_size, &p);
  p.kv_cache = MutableData<uint8_t>(kv_cache);
  RequireApart(kKvOp, "kv_cache", kv_cache,
               {{"state_cache", &state_cache},
                {"block_tables", &block_tables},
                {"batch_id_per_token", &batch_id_per_token},
                {"positions", &positions},
                {"state_slots", &state_slots},
                {"kv_slots", &kv_slots},
                {"rms_norm_weight", &rms_norm_weight},
                {"cos_sin_cache", &cos_sin_cache}});

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(cos_sin_cache)) {
    LaunchOnGpu(kKvOp, cos_sin_cache, [&](cudaStream_t stream) {
      return cuda::LaunchIndexerKvCompressInsert(p, stream);
    });
    return;
  }
#endif
  RequireCpu(kKvOp, place);
  Guarded(kKvOp, [&] { cpu::IndexerKvCompressInsert(p); });
}

}  // namespace fastattn::api
