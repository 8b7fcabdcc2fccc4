// Asynchronous copies: cp.async, cp.async.bulk and TMA's boxes of tensors. All end at once.
#include <algorithm>

#include "async.h"
#include "tensor_map.h"

namespace virtual_gpu {

namespace {

constexpr int kChunk = 16;  // bytes: what swizzles move
constexpr uint32_t kOffsetMask = (uint32_t{1} << kRankShift) - 1;

Outcome Nothing(Warp&, const Instruction&, uint32_t) { return Outcome::kNext; }

enum Source { kWhole, kSourceBytes, kIgnored };

// [target], [source], bytes{, bytes to read, or whether to read none}. detail: which of those.
Outcome CopySmall(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) {
    const auto bytes = static_cast<int64_t>(warp.Get(in.operands[2], lane));
    int64_t present = bytes;
    if (in.detail[0] != kWhole) {
      const auto value = static_cast<uint32_t>(warp.Get(in.operands[3], lane));
      if (in.detail[0] == kSourceBytes) present = value;
      if (in.detail[0] == kIgnored && (value & 1) != 0) present = 0;
    }
    if (present > bytes) throw std::runtime_error("cp.async reads more than it writes");
    char* target = warp.Shared(SharedAddressOf(warp, in.operands[0], lane), bytes, bytes);
    if (present > 0) {
      const uint64_t source = warp.Address(in.operands[1], lane);
      std::memcpy(target, warp.Memory(Space::kGlobal, source, present, bytes, lane), present);
    }
    std::memset(target + present, 0, bytes - present);
  });
  return Outcome::kNext;
}

// Calls f with the CTAs of a mask, or with that of an address.
template <typename F>
void ForTargets(const Warp& warp, const Operand* mask, uint32_t address, int lane, F&& f) {
  if (mask == nullptr) return f(address >> kRankShift);
  for (uint64_t ranks = warp.Get(*mask, lane) & 0xFFFF; ranks != 0; ranks &= ranks - 1) {
    f(static_cast<uint32_t>(__builtin_ctzll(ranks)));
  }
}

// Into shared memory: [target], [source], bytes, [mbarrier]{, CTAs}. detail: whether the source is
// global, and whether there are CTAs.
Outcome CopyBulkToShared(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) {
    const auto bytes = static_cast<uint32_t>(warp.Get(in.operands[2], lane));
    const uint32_t target = SharedAddressOf(warp, in.operands[0], lane);
    const uint32_t barrier = SharedAddressOf(warp, in.operands[3], lane);
    if (bytes % kChunk != 0) throw std::runtime_error("a bulk copy of no multiple of 16 bytes");
    const char* source =
        in.detail[0] != 0
            ? warp.Memory(Space::kGlobal, warp.Address(in.operands[1], lane), bytes, kChunk, lane)
            : warp.Shared(SharedAddressOf(warp, in.operands[1], lane), bytes, kChunk);
    const Operand* mask = in.detail[1] != 0 ? &in.operands[4] : nullptr;
    if (mask == nullptr && target >> kRankShift != barrier >> kRankShift) {
      throw std::runtime_error("a bulk copy's mbarrier is in another CTA than its target");
    }
    ForTargets(warp, mask, target, lane, [&](uint32_t rank) {
      const uint32_t cta = rank << kRankShift;
      std::memmove(warp.Shared(cta | (target & kOffsetMask), bytes, kChunk), source, bytes);
      CompleteBytes(warp, cta | (barrier & kOffsetMask), bytes);
    });
  });
  return Outcome::kNext;
}

Outcome CopyBulkToGlobal(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) {
    const auto bytes = static_cast<uint32_t>(warp.Get(in.operands[2], lane));
    if (bytes % kChunk != 0) throw std::runtime_error("a bulk copy of no multiple of 16 bytes");
    const char* source = warp.Shared(SharedAddressOf(warp, in.operands[1], lane), bytes, kChunk);
    const uint64_t target = warp.Address(in.operands[0], lane);
    std::memcpy(warp.Memory(Space::kGlobal, target, bytes, kChunk, lane), source, bytes);
  });
  return Outcome::kNext;
}

