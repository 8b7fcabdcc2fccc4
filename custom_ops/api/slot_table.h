// Checking of the block tables that lead from tokens to slots of a cache.
#pragma once

#include "api/check.h"
#include "api/paged_cache.h"
#include "params/index_maps.h"

namespace fastattn::api {

// Start of the data of an optional argument that is given, which null would not say. Nothing is
// read of an empty one.
template <typename T>
const T* GivenData(const Tensor& tensor) {
  static const T nothing{};
  return tensor.numel() == 0 ? &nothing : Data<T>(tensor);
}

// A negative `num_blocks` leaves open how many there are. The caller has checked block_size.
inline SlotTable ParseSlotTable(const char* op, const Tensor& tables, const phi::Place& place,
                                int64_t block_size, int64_t num_blocks) {
  Arg(op, "block_tables", tables).On(place).Dtype({phi::DataType::INT32}).Rank(2).Contiguous();
  const Sizes shape = SizesOf(tables);
  for (int64_t size : shape) RequireFits(op, "block_tables", size);
  SlotTable slots;
  slots.tables = GivenData<int32_t>(tables);
  slots.batch = static_cast<int32_t>(shape[0]);
  slots.max_blocks = static_cast<int32_t>(shape[1]);
  slots.block_size = static_cast<int32_t>(block_size);
  slots.block_stride = block_size;
  slots.num_blocks = num_blocks < 0 ? kLargestIndex + 1 : num_blocks;
  return slots;
}

}  // namespace fastattn::api
