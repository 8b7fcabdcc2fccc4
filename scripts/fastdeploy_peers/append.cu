// The operator append_attention_with_output, with the cache writers that its headers define.

// FD_ENABLE_RL is off: without its half of the writers, which is a matter of the time to build.
#define DISPATCH_BOOL_DTYPE(flag, FLAG, ...) \
  {                                          \
    constexpr bool FLAG = false;             \
    __VA_ARGS__                              \
  }

#include "append_attention.cu"
#include "call.h"

// FastDeploy defines these beside much that no attention needs.
bool getEnvEnablePDL() {
  static const bool on = GetSMVersion() >= 90 && getBoolEnv("FD_ENABLE_PDL");
  return on;
}
bool getEnvEnableRL() { return false; }
bool getEnvDeterministicMode() { return false; }
bool getEnvDeterministicDebug() { return false; }
// Signals to a process that fetches the cache; called only where the environment asks for them.
void CUDART_CB RemoteCacheKvIpc::save_cache_kv_complete_signal_layerwise(void*) {}
void CUDART_CB RemoteCacheKvIpc::save_cache_kv_complete_signal_layerwise_per_query(void*) {}

extern "C" {

struct PeerAppend {
  const char* quant;
  int neox, rope_3d, max_model_len;
  float quant_max, quant_min;
  int encoder_rows, decoder_rows, partition;
};

/// The operator's 37 tensors in its order, among them the output, then what the backend sets.
const char* peer_append_attention(const PeerTensor* tensors, const PeerAppend* set,
                                  const PeerCall* where) {
  return standin::Run(*where, [&] {
    paddle::Tensor in[20];
    paddle::optional<paddle::Tensor> o[17];
    for (int i = 0; i < 20; ++i) in[i] = standin::Given(tensors[i]);
    for (int i = 0; i < 17; ++i) o[i] = standin::GivenOrNone(tensors[20 + i]);
    AppendAttentionWithOutput(
        in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], in[8], in[9], in[10], in[11],
        in[12], in[13], in[14], in[15], in[16], in[17], in[18], in[19], o[0], o[1], o[2], o[3],
        o[4], o[5], o[6], o[7], o[8], o[9], o[10], o[11], o[12], o[13], o[14], o[15], o[16], 1e-6f,
        "bf16", set->quant, set->neox != 0, set->rope_3d != 0, set->max_model_len, set->quant_max,
        set->quant_min, -1.f, set->encoder_rows, set->decoder_rows, set->partition,
        set->max_model_len, 0, true, false, 0, 0);
  });
}
}
