// Which bytes a regularly strided view of memory covers, and whether two views share any.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastattn {

// Elements at `begin` plus any sum of i * stride of a dimension, i in [0, size). Dimensions may be
// added in any order.
class StridedView {
 public:
  static constexpr int kMaxRank = 10;

  StridedView(uintptr_t begin, int64_t element_bytes) : begin_(static_cast<int64_t>(begin)) {
    if (element_bytes > 1) Insert({element_bytes, 1});
  }

  // stride: in bytes.
  void Add(int64_t size, int64_t stride) {
    empty_ |= size <= 0;
    if (size <= 1) return;
    if (stride < 0) {
      begin_ += (size - 1) * stride;
      stride = -stride;
    }
    if (stride == 0 || rank_ == kMaxRank) {
      repeats_ = true;
    } else {
      Insert({size, stride});
    }
  }

  // Whether some bytes may belong to two elements. Never wrong where it says no; views whose
  // dimensions do not lie inside each other count as such.
  bool RepeatsItself() const {
    bool repeats = repeats_;
    int64_t extent = 1;
    for (int i = rank_; i-- > 0;) {
      repeats |= levels_[i].stride < extent;
      extent += (levels_[i].size - 1) * levels_[i].stride;
    }
    return repeats && !empty_;
  }

  // Whether the views may share a byte. Never wrong where it says no, and exact for views that are
  // interleaved at the same strides, such as the K and the V of one pool.
  friend bool MayOverlap(const StridedView& a, const StridedView& b) {
    return !a.empty_ && !b.empty_ && Overlap(a.Inner(), b.Inner(), b.begin_ - a.begin_);
  }

 private:
  struct Level {
    int64_t size;
    int64_t stride;
  };

  // The levels of a view from one of them on, the largest stride first.
  struct Levels {
    const Level* first;
    const Level* end;

    int64_t Extent() const {
      int64_t extent = 1;
      for (const Level* level = first; level != end; ++level) {
        extent += (level->size - 1) * level->stride;
      }
      return extent;
    }
    int64_t Stride() const { return first == end ? 1 : first->stride; }
  };

  Levels Inner() const { return {levels_, levels_ + rank_}; }

  void Insert(Level level) {
    int i = rank_++;
    for (; i > 0 && levels_[i - 1].stride < level.stride; --i) levels_[i] = levels_[i - 1];
    levels_[i] = level;
  }

  // Whether a at 0 and b at `distance` may share a byte.
  static bool Overlap(Levels a, Levels b, int64_t distance) {
    if (distance >= a.Extent() || -distance >= b.Extent()) return false;
    const int64_t stride = std::max(a.Stride(), b.Stride());
    if (stride == 1) return true;
    // Entry i of a and entry j of b are `distance` + (j - i) * stride apart.
    int64_t a_last = 0, b_last = 0;
    if (a.Stride() == stride) a_last = (a.first++)->size - 1;
    if (b.Stride() == stride) b_last = (b.first++)->size - 1;
    // Entries may meet where -b's extent < distance + q * stride < a's extent.
    const int64_t low = std::max(-a_last, CeilDiv(1 - b.Extent() - distance, stride));
    const int64_t high = std::min(b_last, FloorDiv(a.Extent() - 1 - distance, stride));
    if (high - low >= kMostPairs) return true;
    for (int64_t q = low; q <= high; ++q) {
      if (Overlap(a, b, distance + q * stride)) return true;
    }
    return false;
  }

  static int64_t FloorDiv(int64_t x, int64_t y) { return x / y - (x % y < 0); }
  static int64_t CeilDiv(int64_t x, int64_t y) { return -FloorDiv(-x, y); }

  // Nested views have fewer neighbouring entries that may meet.
  static constexpr int64_t kMostPairs = 4;

  int64_t begin_;
  int rank_ = 0;
  bool empty_ = false;
  bool repeats_ = false;
  Level levels_[kMaxRank];
};

}  // namespace fastattn
