// Loads, stores, atomics, and what names addresses.

#include "lanes.h"

namespace virtual_gpu {

namespace {

Space SpaceOf(const Instruction& in) {
  for (const std::string& word : in.words) {
    if (word == "global") return Space::kGlobal;
    if (word.compare(0, 6, "shared") == 0) return Space::kShared;
    if (word == "local") return Space::kLocal;
    if (word.compare(0, 5, "param") == 0) return Space::kParam;
    if (word == "const") return Space::kConst;
  }
  return Space::kGeneric;
}

// Where a symbol lies counts: parameters of functions are local memory.
Space SpaceOf(const Instruction& in, const Operand& address) {
  if (address.space != Space::kGeneric) return address.space;
  return static_cast<Space>(in.detail[0]);
}

int Elements(const Operand& operand) {
  return operand.kind == Kind::kVector ? static_cast<int>(operand.parts.size()) : 1;
}

const Operand& Element(const Operand& operand, int index) {
  return operand.kind == Kind::kVector ? operand.parts[index] : operand;
}

Outcome Load(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Operand& to = in.operands[0];
  const Operand& from = in.operands[1];
  const Space space = SpaceOf(in, from);
  const int bytes = in.type.bits / 8, count = Elements(to);
  ForLanes(lanes, [&](int lane) {
    const char* data =
        warp.Memory(space, warp.Address(from, lane), int64_t{bytes} * count, bytes * count, lane);
    for (int k = 0; k < count; ++k) {
      uint64_t value = 0;
      std::memcpy(&value, data + k * bytes, bytes);
      // A register may be wider than what is loaded.
      if (in.type.kind == 's') value = static_cast<uint64_t>(Extend(in.type, value));
      warp.Set(Element(to, k), lane, value);
    }
  });
  return Outcome::kNext;
}

Outcome Store(Warp& warp, const Instruction& in, uint32_t lanes) {
  const Operand& to = in.operands[0];
  const Operand& from = in.operands[1];
  const Space space = SpaceOf(in, to);
  const int bytes = in.type.bits / 8, count = Elements(from);
  if (space != Space::kLocal) ++warp.cta->cluster->events;
  ForLanes(lanes, [&](int lane) {
    char* data =
        warp.Memory(space, warp.Address(to, lane), int64_t{bytes} * count, bytes * count, lane);
    for (int k = 0; k < count; ++k) {
      const uint64_t value = warp.Get(Element(from, k), lane);
      std::memcpy(data + k * bytes, &value, bytes);
    }
  });
  return Outcome::kNext;
}

uint64_t Combine(const Instruction& in, uint64_t old, uint64_t a, uint64_t b) {
  const Type& type = in.type;
  const char* names[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};
  const std::string op = names[in.detail[1]];
  if (op == "cas") return old == a ? b : old;
  if (op == "exch") return a;
  if (type.kind == 'f' || type.kind == 'h') {
    if (op == "add" && type.kind == 'f' && type.bits == 32)
      return AsBits(AsFloat(old) + AsFloat(a));
    throw std::runtime_error("an atomic operation on this type");
  }
  if (op == "add") return old + a;
  if (op == "and") return old & a;
  if (op == "or") return old | a;
  if (op == "xor") return old ^ a;
  if (op == "inc") return old >= a ? 0 : old + 1;
  if (op == "dec") return old == 0 || old > a ? a : old - 1;
  const bool less = type.kind == 's' ? Extend(type, a) < Extend(type, old) : a < old;
  return less == (op == "min") ? a : old;
}

// atom d, [a], b[, c] and red [a], b: one lane after the other.
Outcome Atomic(Warp& warp, const Instruction& in, uint32_t lanes) {
  const bool keeps = in.words[0] == "atom";
  const Operand& at = in.operands[keeps ? 1 : 0];
  const Space space = SpaceOf(in, at);
  const int bytes = in.type.bits / 8;
  ++warp.cta->cluster->events;
  ForLanes(lanes, [&](int lane) {
    char* data = warp.Memory(space, warp.Address(at, lane), bytes, bytes, lane);
    uint64_t old = 0;
    std::memcpy(&old, data, bytes);
    const size_t first = keeps ? 2 : 1;
    const uint64_t a = Narrow(in.type.bits, warp.Get(in.operands[first], lane));
    const uint64_t b = in.operands.size() > first + 1
                           ? Narrow(in.type.bits, warp.Get(in.operands[first + 1], lane))
                           : 0;
    const uint64_t value = Combine(in, old, a, b);
    std::memcpy(data, &value, bytes);
    if (keeps) warp.Set(in.operands[0], lane, old);
  });
  return Outcome::kNext;
}

// cvta.space: an address of that space as a generic one; cvta.to.space: the other way.
Outcome ConvertAddress(Warp& warp, const Instruction& in, uint32_t lanes) {
  const auto space = static_cast<Space>(in.detail[0]);
  const bool to = in.words[1] == "to";
  ForLanes(lanes, [&](int lane) {
    uint64_t address = warp.Get(in.operands[1], lane);
    if (space == Space::kShared) {
      address = to ? address & ~kSharedWindow : address | kSharedWindow;
    } else if (space == Space::kLocal) {
      address = to ? address & ~kLocalWindow : address | kLocalWindow;
    } else if (space == Space::kParam) {
      const auto base = reinterpret_cast<uint64_t>(warp.launch().params.data());
      address = to ? address - base : address + base;
    }
    warp.Set(in.operands[0], lane, address);
  });
  return Outcome::kNext;
}

Outcome IsSpace(Warp& warp, const Instruction& in, uint32_t lanes) {
  const auto space = static_cast<Space>(in.detail[0]);
  ForLanes(lanes, [&](int lane) {
    const uint64_t address = warp.Get(in.operands[1], lane);
    const bool shared = (address & kSharedWindow) != 0, local = (address & kLocalWindow) != 0;
    const bool found = space == Space::kShared   ? shared
                       : space == Space::kLocal  ? local
                       : space == Space::kGlobal ? !shared && !local
                                                 : false;
    warp.Set(in.operands[0], lane, found);
  });
  return Outcome::kNext;
}

Outcome Nothing(Warp&, const Instruction&, uint32_t) { return Outcome::kNext; }

}  // namespace

Handler FindMemory(Instruction& in) {
  const std::string& op = in.words[0];
  in.detail[0] = static_cast<int64_t>(SpaceOf(in));
  if (op == "ld" || op == "ldu") return Load;
  if (op == "st") return Store;
  if (op == "cvta") return ConvertAddress;
  if (op == "isspacep") return IsSpace;
  if (op == "atom" || op == "red") {
    if (in.words[1] == "async") return nullptr;
    const char* names[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};
    for (int k = 0; k < 10; ++k) {
      if (in.Has(names[k])) {
        in.detail[1] = k;
        return Atomic;
      }
    }
    throw std::runtime_error("PTX line " + in.text + ": an atomic this machine does not know");
  }
  if (op == "membar" || op == "prefetch" || op == "prefetchu") return Nothing;
  // fence.proxy and fence.mbarrier_init too: every access is done when the next begins.
  return op == "fence" ? Nothing : nullptr;
}

}  // namespace virtual_gpu
