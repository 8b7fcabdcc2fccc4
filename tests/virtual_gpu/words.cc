#include "words.h"

#include <algorithm>
#include <cctype>

namespace virtual_gpu {

namespace {

bool NameChar(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '.' ||
         c == '%';
}

}  // namespace

std::vector<Token> Tokens(const std::string& text) {
  std::vector<Token> tokens;
  int line = 1;
  for (size_t i = 0; i < text.size();) {
    const char c = text[i];
    if (c == '\n') ++line;
    if (std::isspace(static_cast<unsigned char>(c)) != 0 || c == '\0') {
      ++i;
    } else if (text.compare(i, 2, "//") == 0 || text.compare(i, 5, ".loc\t") == 0 ||
               text.compare(i, 5, ".loc ") == 0 || text.compare(i, 6, ".file\t") == 0 ||
               text.compare(i, 6, ".file ") == 0) {
      while (i < text.size() && text[i] != '\n') ++i;
    } else if (text.compare(i, 2, "/*") == 0) {
      const size_t end = text.find("*/", i);
      line += static_cast<int>(std::count(text.begin() + i, text.begin() + end, '\n'));
      i = end + 2;
    } else if (c == '"') {
      const size_t end = text.find('"', i + 1);
      tokens.push_back({text.substr(i, end + 1 - i), line});
      i = end + 1;
    } else if (NameChar(c)) {
      size_t end = i;
      while (end < text.size() && (NameChar(text[end]) || text.compare(end, 2, "::") == 0)) {
        end += text[end] == ':' ? 2 : 1;
      }
      tokens.push_back({text.substr(i, end - i), line});
      i = end;
    } else {
      tokens.push_back({std::string(1, c), line});
      ++i;
    }
  }
  return tokens;
}

std::vector<std::string> SplitAtDots(const std::string& opcode) {
  std::vector<std::string> words;
  std::string word;
  for (const char c : opcode + ".") {
    if (c == '.') {
      words.push_back(word);
      word.clear();
    } else {
      word += c;
    }
  }
  return words;
}

bool ParseType(const std::string& word, Type* type) {
  static const std::map<std::string, Type> kTypes = {{"b8", {'b', 8}},
                                                     {"b16", {'b', 16}},
                                                     {"b32", {'b', 32}},
                                                     {"b64", {'b', 64}},
                                                     {"u8", {'u', 8}},
                                                     {"u16", {'u', 16}},
                                                     {"u32", {'u', 32}},
                                                     {"u64", {'u', 64}},
                                                     {"s8", {'s', 8}},
                                                     {"s16", {'s', 16}},
                                                     {"s32", {'s', 32}},
                                                     {"s64", {'s', 64}},
                                                     {"f16", {'f', 16}},
                                                     {"f32", {'f', 32}},
                                                     {"f64", {'f', 64}},
                                                     {"bf16", {'h', 16}},
                                                     {"pred", {'p', 1}},
                                                     {"f16x2", {'f', 16, true}},
                                                     {"bf16x2", {'h', 16, true}},
                                                     {"u16x2", {'u', 16, true}},
                                                     {"s16x2", {'s', 16, true}},
                                                     {"e4m3x2", {'4', 8, true}},
                                                     {"e5m2x2", {'5', 8, true}},
                                                     {"b128", {'b', 128}}};
  const auto found = kTypes.find(word);
  if (found == kTypes.end()) return false;
  *type = found->second;
  return true;
}

bool ParseSpecial(const std::string& name, Operand* operand) {
  static const std::map<std::string, Special> kNames = {
      {"%tid", Special::kTid},
      {"%ntid", Special::kNtid},
      {"%ctaid", Special::kCtaid},
      {"%nctaid", Special::kNctaid},
      {"%cluster_ctaid", Special::kClusterCtaid},
      {"%cluster_nctaid", Special::kClusterNctaid},
      {"%clusterid", Special::kClusterId},
      {"%nclusterid", Special::kNclusterId},
      {"%laneid", Special::kLaneId},
      {"%warpid", Special::kWarpId},
      {"%cluster_ctarank", Special::kClusterCtarank},
      {"%cluster_nctarank", Special::kClusterNctarank},
      {"%lanemask_lt", Special::kLaneMaskLt},
      {"%lanemask_le", Special::kLaneMaskLe},
      {"%lanemask_gt", Special::kLaneMaskGt},
      {"%lanemask_ge", Special::kLaneMaskGe},
      {"%lanemask_eq", Special::kLaneMaskEq},
      {"%smid", Special::kSmId},
      {"%nsmid", Special::kNsmId},
      {"%clock", Special::kClock},
      {"%clock64", Special::kClock},
      {"%globaltimer", Special::kGlobalTimer},
      {"%dynamic_smem_size", Special::kDynamicSharedSize}};
  std::string stem = name;
  const size_t dot = name.find('.');
  if (dot != std::string::npos) stem = name.substr(0, dot);
  const auto found = kNames.find(stem);
  if (found == kNames.end()) return false;
  operand->kind = Kind::kSpecial;
  operand->value = static_cast<int64_t>(found->second);
  if (dot != std::string::npos) operand->axis = name[dot + 1] - 'x';
  return true;
}

}  // namespace virtual_gpu
