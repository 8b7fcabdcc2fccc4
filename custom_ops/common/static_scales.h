// Which scale of a static scale tensor belongs to a channel of a KV head.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

// Of scales of heads or of the tensor.
FASTATTN_HD constexpr int64_t HeadScaleIndex(ScaleGranularity granularity, int64_t kv_head) {
  return granularity == ScaleGranularity::kHead ? kv_head : 0;
}

// Of scales of channels.
FASTATTN_HD constexpr int64_t ChannelScaleIndex(int64_t kv_head, int64_t channel,
                                                int64_t head_dim) {
  return kv_head * head_dim + channel;
}

FASTATTN_HD constexpr int64_t StaticScaleIndex(ScaleGranularity granularity, int64_t kv_head,
                                               int64_t channel, int64_t head_dim) {
  return granularity == ScaleGranularity::kChannel ? ChannelScaleIndex(kv_head, channel, head_dim)
                                                   : HeadScaleIndex(granularity, kv_head);
}

}  // namespace fastattn
