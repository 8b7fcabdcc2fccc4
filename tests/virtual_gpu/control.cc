// Branches, calls, barriers of a CTA, and what the lanes of a warp do together.

#include "lanes.h"

namespace virtual_gpu {

namespace {

Outcome Branch(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) { warp.place[lane] = in.operands[0].value; });
  return Outcome::kJumped;
}

// The caller's arguments are copied to where the function has its parameters (Parser::Call).
Outcome Call(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) {
    for (const Operand& copy : in.operands[0].parts) {
      char* to = warp.Memory(Space::kLocal, static_cast<uint64_t>(copy.reg), copy.axis, 1, lane);
      std::memcpy(to, warp.Memory(Space::kLocal, copy.value, copy.axis, 1, lane), copy.axis);
    }
    warp.registers[in.detail[1]].lane[lane] = static_cast<uint64_t>(warp.place[lane]) + 1;
    warp.place[lane] = in.detail[0];
  });
  return Outcome::kJumped;
}

void Wake(Barrier* barrier) {
  for (const auto& [warp, lanes] : barrier->waiting) warp->blocked &= ~lanes;
  barrier->waiting.clear();
  barrier->arrived = 0;
}

int Alive(const Cta& cta) {
  int threads = 0;
  for (const Warp& warp : cta.warps) threads += __builtin_popcount(warp.alive);
  return threads;
}

Outcome Exit(Warp& warp, const Instruction&, uint32_t lanes) {
  warp.alive &= ~lanes;
  Cluster& cluster = *warp.cta->cluster;
  ++cluster.events;
  // Barriers of all threads need no more those that are gone.
  for (int id = 0; id < 16; ++id) {
    Barrier& barrier = warp.cta->barriers[id];
    if (barrier.expected == 0 && barrier.arrived > 0 && barrier.arrived >= Alive(*warp.cta)) {
      Wake(&barrier);
    }
  }
  return Outcome::kJumped;
}

Outcome Return(Warp& warp, const Instruction& in, uint32_t lanes) {
  if (in.operands[0].kind == Kind::kNone) return Exit(warp, in, lanes);
  ForLanes(lanes, [&](int lane) {
    warp.place[lane] = static_cast<int64_t>(warp.Get(in.operands[0], lane));
  });
  return Outcome::kJumped;
}

// bar.sync, bar.arrive, bar.red and their barrier.cta forms. detail[0]: 0 sync, 1 arrive, 2 red;
// detail[1], of red: 0 popc, 1 and, 2 or.
Outcome CtaBarrier(Warp& warp, const Instruction& in, uint32_t lanes) {
  const bool reduces = in.detail[0] == 2;
  const size_t first = reduces ? 1 : 0;
  const int lane = __builtin_ctz(lanes);
  const uint64_t id = warp.Get(in.operands[first], lane);
  if (id >= 16) throw std::runtime_error("barrier " + std::to_string(id));
  Barrier& barrier = warp.cta->barriers[id];
  const size_t counted = in.operands.size() - first - (reduces ? 1 : 0);
  const int expected = counted > 1 ? static_cast<int>(warp.Get(in.operands[first + 1], lane)) : 0;
  if (barrier.arrived > 0 && barrier.expected != expected) {
    throw std::runtime_error("barrier " + std::to_string(id) + " awaits " +
                             std::to_string(barrier.expected) + " threads, here " +
                             std::to_string(expected));
  }
  barrier.expected = expected;
  if (barrier.arrived == 0) barrier.reduced = 0;
  barrier.arrived += __builtin_popcount(lanes);
  ++warp.cta->cluster->events;
  if (reduces) {
    ForLanes(lanes, [&](int i) { barrier.reduced += warp.Get(in.operands.back(), i) != 0; });
    barrier.readers.push_back({&warp, lanes, &in});
  }
  if (in.detail[0] != 1) {
    barrier.waiting.emplace_back(&warp, lanes);
    warp.blocked |= lanes;
  }
  const int total = expected == 0 ? Alive(*warp.cta) : expected;
  if (barrier.arrived < total) return in.detail[0] == 1 ? Outcome::kNext : Outcome::kBlocked;
  if (barrier.arrived > total) throw std::runtime_error("too many threads at a barrier");
  for (const auto& reader : barrier.readers) {
    const int64_t kind = reader.in->detail[1];
    const uint64_t value = kind == 0   ? barrier.reduced
                           : kind == 1 ? barrier.reduced == barrier.arrived
                                       : barrier.reduced > 0;
    ForLanes(reader.lanes, [&](int i) { reader.warp->Set(reader.in->operands[0], i, value); });
  }
  barrier.readers.clear();
  Wake(&barrier);
  return in.detail[0] == 1 ? Outcome::kNext : Outcome::kBlocked;  // awake again
}

}  // namespace

