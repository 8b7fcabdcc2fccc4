// Arithmetic, logic, comparisons, conversions and moves: each lane by itself.
#include <algorithm>
#include <cmath>
#include <limits>

#include "lanes.h"
#include "machine.h"

namespace virtual_gpu {

namespace {

// add, mul and their kin by type. `F` takes and gives values of T.
template <typename T, typename F>
Handler One(F) {
  return [](Warp& warp, const Instruction& in, uint32_t lanes) {
    const Values a(warp, in.operands[1], lanes);
    Results d(warp, in.operands[0]);
    ForLanes(lanes, [&](int i) { d.Put<T>(i, F{}(in, a.As<T>(i))); });
    return Outcome::kNext;
  };
}

template <typename T, typename F>
Handler Two(F) {
  return [](Warp& warp, const Instruction& in, uint32_t lanes) {
    const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
    Results d(warp, in.operands[0]);
    ForLanes(lanes, [&](int i) { d.Put<T>(i, F{}(in, a.As<T>(i), b.As<T>(i))); });
    return Outcome::kNext;
  };
}

template <typename T, typename F>
Handler Three(F) {
  return [](Warp& warp, const Instruction& in, uint32_t lanes) {
    const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
    const Values c(warp, in.operands[3], lanes);
    Results d(warp, in.operands[0]);
    ForLanes(lanes, [&](int i) { d.Put<T>(i, F{}(in, a.As<T>(i), b.As<T>(i), c.As<T>(i))); });
    return Outcome::kNext;
  };
}

[[noreturn]] void Unknown(const Instruction& in) {
  throw std::runtime_error("PTX line " + in.text + ": a form this machine does not know");
}

// Calls f with a value of the type's C++ type, integers by width and sign (b counts as unsigned).
template <typename F>
Handler ByInteger(const Instruction& in, F f) {
  const bool is_signed = in.type.kind == 's';
  switch (in.type.bits) {
    case 16:
      return is_signed ? f(int16_t{}) : f(uint16_t{});
    case 32:
      return is_signed ? f(int32_t{}) : f(uint32_t{});
    case 64:
      return is_signed ? f(int64_t{}) : f(uint64_t{});
  }
  Unknown(in);
}

template <typename F>
Handler ByType(const Instruction& in, F f) {
  if (in.type.packed && in.type.kind == 'f') return f(Pair<Half>{});
  if (in.type.packed && in.type.kind == 'h') return f(Pair<Bf16>{});
  if (in.type.packed && in.type.kind == 'u') return f(Pair<uint16_t>{});
  if (in.type.packed && in.type.kind == 's') return f(Pair<int16_t>{});
  if (in.type.kind == 'f' && in.type.bits == 16) return f(Half{});
  if (in.type.kind == 'h') return f(Bf16{});
  if (in.type.kind == 'f' && in.type.bits == 32) return f(float{});
  if (in.type.kind == 'f' && in.type.bits == 64) return f(double{});
  return ByInteger(in, f);
}

template <typename T>
constexpr bool kFloat = std::is_same_v<T, float> || std::is_same_v<T, double> ||
                        std::is_same_v<T, Half> || std::is_same_v<T, Bf16>;

// One element of a binary operation; pairs take it twice.
template <typename Op, typename T>
T Apply(const Instruction& in, T a, T b) {
  if constexpr (IsPair<T>::value) {
    return T{Apply<Op>(in, a.low, b.low), Apply<Op>(in, a.high, b.high)};
  } else if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Bf16>) {
    return T::From(Op::Do(in, a.Value(), b.Value()));
  } else {
    return Op::Do(in, a, b);
  }
}

template <typename Op>
Handler Binary(const Instruction& in) {
  return ByType(in, [](auto zero) {
    using T = decltype(zero);
    return Two<T>([](const Instruction& it, T a, T b) { return Apply<Op>(it, a, b); });
  });
}

// Results of .ftz and .sat; detail[0]: 1 flush, 2 saturate.
template <typename T>
T Finish(const Instruction& in, T value) {
  if constexpr (std::is_same_v<T, float>) {
    if ((in.detail[0] & 1) != 0) value = Flush(value);
    if ((in.detail[0] & 2) != 0) value = value > 0 ? std::min(value, 1.0f) : 0.0f;
  }
  return value;
}

template <typename T>
T Enter(const Instruction& in, T value) {
  if constexpr (std::is_same_v<T, float>) {
    if ((in.detail[0] & 1) != 0) value = Flush(value);
  }
  return value;
}

template <typename T>
T Wrap(const Instruction&, T a, T b, char op) {
  using U = std::make_unsigned_t<T>;
  // 16-bit values would be promoted to int, whose products overflow.
  const uint64_t x = static_cast<U>(a), y = static_cast<U>(b);
  return static_cast<T>(op == '+' ? x + y : op == '-' ? x - y : x * y);
}

struct AddOp {
  template <typename T>
  static T Do(const Instruction& in, T a, T b) {
    if constexpr (kFloat<T>)
      return Finish<T>(in, Enter(in, a) + Enter(in, b));
    else
      return Wrap(in, a, b, '+');
  }
};
struct SubOp {
  template <typename T>
  static T Do(const Instruction& in, T a, T b) {
    if constexpr (kFloat<T>)
      return Finish<T>(in, Enter(in, a) - Enter(in, b));
    else
      return Wrap(in, a, b, '-');
  }
};
struct MulOp {  // integers: the low half
  template <typename T>
  static T Do(const Instruction& in, T a, T b) {
    if constexpr (kFloat<T>)
      return Finish<T>(in, Enter(in, a) * Enter(in, b));
    else
      return Wrap(in, a, b, '*');
  }
};
struct DivOp {
  template <typename T>
  static T Do(const Instruction& in, T a, T b) {
    if constexpr (kFloat<T>)
      return Finish<T>(in, Enter(in, a) / Enter(in, b));
    else if (b == 0)
      return static_cast<T>(-1);
    else if (std::is_signed_v<T> && b == static_cast<T>(-1))
      return Wrap(in, T{0}, a, '-');
    else
      return static_cast<T>(a / b);
  }
};
struct RemOp {
  template <typename T>
  static T Do(const Instruction&, T a, T b) {
    if constexpr (kFloat<T>)
      return a;
    else if (b == 0)
      return a;
    else if (std::is_signed_v<T> && b == static_cast<T>(-1))
      return 0;
    else
      return static_cast<T>(a % b);
  }
};

// detail[1]: 1 NaN wins, 2 xorsign.abs.
template <bool kMax>
struct ExtremeOp {
  template <typename T>
  static T Do(const Instruction& in, T a, T b) {
    if constexpr (kFloat<T>) {
      const bool negative = (in.detail[1] & 2) != 0 && std::signbit(a) != std::signbit(b);
      a = Enter(in, a), b = Enter(in, b);
      if ((in.detail[1] & 2) != 0) a = std::fabs(a), b = std::fabs(b);
      if (std::isnan(a) || std::isnan(b)) {
        const bool both = std::isnan(a) && std::isnan(b);
        if (both || (in.detail[1] & 1) != 0) return std::numeric_limits<T>::quiet_NaN();
        a = b = std::isnan(a) ? b : a;
      }
      // +0 counts as larger than -0.
      const bool a_first = a == b ? std::signbit(a) < std::signbit(b) : a > b;
      const T value = a_first == kMax ? a : b;
      return negative ? -value : value;
    } else {
      return kMax ? std::max(a, b) : std::min(a, b);
    }
  }
};

Handler Multiply(Instruction& in) {
  if (in.type.kind == 'f' || in.type.kind == 'h') return Binary<MulOp>(in);
  if (in.Has("lo")) return Binary<MulOp>(in);
  if (in.Has("wide")) {
    return [](Warp& warp, const Instruction& it, uint32_t lanes) {
      const Values a(warp, it.operands[1], lanes), b(warp, it.operands[2], lanes);
      Results d(warp, it.operands[0]);
      ForLanes(lanes, [&](int i) {
        const int64_t x = Extend(it.type, a[i]), y = Extend(it.type, b[i]);
        d.Bits(i, Narrow(it.type.bits * 2, static_cast<uint64_t>(x) * static_cast<uint64_t>(y)));
      });
      return Outcome::kNext;
    };
  }
  if (!in.Has("hi")) Unknown(in);
  return [](Warp& warp, const Instruction& it, uint32_t lanes) {
    const Values a(warp, it.operands[1], lanes), b(warp, it.operands[2], lanes);
    Results d(warp, it.operands[0]);
    ForLanes(lanes, [&](int i) {
      __extension__ using Wide = __int128;
      __extension__ using UnsignedWide = unsigned __int128;
      const int64_t x = Extend(it.type, a[i]), y = Extend(it.type, b[i]);
      const uint64_t high =
          it.type.kind == 's'
              ? static_cast<uint64_t>((static_cast<Wide>(x) * y) >> it.type.bits)
              : static_cast<uint64_t>((static_cast<UnsignedWide>(static_cast<uint64_t>(x)) *
                                       static_cast<uint64_t>(y)) >>
                                      it.type.bits);
      d.Bits(i, Narrow(it.type.bits, high));
    });
    return Outcome::kNext;
  };
}

struct FmaOp {
  template <typename T>
  static T Do(const Instruction& in, T a, T b, T c) {
    T value = Finish<T>(in, std::fma(Enter(in, a), Enter(in, b), Enter(in, c)));
    if ((in.detail[1] & 4) != 0) value = value > 0 ? value : T{0};  // .relu
    return value;
  }
};

template <typename T>
T ApplyFma(const Instruction& in, T a, T b, T c) {
  if constexpr (IsPair<T>::value) {
    return T{ApplyFma(in, a.low, b.low, c.low), ApplyFma(in, a.high, b.high, c.high)};
  } else if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Bf16>) {
    // In double, where the sum of an exact product and a third number is rounded once to 16 bits
    // but for ties that 53 bits cannot tell, which 11-bit factors do not make.
    return T::FromDouble(std::fma(static_cast<double>(a.Value()), static_cast<double>(b.Value()),
                                  static_cast<double>(c.Value())));
  } else {
    return FmaOp::Do(in, a, b, c);
  }
}

