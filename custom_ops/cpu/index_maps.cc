#include "cpu/index_maps.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

// Writes a row and returns one past its last index.
template <typename Map>
int64_t WriteRow(const Map& map, int64_t row, bool compact, int64_t columns, int64_t width,
                 int32_t* out) {
  const auto begun = map.Begin(row);
  int64_t end = 0;
  for (int64_t column = 0; column < columns; ++column) {
    const int32_t index = map.At(begun, column);
    if (compact) {
      if (index >= 0) out[end++] = index;
      continue;
    }
    out[column] = index;
    if (index >= 0) end = column + 1;
  }
  std::fill(out + (compact ? end : columns), out + width, kNoIndex);
  return end;
}

template <typename Map>
void WriteRows(const Map& map, const MapOutput& out, bool compact) {
  ParallelFor(out.rows, 4 * out.width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t length =
          WriteRow(map, row, compact, out.columns, out.width, out.indices + row * out.width);
      if (out.lengths != nullptr) out.lengths[row] = static_cast<int32_t>(length);
    }
  });
}

}  // namespace

void RunIndexMap(const TopkToSlotsParams& p, const MapOutput& out, bool compact) {
  WriteRows(p, out, compact);
}

void RunIndexMap(const WindowParams& p, const MapOutput& out, bool compact) {
  WriteRows(p, out, compact);
}

void RunIndexMap(const ShortContextParams& p, const MapOutput& out, bool compact) {
  WriteRows(p, out, compact);
}

void RunIndexMap(const CombineParams& p, const MapOutput& out, bool compact) {
  WriteRows(p, out, compact);
}

void PlaceTopk(const PlaceTopkParams& p, const MapOutput& out) {
  std::vector<int64_t> first_tokens(p.batch_ids == nullptr ? 0 : p.num_slots, -1);
  for (int64_t token = p.batch_ids == nullptr ? 0 : p.num_tokens; token-- > 0;) {
    const int64_t slot = p.batch_ids[token];
    if (slot >= 0 && slot < p.num_slots) first_tokens[slot] = token;
  }
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t slot = row / p.heads;
    const bool known = slot < static_cast<int64_t>(first_tokens.size());
    const int64_t out_row = p.OutRow(row, known ? first_tokens[slot] : -1);
    if (out_row < 0) continue;
    WriteRow(p, row, false, out.columns, out.width, out.indices + out_row * out.width);
  }
}

}  // namespace fastattn::cpu
