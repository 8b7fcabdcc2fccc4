// Tensor cores: products of matrices in registers (mma) and in shared memory (wgmma), and moves of
// 8 x 8 matrices. Products are exact, sums are of fp32 (s32) in the order of k.
//
// A warp computes 16 rows in both: of a warpgroup's 64 the 16 that its index says, at its own time.
#include <immintrin.h>

#include <array>
#include <type_traits>

#include "machine.h"

namespace virtual_gpu {

namespace {

enum Format { kF16, kBf16, kTf32, kE4m3, kE5m2, kS8, kU8 };
enum Sums { kFloatSums, kHalfSums, kIntSums };
enum Flag { kNegate = 1, kTransposedA = 2, kTransposedB = 4 };

constexpr int kRows = 16, kMaxColumns = 256, kMaxDepth = 32;
constexpr int kChunk = 16;  // bytes that lie side by side in every layout

// What Find... leaves in Instruction::detail.
struct Product {
  explicit Product(const Instruction& in)
      : columns(static_cast<int>(in.detail[0] & 0xFFFF)),
        depth(static_cast<int>(in.detail[0] >> 16)),
        a(static_cast<Format>(in.detail[1] & 0xFF)),
        b(static_cast<Format>(in.detail[1] >> 8)),
        sums(static_cast<Sums>(in.detail[2])),
        flags(static_cast<int>(in.detail[3])) {}
  int columns, depth;
  Format a, b;
  Sums sums;
  int flags;
};

// T: float, or uint32_t for integers of either sign, modulo 2^32.
template <typename T>
struct Tile {
  alignas(32) T a[kRows][kMaxDepth];
  alignas(32) T b[kMaxDepth][kMaxColumns];
  alignas(32) T c[kRows][kMaxColumns];
};

[[noreturn]] void Unknown(const Instruction& in) {
  std::string name;
  for (const std::string& word : in.words) name += (name.empty() ? "" : ".") + word;
  throw std::runtime_error("no such form in this machine: " + name);
}

int BytesOf(Format format) { return format <= kBf16 ? 2 : format == kTf32 ? 4 : 1; }

template <typename T>
T Load(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

const float* EightBitValues(Format format) {
  using Table = std::array<float, 256>;
  static const std::array<Table, 2> tables = [] {
    std::array<Table, 2> made{};
    for (int code = 0; code < 256; ++code) {
      made[0][code] = E4m3ToFloat(static_cast<uint8_t>(code));
      made[1][code] = E5m2ToFloat(static_cast<uint8_t>(code));
    }
    return made;
  }();
  return tables[format == kE5m2].data();
}

void Decode(Format format, const char* from, int bytes, float* to) {
  if (format == kF16 && bytes == kChunk) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    _mm256_storeu_ps(to, _mm256_cvtph_ps(halves));
  } else if (format == kBf16 && bytes == kChunk) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256i words = _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
    _mm256_storeu_ps(to, _mm256_castsi256_ps(words));
  } else if (format == kF16) {
    for (int i = 0; i < bytes / 2; ++i) to[i] = HalfToFloat(Load<uint16_t>(from + 2 * i));
  } else if (format == kBf16) {
    for (int i = 0; i < bytes / 2; ++i) to[i] = Bf16ToFloat(Load<uint16_t>(from + 2 * i));
  } else if (format == kTf32) {
    for (int i = 0; i < bytes / 4; ++i) to[i] = AsFloat(Load<uint32_t>(from + 4 * i) & ~0x1FFFu);
  } else {
    const float* values = EightBitValues(format);
    for (int i = 0; i < bytes; ++i) to[i] = values[static_cast<uint8_t>(from[i])];
  }
}

void Decode(Format format, const char* from, int bytes, uint32_t* to) {
  for (int i = 0; i < bytes; ++i) {
    to[i] = format == kS8 ? static_cast<uint32_t>(static_cast<int8_t>(from[i]))
                          : static_cast<uint8_t>(from[i]);
  }
}

// The parts of {...}; an operand without braces is its only part.
struct Parts {
  explicit Parts(const Operand& operand)
      : first(operand.kind == Kind::kVector ? operand.parts.data() : &operand),
        count(operand.kind == Kind::kVector ? static_cast<int>(operand.parts.size()) : 1) {}
  const Operand& operator[](int i) const { return first[i]; }
  const Operand* first;
  int count;
};

// All lanes' values of an operand; those that lie in no register come into `buffer`.
const Register& Values(const Warp& warp, const Operand& operand, Register* buffer) {
  if (operand.kind == Kind::kRegister) return warp.registers[operand.reg];
  for (int lane = 0; lane < kLanes; ++lane) buffer->lane[lane] = warp.Get(operand, lane);
  return *buffer;
}

// Accumulator 4 * j + 2 * h + e of a lane: row lane / 4 + 8 * h, column 8 * j + 2 * (lane % 4) + e.
// Those of f16 are pairs: 2 * j + h.
int Row(int lane, int h) { return lane / 4 + 8 * h; }
int Column(int lane, int j) { return 8 * j + 2 * (lane % 4); }

float FromBits(uint64_t bits, float*) { return AsFloat(bits); }
uint32_t FromBits(uint64_t bits, uint32_t*) { return static_cast<uint32_t>(bits); }
uint32_t ToBits(float value) { return AsBits(value); }
uint32_t ToBits(uint32_t value) { return value; }

template <typename T>
void LoadSums(const Warp& warp, const Operand& operand, const Product& product, Tile<T>* tile) {
  const Parts parts(operand);
  for (int i = 0; i < parts.count; ++i) {
    Register buffer;
    const Register& values = Values(warp, parts[i], &buffer);
    if constexpr (std::is_same_v<T, float>) {
      if (product.sums == kHalfSums) {
        for (int lane = 0; lane < kLanes; ++lane) {
          float* to = &tile->c[Row(lane, i % 2)][Column(lane, i / 2)];
          to[0] = HalfToFloat(static_cast<uint16_t>(values.lane[lane]));
          to[1] = HalfToFloat(static_cast<uint16_t>(values.lane[lane] >> 16));
        }
        continue;
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      tile->c[Row(lane, i / 2 % 2)][Column(lane, i / 4) + i % 2] =
          FromBits(values.lane[lane], static_cast<T*>(nullptr));
    }
  }
}

template <typename T>
void StoreSums(Warp& warp, const Operand& operand, const Product& product, const Tile<T>& tile) {
  const Parts parts(operand);
  for (int i = 0; i < parts.count; ++i) {
    if (parts[i].kind != Kind::kRegister) continue;  // _
    uint64_t* to = warp.registers[parts[i].reg].lane;
    if constexpr (std::is_same_v<T, float>) {
      if (product.sums == kHalfSums) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const float* from = &tile.c[Row(lane, i % 2)][Column(lane, i / 2)];
          to[lane] = FloatToHalf(from[0]) | uint32_t{FloatToHalf(from[1])} << 16;
        }
        continue;
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      to[lane] = ToBits(tile.c[Row(lane, i / 2 % 2)][Column(lane, i / 4) + i % 2]);
    }
  }
}

// Register r of a lane holds row lane / 4 + 8 * (r % 2), bytes 4 * (lane % 4) + 16 * (r / 2) on.
template <typename T>
void LoadRegistersA(const Warp& warp, const Operand& operand, const Product& product,
                    Tile<T>* tile) {
  const Parts parts(operand);
  const int size = BytesOf(product.a);
  for (int r = 0; r < parts.count; ++r) {
    Register buffer;
    const Register& values = Values(warp, parts[r], &buffer);
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto word = static_cast<uint32_t>(values.lane[lane]);
      char bytes[4];
      std::memcpy(bytes, &word, 4);
      Decode(product.a, bytes, 4,
             &tile->a[Row(lane, r % 2)][(4 * (lane % 4) + kChunk * (r / 2)) / size]);
    }
  }
}

