// Moves and operations on bits.
#include <algorithm>

#include "lanes.h"

namespace virtual_gpu {

namespace {

template <typename F>
Handler Bitwise(F) {
  return [](Warp& warp, const Instruction& in, uint32_t lanes) {
    const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
    Results d(warp, in.operands[0]);
    ForLanes(lanes, [&](int i) { d.Bits(i, Narrow(in.type.bits, F{}(a[i], b[i]))); });
    return Outcome::kNext;
  };
}

template <typename F>
Handler Unary(F) {
  return [](Warp& warp, const Instruction& in, uint32_t lanes) {
    const Values a(warp, in.operands[1], lanes);
    Results d(warp, in.operands[0]);
    ForLanes(lanes, [&](int i) { d.Bits(i, F{}(in, Narrow(in.type.bits, a[i]))); });
    return Outcome::kNext;
  };
}

Outcome Move(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Operand& to = in.operands[0];
  const Operand& from = in.operands[1];
  if (to.kind == Kind::kVector) {
    const int bits = in.type.bits / static_cast<int>(to.parts.size());
    ForLanes(lanes, [&](int i) {
      const uint64_t value = warp.Get(from, i);
      for (size_t k = 0; k < to.parts.size(); ++k) {
        warp.Set(to.parts[k], i, Narrow(bits, value >> (k * bits)));
      }
    });
  } else if (from.kind == Kind::kVector) {
    const int bits = in.type.bits / static_cast<int>(from.parts.size());
    ForLanes(lanes, [&](int i) {
      uint64_t value = 0;
      for (size_t k = 0; k < from.parts.size(); ++k) {
        value |= Narrow(bits, warp.Get(from.parts[k], i)) << (k * bits);
      }
      warp.Set(to, i, value);
    });
  } else {
    const Values a(warp, from, lanes);
    Results d(warp, to);
    ForLanes(lanes, [&](int i) { d.Bits(i, Narrow(in.type.bits, a[i])); });
  }
  return Outcome::kNext;
}

Outcome Shift(Warp& warp, const Instruction& in, uint32_t lanes) {
  const bool left = in.words[0] == "shl";
  const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
  Results d(warp, in.operands[0]);
  ForLanes(lanes, [&](int i) {
    const uint64_t by = std::min<uint64_t>(b.As<uint32_t>(i), in.type.bits);
    uint64_t value = 0;
    if (left) {
      value = by >= 64 ? 0 : Narrow(in.type.bits, a[i]) << by;
    } else if (in.type.kind == 's') {
      value = static_cast<uint64_t>(Extend(in.type, a[i]) >> std::min<uint64_t>(by, 63));
    } else {
      value = by >= 64 ? 0 : Narrow(in.type.bits, a[i]) >> by;
    }
    d.Bits(i, Narrow(in.type.bits, value));
  });
  return Outcome::kNext;
}

// shf.{l,r}.{wrap,clamp}: the words b:a as one.
Outcome Funnel(Warp& warp, const Instruction& in, uint32_t lanes) {
  const bool left = in.words[1] == "l", wrap = in.words[2] == "wrap";
  const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
  const Values c(warp, in.operands[3], lanes);
  Results d(warp, in.operands[0]);
  ForLanes(lanes, [&](int i) {
    const uint64_t both = Narrow(32, b[i]) << 32 | Narrow(32, a[i]);
    const uint32_t by = wrap ? c.As<uint32_t>(i) & 31 : std::min(c.As<uint32_t>(i), 32u);
    d.Bits(i, Narrow(32, left ? (both << by) >> 32 : both >> by));
  });
  return Outcome::kNext;
}

uint32_t Permute(uint64_t both, uint32_t selector) {
  uint32_t value = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t pick = selector >> (4 * k) & 15;
    const auto byte = static_cast<uint8_t>(both >> (8 * (pick & 7)));
    const uint32_t out = (pick & 8) == 0 ? byte : (byte & 0x80) != 0 ? 0xFF : 0;
    value |= out << (8 * k);
  }
  return value;
}

Outcome PermuteBytes(Warp& warp, const Instruction& in, uint32_t lanes) {
  if (in.words.size() != 2) throw std::runtime_error("a mode of prmt");
  const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
  const Values c(warp, in.operands[3], lanes);
  Results d(warp, in.operands[0]);
  ForLanes(lanes, [&](int i) {
    d.Bits(i, Permute(Narrow(32, b[i]) << 32 | Narrow(32, a[i]), c.As<uint32_t>(i)));
  });
  return Outcome::kNext;
}

Outcome Lop3(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
  const Values c(warp, in.operands[3], lanes);
  const auto table = static_cast<uint32_t>(in.operands[4].value);
  Results d(warp, in.operands[0]);
  ForLanes(lanes, [&](int i) {
    const auto x = a.As<uint32_t>(i), y = b.As<uint32_t>(i), z = c.As<uint32_t>(i);
    uint32_t value = 0;
    for (uint32_t k = 0; k < 8; ++k) {
      if ((table >> k & 1) == 0) continue;
      value |= ((k & 4) != 0 ? x : ~x) & ((k & 2) != 0 ? y : ~y) & ((k & 1) != 0 ? z : ~z);
    }
    d.Bits(i, value);
  });
  return Outcome::kNext;
}

// bfe d, a, start, length; the sign of signed types is that of the field.
Outcome Extract(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
  const Values c(warp, in.operands[3], lanes);
  Results d(warp, in.operands[0]);
  ForLanes(lanes, [&](int i) {
    const auto start = static_cast<int>(b[i] & 255), length = static_cast<int>(c[i] & 255);
    const int bits = in.type.bits;
    uint64_t value = Narrow(bits, a[i]);
    const uint64_t sign = in.type.kind != 's' || length == 0
                              ? 0
                              : value >> std::min(start + length - 1, bits - 1) & 1;
    value = start >= bits ? 0 : value >> start;
    const int kept = std::min(length, std::max(0, bits - start));
    value = Narrow(kept, value);
    if (sign != 0 && kept < bits) value |= ~uint64_t{0} << kept;
    d.Bits(i, Narrow(bits, value));
  });
  return Outcome::kNext;
}

// bfi d, a, b, start, length: a's low bits into b.
Outcome Insert(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
  const Values c(warp, in.operands[3], lanes), e(warp, in.operands[4], lanes);
  Results d(warp, in.operands[0]);
  ForLanes(lanes, [&](int i) {
    const auto start = static_cast<int>(c[i] & 255), length = static_cast<int>(e[i] & 255);
    const uint64_t mask = start >= 64 ? 0 : Narrow(length, ~uint64_t{0}) << start;
    const uint64_t value = start >= 64 ? 0 : a[i] << start;
    d.Bits(i, Narrow(in.type.bits, (b[i] & ~mask) | (value & mask)));
  });
  return Outcome::kNext;
}

// The highest bit that differs from the sign; .shiftamt: how far it is from the top.
uint64_t HighestBit(const Instruction& in, uint64_t value) {
  if (in.type.kind == 's' && (value >> (in.type.bits - 1) & 1) != 0) {
    value = Narrow(in.type.bits, ~value);
  }
  if (value == 0) return 0xFFFFFFFF;
  const int place = 63 - __builtin_clzll(value);
  return in.Has("shiftamt") ? in.type.bits - 1 - place : place;
}

uint64_t Reverse(const Instruction& in, uint64_t value) {
  uint64_t out = 0;
  for (int k = 0; k < in.type.bits; ++k) out |= (value >> k & 1) << (in.type.bits - 1 - k);
  return out;
}

}  // namespace

