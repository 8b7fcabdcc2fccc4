// mbarriers, clusters of CTAs, and hints, which do nothing here.
#include "async.h"

namespace virtual_gpu {

namespace {

constexpr uint32_t kOffsetMask = (uint32_t{1} << kRankShift) - 1;

// An mbarrier, in the 64 bits that shared memory has for it.
class MBarrier {
 public:
  static constexpr int kMaxCount = (1 << 20) - 1;

  MBarrier(Warp& warp, uint32_t address) : warp_(warp), data_(warp.Shared(address, 8, 8)) {
    uint64_t bits;
    std::memcpy(&bits, data_, 8);
    Unpack(bits);
  }

  void Init(int64_t count) {
    if (count < 1 || count > kMaxCount) throw std::runtime_error("mbarrier: arrivals to expect");
    valid_ = true;
    phase_ = 0;
    expected_ = pending_ = count;
    bytes_ = 0;
    Store();
  }

  void Invalidate() {
    const uint64_t none = 0;
    std::memcpy(data_, &none, 8);
  }

  void Check() const {
    if (!valid_) throw std::runtime_error("an mbarrier that is not initialised");
  }

  uint64_t state() const { return Pack(); }
  bool odd() const { return phase_; }
  static bool OddOf(uint64_t state) { return (state >> 63) != 0; }
  static int64_t PendingOf(uint64_t state) { return static_cast<int64_t>(state & kMaxCount); }

  // `bytes` are expected (negative: have come), `count` threads arrive, `leaving` of which expected
  // in later phases, too.
  void Change(int64_t bytes, int64_t count, int64_t leaving) {
    bytes_ += bytes;
    pending_ -= count;
    expected_ -= leaving;
    if (pending_ < 0) throw std::runtime_error("more arrivals at an mbarrier than it expects");
    if (bytes_ < -kMaxCount || bytes_ > kMaxCount) {
      throw std::runtime_error("an mbarrier cannot count so many bytes");
    }
    if (pending_ == 0 && bytes_ == 0) {
      phase_ = !phase_;
      pending_ = expected_;
    }
    Store();
    ++warp_.cta->cluster->events;
  }

 private:
  static constexpr uint64_t kValid = uint64_t{1} << 62;
  static constexpr int kBytesBias = 1 << 20;

  uint64_t Pack() const {
    return uint64_t{phase_} << 63 | kValid | static_cast<uint64_t>(bytes_ + kBytesBias) << 40 |
           static_cast<uint64_t>(expected_) << 20 | static_cast<uint64_t>(pending_);
  }

  void Unpack(uint64_t bits) {
    phase_ = bits >> 63;
    bytes_ = static_cast<int64_t>(bits >> 40 & 0x3FFFFF) - kBytesBias;
    expected_ = static_cast<int64_t>(bits >> 20 & kMaxCount);
    pending_ = PendingOf(bits);
    // Shared memory that nobody wrote has all bits set.
    valid_ = (bits & kValid) != 0 && bits != ~uint64_t{0};
  }

  void Store() {
    const uint64_t bits = Pack();
    std::memcpy(data_, &bits, 8);
  }

  Warp& warp_;
  char* data_;
  bool phase_ = false, valid_ = false;
  int64_t expected_ = 0, pending_ = 0, bytes_ = 0;
};

MBarrier BarrierAt(Warp& warp, const Operand& operand, int lane) {
  return MBarrier(warp, SharedAddressOf(warp, operand, lane));
}

Outcome Init(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) {
    const auto count = static_cast<uint32_t>(warp.Get(in.operands[1], lane));
    BarrierAt(warp, in.operands[0], lane).Init(count);
  });
  return Outcome::kNext;
}

Outcome Invalidate(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) {
    MBarrier barrier = BarrierAt(warp, in.operands[0], lane);
    barrier.Check();
    barrier.Invalidate();
  });
  return Outcome::kNext;
}

// detail: whether bytes come to be expected, and whether the thread leaves for good.
Outcome Arrive(Warp& warp, const Instruction& in, uint32_t lanes) {
  const bool expects = in.detail[0] != 0, leaves = in.detail[1] != 0;
  ForLanes(lanes, [&](int lane) {
    MBarrier barrier = BarrierAt(warp, in.operands[1], lane);
    barrier.Check();
    const uint64_t before = barrier.state();
    int64_t amount = 1;
    if (in.operands.size() > 2) amount = static_cast<uint32_t>(warp.Get(in.operands[2], lane));
    const int64_t count = expects ? 1 : amount;
    barrier.Change(expects ? amount : 0, count, leaves ? count : 0);
    warp.Set(in.operands[0], lane, before);
  });
  return Outcome::kNext;
}