// A product is one of four warps: it is over, and what it read may be written, when all of them
// have come this far. Each executes its own rows when it comes to them, so they have to meet.
Outcome WaitForWarpgroup(Warp& warp, const Instruction&, uint32_t lanes) {
  Cta& cta = *warp.cta;
  const size_t group = static_cast<size_t>(warp.index) / 4;
  if (group >= 8 || (group + 1) * 4 > cta.warps.size()) {
    throw std::runtime_error("a product of a warp without a warpgroup");
  }
  Barrier& barrier = cta.barriers[16 + group];
  barrier.arrived += __builtin_popcount(lanes);
  barrier.waiting.emplace_back(&warp, lanes);
  warp.blocked |= lanes;
  ++cta.cluster->events;
  if (barrier.arrived == 4 * kLanes) Wake(&barrier);
  return Outcome::kBlocked;
}

namespace {

uint32_t Members(const Warp& warp, const Operand& operand, uint32_t lanes) {
  return static_cast<uint32_t>(warp.Get(operand, __builtin_ctz(lanes)));
}

Outcome SyncWarp(Warp& warp, const Instruction& in, uint32_t lanes) {
  return Together(warp, lanes, Members(warp, in.operands[0], lanes)) ? Outcome::kNext
                                                                     : Outcome::kParked;
}

// shfl.sync.mode.b32 d[|p], a, b, c, members
Outcome Shuffle(Warp& warp, const Instruction& in, uint32_t lanes) {
  if (!Together(warp, lanes, Members(warp, in.operands[4], lanes))) return Outcome::kParked;
  const Values a(warp, in.operands[1], lanes), b(warp, in.operands[2], lanes);
  const Values c(warp, in.operands[3], lanes);
  const Operand& to = in.operands[0];
  const bool pair = to.kind == Kind::kVector;
  uint64_t values[kLanes];
  bool valid[kLanes];
  ForLanes(lanes, [&](int lane) {
    const int clamp = static_cast<int>(c[lane] & 31), segment = static_cast<int>(c[lane] >> 8 & 31);
    const int by = static_cast<int>(b[lane] & 31);
    const int most = (lane & segment) | (clamp & ~segment);
    const int least = lane & segment;
    int from = lane;
    switch (in.detail[0]) {
      case 0:
        from = lane - by;
        valid[lane] = from >= most;
        break;  // up
      case 1:
        from = lane + by;
        valid[lane] = from <= most;
        break;  // down
      case 2:
        from = lane ^ by;
        valid[lane] = from <= most;
        break;  // bfly
      default:
        from = least | (by & ~segment);
        valid[lane] = from <= most;  // idx
    }
    if (!valid[lane]) from = lane;
    if ((lanes >> from & 1) == 0) throw std::runtime_error("a value of a lane that is not here");
    values[lane] = a[from];
  });
  ForLanes(lanes, [&](int lane) {
    warp.Set(pair ? to.parts[0] : to, lane, Narrow(32, values[lane]));
    if (pair) warp.Set(to.parts[1], lane, valid[lane]);
  });
  return Outcome::kNext;
}

// vote.sync.{all,any,uni,ballot} d, p, members
Outcome Vote(Warp& warp, const Instruction& in, uint32_t lanes) {
  if (!Together(warp, lanes, Members(warp, in.operands[2], lanes))) return Outcome::kParked;
  uint32_t set = 0;
  ForLanes(lanes, [&](int lane) {
    set |= static_cast<uint32_t>(warp.Get(in.operands[1], lane) & 1) << lane;
  });
  const std::string& mode = in.words[2];
  const uint64_t value = mode == "ballot" ? set
                         : mode == "any"  ? set != 0
                         : mode == "all"  ? set == lanes
                                          : set == 0 || set == lanes;
  ForLanes(lanes, [&](int lane) { warp.Set(in.operands[0], lane, value); });
  return Outcome::kNext;
}

// redux.sync.op.type d, a, members
Outcome Reduce(Warp& warp, const Instruction& in, uint32_t lanes) {
  if (!Together(warp, lanes, Members(warp, in.operands[2], lanes))) return Outcome::kParked;
  const std::string& op = in.words[2];
  bool first = true;
  uint32_t value = 0;
  ForLanes(lanes, [&](int lane) {
    const auto next = static_cast<uint32_t>(warp.Get(in.operands[1], lane));
    const bool less = in.type.kind == 's' ? static_cast<int32_t>(next) < static_cast<int32_t>(value)
                                          : next < value;
    if (first)
      value = next;
    else if (op == "add")
      value += next;
    else if (op == "and")
      value &= next;
    else if (op == "or")
      value |= next;
    else if (op == "xor")
      value ^= next;
    else if (less == (op == "min"))
      value = next;
    first = false;
  });
  ForLanes(lanes, [&](int lane) { warp.Set(in.operands[0], lane, value); });
  return Outcome::kNext;
}

// match.any.sync.b32 d, a, members: who has the same value.
Outcome Match(Warp& warp, const Instruction& in, uint32_t lanes) {
  if (!Together(warp, lanes, Members(warp, in.operands[2], lanes))) return Outcome::kParked;
  if (!in.Has("any")) throw std::runtime_error("match.all");
  uint32_t same[kLanes];
  ForLanes(lanes, [&](int lane) {
    same[lane] = 0;
    ForLanes(lanes, [&](int other) {
      const bool equal = Narrow(in.type.bits, warp.Get(in.operands[1], lane)) ==
                         Narrow(in.type.bits, warp.Get(in.operands[1], other));
      same[lane] |= static_cast<uint32_t>(equal) << other;
    });
  });
  ForLanes(lanes, [&](int lane) { warp.Set(in.operands[0], lane, same[lane]); });
  return Outcome::kNext;
}

Outcome ActiveMask(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) { warp.Set(in.operands[0], lane, lanes); });
  return Outcome::kNext;
}

