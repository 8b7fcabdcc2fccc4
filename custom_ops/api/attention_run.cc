#include "api/attention_run.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <exception>
#include <iterator>
#include <limits>

#include "api/paged_cache.h"
#include "api/quantize_query.h"
#include "api/query_transform.h"
#include "cpu/attention.h"
#include "cpu/quantize_query.h"
#include "cpu/query_transform.h"
#include "cpu/rope_write_cache.h"
#if defined(FASTATTN_WITH_CUDA)
#include "api/device.h"
#include "api/refused_bytes.h"
#include "cuda/attention/dequantize_kv/launch.h"
#include "cuda/attention/launch.h"
#include "cuda/attention/quantize_q/launch.h"
#include "cuda/attention/query_transform/launch.h"
#include "cuda/cache/rope_write/launch.h"
#include "cuda/host_calls/launch.h"
#include "plan/attention.h"
#include "plan/rope_write.h"
#endif

namespace fastattn::api {

#if defined(FASTATTN_WITH_CUDA)

namespace {

// What the kernels ask of addresses and strides: they read and write four channels at once.
void CheckForGpu(const char* op, const AttentionParams& p) {
  if (p.q_dtype == DType::kFloat32) {
    Fail("NotImplementedError", op, "q", "float32 queries have no CUDA kernel in this build");
  }
  RequireFits(op, "q", static_cast<int64_t>(p.seqs.num_tokens) * p.num_heads);
  const int64_t piece = 4 * SizeOf(p.q_dtype);
  if (p.q_token_stride % 4 != 0 || p.q_head_stride % 4 != 0 ||
      reinterpret_cast<uintptr_t>(p.q) % piece != 0) {
    Fail("ValueError", op, "q", "expected strides of a multiple of 4 elements and an address of a ",
         "multiple of ", piece, " bytes on a GPU, got strides ", p.q_token_stride, " and ",
         p.q_head_stride);
  }
  const int64_t out_piece = 4 * SizeOf(p.out_dtype);
  if (reinterpret_cast<uintptr_t>(p.out) % out_piece != 0) {
    Fail("ValueError", op, "out", "expected an address of a multiple of ", out_piece,
         " bytes on a GPU");
  }
  if (p.paged) RequireAlignedCache(op, p.cache);
}

// What fastattn_limit_dequantized() set.
std::atomic<int64_t> dequantized_bytes{kDequantizedBytes};
std::atomic<double> dequantized_operations{kDequantizedOperations};

// What the allocator of a device did not have. Devices from the last on share one.
RefusedBytes& RefusedOn(const phi::Place& place) {
  static RefusedBytes devices[64];
  const int last = static_cast<int>(std::size(devices)) - 1;
  return devices[std::clamp<int>(place.GetDeviceId(), 0, last)];
}

RefusedBytes::Time Now() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<RefusedBytes::Time>(now);
}

// Memory of 16-bit keys and values; without any left, codes are attended as they are.
Tensor RoomFor(const AttentionParams& p, const phi::Place& place, DequantizePlan* plan) {
  const int64_t bytes = DequantizedBytes(p, *plan);
  if (bytes == 0) return {};
  RefusedBytes& refused = RefusedOn(place);
  if (refused.MayAsk(bytes, Now())) {
    try {
      Tensor room = paddle::empty({bytes}, phi::DataType::UINT8, place);
      refused.Grant(bytes);
      return room;
    } catch (const std::exception&) {
      refused.Refuse(bytes, Now());
    }
  }
  *plan = {};
  return {};
}

// Ints with which the CTAs of the step's attention join partial results without a kernel of its own
// for that: the writer's decode kernel sets them to 0. An attention without a writer has none,
// since only a kernel more could do so. 0 where the step has no use for them.
int64_t CountersOf(const AttentionPlan& plan, const StepWriter* writer, int num_sms) {
  if (writer == nullptr || !plan.MergesInKernel()) return 0;
  const SeqMeta& seqs = writer->params.seqs;
  const bool sets = seqs.num_tokens <= kMaxPlanSeqs && UseDecodeKernel(seqs.num_tokens, seqs.batch);
  return sets ? NumArrivals(int64_t{kAttentionCtasPerSm} * num_sms) : 0;
}

// The workspace and, after it, the counters. `p` and the writer then point to them.
Tensor Scratch(const phi::Place& place, int64_t workspace, int64_t counters, AttentionParams* p,
               StepWriter* writer) {
  constexpr int64_t kAlignment = 64;  // floats: 256 bytes
  if (workspace + counters == 0) return {};
  const int64_t first = (workspace + kAlignment - 1) / kAlignment * kAlignment;
  Tensor scratch = paddle::empty({first + counters}, phi::DataType::FLOAT32, place);
  p->workspace = MutableData<float>(scratch);
  if (counters > 0) {
    p->arrivals = writer->params.arrivals = reinterpret_cast<int*>(p->workspace + first);
    p->num_arrivals = writer->params.num_arrivals = static_cast<int>(counters);
  }
  return scratch;
}

// Tokens of no sequence are cleared by the kernels, as no memory operation is launched beside them.
void RunOnGpu(const char* op, const phi::Place& place, const Tensor& out,
              const QuantizeQueryParams& query, const QueryTransform& transform, AttentionParams* p,
              StepWriter* writer) {
  if (p->out == nullptr) return;  // an empty tensor's strides mean nothing
  CheckForGpu(op, *p);
  const DeviceGuard guard(op, place.GetDeviceId());
  cuda::DeviceFacts facts;
  CheckCuda(op, cuda::GetDeviceFacts(place.GetDeviceId(), &facts));
  int clusters = 0;
  CheckCuda(op, cuda::CountClusters(place.GetDeviceId(), facts, &clusters));
  AttentionDecision decision = DecideAttention(
      *p, {facts.major, facts.processors, clusters, {dequantized_bytes, dequantized_operations}});
  const Tensor scratch = Scratch(place, decision.workspace,
                                 CountersOf(decision.plan, writer, facts.processors), p, writer);
  Tensor dequantized = RoomFor(*p, place, &decision.dequantize);
  DequantizedKv kv;
  if (dequantized.defined()) {
    kv = DequantizedKvAt(MutableData(dequantized), *p, decision.dequantize);
  }
  Guarded(op, [&] {
    const cudaStream_t stream = StreamOf(out);
    if (writer != nullptr) {
      CheckCuda(op, cuda::LaunchRopeWriteCache(writer->params, writer->transform, stream));
    }
    CheckCuda(op, cuda::LaunchTransformQuery(transform.before, stream));
    CheckCuda(op, cuda::LaunchQuantizeQuery(query, stream));
    if (kv.key != nullptr) CheckCuda(op, cuda::LaunchDequantizeKv(*p, kv, stream));
    CheckCuda(op, cuda::LaunchAttention(*p, decision, kv, stream));
    CheckCuda(op, cuda::LaunchShiftScores(transform.after, stream));
    CheckCuda(op, cuda::JoinHostCalls(stream));  // a layer's signal goes out beside its attention
  });
}

}  // namespace