// detail: the sign of the bytes.
Outcome ChangeBytes(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) {
    MBarrier barrier = BarrierAt(warp, in.operands[0], lane);
    barrier.Check();
    const auto bytes = static_cast<uint32_t>(warp.Get(in.operands[1], lane));
    barrier.Change(in.detail[0] * int64_t{bytes}, 0, 0);
  });
  return Outcome::kNext;
}

// detail: whether the phase is named by its parity, else by a state.
Outcome TestWait(Warp& warp, const Instruction& in, uint32_t lanes) {
  bool all = true;
  ForLanes(lanes, [&](int lane) {
    MBarrier barrier = BarrierAt(warp, in.operands[1], lane);
    barrier.Check();
    const uint64_t which = warp.Get(in.operands[2], lane);
    const bool odd = in.detail[0] != 0 ? (which & 1) != 0 : MBarrier::OddOf(which);
    const bool complete = barrier.odd() != odd;
    all = all && complete;
    warp.Set(in.operands[0], lane, complete);
  });
  return all ? Outcome::kNext : Outcome::kPoll;
}

Outcome PendingCount(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) {
    const int64_t count = MBarrier::PendingOf(warp.Get(in.operands[1], lane));
    warp.Set(in.operands[0], lane, static_cast<uint64_t>(count));
  });
  return Outcome::kNext;
}

// A thread's copies have ended when it gets here. One that .noinc does not name expects its own
// arrival itself, so that nothing changes.
Outcome ArriveAfterCopies(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) {
    MBarrier barrier = BarrierAt(warp, in.operands[0], lane);
    barrier.Check();
    if (in.detail[0] != 0) barrier.Change(0, 1, 0);
  });
  return Outcome::kNext;
}

Handler FindMBarrier(Instruction& in) {
  const std::string& what = in.words.size() > 1 ? in.words[1] : in.words[0];
  const size_t count = in.operands.size();
  if (what == "init" && count == 2) return Init;
  if (what == "inval" && count == 1) return Invalidate;
  if ((what == "arrive" || what == "arrive_drop") && (count == 2 || count == 3)) {
    in.detail[0] = in.Has("expect_tx");
    in.detail[1] = what == "arrive_drop";
    if (in.detail[0] != 0 && count != 3) UnknownForm(in);
    return Arrive;
  }
  if ((what == "expect_tx" || what == "complete_tx") && count == 2) {
    in.detail[0] = what == "expect_tx" ? 1 : -1;
    return ChangeBytes;
  }
  if ((what == "test_wait" || what == "try_wait") && (count == 3 || count == 4)) {
    in.detail[0] = in.Has("parity");  // operand 3: how long to sleep
    return TestWait;
  }
  if (what == "pending_count" && count == 2) return PendingCount;
  UnknownForm(in);
}

// Whether every thread of the cluster that has not ended has arrived in this phase. A lane notes
// the phase behind the one that it arrived in.
bool AllArrived(const Cluster& cluster) {
  for (const auto& cta : cluster.ctas) {
    for (const Warp& warp : cta->warps) {
      bool arrived = true;
      ForLanes(warp.alive, [&](int lane) {
        arrived = arrived && warp.cluster_phase[lane] == cluster.phase + 1;
      });
      if (!arrived) return false;
    }
  }
  return true;
}

void CompletePhase(Cluster* cluster) {
  if (!AllArrived(*cluster)) return;
  cluster->barrier.arrived = 0;
  ++cluster->phase;
  ++cluster->events;
}

Outcome ArriveAtCluster(Warp& warp, const Instruction&, uint32_t lanes) {
  Cluster* cluster = warp.cta->cluster;
  ForLanes(lanes, [&](int lane) {
    if (warp.cluster_phase[lane] == cluster->phase + 1) {
      throw std::runtime_error("a thread arrives at the cluster's barrier twice");
    }
    warp.cluster_phase[lane] = cluster->phase + 1;
    ++cluster->barrier.arrived;
  });
  ++cluster->events;
  CompletePhase(cluster);
  return Outcome::kNext;
}