Outcome Sleep(Warp&, const Instruction&, uint32_t) { return Outcome::kPoll; }

Outcome Trap(Warp&, const Instruction&, uint32_t) {
  throw std::runtime_error("the kernel gave up");
}

}  // namespace

Handler FindControl(Instruction& in) {
  const std::string& op = in.words[0];
  if (op == "bra") return Branch;
  if (op == "call") return Call;
  if (op == "ret") return Return;
  if (op == "exit") return Exit;
  if (op == "trap" || op == "brkpt") return Trap;
  if (op == "nanosleep") return Sleep;
  if (op == "activemask") return ActiveMask;
  if (op == "shfl") {
    const std::string& mode = in.words[2];
    in.detail[0] = mode == "up" ? 0 : mode == "down" ? 1 : mode == "bfly" ? 2 : 3;
    return Shuffle;
  }
  if (op == "vote") return Vote;
  if (op == "redux") return Reduce;
  if (op == "match") return Match;
  if (op == "bar" && in.Has("warp")) return SyncWarp;
  if (op == "bar" || (op == "barrier" && !in.Has("cluster"))) {
    in.detail[0] = in.Has("arrive") ? 1 : in.Has("red") ? 2 : 0;
    in.detail[1] = in.Has("and") ? 1 : in.Has("or") ? 2 : 0;
    return CtaBarrier;
  }
  return nullptr;
}

}  // namespace virtual_gpu