// A box of a tensor. Its rows lie one behind the other in shared memory.
class Box {
 public:
  // operand: [map, {coordinates}]
  Box(const Warp& warp, const Operand& operand, int lane) {
    const uint64_t address = warp.Address(operand.parts.at(0), lane);
    const Space space = operand.parts[0].space;
    std::memcpy(&map_, warp.Memory(space, address, sizeof(map_), 1, lane), sizeof(map_));
    if (map_.magic != TensorMap::kMagic) throw std::runtime_error("no tensor map at its address");
    const std::vector<Operand>& parts = operand.parts.at(1).parts;
    if (parts.size() != map_.rank) throw std::runtime_error("a tensor map of another rank");
    for (size_t i = 0; i < parts.size(); ++i) {
      first_[i] = static_cast<int32_t>(warp.Get(parts[i], lane));
    }
    for (int i = 0; i < 5; ++i) count_[i] = (map_.box[i] + map_.step[i] - 1) / map_.step[i];
    row_bytes_ = count_[0] * map_.element_bytes;
    if (map_.swizzle != 0 && row_bytes_ != kChunk << map_.swizzle) {
      throw std::runtime_error("a box that is narrower than its swizzle");
    }
  }

  int64_t bytes() const { return row_bytes_ * count_[1] * count_[2] * count_[3] * count_[4]; }

  // Zeros come from outside of the tensor.
  void Load(const Warp& warp, uint32_t target) const {
    Walk(warp, target, [](char* chunk, char* from, int64_t begin, int64_t end) {
      std::memset(chunk, 0, kChunk);
      if (begin < end) std::memcpy(chunk + begin, from + begin, end - begin);
    });
  }

  void Store(const Warp& warp, uint32_t source) const {
    Walk(warp, source, [](const char* chunk, char* to, int64_t begin, int64_t end) {
      if (begin < end) std::memcpy(to + begin, chunk + begin, end - begin);
    });
  }

 private:
  // f(chunk in shared memory, where it is in the tensor, begin and end of its bytes in the tensor).
  template <typename F>
  void Walk(const Warp& warp, uint32_t shared, F&& f) const {
    if (shared % 128 != 0) throw std::runtime_error("a box is not aligned to 128 bytes");
    int64_t i[5] = {};
    for (i[4] = 0; i[4] < count_[4]; ++i[4]) {
      for (i[3] = 0; i[3] < count_[3]; ++i[3]) {
        for (i[2] = 0; i[2] < count_[2]; ++i[2]) {
          for (i[1] = 0; i[1] < count_[1]; ++i[1]) {
            Row(warp, shared, i, f);
            shared += static_cast<uint32_t>(row_bytes_);
          }
        }
      }
    }
  }

  template <typename F>
  void Row(const Warp& warp, uint32_t shared, const int64_t* i, F&& f) const {
    bool inside = true;
    uint64_t row = map_.base;
    for (int d = 1; d < map_.rank; ++d) {
      const int64_t at = first_[d] + i[d] * map_.step[d];
      inside = inside && at >= 0 && at < static_cast<int64_t>(map_.size[d]);
      row += static_cast<uint64_t>(at) * map_.stride[d - 1];
    }
    row += static_cast<uint64_t>(first_[0] * map_.element_bytes);
    const int64_t begin = std::max<int64_t>(0, -first_[0]) * map_.element_bytes;
    const int64_t end =
        inside ? (static_cast<int64_t>(map_.size[0]) - first_[0]) * map_.element_bytes : begin;
    const uint32_t mask = (1u << map_.swizzle) - 1;
    for (int64_t at = 0; at < row_bytes_; at += kChunk) {
      uint32_t address = shared + static_cast<uint32_t>(at);
      address ^= (address >> 7 & mask) << 4;
      f(warp.Shared(address, kChunk, kChunk), reinterpret_cast<char*>(row + at),
        std::max<int64_t>(begin - at, 0), std::min<int64_t>(end - at, kChunk));
    }
  }

