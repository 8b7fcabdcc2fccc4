// A machine that runs PTX on the CPU: what a kernel computes, not how fast.
//
// Warps run one instruction at a time for the lanes that stand at it, lowest place first, so that
// lanes which diverged meet again. A register holds the values of 32 lanes. Copies and products
// that a GPU does in the background are done at once: an order that the GPU may choose, too.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace virtual_gpu {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// Shared memory is addressed by (rank of the CTA in its cluster << kRankShift) + offset, as .shared
// (32 bits), and with kSharedWindow on top as a generic address. Local memory of a lane likewise.
// Every other generic address is the host's.
constexpr int kRankShift = 24;
constexpr uint64_t kSharedWindow = uint64_t{1} << 60;
constexpr uint64_t kLocalWindow = uint64_t{2} << 60;

struct Register {
  uint64_t lane[kLanes];  // narrow values in the low bits; a predicate is 0 or 1
};

enum class Kind : uint8_t {
  kNone,       // _
  kRegister,   // reg
  kImmediate,  // value (floating point: its bits, in the width that it was written in)
  kAddress,    // [reg + value], reg may be -1; `param`: an offset into the kernel's parameters
  kVector,     // {parts}, and d|p as two parts
  kSpecial,    // value is a Special
  kLabel,      // value is the place of an instruction
  kName,       // a function or a parameter of a call, in `name`
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };

enum class Special : uint8_t {
  kTid,
  kNtid,
  kCtaid,
  kNctaid,
  kClusterCtaid,
  kClusterNctaid,
  kClusterId,
  kNclusterId,  // + x y z
  kLaneId,
  kWarpId,
  kClusterCtarank,
  kClusterNctarank,
  kLaneMaskLt,
  kLaneMaskLe,
  kLaneMaskGt,
  kLaneMaskGe,
  kLaneMaskEq,
  kSmId,
  kNsmId,
  kClock,
  kGlobalTimer,
  kDynamicSharedSize,
};

struct Operand {
  Kind kind = Kind::kNone;
  bool negated = false;           // !p
  Space space = Space::kGeneric;  // of an address that was written with a symbol
  int reg = -1;
  int axis = 0;          // of a Special: 0 x, 1 y, 2 z
  bool dynamic = false;  // an address in extern shared memory
  int64_t value = 0;
  std::string name;
  std::vector<Operand> parts;
};

enum class Outcome : uint8_t {
  kNext,     // the lanes go on with the next instruction
  kJumped,   // the handler has set the lanes' places
  kParked,   // the lanes wait here until others of their warp stand here, too
  kBlocked,  // the handler has put the lanes to sleep; they wake behind this instruction
  kPoll,     // the lanes go on with the next instruction, but other warps should run first
};

class Warp;
struct Instruction;
using Handler = Outcome (*)(Warp& warp, const Instruction& in, uint32_t lanes);

// Type of a value, out of a word such as "f32".
struct Type {
  char kind = 'b';  // b, u, s, f; 'h' for bf16, 'p' for pred
  int bits = 32;
  bool packed = false;  // f16x2, bf16x2, u16x2
};

struct Instruction {
  Handler run = nullptr;
  std::vector<std::string> words;  // the opcode's, "mma" "sync" ...
  std::vector<Operand> operands;
  int guard = -1;
  bool guard_negated = false;
  bool simple = false;     // always Outcome::kNext
  Type type, source;       // last two type words; of one: both
  int64_t detail[4] = {};  // what the handler's own decoding left
  std::string text;        // for messages
  bool Has(const char* word) const {
    for (const std::string& w : words) {
      if (w == word) return true;
    }
    return false;
  }
};

struct Variable {
  Space space;
  int64_t offset = 0;  // in shared memory, a lane's local memory or the parameters
  int64_t bytes = 0;
  char* data = nullptr;  // of a global or constant
};

struct Function {
  std::string name;
  bool entry = false;
  int64_t begin = 0;         // its first instruction in Module::code
  int64_t return_slot = -1;  // register with the place to return to
  std::vector<Variable> params, results;
  int64_t param_bytes = 0;
  int registers = 0;          // of an entry: with those of the functions that it may call
  int64_t static_shared = 0;  // bytes that it and they name; extern shared memory begins behind
};

struct Module {
  std::vector<Instruction> code;
  std::map<std::string, Function> functions;
  std::map<std::string, Variable> globals;
  int64_t shared_align = 16;  // of extern shared memory
  int64_t local_bytes = 0;    // of a lane
  std::vector<std::unique_ptr<char[]>> storage;
};

// Throws std::runtime_error, with the line, for what it does not know.
std::unique_ptr<Module> Parse(const std::string& text);

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

struct Launch {
  const Module* module = nullptr;
  const Function* function = nullptr;
  Dim3 grid, block, cluster;
  int64_t dynamic_shared = 0;
  std::vector<char> params;
};

