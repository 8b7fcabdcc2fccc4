#pragma once

#include "params/index_maps.h"

namespace fastattn::cpu {

// `compact` moves a row's indices to its front, in their order.
void RunIndexMap(const TopkToSlotsParams& p, const MapOutput& out, bool compact);
void RunIndexMap(const WindowParams& p, const MapOutput& out, bool compact);
void RunIndexMap(const ShortContextParams& p, const MapOutput& out, bool compact);
void RunIndexMap(const CombineParams& p, const MapOutput& out, bool compact);

// Writes some rows of `out`, which may have more rows than the map.
void PlaceTopk(const PlaceTopkParams& p, const MapOutput& out);

}  // namespace fastattn::cpu
