// A tensor map of the virtual GPU, in the 128 bytes of a CUtensorMap.
#pragma once

#include <cstdint>
#include <cstring>

namespace virtual_gpu {

struct TensorMap {
  static constexpr uint64_t kMagic = 0x70616D726F736E74;
  uint64_t magic;      // kMagic: the bytes are a tensor map
  uint64_t base;       // address in the host's memory
  uint64_t size[5];    // elements, innermost dimension first; 1 beyond the rank
  uint64_t stride[4];  // bytes, of dimensions 1 and up
  uint16_t box[5];     // elements that a copy visits ...
  uint8_t step[5];     // ... of which it takes every step'th
  uint8_t rank;
  uint8_t element_bytes;
  uint8_t swizzle;  // 0 none, 1 2 3: chunks of 16 bytes within 32, 64, 128 bytes
  uint8_t unused[22];
};
static_assert(sizeof(TensorMap) == 128);

// What cuTensorMapEncodeTiled does, with its arguments and the numbers of its enumerations. Returns
// a CUresult: 1 (CUDA_ERROR_INVALID_VALUE) for what that function refuses, 801
// (CUDA_ERROR_NOT_SUPPORTED) for what this machine lacks: interleaved layouts, packed types, other
// swizzles, and NaN for what lies outside.
inline int EncodeTensorMap(void* map, int type, uint32_t rank, void* base, const uint64_t* size,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                           int interleave, int swizzle, int /*promotion*/, int fill) {
  constexpr int kInvalid = 1, kUnsupported = 801;
  constexpr uint8_t kBytes[13] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  if (interleave != 0 || fill != 0 || type < 0 || type >= 13 || swizzle < 0 || swizzle > 3) {
    return kUnsupported;
  }
  TensorMap made{};
  made.magic = TensorMap::kMagic;
  made.base = reinterpret_cast<uintptr_t>(base);
  made.rank = static_cast<uint8_t>(rank);
  made.element_bytes = kBytes[type];
  made.swizzle = static_cast<uint8_t>(swizzle);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || rank < 1 || rank > 5 || made.base % 16 != 0) {
    return kInvalid;
  }
  for (uint32_t i = 0; i < 5; ++i) {
    made.size[i] = made.box[i] = made.step[i] = 1;
    if (i >= rank) continue;
    if (size[i] == 0 || size[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256 ||
        steps[i] == 0 || steps[i] > 8) {
      return kInvalid;
    }
    made.size[i] = size[i];
    made.box[i] = static_cast<uint16_t>(box[i]);
    made.step[i] = i == 0 ? 1 : static_cast<uint8_t>(steps[i]);
    if (i == 0) continue;
    if (strides[i - 1] % 16 != 0 || strides[i - 1] >= uint64_t{1} << 40) return kInvalid;
    made.stride[i - 1] = strides[i - 1];
  }
  const uint32_t row = box[0] * made.element_bytes;
  if (row % 16 != 0 || (swizzle != 0 && row > 16u << swizzle)) return kInvalid;
  std::memcpy(map, &made, sizeof(made));
  return 0;
}

}  // namespace virtual_gpu