// Register r of a lane holds column lane / 4, bytes 4 * (lane % 4) + 16 * r on.
template <typename T>
void LoadRegistersB(const Warp& warp, const Operand& operand, const Product& product,
                    Tile<T>* tile) {
  const Parts parts(operand);
  const int size = BytesOf(product.b);
  for (int r = 0; r < parts.count; ++r) {
    Register buffer;
    const Register& values = Values(warp, parts[r], &buffer);
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto word = static_cast<uint32_t>(values.lane[lane]);
      char bytes[4];
      std::memcpy(bytes, &word, 4);
      T elements[4];
      Decode(product.b, bytes, 4, elements);
      const int depth = (4 * (lane % 4) + kChunk * r) / size;
      for (int i = 0; i < 4 / size; ++i) tile->b[depth + i][lane / 4] = elements[i];
    }
  }
}

// An operand of wgmma in shared memory. Chunks of 16 bytes are elements of one row (column of b),
// or if it is transposed those of one k.
class SharedOperand {
 public:
  SharedOperand(const Warp& warp, const Operand& operand) : shared_(warp.cta->shared) {
    Register buffer;
    const Register& values = Values(warp, operand, &buffer);
    const uint64_t bits = values.lane[0];
    for (int lane = 1; lane < kLanes; ++lane) {
      if (values.lane[lane] != bits) throw std::runtime_error("lanes have different descriptors");
    }
    start_ = (bits & 0x3FFF) << 4;
    leading_ = (bits >> 16 & 0x3FFF) << 4;
    stride_ = (bits >> 32 & 0x3FFF) << 4;
    base_ = bits >> 49 & 7;
    swizzle_ = (4 - static_cast<int>(bits >> 62)) % 4;
  }