Handler Fma(const Instruction& in) {
  if (in.type.packed && in.type.kind == 'f') {
    return Three<Pair<Half>>([](const Instruction& it, Pair<Half> a, Pair<Half> b, Pair<Half> c) {
      return ApplyFma(it, a, b, c);
    });
  }
  if (in.type.packed && in.type.kind == 'h') {
    return Three<Pair<Bf16>>([](const Instruction& it, Pair<Bf16> a, Pair<Bf16> b, Pair<Bf16> c) {
      return ApplyFma(it, a, b, c);
    });
  }
  if (in.type.kind == 'f' && in.type.bits == 16) {
    return Three<Half>(
        [](const Instruction& it, Half a, Half b, Half c) { return ApplyFma(it, a, b, c); });
  }
  if (in.type.kind == 'h') {
    return Three<Bf16>(
        [](const Instruction& it, Bf16 a, Bf16 b, Bf16 c) { return ApplyFma(it, a, b, c); });
  }
  if (in.type.bits == 64) {
    return Three<double>(
        [](const Instruction& it, double a, double b, double c) { return FmaOp::Do(it, a, b, c); });
  }
  return Three<float>(
      [](const Instruction& it, float a, float b, float c) { return FmaOp::Do(it, a, b, c); });
}

// mad.lo and mad.wide; mad of floating point is fma.
Handler MultiplyAdd(Instruction& in) {
  if (in.type.kind == 'f') return Fma(in);
  in.detail[2] = in.Has("wide") ? in.type.bits * 2 : in.type.bits;
  if (in.Has("hi")) Unknown(in);
  return [](Warp& warp, const Instruction& it, uint32_t lanes) {
    const Values a(warp, it.operands[1], lanes), b(warp, it.operands[2], lanes);
    const Values c(warp, it.operands[3], lanes);
    Results d(warp, it.operands[0]);
    ForLanes(lanes, [&](int i) {
      const auto x = static_cast<uint64_t>(Extend(it.type, a[i]));
      const auto y = static_cast<uint64_t>(Extend(it.type, b[i]));
      d.Bits(i, Narrow(static_cast<int>(it.detail[2]), x * y + c[i]));
    });
    return Outcome::kNext;
  };
}

