// Comparisons, selections and conversions.
#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace virtual_gpu {

namespace {

// eq ne lt le gt ge (lo ls hi hs), with u behind it: true where a number is NaN; num, nan.
template <typename T>
bool Compare(int64_t kind, T a, T b) {
  switch (kind) {
    case 0:
      return a == b;
    case 1:
      return a != b;
    case 2:
      return a < b;
    case 3:
      return a <= b;
    case 4:
      return a > b;
    default:
      return a >= b;
  }
}

int64_t CompareKind(const std::string& word, bool* unordered) {
  static const std::map<std::string, int64_t> kKinds = {
      {"eq", 0}, {"ne", 1}, {"lt", 2}, {"le", 3}, {"gt", 4},  {"ge", 5},
      {"lo", 2}, {"ls", 3}, {"hi", 4}, {"hs", 5}, {"num", 6}, {"nan", 7}};
  std::string stem = word;
  *unordered = word.size() == 3 && word.back() == 'u';
  if (*unordered) stem.pop_back();
  const auto found = kKinds.find(stem);
  if (found == kKinds.end()) throw std::runtime_error("no comparison " + word);
  return found->second;
}

float FloatOf(const Type& type, uint64_t bits) {
  if (type.kind == 'h') return Bf16ToFloat(static_cast<uint16_t>(bits));
  return type.bits == 16 ? HalfToFloat(static_cast<uint16_t>(bits)) : AsFloat(bits);
}

bool Holds(const Instruction& in, uint64_t a, uint64_t b) {
  const Type& type = in.source;
  const int64_t kind = in.detail[0];
  if (type.kind == 'f' || type.kind == 'h') {
    double x = 0, y = 0;
    if (type.bits == 64) {
      std::memcpy(&x, &a, 8);
      std::memcpy(&y, &b, 8);
    } else {
      x = FloatOf(type, a), y = FloatOf(type, b);
      if (in.detail[2] != 0) x = Flush(static_cast<float>(x)), y = Flush(static_cast<float>(y));
    }
    const bool nan = std::isnan(x) || std::isnan(y);
    if (kind == 6) return !nan;
    if (kind == 7) return nan;
    return nan ? in.detail[1] != 0 : Compare(kind, x, y);
  }
  if (type.kind == 's') return Compare(kind, Extend(type, a), Extend(type, b));
  return Compare(kind, Narrow(type.bits, a), Narrow(type.bits, b));
}

// setp.lt[.and].type p[|q], a, b[, c]
Outcome SetPredicate(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
  const Operand& to = in.operands[0];
  ForLanes(lanes, [&](int i) {
    bool holds = Holds(in, a[i], b[i]), not_so = !holds;
    if (in.operands.size() > 3) {
      const bool c = warp.Get(in.operands[3], i) != 0;
      const int64_t join = in.detail[3];
      holds = join == 1 ? holds && c : join == 2 ? holds || c : holds != c;
      not_so = join == 1 ? not_so && c : join == 2 ? not_so || c : not_so != c;
    }
    if (to.kind == Kind::kVector) {
      warp.Set(to.parts[0], i, holds);
      warp.Set(to.parts[1], i, not_so);
    } else {
      warp.Set(to, i, holds);
    }
  });
  return Outcome::kNext;
}

Outcome Set(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
  Results d(warp, in.operands[0]);
  const uint64_t yes = in.type.kind == 'f' ? AsBits(1.0f) : 0xFFFFFFFF;
  ForLanes(lanes, [&](int i) { d.Bits(i, Holds(in, a[i], b[i]) ? yes : 0); });
  return Outcome::kNext;
}

Outcome Select(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
  const Values p(warp, in.operands[3], lanes);
  Results d(warp, in.operands[0]);
  ForLanes(lanes, [&](int i) { d.Bits(i, Narrow(in.type.bits, (p[i] & 1) != 0 ? a[i] : b[i])); });
  return Outcome::kNext;
}

// A number on its way from one type to another: exact in either part.
struct Number {
  bool real = false;
  double value = 0;     // real
  int64_t integer = 0;  // else; as unsigned where the source is
};

Number ReadNumber(const Instruction& in, uint64_t bits) {
  Number number;
  if (in.source.kind == 'f' || in.source.kind == 'h') {
    number.real = true;
    if (in.source.bits == 64) {
      std::memcpy(&number.value, &bits, 8);
    } else {
      float value = FloatOf(in.source, bits);
      if (in.Has("ftz")) value = Flush(value);
      number.value = value;
    }
  } else {
    number.integer = Extend(in.source, bits);
  }
  return number;
}

uint64_t ToInteger(const Instruction& in, double value) {
  const int bits = in.type.bits;
  const bool is_signed = in.type.kind == 's';
  if (std::isnan(value)) return bits == 64 ? uint64_t{1} << 63 : 0;
  value = in.Has("rzi")   ? std::trunc(value)
          : in.Has("rmi") ? std::floor(value)
          : in.Has("rpi") ? std::ceil(value)
                          : std::nearbyint(value);
  const double top = std::ldexp(1.0, is_signed ? bits - 1 : bits);
  if (value >= top) return Narrow(is_signed ? bits - 1 : bits, ~uint64_t{0});
  if (value < (is_signed ? -top : 0)) return is_signed ? uint64_t{1} << (bits - 1) : 0;
  return Narrow(bits, is_signed ? static_cast<uint64_t>(static_cast<int64_t>(value))
                                : static_cast<uint64_t>(value));
}

// A real number to fp32 with the rounding of the instruction.
float ToFloat(const Instruction& in, double value) {
  const auto nearest = static_cast<float>(value);
  const bool down = in.Has("rm"), up = in.Has("rp"), zero = in.Has("rz");
  const bool larger = static_cast<double>(nearest) > value;
  const bool smaller = static_cast<double>(nearest) < value;
  if ((larger && (down || (zero && value > 0)))) return std::nextafterf(nearest, -INFINITY);
  if ((smaller && (up || (zero && value < 0)))) return std::nextafterf(nearest, INFINITY);
  return nearest;
}

uint64_t WriteReal(const Instruction& in, const Number& number) {
  double value = number.value;
  if (!number.real) {
    if (in.type.bits == 32 && !in.Has("rz") && !in.Has("rm") && !in.Has("rp")) {
      return AsBits(in.source.kind == 's' ? static_cast<float>(number.integer)
                                          : static_cast<float>(uint64_t(number.integer)));
    }
    value = in.source.kind == 's' ? static_cast<double>(number.integer)
                                  : static_cast<double>(static_cast<uint64_t>(number.integer));
  } else if (in.Has("rni") || in.Has("rmi") || in.Has("rpi") || in.Has("rzi")) {
    value = in.Has("rni")   ? std::nearbyint(value)
            : in.Has("rmi") ? std::floor(value)
            : in.Has("rpi") ? std::ceil(value)
                            : std::trunc(value);
  }
  if (in.Has("sat")) value = value > 0 ? std::fmin(value, 1.0) : 0.0;
  if (in.Has("relu")) value = value > 0 ? value : 0.0;
  if (in.type.bits == 64) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, 8);
    return bits;
  }
  if (in.type.kind == 'h') return FloatToBf16(ToOdd(value));
  if (in.type.bits == 16) return FloatToHalf(ToOdd(value));
  float single = ToFloat(in, value);
  if (in.Has("ftz")) single = Flush(single);
  return AsBits(single);
}