// Where extern shared memory begins.
inline int64_t DynamicBegin(const Launch& launch) {
  const int64_t align = launch.module->shared_align;
  return (launch.function->static_shared + align - 1) / align * align;
}

struct Barrier {
  int arrived = 0;
  int expected = 0;
  int reduced = 0;  // of bar.red: predicates that are set
  struct Reader {
    Warp* warp;
    uint32_t lanes;
    const Instruction* in;
  };
  std::vector<Reader> readers;  // of its result
  std::vector<std::pair<Warp*, uint32_t>> waiting;
};

struct Cluster;

struct Cta {
  Cluster* cluster = nullptr;
  uint32_t rank = 0;
  Dim3 id;  // in the grid
  std::vector<char> shared;
  std::vector<Warp> warps;
  Barrier barriers[16 + 8];  // those of bar, then one for each warpgroup's wgmma.wait_group
};

struct Cluster {
  const Launch* launch = nullptr;
  std::vector<std::unique_ptr<Cta>> ctas;
  Barrier barrier;      // barrier.cluster; `arrived` counts threads
  uint64_t phase = 0;   // of it
  uint64_t ticks = 0;   // of clocks
  uint64_t events = 0;  // whatever may let a waiting thread go on: to find deadlocks
};

class Warp {
 public:
  Cta* cta = nullptr;
  int index = 0;  // in the CTA
  uint32_t alive = 0, blocked = 0, parked = 0;
  uint32_t polled = 0;  // lanes that should give way to others of the warp once
  int64_t place[kLanes] = {};
  uint64_t cluster_phase[kLanes] = {};  // of the barrier.cluster arrival that a lane waits for
  std::vector<Register> registers;
  std::vector<char> local;  // of all lanes, one behind the other

  const Launch& launch() const { return *cta->cluster->launch; }
  int64_t local_bytes() const { return launch().module->local_bytes; }
  int64_t dynamic_begin() const { return DynamicBegin(launch()); }

  // Value of an operand in a lane: a register, an immediate or a special register.
  uint64_t Get(const Operand& operand, int lane) const;
  void Set(const Operand& operand, int lane, uint64_t value);  // kNone: dropped
  // What [address] names in a lane: an address in `space` (generic addresses stay generic).
  uint64_t Address(const Operand& operand, int lane) const;
  // Host memory of `bytes` at an address. Throws where shared or local memory ends before, or
  // where the address is not aligned to `align`.
  char* Memory(Space space, uint64_t address, int64_t bytes, int64_t align, int lane) const;
  char* Shared(uint32_t address, int64_t bytes, int64_t align = 1) const;
};

template <typename F>
inline void ForLanes(uint32_t lanes, F&& f) {
  if (lanes == kAllLanes) {  // which a compiler makes vectors of
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
    return;
  }
  for (; lanes != 0; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

// Whether all lanes of `members` that are alive stand here; if not, the handler returns kParked.
inline bool Together(const Warp& warp, uint32_t lanes, uint32_t members) {
  return (members & warp.alive & ~lanes) == 0;
}

inline float AsFloat(uint64_t bits) {
  float value;
  const auto low = static_cast<uint32_t>(bits);
  std::memcpy(&value, &low, 4);
  return value;
}
inline uint32_t AsBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// numbers.cc: 16-bit and 8-bit floating point.
float HalfToFloat(uint16_t bits);
uint16_t FloatToHalf(float value);  // to nearest even; overflow to infinity
float Bf16ToFloat(uint16_t bits);
uint16_t FloatToBf16(float value);  // to nearest even
float E4m3ToFloat(uint8_t bits);
float E5m2ToFloat(uint8_t bits);
uint8_t FloatToE4m3(float value);  // to nearest even, saturating; NaN: 0x7F
uint8_t FloatToE5m2(float value);  // to nearest even, saturating to 57344; NaN: 0x7F

// Handler of an opcode, or null. Each looks at in.words and may leave in.detail; each throws for a
// form of its opcodes that it does not know.
Handler FindScalar(Instruction& in);  // scalar.cc: arithmetic, comparisons, conversions, mov
Handler FindMemory(Instruction& in);  // memory.cc: ld, st, atom, red, cvta, prefetch, fences
Handler FindControl(
    Instruction& in);  // control.cc: bra, call, ret, exit, bar, shfl, vote, redux...
Outcome WaitForWarpgroup(Warp& warp, const Instruction& in, uint32_t lanes);  // control.cc
Handler FindTensor(Instruction& in);  // tensor.cc: mma, wgmma, ldmatrix, stmatrix, movmatrix
Handler FindAsync(Instruction& in);   // async.cc: mbarrier, cp.async and its kin, clusters, mapa

// Runs all CTAs, cluster after cluster. Throws for an access out of bounds, a deadlock (with where
// each warp stands) and what the machine does not know.
void Run(const Launch& launch);

}  // namespace virtual_gpu
