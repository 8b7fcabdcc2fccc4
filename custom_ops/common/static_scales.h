// Which scale of a static scale tensor belongs to a channel of a KV head. Index is int where a
// kernel adds it to an address in 32 bits.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

// Of scales of heads or of the tensor.
template <typename Index>
FASTATTN_HD constexpr Index HeadScaleIndex(bool per_head, Index kv_head) {
  return per_head ? kv_head : 0;
}
template <typename Index>
FASTATTN_HD constexpr Index HeadScaleIndex(ScaleScheme granularity, Index kv_head) {
  return granularity == ScaleScheme::kHead ? kv_head : 0;
}

// Of scales of channels.
template <typename Index>
FASTATTN_HD constexpr Index ChannelScaleIndex(Index kv_head, Index channel, Index head_dim) {
  return kv_head * head_dim + channel;
}

FASTATTN_HD constexpr int64_t StaticScaleIndex(ScaleScheme granularity, int64_t kv_head,
                                               int64_t channel, int64_t head_dim) {
  return granularity == ScaleScheme::kChannel ? ChannelScaleIndex(kv_head, channel, head_dim)
                                              : HeadScaleIndex(granularity, kv_head);
}

}  // namespace fastattn
