// Running a launch: which warp goes on, which of its lanes, and what their operands are.
#include <algorithm>
#include <sstream>

#include "machine.h"

namespace virtual_gpu {

namespace {

constexpr int kTurn = 20000;        // instructions before other warps run
constexpr int kIdleSweeps = 20000;  // over all warps without an event: a deadlock

uint32_t Axis(const Dim3& dim, int axis) { return axis == 0 ? dim.x : axis == 1 ? dim.y : dim.z; }

Dim3 Split(uint64_t index, const Dim3& shape) {
  Dim3 id;
  id.x = static_cast<uint32_t>(index % shape.x);
  id.y = static_cast<uint32_t>(index / shape.x % shape.y);
  id.z = static_cast<uint32_t>(index / (uint64_t{shape.x} * shape.y));
  return id;
}

Dim3 Times(const Dim3& a, const Dim3& b) { return {a.x * b.x, a.y * b.y, a.z * b.z}; }
Dim3 Plus(const Dim3& a, const Dim3& b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }
Dim3 Over(const Dim3& a, const Dim3& b) { return {a.x / b.x, a.y / b.y, a.z / b.z}; }

uint64_t SpecialValue(const Warp& warp, const Operand& operand, int lane) {
  const Cta& cta = *warp.cta;
  const Launch& launch = warp.launch();
  const auto thread = static_cast<uint64_t>(warp.index) * kLanes + lane;
  const uint32_t bit = uint32_t{1} << lane;
  switch (static_cast<Special>(operand.value)) {
    case Special::kTid:
      return Axis(Split(thread, launch.block), operand.axis);
    case Special::kNtid:
      return Axis(launch.block, operand.axis);
    case Special::kCtaid:
      return Axis(cta.id, operand.axis);
    case Special::kNctaid:
      return Axis(launch.grid, operand.axis);
    case Special::kClusterCtaid:
      return Axis(Split(cta.rank, launch.cluster), operand.axis);
    case Special::kClusterNctaid:
      return Axis(launch.cluster, operand.axis);
    case Special::kClusterId:
      return Axis(Over(cta.id, launch.cluster), operand.axis);
    case Special::kNclusterId:
      return Axis(Over(launch.grid, launch.cluster), operand.axis);
    case Special::kLaneId:
      return lane;
    case Special::kWarpId:
      return warp.index;
    case Special::kClusterCtarank:
      return cta.rank;
    case Special::kClusterNctarank:
      return launch.cluster.count();
    case Special::kLaneMaskLt:
      return bit - 1;
    case Special::kLaneMaskLe:
      return bit | (bit - 1);
    case Special::kLaneMaskGt:
      return ~(bit | (bit - 1));
    case Special::kLaneMaskGe:
      return ~(bit - 1);
    case Special::kLaneMaskEq:
      return bit;
    case Special::kSmId:
      return cta.rank;
    case Special::kNsmId:
      return launch.cluster.count();
    case Special::kClock:
    case Special::kGlobalTimer:
      return ++cta.cluster->ticks;
    case Special::kDynamicSharedSize:
      return launch.dynamic_shared;
  }
  return 0;
}

// Lets a warp run until its lanes wait, poll or have had their turn.
class Turn {
 public:
  explicit Turn(Warp& warp) : warp_(warp), code_(warp.launch().module->code) {}

  void Run() {
    int budget = kTurn;
    while (budget > 0 && Choose()) Straight(&budget);
    warp_.polled = 0;
  }

 private:
  // The lanes at the lowest place, with those that wait there for company.
  bool Choose() {
    const uint32_t ready = warp_.alive & ~warp_.blocked & ~warp_.parked & ~warp_.polled;
    if (ready == 0) return false;
    here_ = INT64_MAX;
    ForLanes(ready, [&](int lane) { here_ = std::min(here_, warp_.place[lane]); });
    group_ = 0;
    limit_ = INT64_MAX;
    ForLanes(warp_.alive & ~warp_.blocked, [&](int lane) {
      const int64_t place = warp_.place[lane];
      if (place == here_) {
        group_ |= uint32_t{1} << lane;
      } else if (place > here_) {
        limit_ = std::min(limit_, place);
      }
    });
    warp_.parked &= ~group_;
    return true;
  }

