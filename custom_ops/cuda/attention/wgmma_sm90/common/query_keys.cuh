// Which keys a query of a work tile sees, and which all of them see.
#pragma once

#include "common/visible_keys.h"
#include "cuda/attention/shared/forms.cuh"
#include "cuda/attention/wgmma_sm90/common/work_tile.h"

namespace fastattn::cuda::wgmma_sm90 {

// First key that query i sees, and the one after its last.
__device__ inline int2 QueryKeys(const AttentionParams& p, const volatile WorkTile& tile, int i) {
  // Out-of-range query rows use k_len as their bound: they ask for no mask of their own, but a NaN
  // past it would poison the row max.
  if (i >= tile.queries) return make_int2(0, tile.k_len);
  const int position = tile.position + i;
  int begin = 0, end = tile.k_len;
  end = VisibleEnd<Sm90Form>(p, position, end);
  begin = VisibleBegin<Sm90Form>(p, position, begin);
  if (p.mask_offsets != nullptr) {
    const int* mask = p.mask_offsets + 2 * static_cast<int64_t>(tile.token + i);
    begin = max(begin, min(mask[0], kMaxKeys));
    end = min(end, max(mask[1], 0));
  }
  return make_int2(begin, max(begin, end));
}

// Sets the KV tiles of a work tile whose queries and k_len are known. Called by a whole warp.
template <class C>
__device__ void SetKvTiles(const AttentionParams& p, WorkTile* tile, int lane) {
  // VisibleBegin() and VisibleEnd() for the first and the last query, each mask for both at once:
  // as calls of those this was measured to be other code.
  const int first = tile->position, final = first + tile->queries - 1;
  int begin = 0, end = tile->k_len;
  int unmasked_begin = 0, unmasked_end = end;
  if (p.causal) {
    end = min(end, final + 1);
    unmasked_end = min(unmasked_end, first + 1);
  }
  if (p.window_right >= 0) {
    const int right = Sm90Form::Right(p.window_right);
    end = min(end, final + right);
    unmasked_end = min(unmasked_end, first + right);
  }
  if (p.window_left >= 0) {
    const int left = Sm90Form::Left(p.window_left);
    begin = max(begin, first - left);
    unmasked_begin = max(0, final - left);
  }
  if (p.mask_offsets != nullptr) {
    int least = kMaxCachedKeys, most = 0;  // may be cut: the queries' own ranges mask
    int last_begin = 0, first_end = kMaxCachedKeys;
#pragma unroll 1
    for (int i = lane; i < tile->queries; i += 32) {
      const int64_t token = tile->token + i;
      const int mask_begin = p.mask_offsets[2 * token], mask_end = p.mask_offsets[2 * token + 1];
      least = min(least, mask_begin);
      most = max(most, mask_end);
      last_begin = max(last_begin, mask_begin);
      first_end = min(first_end, mask_end);
    }
    begin = max(begin, __reduce_min_sync(~0u, least));
    end = min(end, __reduce_max_sync(~0u, most));
    unmasked_begin = max(unmasked_begin, __reduce_max_sync(~0u, last_begin));
    unmasked_end = min(unmasked_end, __reduce_min_sync(~0u, first_end));
  }
  if (lane != 0) return;
  // Without a visible key, one iteration finds that out.
  const bool empty = end <= begin;
  tile->kv_tiles = empty ? 1 : (end + C::kKeys - 1) / C::kKeys - begin / C::kKeys;
  tile->last_kv_tile = empty ? 0 : (end - 1) / C::kKeys;
  tile->unmasked_begin = unmasked_begin;
  tile->unmasked_end = unmasked_end;
}

}  // namespace fastattn::cuda::wgmma_sm90
