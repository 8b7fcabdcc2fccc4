// PTX text as words.
#pragma once

#include <string>
#include <vector>

#include "machine.h"

namespace virtual_gpu {

struct Token {
  std::string text;
  int line;
};

// Debugging information and comments are dropped; quoted text is one token.
std::vector<Token> Tokens(const std::string& text);

std::vector<std::string> SplitAtDots(const std::string& opcode);

// False for a word that is no type, or no special register.
bool ParseType(const std::string& word, Type* type);
bool ParseSpecial(const std::string& name, Operand* operand);

}  // namespace virtual_gpu