  TensorMap map_;
  int64_t first_[5] = {};
  int64_t count_[5] = {};  // elements of the box
  int64_t row_bytes_ = 0;
};

// [target], [map, {coordinates}], [mbarrier]{, CTAs}. detail: whether there are CTAs.
Outcome LoadBox(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) {
    const Box box(warp, in.operands[1], lane);
    const uint32_t target = SharedAddressOf(warp, in.operands[0], lane);
    const uint32_t barrier = SharedAddressOf(warp, in.operands[2], lane);
    const Operand* mask = in.detail[0] != 0 ? &in.operands[3] : nullptr;
    if (mask == nullptr && target >> kRankShift != barrier >> kRankShift) {
      throw std::runtime_error("a box's mbarrier is in another CTA than its target");
    }
    ForTargets(warp, mask, target, lane, [&](uint32_t rank) {
      const uint32_t cta = rank << kRankShift;
      box.Load(warp, cta | (target & kOffsetMask));
      CompleteBytes(warp, cta | (barrier & kOffsetMask), box.bytes());
    });
  });
  return Outcome::kNext;
}

// [map, {coordinates}], [source]
Outcome StoreBox(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) {
    const Box box(warp, in.operands[0], lane);
    box.Store(warp, SharedAddressOf(warp, in.operands[1], lane));
  });
  return Outcome::kNext;
}

bool IsShared(const std::string& word) { return word.compare(0, 6, "shared") == 0; }

// Words "cp.async.bulk[.tensor.3d]" and behind them target and source.
Handler FindBulk(Instruction& in) {
  if (in.Has("commit_group") || in.Has("wait_group") || in.Has("prefetch")) return Nothing;
  const bool tensor = in.words.size() > 4 && in.words[3] == "tensor";
  const size_t at = tensor ? 5 : 3;
  if (in.words.size() < at + 2) UnknownForm(in);
  const std::string &target = in.words[at], &source = in.words[at + 1];
  const bool multicast = in.Has("multicast::cluster");
  const size_t operands = in.operands.size() - in.Has("L2::cache_hint") - multicast;
  for (const std::string& word : in.words) {
    if (word.compare(0, 6, "im2col") == 0 || word.compare(0, 6, "tile::") == 0 ||
        word == "cp_mask" || word.compare(0, 9, "cta_group") == 0) {
      UnknownForm(in);
    }
  }
  if (target == "global" && IsShared(source) && in.Has("bulk_group")) {
    if (operands != (tensor ? 2 : 3) || multicast) UnknownForm(in);
    return tensor ? StoreBox : CopyBulkToGlobal;
  }
  if (!IsShared(target) || (source != "global" && (tensor || !IsShared(source))) ||
      !in.Has("mbarrier::complete_tx::bytes") || operands != (tensor ? 3 : 4)) {
    UnknownForm(in);
  }
  if (tensor) {
    in.detail[0] = multicast;
    return LoadBox;
  }
  in.detail[0] = source == "global";
  in.detail[1] = multicast;
  return CopyBulkToShared;
}

}  // namespace

Handler FindCopy(Instruction& in) {
  if (in.words.size() < 3 || in.words[1] != "async") UnknownForm(in);
  const std::string& what = in.words[2];
  if (what == "commit_group" || what == "wait_group" || what == "wait_all") return Nothing;
  if (what == "bulk") return FindBulk(in);
  const size_t operands = in.operands.size() - in.Has("L2::cache_hint");
  if ((what != "ca" && what != "cg") || operands < 3 || operands > 4) UnknownForm(in);
  in.detail[0] = kWhole;
  if (operands == 4) {
    // Registers have no types here; compilers name their predicates p.
    const std::string& name = in.operands[3].name;
    const size_t letter = name[0] == '%' ? 1 : 0;
    const bool predicate = in.operands[3].kind == Kind::kRegister && name.size() > letter + 1 &&
                           name[letter] == 'p' && name[letter + 1] >= '0' &&
                           name[letter + 1] <= '9';
    in.detail[0] = predicate || in.operands[3].negated ? kIgnored : kSourceBytes;
  }
  return CopySmall;
}

}  // namespace virtual_gpu