Outcome ConvertOne(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Values a(warp, in.operands[1], lanes);
  Results d(warp, in.operands[0]);
  const bool from_integer = in.source.kind != 'f' && in.source.kind != 'h';
  const bool to_integer = in.type.kind != 'f' && in.type.kind != 'h';
  ForLanes(lanes, [&](int i) {
    if (from_integer && to_integer) {
      const int64_t value = Extend(in.source, a[i]);
      if (in.Has("sat")) throw std::runtime_error("cvt.sat of one integer");
      d.Bits(i, static_cast<uint64_t>(Extend(in.type, static_cast<uint64_t>(value))));
    } else if (to_integer) {
      const uint64_t value = ToInteger(in, ReadNumber(in, a[i]).value);
      d.Bits(i, static_cast<uint64_t>(Extend(in.type, value)));
    } else {
      d.Bits(i, WriteReal(in, ReadNumber(in, a[i])));
    }
  });
  return Outcome::kNext;
}

// Two numbers into one register, the first in the upper half.
Outcome ConvertTwo(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
  Results d(warp, in.operands[0]);
  const bool relu = in.Has("relu");
  const auto code = [&](uint64_t bits) -> uint64_t {
    float value = AsFloat(bits);
    if (relu) value = value > 0 ? value : 0.0f;
    switch (in.type.kind) {
      case '4':
        return FloatToE4m3(value);
      case '5':
        return FloatToE5m2(value);
      case 'h':
        return FloatToBf16(value);
      default:
        return FloatToHalf(value);
    }
  };
  const int width = in.type.bits;
  ForLanes(lanes, [&](int i) { d.Bits(i, code(a[i]) << width | code(b[i])); });
  return Outcome::kNext;
}