  // Chunk `chunk` of the k of a row.
  const char* OfRow(int row, int chunk) const {
    const uint64_t eight = uint64_t(row % 8) * (kChunk << swizzle_) + uint64_t(row / 8) * stride_;
    return At(eight + uint64_t(chunk) * (swizzle_ == 0 ? leading_ : kChunk));
  }

  // Chunk `chunk` of the rows of a k.
  const char* OfDepth(int depth, int chunk) const {
    const int atom = 1 << swizzle_;  // chunks
    const uint64_t eight = uint64_t(depth % 8) * (kChunk << swizzle_);
    if (swizzle_ == 0) return At(eight + depth / 8 * leading_ + chunk * stride_);
    return At(eight + depth / 8 * stride_ + chunk % atom * kChunk + chunk / atom * leading_);
  }

 private:
  // Bits 7 and up of an address, as many as the swizzle has, flip bits 4 and up.
  const char* At(uint64_t offset) const {
    uint64_t at = start_ + offset;
    at ^= (((at >> 7) - base_) & ((1u << swizzle_) - 1)) << 4;
    if (at + kChunk > shared_.size()) {
      throw std::runtime_error("an operand in shared memory ends at " +
                               std::to_string(at + kChunk) + " of " +
                               std::to_string(shared_.size()));
    }
    return shared_.data() + at;
  }

  const std::vector<char>& shared_;
  uint64_t start_, leading_, stride_, base_;
  int swizzle_;  // 0: none, else log2 of the chunks of a row: 1 for 32 bytes, 3 for 128
};

template <typename T>
void LoadSharedA(const SharedOperand& from, int first, const Product& product, Tile<T>* tile) {
  const int elements = kChunk / BytesOf(product.a);
  if ((product.flags & kTransposedA) == 0) {
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < 2; ++i) {
        Decode(product.a, from.OfRow(first + row, i), kChunk, &tile->a[row][i * elements]);
      }
    }
    return;
  }
  for (int depth = 0; depth < product.depth; ++depth) {
    for (int row = 0; row < kRows; row += elements) {
      T values[kChunk];
      Decode(product.a, from.OfDepth(depth, (first + row) / elements), kChunk, values);
      for (int i = 0; i < elements; ++i) tile->a[row + i][depth] = values[i];
    }
  }
}