// Tries again while threads are missing; those that have ended meanwhile are not.
Outcome WaitForCluster(Warp& warp, const Instruction&, uint32_t lanes) {
  Cluster* cluster = warp.cta->cluster;
  uint32_t waiting = 0;
  const auto look = [&] {
    waiting = 0;
    ForLanes(lanes, [&](int lane) {
      if (warp.cluster_phase[lane] == 0) {
        throw std::runtime_error("a thread waits for the cluster's barrier without an arrival");
      }
      if (warp.cluster_phase[lane] > cluster->phase) waiting |= uint32_t{1} << lane;
    });
  };
  look();
  if (waiting != 0) {
    CompletePhase(cluster);
    look();
  }
  if (waiting == 0) return Outcome::kNext;
  ForLanes(lanes & ~waiting, [&](int lane) { ++warp.place[lane]; });
  warp.polled |= waiting;
  return Outcome::kJumped;
}

Outcome Nothing(Warp&, const Instruction&, uint32_t) { return Outcome::kNext; }

// The lowest lane of those that the mask names.
Outcome Elect(Warp& warp, const Instruction& in, uint32_t lanes) {
  const auto members = static_cast<uint32_t>(warp.Get(in.operands[1], __builtin_ctz(lanes)));
  if (!Together(warp, lanes, members)) return Outcome::kParked;
  const uint32_t present = members & lanes;
  if (present == 0) throw std::runtime_error("elect.sync: no lane of its mask");
  const int leader = __builtin_ctz(present);
  ForLanes(lanes, [&](int lane) {
    warp.Set(in.operands[0].parts[0], lane, static_cast<uint64_t>(leader));
    warp.Set(in.operands[0].parts[1], lane, lane == leader);
  });
  return Outcome::kNext;
}

// detail: whether addresses are generic.
Outcome MapAddress(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) {
    const uint64_t offset = warp.Get(in.operands[1], lane) & kOffsetMask;
    const auto rank = static_cast<uint32_t>(warp.Get(in.operands[2], lane));
    if (rank >= warp.cta->cluster->ctas.size()) {
      throw std::runtime_error("mapa: no CTA " + std::to_string(rank) + " in the cluster");
    }
    const uint64_t window = in.detail[0] != 0 ? kSharedWindow : 0;
    warp.Set(in.operands[0], lane, window | uint64_t{rank} << kRankShift | offset);
  });
  return Outcome::kNext;
}

Outcome RankOfAddress(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) {
    const auto address = static_cast<uint32_t>(warp.Get(in.operands[1], lane));
    warp.Set(in.operands[0], lane, address >> kRankShift);
  });
  return Outcome::kNext;
}

Outcome CreatePolicy(Warp& warp, const Instruction& in, uint32_t lanes) {
  ForLanes(lanes, [&](int lane) { warp.Set(in.operands[0], lane, 0x12F0000000000000); });
  return Outcome::kNext;
}

Handler FindHint(const Instruction& in) {
  const std::string& opcode = in.words[0];
  if (opcode == "createpolicy") return CreatePolicy;
  if (opcode == "fence" && (in.Has("proxy") || in.Has("mbarrier_init"))) return Nothing;
  for (const char* hint :
       {"griddepcontrol", "setmaxnreg", "prefetch", "prefetchu", "applypriority", "discard"}) {
    if (opcode == hint) return Nothing;
  }
  return nullptr;
}

}  // namespace

uint32_t SharedAddressOf(const Warp& warp, const Operand& operand, int lane) {
  const uint64_t address = warp.Address(operand, lane);
  if ((address & ~kSharedWindow) >> 32 != 0) {
    throw std::runtime_error("an address outside of shared memory");
  }
  return static_cast<uint32_t>(address);
}

void CompleteBytes(Warp& warp, uint32_t address, int64_t bytes) {
  MBarrier barrier(warp, address);
  barrier.Check();
  barrier.Change(-bytes, 0, 0);
}

void UnknownForm(const Instruction& in) {
  std::string name;
  for (const std::string& word : in.words) name += (name.empty() ? "" : ".") + word;
  throw std::runtime_error("no such form in this machine: " + name);
}

Handler FindAsync(Instruction& in) {
  const std::string& opcode = in.words[0];
  if (opcode == "mbarrier") return FindMBarrier(in);
  if (opcode == "cp" && in.Has("mbarrier")) {
    in.detail[0] = in.Has("noinc");
    return ArriveAfterCopies;
  }
  if (opcode == "cp") return FindCopy(in);
  if (opcode == "barrier" && in.Has("cluster")) {
    return in.Has("arrive") ? ArriveAtCluster : WaitForCluster;
  }
  if (opcode == "elect") return Elect;
  if (opcode == "mapa") {
    in.detail[0] = !in.Has("shared::cluster");
    return MapAddress;
  }
  if (opcode == "getctarank") return RankOfAddress;
  return FindHint(in);
}

}  // namespace virtual_gpu
