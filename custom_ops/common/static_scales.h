// Which scale of a static scale tensor belongs to a channel of a KV head.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

FASTATTN_HD constexpr int64_t StaticScaleIndex(ScaleGranularity granularity, int64_t kv_head,
                                               int64_t channel, int64_t head_dim) {
  return granularity == ScaleGranularity::kChannel ? kv_head * head_dim + channel
         : granularity == ScaleGranularity::kHead  ? kv_head
                                                   : 0;
}

}  // namespace fastattn
