#include "fat_binary.h"

namespace virtual_gpu {

namespace {

// What nvcc's host code registers, and what that points to: a header and then files, each with a
// header of its own, whose sizes the headers tell.
struct Wrapper {
  uint32_t magic, version;
  const char* data;
  void* rest;
};

struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;  // behind the header
};

struct FileHeader {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t bytes;  // behind the header
};

constexpr uint32_t kWrapperMagic = 0x466243B1, kMagic = 0xBA55ED50;
constexpr uint16_t kPtx = 1;

template <typename T>
T ReadAt(const char* data) {
  T value;
  std::memcpy(&value, data, sizeof(T));
  return value;
}

}  // namespace

void FatBinary::Read() {
  const auto wrapper = ReadAt<Wrapper>(static_cast<const char*>(wrapper_));
  if (wrapper.magic != kWrapperMagic) throw std::runtime_error("no fat binary");
  const auto header = ReadAt<Header>(wrapper.data);
  if (header.magic != kMagic) throw std::runtime_error("no fat binary behind its wrapper");
  const char* at = wrapper.data + header.header_bytes;
  const char* end = at + header.bytes;
  while (at < end) {
    const auto file = ReadAt<FileHeader>(at);
    if (file.kind == kPtx) {
      const std::string text(at + file.header_bytes, file.bytes);
      if (text.find(".version") == std::string::npos) {
        throw std::runtime_error("the PTX is compressed: compile with -Xfatbin -compress=false");
      }
      text_ = text;
      return;
    }
    at += file.header_bytes + file.bytes;
  }
  throw std::runtime_error("a fat binary without PTX: compile with code=compute_90a");
}

const Module& FatBinary::module() {
  if (module_ == nullptr) {
    if (text_.empty()) Read();
    module_ = Parse(text_.c_str());  // up to the zeros that fill it up
  }
  return *module_;
}

size_t FatBinary::PlaceOf(const std::string& entry) const {
  const size_t place = text_.find(".entry " + entry + "(");
  if (place == std::string::npos) throw std::runtime_error("no kernel " + entry);
  return place;
}

Dim3 FatBinary::Directive(const std::string& entry, const std::string& directive) const {
  Dim3 result{0, 0, 0};
  const size_t begin = PlaceOf(entry), end = text_.find('{', begin);
  const size_t found = text_.find(directive + " ", begin);
  if (found == std::string::npos || found > end) return result;
  const int numbers = std::sscanf(text_.c_str() + found + directive.size(), "%u, %u, %u", &result.x,
                                  &result.y, &result.z);
  if (numbers < 2) result.y = 1;
  if (numbers < 3) result.z = 1;
  return result;
}

void Kernel::Prepare() {
  if (function != nullptr) return;
  const Module& module = binary->module();
  const auto found = module.functions.find(name);
  if (found == module.functions.end()) throw std::runtime_error("no kernel " + name);
  max_threads = binary->Directive(name, ".maxntid").count();
  cluster = binary->Directive(name, ".reqnctapercluster");
  function = &found->second;
  static_shared = function->static_shared;
}

}  // namespace virtual_gpu