#endif

std::vector<Tensor> RunAttention(const char* op, const AttentionArgs& args, const phi::Place& place,
                                 AttentionParams* p, StepWriter* writer) {
  Tensor out =
      args.out ? *args.out : paddle::empty(OutputShape(args, *p), ToPhi(p->out_dtype), place);
  Tensor lse;  // undefined unless asked for
  if (args.return_softmax_lse) {
    lse = paddle::empty({p->num_heads, p->seqs.num_tokens}, phi::DataType::FLOAT32, place);
    p->lse = MutableData<float>(lse);
  }
  p->out = MutableData(out);
  p->clear_padding = args.out == nullptr;
  QuantizeQueryParams query;  // without tokens where the queries are taken as they are
  Tensor query_codes;
  QueryTransform transform;
  transform.Take(place, args.transform, p);
  if (args.quantize_q) query_codes = TakeQueryCodes(place, p, &query);  // rotated ones
#if defined(FASTATTN_WITH_CUDA)
  if (IsGpu(place)) {
    RunOnGpu(op, place, out, query, transform, p, writer);
    return {out, lse};
  }
#endif
  RequireCpu(op, place);
  if (p->clear_padding && p->out != nullptr) {
    std::memset(p->out, 0, static_cast<size_t>(out.numel()) * SizeOf(p->out_dtype));
  }
  if (p->lse != nullptr) {
    const int64_t count = static_cast<int64_t>(p->num_heads) * p->seqs.num_tokens;
    std::fill(p->lse, p->lse + count, -std::numeric_limits<float>::infinity());
  }
  Guarded(op, [&] {
    if (writer != nullptr) cpu::RopeWriteCache(writer->params, writer->transform);
    if (transform.Prepares()) cpu::TransformQuery(transform.before);
    if (args.quantize_q) cpu::QuantizeQuery(query);
    cpu::Attention(*p);
    if (transform.Finishes()) cpu::ShiftScores(transform.after);
  });
  return {out, lse};
}

}  // namespace fastattn::api

// Bytes that the 16-bit keys and values of a call may take, and operations that it must have for
// them: of the process. Python reads them from the environment (fastattn/env.py).
extern "C" __attribute__((visibility("default"))) void fastattn_limit_dequantized(
    int64_t bytes, double operations) {
#if defined(FASTATTN_WITH_CUDA)
  fastattn::api::dequantized_bytes = bytes;
  fastattn::api::dequantized_operations = operations;
#endif
}
