// What tests/cache/test_strided_views.py calls.
#include "common/strided_view.h"

#include <cstdint>

#include "params/block_planes.h"

namespace {

fastattn::StridedView View(int64_t begin, int64_t element, const int64_t* dims, int rank) {
  fastattn::StridedView view(static_cast<uintptr_t>(begin), element);
  for (int i = 0; i < rank; ++i) view.Add(dims[2 * i], dims[2 * i + 1]);
  return view;
}

}  // namespace

extern "C" {

// dims: (size, stride in bytes) of each dimension.
int may_overlap(int64_t a_begin, const int64_t* a_dims, int a_rank, int64_t b_begin,
                const int64_t* b_dims, int b_rank, int64_t element) {
  return MayOverlap(View(a_begin, element, a_dims, a_rank), View(b_begin, element, b_dims, b_rank));
}

int repeats_itself(int64_t begin, const int64_t* dims, int rank, int64_t element) {
  return View(begin, element, dims, rank).RepeatsItself();
}

// result: stride in bytes, the number of plane (block, head), the size of the dimension.
int find_plane(const int64_t* strides, int num_blocks, int kv_heads, int element, int block,
               int head, int64_t* result) {
  const fastattn::CacheStrides cache{strides[0], strides[1], strides[2]};
  const auto planes = fastattn::PlanesOf(cache, num_blocks, kv_heads, element);
  result[0] = static_cast<int64_t>(planes.stride);
  result[1] = planes.planes.Of(block, head);
  result[2] = planes.planes.outside;
  return planes.fits;
}
}