  // Instruction after instruction, until the group meets other lanes or falls apart.
  void Straight(int* budget) {
    do {
      const Instruction& in = code_[here_];
      uint32_t lanes = group_;
      if (in.guard >= 0) {
        const Register& guard = warp_.registers[in.guard];
        uint32_t set = 0;
        for (int lane = 0; lane < kLanes; ++lane) set |= uint32_t(guard.lane[lane] & 1) << lane;
        lanes &= in.guard_negated ? ~set : set;
      }
      if (in.simple) {
        if (lanes != 0) Call(in, lanes);
      } else {
        // Whoever does not take part goes on; the handler may move whoever does.
        ForLanes(group_, [&](int lane) { warp_.place[lane] = here_ + 1; });
        if (lanes != 0) {
          ForLanes(lanes, [&](int lane) { warp_.place[lane] = here_; });
          if (!Special(in, lanes)) return;
        }
      }
      ++here_;
    } while (--*budget > 0 && here_ != limit_);
    ForLanes(group_, [&](int lane) { warp_.place[lane] = here_; });
  }

  Outcome Call(const Instruction& in, uint32_t lanes) {
    try {
      return in.run(warp_, in, lanes);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(error.what()) + ", PTX line " + in.text);
    }
  }

  // Whether the group goes on in one piece.
  bool Special(const Instruction& in, uint32_t lanes) {
    const Outcome outcome = Call(in, lanes);
    if (outcome == Outcome::kNext || outcome == Outcome::kBlocked || outcome == Outcome::kPoll) {
      ForLanes(lanes, [&](int lane) { warp_.place[lane] = here_ + 1; });
    }
    if (outcome == Outcome::kParked) warp_.parked |= lanes;
    if (outcome == Outcome::kPoll) warp_.polled |= lanes;
    return outcome == Outcome::kNext && (warp_.alive & group_) == group_;
  }

  Warp& warp_;
  const std::vector<Instruction>& code_;
  int64_t here_ = 0, limit_ = 0;
  uint32_t group_ = 0;
};

std::string Where(const Cluster& cluster) {
  std::ostringstream text;
  const std::vector<Instruction>& code = cluster.launch->module->code;
  for (const auto& cta : cluster.ctas) {
    for (const Warp& warp : cta->warps) {
      std::map<int64_t, uint32_t> places;
      ForLanes(warp.alive, [&](int lane) { places[warp.place[lane]] |= uint32_t{1} << lane; });
      for (const auto& [place, lanes] : places) {
        const int64_t at = (lanes & warp.blocked) != 0 ? place - 1 : place;
        text << "\n  CTA " << cta->id.x << " " << cta->id.y << " " << cta->id.z << ", warp "
             << warp.index << ", lanes " << std::hex << lanes << std::dec << ": " << code[at].text;
      }
    }
  }
  return text.str();
}

void RunCluster(Cluster* cluster) {
  uint64_t seen = ~uint64_t{0};
  for (int idle = 0; idle < kIdleSweeps; ++idle) {
    bool alive = false;
    for (const auto& cta : cluster->ctas) {
      for (Warp& warp : cta->warps) {
        if (warp.alive == 0) continue;
        Turn(warp).Run();
        alive = alive || warp.alive != 0;
      }
    }
    if (!alive) return;
    if (cluster->events != seen) idle = 0;
    seen = cluster->events;
  }
  throw std::runtime_error("no thread goes on:" + Where(*cluster));
}

// Registers of warps that are done, for the next: an entry's are megabytes.
std::vector<std::vector<Register>>& Spare() {
  thread_local std::vector<std::vector<Register>> spare;
  return spare;
}

void MakeCta(Cluster* cluster, uint32_t rank, const Dim3& id) {
  const Launch& launch = *cluster->launch;
  const Module& module = *launch.module;
  auto cta = std::make_unique<Cta>();
  cta->cluster = cluster;
  cta->rank = rank;
  cta->id = id;
  // 0xFF: what a kernel reads before it writes it is NaN, -1 or far out of range.
  cta->shared.assign(DynamicBegin(launch) + launch.dynamic_shared, static_cast<char>(0xFF));
  const auto threads = static_cast<int>(launch.block.count());
  cta->warps.resize((threads + kLanes - 1) / kLanes);
  for (size_t i = 0; i < cta->warps.size(); ++i) {
    Warp& warp = cta->warps[i];
    warp.cta = cta.get();
    warp.index = static_cast<int>(i);
    const int lanes = std::min(kLanes, threads - static_cast<int>(i) * kLanes);
    warp.alive = lanes == kLanes ? kAllLanes : (uint32_t{1} << lanes) - 1;
    std::fill_n(warp.place, kLanes, launch.function->begin);
    if (!Spare().empty()) {
      warp.registers = std::move(Spare().back());
      Spare().pop_back();
    }
    warp.registers.resize(launch.function->registers);
    warp.local.resize(module.local_bytes * kLanes);
  }
  cluster->ctas.push_back(std::move(cta));
}

}  // namespace