// What takes one number and gives one, of fp32.
template <typename F>
Handler OfFloat(F) {
  return One<float>(
      [](const Instruction& in, float a) { return Finish<float>(in, F{}(Enter(in, a))); });
}

Handler OfOneNumber(const Instruction& in) {
  const std::string& op = in.words[0];
  if (in.type.kind == 'f' && in.type.bits == 64) {
    if (op == "rcp") return One<double>([](const Instruction&, double a) { return 1 / a; });
    if (op == "sqrt") return One<double>([](const Instruction&, double a) { return std::sqrt(a); });
    return nullptr;
  }
  if (in.type.packed || in.type.bits != 32) {
    if (op == "ex2" && in.type.packed && in.type.kind == 'f') {
      return One<Pair<Half>>([](const Instruction&, Pair<Half> a) {
        return Pair<Half>{Half::From(std::exp2(a.low.Value())),
                          Half::From(std::exp2(a.high.Value()))};
      });
    }
    return nullptr;
  }
  if (op == "rcp") return OfFloat([](float a) { return 1 / a; });
  if (op == "sqrt") return OfFloat([](float a) { return std::sqrt(a); });
  if (op == "rsqrt")
    return OfFloat([](float a) { return static_cast<float>(1 / std::sqrt(double{a})); });
  if (op == "ex2") return OfFloat([](float a) { return static_cast<float>(std::exp2(double{a})); });
  if (op == "lg2") return OfFloat([](float a) { return static_cast<float>(std::log2(double{a})); });
  if (op == "sin") return OfFloat([](float a) { return static_cast<float>(std::sin(double{a})); });
  if (op == "cos") return OfFloat([](float a) { return static_cast<float>(std::cos(double{a})); });
  if (op == "tanh")
    return OfFloat([](float a) { return static_cast<float>(std::tanh(double{a})); });
  return nullptr;
}

