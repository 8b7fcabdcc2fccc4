// Values of operands in all lanes, as numbers of a type.
#pragma once

#include <cmath>
#include <type_traits>

#include "machine.h"

namespace virtual_gpu {

struct Half {
  uint16_t bits;
  float Value() const { return HalfToFloat(bits); }
  static Half From(float value) { return {FloatToHalf(value)}; }
  static Half FromDouble(double value);
};

struct Bf16 {
  uint16_t bits;
  float Value() const { return Bf16ToFloat(bits); }
  static Bf16 From(float value) { return {FloatToBf16(value)}; }
  static Bf16 FromDouble(double value);
};

// To fp32 with the last bit set where something was lost ("to odd"): rounding that again to 16 bits
// is the same as rounding once.
inline float ToOdd(double value) {
  float low = static_cast<float>(value);
  if (static_cast<double>(low) == value || std::isnan(value) || std::isinf(low)) return low;
  uint32_t bits = AsBits(low);
  if (std::fabs(static_cast<double>(low)) > std::fabs(value)) --bits;  // toward zero
  return AsFloat(bits | 1);
}
inline Half Half::FromDouble(double value) { return From(ToOdd(value)); }
inline Bf16 Bf16::FromDouble(double value) { return From(ToOdd(value)); }

template <typename T>
struct Pair {
  T low, high;
};

template <typename T>
struct IsPair : std::false_type {};
template <typename T>
struct IsPair<Pair<T>> : std::true_type {};

inline float Flush(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

inline uint64_t Narrow(int bits, uint64_t value) {
  return bits >= 64 ? value : value & ((uint64_t{1} << bits) - 1);
}

// A value of a narrow type as 64 bits, with its sign where the type has one.
inline int64_t Extend(const Type& type, uint64_t value) {
  if (type.bits >= 64) return static_cast<int64_t>(value);
  value = Narrow(type.bits, value);
  const uint64_t sign = uint64_t{1} << (type.bits - 1);
  return static_cast<int64_t>(type.kind == 's' ? (value ^ sign) - sign : value);
}

// Values of an operand in the lanes that take part.
class Values {
 public:
  Values(const Warp& warp, const Operand& operand, uint32_t lanes) {
    if (operand.kind == Kind::kRegister && !operand.negated) {
      data_ = warp.registers[operand.reg].lane;
    } else {
      data_ = own_;
      ForLanes(lanes, [&](int lane) { own_[lane] = warp.Get(operand, lane); });
    }
  }
  Values(const Values&) = delete;
  uint64_t operator[](int lane) const { return data_[lane]; }
  template <typename T>
  T As(int lane) const {
    T value;
    std::memcpy(&value, &data_[lane], sizeof(T));
    return value;
  }

 private:
  const uint64_t* data_;
  uint64_t own_[kLanes];
};

class Results {
 public:
  Results(Warp& warp, const Operand& operand) {
    data_ = operand.kind == Kind::kRegister ? warp.registers[operand.reg].lane : dropped_;
  }
  Results(const Results&) = delete;
  void Bits(int lane, uint64_t bits) { data_[lane] = bits; }
  template <typename T>
  void Put(int lane, T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    data_[lane] = bits;
  }

 private:
  uint64_t* data_;
  uint64_t dropped_[kLanes];
};

Handler FindArithmetic(Instruction& in);
Handler FindBits(Instruction& in);     // bits.cc
Handler FindCompare(Instruction& in);  // convert.cc
Handler FindConvert(Instruction& in);

}  // namespace virtual_gpu