template <typename T>
void LoadSharedB(const SharedOperand& from, const Product& product, Tile<T>* tile) {
  const int elements = kChunk / BytesOf(product.b);
  if ((product.flags & kTransposedB) != 0) {
    for (int depth = 0; depth < product.depth; ++depth) {
      for (int column = 0; column < product.columns; column += elements) {
        Decode(product.b, from.OfDepth(depth, column / elements), kChunk, &tile->b[depth][column]);
      }
    }
    return;
  }
  for (int column = 0; column < product.columns; ++column) {
    for (int chunk = 0; chunk < 2; ++chunk) {
      T values[kChunk];
      Decode(product.b, from.OfRow(column, chunk), kChunk, values);
      for (int i = 0; i < elements; ++i) tile->b[chunk * elements + i][column] = values[i];
    }
  }
}

template <typename T>
void Multiply(const Product& product, Tile<T>* tile) {
  typedef T Vector __attribute__((vector_size(32)));
  constexpr int kBlock = 8;  // rows whose sums stay in registers
  for (int column = 0; column < product.columns; column += 8) {
    for (int row = 0; row < kRows; row += kBlock) {
      Vector sums[kBlock];
      for (int i = 0; i < kBlock; ++i) std::memcpy(&sums[i], &tile->c[row + i][column], 32);
      for (int k = 0; k < product.depth; ++k) {
        Vector b;
        std::memcpy(&b, &tile->b[k][column], 32);
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; ++i) sums[i] += tile->a[row + i][k] * b;
      }
      for (int i = 0; i < kBlock; ++i) std::memcpy(&tile->c[row + i][column], &sums[i], 32);
    }
  }
}

// Whether the whole warp stands here. An instruction for it is not defined in a part of it.
bool WholeWarp(const Warp& warp, uint32_t lanes) {
  if (!Together(warp, lanes, kAllLanes)) return false;
  if (lanes != kAllLanes) throw std::runtime_error("some lanes of the warp have ended");
  return true;
}

template <typename T>
Outcome RunMma(Warp& warp, const Instruction& in, uint32_t lanes) {
  if (!WholeWarp(warp, lanes)) return Outcome::kParked;
  const Product product(in);
  Tile<T> tile;
  LoadRegistersA(warp, in.operands[1], product, &tile);
  LoadRegistersB(warp, in.operands[2], product, &tile);
  LoadSums(warp, in.operands[3], product, &tile);
  Multiply(product, &tile);
  StoreSums(warp, in.operands[0], product, tile);
  return Outcome::kNext;
}

template <typename T>
Outcome RunWgmma(Warp& warp, const Instruction& in, uint32_t lanes) {
  if (!WholeWarp(warp, lanes)) return Outcome::kParked;
  const Product product(in);
  Tile<T> tile;
  if (in.operands[1].kind == Kind::kVector) {
    LoadRegistersA(warp, in.operands[1], product, &tile);
  } else {
    LoadSharedA(SharedOperand(warp, in.operands[1]), kRows * (warp.index % 4), product, &tile);
  }
  if ((product.flags & kNegate) != 0) {
    for (int row = 0; row < kRows; ++row) {
      for (int k = 0; k < product.depth; ++k) tile.a[row][k] = -tile.a[row][k];
    }
  }
  LoadSharedB(SharedOperand(warp, in.operands[2]), product, &tile);
  if ((warp.Get(in.operands[3], 0) & 1) != 0) {
    LoadSums(warp, in.operands[0], product, &tile);
  } else {
    for (auto& row : tile.c) std::memset(row, 0, product.columns * sizeof(T));
  }
  Multiply(product, &tile);
  StoreSums(warp, in.operands[0], product, tile);
  return Outcome::kNext;
}

Outcome Nothing(Warp&, const Instruction&, uint32_t) { return Outcome::kNext; }

// Where the first 8 lanes for each matrix say that its rows of 16 bytes lie.
void Rows(const Warp& warp, const Instruction& in, const Operand& operand, char** rows) {
  const bool shared = in.Has("shared") || in.Has("shared::cta");
  const Space space = shared ? Space::kShared : Space::kGeneric;
  for (int lane = 0; lane < 8 * in.detail[0]; ++lane) {
    rows[lane] = warp.Memory(space, warp.Address(operand, lane), kChunk, kChunk, lane);
  }
}

