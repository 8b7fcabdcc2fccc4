// The operator get_block_shape_and_split_kv_block, which prepares a step for all of its layers.

#include "append_attn/get_block_shape_and_split_kv_block.cu"
#include "call.h"

/// The operator's 15 tensors in its order.
extern "C" const char* peer_split_blocks(const PeerTensor* tensors, int encoder_rows,
                                         int decoder_rows, int group_size, const PeerCall* where) {
  return standin::Run(*where, [&] {
    paddle::Tensor t[15];
    for (int i = 0; i < 15; ++i) t[i] = standin::Given(tensors[i]);
    GetBlockShapeAndSplitKVBlock(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10],
                                 t[11], t[12], t[13], t[14], encoder_rows, decoder_rows, group_size,
                                 64);
  });
}