Handler FindBits(Instruction& in) {
  const std::string& op = in.words[0];
  if (op == "mov") return Move;
  if (op == "and") return Bitwise([](uint64_t a, uint64_t b) { return a & b; });
  if (op == "or") return Bitwise([](uint64_t a, uint64_t b) { return a | b; });
  if (op == "xor") return Bitwise([](uint64_t a, uint64_t b) { return a ^ b; });
  if (op == "not") {
    return Unary([](const Instruction& it, uint64_t a) { return Narrow(it.type.bits, ~a); });
  }
  if (op == "cnot") return Unary([](const Instruction&, uint64_t a) { return uint64_t{a == 0}; });
  if (op == "popc") {
    return Unary([](const Instruction&, uint64_t a) { return uint64_t(__builtin_popcountll(a)); });
  }
  if (op == "clz") {
    return Unary([](const Instruction& it, uint64_t a) {
      return a == 0 ? it.type.bits : uint64_t(__builtin_clzll(a)) - (64 - it.type.bits);
    });
  }
  if (op == "brev") return Unary([](const Instruction& it, uint64_t a) { return Reverse(it, a); });
  if (op == "bfind")
    return Unary([](const Instruction& it, uint64_t a) { return HighestBit(it, a); });
  if (op == "shl" || op == "shr") return Shift;
  if (op == "shf") return Funnel;
  if (op == "prmt") return PermuteBytes;
  if (op == "lop3") return Lop3;
  if (op == "bfe") return Extract;
  if (op == "bfi") return Insert;
  return nullptr;
}

}  // namespace virtual_gpu