template <typename T>
T Negated(T a) {
  if constexpr (IsPair<T>::value)
    return T{Negated(a.low), Negated(a.high)};
  else if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Bf16>) {
    a.bits ^= 0x8000;
    return a;
  } else if constexpr (kFloat<T>)
    return -a;
  else
    return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
}

template <typename T>
T Absolute(T a) {
  if constexpr (IsPair<T>::value)
    return T{Absolute(a.low), Absolute(a.high)};
  else if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Bf16>) {
    a.bits &= 0x7FFF;
    return a;
  } else if constexpr (kFloat<T>)
    return std::fabs(a);
  else
    return std::is_signed_v<T> && a < 0 ? Negated(a) : a;
}

Handler Sign(const Instruction& in) {
  const bool neg = in.words[0] == "neg";
  return ByType(in, [neg](auto zero) {
    using T = decltype(zero);
    return neg ? One<T>([](const Instruction& it, T a) { return Finish(it, Negated(a)); })
               : One<T>([](const Instruction& it, T a) { return Finish(it, Absolute(a)); });
  });
}

}  // namespace

Handler FindArithmetic(Instruction& in) {
  const std::string& op = in.words[0];
  in.detail[0] = (in.Has("ftz") ? 1 : 0) | (in.Has("sat") ? 2 : 0);
  in.detail[1] = (in.Has("NaN") ? 1 : 0) | (in.Has("xorsign") ? 2 : 0) | (in.Has("relu") ? 4 : 0);
  static const char* const kNeedType[] = {"add", "sub", "mul", "div", "rem", "max", "min", "mad"};
  for (const char* name : kNeedType) {
    if (op == name && in.type.kind == 'b') Unknown(in);
  }
  if (op == "add") return Binary<AddOp>(in);
  if (op == "sub") return Binary<SubOp>(in);
  if (op == "mul") return Multiply(in);
  if (op == "div") return Binary<DivOp>(in);
  if (op == "rem") return Binary<RemOp>(in);
  if (op == "max" && in.operands.size() == 3) return Binary<ExtremeOp<true>>(in);
  if (op == "min" && in.operands.size() == 3) return Binary<ExtremeOp<false>>(in);
  if (op == "fma") return Fma(in);
  if (op == "mad") return MultiplyAdd(in);
  if (op == "neg" || op == "abs") return Sign(in);
  if (op == "copysign") {
    return Two<float>([](const Instruction&, float a, float b) { return std::copysign(b, a); });
  }
  return OfOneNumber(in);
}

Handler FindScalar(Instruction& in) {
  for (const auto find : {FindArithmetic, FindBits, FindCompare, FindConvert}) {
    if (const Handler handler = find(in)) return handler;
  }
  return nullptr;
}

}  // namespace virtual_gpu