// detail: how many matrices, whether they are transposed. A lane has row lane / 4 of each, elements
// 2 * (lane % 4) and the next; of a transposed one it has column lane / 4.
Outcome LoadMatrices(Warp& warp, const Instruction& in, uint32_t lanes) {
  if (!WholeWarp(warp, lanes)) return Outcome::kParked;
  const auto count = static_cast<int>(in.detail[0]);
  char* rows[kLanes];
  Rows(warp, in, in.operands[1], rows);
  const Parts parts(in.operands[0]);
  for (int m = 0; m < count; ++m) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int outer = lane / 4, inner = 2 * (lane % 4);
      uint32_t word;
      if (in.detail[1] == 0) {
        word = Load<uint32_t>(rows[8 * m + outer] + 2 * inner);
      } else {
        word = Load<uint16_t>(rows[8 * m + inner] + 2 * outer) |
               uint32_t{Load<uint16_t>(rows[8 * m + inner + 1] + 2 * outer)} << 16;
      }
      warp.Set(parts[m], lane, word);
    }
  }
  return Outcome::kNext;
}

Outcome StoreMatrices(Warp& warp, const Instruction& in, uint32_t lanes) {
  if (!WholeWarp(warp, lanes)) return Outcome::kParked;
  const auto count = static_cast<int>(in.detail[0]);
  char* rows[kLanes];
  Rows(warp, in, in.operands[0], rows);
  const Parts parts(in.operands[1]);
  for (int m = 0; m < count; ++m) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int outer = lane / 4, inner = 2 * (lane % 4);
      const auto word = static_cast<uint32_t>(warp.Get(parts[m], lane));
      if (in.detail[1] == 0) {
        std::memcpy(rows[8 * m + outer] + 2 * inner, &word, 4);
      } else {
        const uint32_t high = word >> 16;
        std::memcpy(rows[8 * m + inner] + 2 * outer, &word, 2);
        std::memcpy(rows[8 * m + inner + 1] + 2 * outer, &high, 2);
      }
    }
  }
  return Outcome::kNext;
}

Outcome TransposeMatrix(Warp& warp, const Instruction& in, uint32_t lanes) {
  if (!WholeWarp(warp, lanes)) return Outcome::kParked;
  uint16_t matrix[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t word = warp.Get(in.operands[1], lane);
    matrix[lane / 4][2 * (lane % 4)] = static_cast<uint16_t>(word);
    matrix[lane / 4][2 * (lane % 4) + 1] = static_cast<uint16_t>(word >> 16);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = 2 * (lane % 4);
    const uint32_t high = matrix[row + 1][lane / 4];
    warp.Set(in.operands[0], lane, matrix[row][lane / 4] | high << 16);
  }
  return Outcome::kNext;
}

Format FormatOf(const Instruction& in, const std::string& word) {
  static const std::map<std::string, Format> formats = {
      {"f16", kF16},   {"bf16", kBf16}, {"tf32", kTf32}, {"e4m3", kE4m3},
      {"e5m2", kE5m2}, {"s8", kS8},     {"u8", kU8}};
  const auto found = formats.find(word);
  if (found == formats.end()) Unknown(in);
  return found->second;
}

// Reads "m64n128k16" and the types of the result and of both operands; checks how many registers
// the result has.
void DecodeProduct(Instruction& in, int rows, const std::string& result, const std::string& a,
                   const std::string& b) {
  int m = 0, n = 0, k = 0;
  for (const std::string& word : in.words) {
    if (std::sscanf(word.c_str(), "m%dn%dk%d", &m, &n, &k) == 3) break;
  }
  const Format left = FormatOf(in, a), right = FormatOf(in, b);
  const bool integers = left >= kS8;
  const Sums sums = result == "f16" ? kHalfSums : integers ? kIntSums : kFloatSums;
  if (m != rows || n < 8 || n > kMaxColumns || n % 8 != 0 || k * BytesOf(left) > kMaxDepth ||
      k * BytesOf(left) % kChunk != 0 || BytesOf(left) != BytesOf(right) ||
      integers != (right >= kS8) || (result != "f16" && result != (integers ? "s32" : "f32")) ||
      (sums == kHalfSums && integers) || in.Has("satfinite") ||
      Parts(in.operands[0]).count != n / 8 * (sums == kHalfSums ? 2 : 4)) {
    Unknown(in);
  }
  in.detail[0] = n | k << 16;
  in.detail[1] = left | right << 8;
  in.detail[2] = sums;
}

