#include <algorithm>
#include <utility>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "cpu/merge_decode.h"
#include "params/merge_decode.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/compat/merge_decode/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "merge_prefill_decode_output";

void CheckTokens(const char* name, const Tensor& tensor, int head_num, int head_dim) {
  const int64_t width = CheckedProduct(kOp, "head_num", {head_num, head_dim});
  const Sizes shape = SizesOf(tensor);
  const int64_t tokens = shape.empty() ? -1 : shape[0];
  if (shape != Sizes{tokens, width} && shape != Sizes{tokens, head_num, head_dim}) {
    Fail("ValueError", kOp, name, "expected shape [T, ", width, "] (head_num * head_dim) or [T, ",
         head_num, ", ", head_dim, "], got ", ShapeText(shape));
  }
}

}  // namespace

FASTATTN_OPERATOR(void, kOp, MergePrefillDecodeOutput, NoResults,
                  (Tensor & encoder_res, const Tensor& decoder_res, const Tensor& seq_lens_encoder,
                   const Tensor& seq_lens_decoder, const Tensor& seq_lens_this_time,
                   const Tensor& cu_seq_q, int head_num, int head_dim, int max_token)) {
  for (const auto& [name, value] :
       {std::pair{"head_num", head_num}, {"head_dim", head_dim}, {"max_token", max_token}}) {
    if (value < 1) Fail("ValueError", kOp, name, "expected at least 1, got ", value);
  }
  Arg(kOp, "encoder_res", encoder_res).Contiguous();
  ToDType(kOp, "encoder_res", encoder_res.dtype());
  const phi::Place place = encoder_res.place();
  Arg(kOp, "decoder_res", decoder_res).On(place).Dtype({encoder_res.dtype()}).Contiguous();
  CheckTokens("encoder_res", encoder_res, head_num, head_dim);
  CheckTokens("decoder_res", decoder_res, head_num, head_dim);
  Arg(kOp, "seq_lens_encoder", seq_lens_encoder);
  Arg(kOp, "seq_lens_this_time", seq_lens_this_time);
  const Sizes all = SizesOf(seq_lens_encoder), running = SizesOf(seq_lens_this_time);
  const int64_t slots = all.empty() ? 0 : all[0];
  const int64_t batch = running.empty() ? slots : std::min(running[0], slots);
  RequireFits(kOp, "seq_lens_encoder", slots);
  const int64_t num_tokens = std::min(encoder_res.shape()[0], decoder_res.shape()[0]);
  RequireFits(kOp, "encoder_res", num_tokens);

  const auto lengths = [&](const char* name, const Tensor& tensor, int64_t size) {
    return ParseLengths(kOp, name, tensor, size, place, " (seq_lens_encoder is [B])");
  };
  MergeDecodeParams p;
  p.seq_lens_encoder = lengths("seq_lens_encoder", seq_lens_encoder, slots);
  p.seqs.seq_lens_decoder = lengths("seq_lens_decoder", seq_lens_decoder, slots);
  p.seqs.seq_lens_this_time = lengths("seq_lens_this_time", seq_lens_this_time, batch);
  p.seqs.cu_seqlens_q = lengths("cu_seq_q", cu_seq_q, batch + 1);
  RequireApart(kOp, "encoder_res", encoder_res,
               {{"decoder_res", &decoder_res},
                {"seq_lens_encoder", &seq_lens_encoder},
                {"seq_lens_decoder", &seq_lens_decoder},
                {"seq_lens_this_time", &seq_lens_this_time},
                {"cu_seq_q", &cu_seq_q}});
  p.seqs.batch = static_cast<int>(batch);
  p.seqs.num_tokens = static_cast<int>(num_tokens);
  p.prefill = MutableData(encoder_res);
  p.decode = Data(decoder_res);
  p.row_bytes =
      CheckedProduct(kOp, "head_num",
                     {head_num, head_dim, static_cast<int64_t>(phi::SizeOf(encoder_res.dtype()))});
  if (num_tokens == 0 || batch == 0) return;

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(encoder_res)) {
    LaunchOnGpu(kOp, encoder_res,
                [&](cudaStream_t stream) { return cuda::LaunchMergeDecode(p, stream); });
    return;
  }
#endif
  RequireCpu(kOp, place);
  Guarded(kOp, [&] { cpu::MergeDecode(p); });
}

}  // namespace fastattn::api