uint64_t Warp::Get(const Operand& operand, int lane) const {
  switch (operand.kind) {
    case Kind::kRegister: {
      const uint64_t value = registers[operand.reg].lane[lane];
      return operand.negated ? value ^ 1 : value;
    }
    case Kind::kImmediate:
      return static_cast<uint64_t>(operand.value);
    case Kind::kSpecial:
      return SpecialValue(*this, operand, lane);
    case Kind::kAddress:
      return Address(operand, lane);
    default:
      throw std::runtime_error("an operand without a value");
  }
}

void Warp::Set(const Operand& operand, int lane, uint64_t value) {
  if (operand.kind == Kind::kRegister) registers[operand.reg].lane[lane] = value;
}

uint64_t Warp::Address(const Operand& operand, int lane) const {
  uint64_t address = static_cast<uint64_t>(operand.value);
  if (operand.reg >= 0) address += registers[operand.reg].lane[lane];
  if (operand.reg < 0 && operand.space == Space::kShared) {
    address += uint64_t{cta->rank} << kRankShift;
    if (operand.dynamic) address += static_cast<uint64_t>(dynamic_begin());
  }
  return address;
}

char* Warp::Shared(uint32_t address, int64_t bytes, int64_t align) const {
  const uint32_t rank = address >> kRankShift;
  const int64_t offset = address & ((uint32_t{1} << kRankShift) - 1);
  if (rank >= cta->cluster->ctas.size()) {
    throw std::runtime_error("shared memory of CTA " + std::to_string(rank) + " of a cluster of " +
                             std::to_string(cta->cluster->ctas.size()));
  }
  std::vector<char>& shared = cta->cluster->ctas[rank]->shared;
  if (offset % align != 0 || offset + bytes > static_cast<int64_t>(shared.size())) {
    throw std::runtime_error(std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                             " of " + std::to_string(shared.size()) +
                             " of shared memory, aligned to " + std::to_string(align));
  }
  return shared.data() + offset;
}

char* Warp::Memory(Space space, uint64_t address, int64_t bytes, int64_t align, int lane) const {
  if (space == Space::kShared || (space == Space::kGeneric && (address & kSharedWindow) != 0)) {
    return Shared(static_cast<uint32_t>(address), bytes, align);
  }
  if (space == Space::kLocal || (space == Space::kGeneric && (address & kLocalWindow) != 0)) {
    const auto offset = static_cast<int64_t>(address & ~kLocalWindow);
    if (offset < 0 || offset + bytes > local_bytes()) {
      throw std::runtime_error("local memory ends before " + std::to_string(offset + bytes));
    }
    return const_cast<char*>(local.data()) + lane * local_bytes() + offset;
  }
  if (space == Space::kParam) {
    const std::vector<char>& params = launch().params;
    if (address + bytes > params.size()) throw std::runtime_error("parameters end before");
    return const_cast<char*>(params.data()) + address;
  }
  if (address % align != 0 || address < 4096 || (address >> 48) != 0) {
    std::ostringstream text;
    text << bytes << " bytes at global address 0x" << std::hex << address;
    throw std::runtime_error(text.str());
  }
  return reinterpret_cast<char*>(address);
}

void Run(const Launch& launch) {
  const Dim3 clusters = Over(launch.grid, launch.cluster);
  const Dim3 covered = Times(clusters, launch.cluster);
  if (covered.x != launch.grid.x || covered.y != launch.grid.y || covered.z != launch.grid.z) {
    throw std::runtime_error("a grid that is no multiple of its clusters");
  }
  for (uint64_t i = 0; i < clusters.count(); ++i) {
    Cluster cluster;
    cluster.launch = &launch;
    const Dim3 first = Times(Split(i, clusters), launch.cluster);
    for (uint32_t rank = 0; rank < launch.cluster.count(); ++rank) {
      MakeCta(&cluster, rank, Plus(first, Split(rank, launch.cluster)));
    }
    try {
      RunCluster(&cluster);
    } catch (const std::exception& error) {
      throw std::runtime_error(launch.function->name + ": " + error.what());
    }
    for (const auto& cta : cluster.ctas) {
      for (Warp& warp : cta->warps) Spare().push_back(std::move(warp.registers));
    }
  }
}

}  // namespace virtual_gpu