Handler FindMma(Instruction& in) {
  const size_t count = in.words.size();
  if (count < 10 || !in.Has("row") || !in.Has("col") || in.operands.size() != 4) Unknown(in);
  const std::string* types = &in.words[count - 4];
  if (types[0] != types[3]) Unknown(in);
  DecodeProduct(in, kRows, types[0], types[1], types[2]);
  const Product product(in);
  const int bytes = product.depth * BytesOf(product.a);
  if (Parts(in.operands[1]).count != bytes / 8 || Parts(in.operands[2]).count != bytes / 16 ||
      Parts(in.operands[3]).count != Parts(in.operands[0]).count) {
    Unknown(in);
  }
  return product.sums == kIntSums ? RunMma<uint32_t> : RunMma<float>;
}

// d, a, b, scale-d{, negate a, negate b{, transpose a, transpose b}}; an a in registers has no
// transpose.
Handler FindWgmma(Instruction& in) {
  const std::string& what = in.words[1];
  if (what == "wait_group") return WaitForWarpgroup;
  if (what == "fence" || what == "commit_group") return Nothing;
  const size_t count = in.words.size();
  if (what != "mma_async" || count < 8 || in.operands.size() < 4 || in.Has("sp")) Unknown(in);
  DecodeProduct(in, 4 * kRows, in.words[count - 3], in.words[count - 2], in.words[count - 1]);
  const Product product(in);
  const bool registers = in.operands[1].kind == Kind::kVector;
  const auto value = [&](size_t i) { return i < in.operands.size() ? in.operands[i].value : 0; };
  int flags = 0;
  if (product.sums != kIntSums) {
    if (in.operands.size() < 6 || value(4) * value(4) != 1 || value(5) * value(5) != 1) {
      Unknown(in);
    }
    if (value(4) != value(5)) flags |= kNegate;
    if (!registers && value(6) != 0) flags |= kTransposedA;
    if (value(registers ? 6 : 7) != 0) flags |= kTransposedB;
  }
  if (product.depth * BytesOf(product.a) != kMaxDepth ||
      (registers && Parts(in.operands[1]).count != 4) ||
      (BytesOf(product.a) != 2 && (flags & (kTransposedA | kTransposedB)) != 0)) {
    Unknown(in);
  }
  in.detail[3] = flags;
  return product.sums == kIntSums ? RunWgmma<uint32_t> : RunWgmma<float>;
}

Handler FindMatrices(Instruction& in, const Operand& registers, Handler handler) {
  in.detail[0] = in.Has("x4") ? 4 : in.Has("x2") ? 2 : 1;
  in.detail[1] = in.Has("trans");
  if (!in.Has("m8n8") || !in.Has("b16") || Parts(registers).count != in.detail[0]) Unknown(in);
  return handler;
}

}  // namespace

Handler FindTensor(Instruction& in) {
  const std::string& opcode = in.words[0];
  if (opcode == "mma") return FindMma(in);
  if (opcode == "wgmma") return FindWgmma(in);
  if (opcode == "movmatrix") return TransposeMatrix;
  if (opcode != "ldmatrix" && opcode != "stmatrix") return nullptr;
  if (in.operands.size() != 2) Unknown(in);
  return opcode == "ldmatrix" ? FindMatrices(in, in.operands[0], LoadMatrices)
                              : FindMatrices(in, in.operands[1], StoreMatrices);
}

}  // namespace virtual_gpu