// f16x2 from two e4m3 or e5m2.
Outcome Widen(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Values a(warp, in.operands[1], lanes);
  Results d(warp, in.operands[0]);
  const auto half = [&](uint64_t code) -> uint64_t {
    const auto byte = static_cast<uint8_t>(code);
    return FloatToHalf(in.source.kind == '4' ? E4m3ToFloat(byte) : E5m2ToFloat(byte));
  };
  ForLanes(lanes, [&](int i) { d.Bits(i, half(a[i] >> 8) << 16 | half(a[i])); });
  return Outcome::kNext;
}

// e4m3x2 or e5m2x2 from f16x2.
Outcome NarrowHalves(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Values a(warp, in.operands[1], lanes);
  Results d(warp, in.operands[0]);
  const auto code = [&](uint64_t bits) -> uint64_t {
    const float value = FloatOf(Type{in.source.kind, 16, false}, bits);
    return in.type.kind == '4' ? FloatToE4m3(value) : FloatToE5m2(value);
  };
  ForLanes(lanes, [&](int i) { d.Bits(i, code(a[i] >> 16) << 8 | code(a[i])); });
  return Outcome::kNext;
}

// cvt.pack.sat: two integers side by side, the second lower, below the low part of a third.
Outcome PackIntegers(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
  const int bits = in.type.bits;
  const int64_t least = in.type.kind == 's' ? -(int64_t{1} << (bits - 1)) : 0;
  const int64_t most = least + (int64_t{1} << bits) - 1;
  const auto one = [&](uint64_t value) {
    const int64_t number = Extend(Type{'s', 32, false}, value);
    return Narrow(bits, static_cast<uint64_t>(std::clamp(number, least, most)));
  };
  ForLanes(lanes, [&](int i) {
    const uint64_t c = in.operands.size() > 3 ? warp.Get(in.operands[3], i) << (2 * bits) : 0;
    warp.Set(in.operands[0], i, Narrow(32, c | one(a[i]) << bits | one(b[i])));
  });
  return Outcome::kNext;
}

}  // namespace

Handler FindCompare(Instruction& in) {
  const std::string& op = in.words[0];
  if (op == "selp") return Select;
  if ((op != "setp" && op != "set") || in.source.packed) return nullptr;  // no pairs
  bool unordered = false;
  in.detail[0] = CompareKind(in.words[1], &unordered);
  // "!=" of floating point is false for NaN, unlike that of C.
  in.detail[1] = unordered ? 1 : 0;
  in.detail[2] = in.Has("ftz") ? 1 : 0;
  in.detail[3] = in.Has("and") ? 1 : in.Has("or") ? 2 : 3;
  return op == "setp" ? SetPredicate : Set;
}

Handler FindConvert(Instruction& in) {
  if (in.words[0] != "cvt") return nullptr;
  if (in.Has("pack")) return PackIntegers;
  if (in.operands.size() == 3) return ConvertTwo;
  if (in.type.packed && in.source.packed) {
    return in.type.kind == '4' || in.type.kind == '5' ? NarrowHalves : Widen;
  }
  return ConvertOne;
}

}  // namespace virtual_gpu
