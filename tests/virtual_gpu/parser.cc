// PTX text into instructions whose operands are resolved and whose handlers are found.
#include <algorithm>
#include <cctype>

#include "words.h"

namespace virtual_gpu {

namespace {

constexpr int64_t kDynamic = INT64_MIN;  // offset of extern shared memory

[[noreturn]] void Fail(int line, const std::string& what) {
  throw std::runtime_error("PTX line " + std::to_string(line) + ": " + what);
}

struct Scope {
  std::map<std::string, int> registers;
  std::map<std::string, std::pair<int, int>> families;  // "%r" of %r<10>: first, count
  std::map<std::string, Variable> variables;
};

struct Fixup {
  int64_t at;
  size_t operand;
  std::string label;
  int line;
};

class Parser {
 public:
  explicit Parser(const std::string& text) : tokens_(Tokens(text)), module_(new Module) {}

  std::unique_ptr<Module> Parse() {
    Outline();
    // Functions first: their registers come before those of every entry.
    for (const bool entry : {false, true}) {
      for (const auto& [name, place] : bodies_) {
        if (module_->functions.at(name).entry == entry) Body(name, place);
      }
    }
    for (Instruction& in : module_->code) Resolve(in);
    return std::move(module_);
  }

 private:
  const std::string& Peek(size_t ahead = 0) const {
    static const std::string kEnd;
    return at_ + ahead < tokens_.size() ? tokens_[at_ + ahead].text : kEnd;
  }
  int Line() const { return at_ < tokens_.size() ? tokens_[at_].line : -1; }
  std::string Next() {
    if (at_ >= tokens_.size()) Fail(-1, "the text ends early");
    return tokens_[at_++].text;
  }
  void Expect(const std::string& text) {
    if (Next() != text) Fail(tokens_[at_ - 1].line, "expected " + text);
  }
  void SkipBraces() {
    int depth = 0;
    do {
      const std::string text = Next();
      depth += text == "{" ? 1 : text == "}" ? -1 : 0;
    } while (depth > 0);
  }

  // The text from end to end, without the bodies.
  void Outline() {
    while (at_ < tokens_.size()) {
      const std::string text = Next();
      if (text == ".entry" || text == ".func") {
        Signature(text == ".entry");
      } else if (text == ".section") {
        while (Peek() != "{") Next();
        SkipBraces();
      } else if (text == ".global" || text == ".const" || text == ".shared") {
        Declare(text, &module_->globals, nullptr);
      }
    }
  }

  void Signature(bool entry) {
    Function function;
    function.entry = entry;
    std::map<std::string, Variable> named;
    if (Peek() == "(") Parameters(&function, &function.results, &named);
    function.name = Next();
    if (Peek() == "(") Parameters(&function, &function.params, &named);
    while (Peek() != "{" && Peek() != ";") Next();  // .maxntid, .noreturn and the like
    const bool defined = Peek() == "{";
    if (defined) {
      bodies_[function.name] = at_;
      SkipBraces();
    }
    if (defined || module_->functions.count(function.name) == 0) {
      module_->functions[function.name] = function;
      parameters_[function.name] = named;
    }
  }

  // Those of an entry lie in the launch's parameters, a function's in local memory of each lane.
  void Parameters(Function* function, std::vector<Variable>* list,
                  std::map<std::string, Variable>* named) {
    Expect("(");
    while (Peek() != ")") {
      if (Peek() == ",") Next();
      Expect(".param");
      int64_t align = 1;
      std::string name;
      Variable variable;
      variable.bytes = Shape(&align, &name);
      int64_t* end = function->entry ? &function->param_bytes : &module_->local_bytes;
      variable.space = function->entry ? Space::kParam : Space::kLocal;
      variable.offset = (*end + align - 1) / align * align;
      *end = variable.offset + variable.bytes;
      list->push_back(variable);
      (*named)[name] = variable;
    }
    Expect(")");
  }

  // ".align 8 .b8 name[72]": its bytes.
  int64_t Shape(int64_t* align, std::string* name) {
    Type type;
    int64_t count = 1;
    *align = 0;
    while (Peek()[0] == '.') {
      const std::string word = Next();
      if (word == ".align") {
        *align = std::stoll(Next());
      } else if (word == ".v2" || word == ".v4") {
        count *= word[2] - '0';
      } else if (word != ".ptr" && !ParseType(word.substr(1), &type)) {
        if (word != ".attribute") continue;  // .extern, .visible and state spaces of pointers
        while (Next() != ")") {
        }
      }
    }
    *name = Next();
    const int64_t element = std::max(1, type.bits / 8);
    if (*align == 0) *align = element;
    while (Peek() == "[") {
      Next();
      count = Peek() == "]" ? 0 : count * std::stoll(Next());
      Expect("]");
    }
    element_ = element;
    return count * element;
  }

  void Declare(const std::string& word, std::map<std::string, Variable>* into, Scope* scope) {
    int64_t align = 1;
    std::string name;
    Variable variable;
    variable.bytes = Shape(&align, &name);
    if (word == ".shared") {
      variable.space = Space::kShared;
      if (variable.bytes == 0) {
        module_->shared_align = std::max(module_->shared_align, align);
        variable.offset = kDynamic;
      } else {
        variable.offset = -align;  // a place in it is found where a kernel names it
      }
    } else if (word == ".local" || word == ".param") {
      variable.space = Space::kLocal;
      int64_t& end = module_->local_bytes;
      variable.offset = (end + align - 1) / align * align;
      end = variable.offset + variable.bytes;
    } else {
      variable.space = Space::kGlobal;
      module_->storage.emplace_back(new char[variable.bytes + align]());
      char* data = module_->storage.back().get();
      variable.data = data + (align - reinterpret_cast<uintptr_t>(data) % align) % align;
      if (Peek() == "=") Initialise(variable);
    }
    (scope != nullptr ? scope->variables : *into)[name] = variable;
    while (Next() != ";") {
    }
  }

  void Initialise(const Variable& variable) {
    Expect("=");
    const bool list = Peek() == "{";
    if (list) Next();
    for (int64_t i = 0; Peek() != "}" && Peek() != ";"; ++i) {
      if (Peek() == ",") Next();
      const Operand operand = ParseOperand();
      if (operand.kind != Kind::kImmediate) Fail(Line(), "an initial value that is no number");
      std::memcpy(variable.data + i * element_, &operand.value, element_);
    }
    if (list) Expect("}");
  }

  int NewRegister() { return registers_++; }

  // A kernel has the shared memory that it or a function names, not what others of its file do.
  int64_t SharedPlace(const std::string& name, const Variable& variable) {
    const auto found = shared_.find(name);
    if (found != shared_.end()) return found->second;
    const int64_t align = -variable.offset;
    const int64_t place = (shared_end_ + align - 1) / align * align;
    shared_end_ = place + variable.bytes;
    return shared_[name] = place;
  }

  void Body(const std::string& name, size_t place) {
    Function& function = module_->functions.at(name);
    at_ = place;
    if (function.entry) {
      registers_ = shared_registers_;
      shared_ = shared_of_functions_;
      shared_end_ = end_of_functions_;
    }
    scopes_.assign(1, Scope());
    for (const auto& [parameter, variable] : parameters_.at(name)) {
      scopes_[0].variables[parameter] = variable;
    }
    labels_.clear();
    fixups_.clear();
    function.begin = static_cast<int64_t>(module_->code.size());
    function.return_slot = function.entry ? -1 : NewRegister();
    current_ = &function;
    Expect("{");
    while (!scopes_.empty()) Statement();
    Emit("ret", Operand(), -1, false);  // behind a body that does not end with one
    for (const Fixup& fixup : fixups_) {
      const auto found = labels_.find(fixup.label);
      if (found == labels_.end()) Fail(fixup.line, "no label or name " + fixup.label);
      Operand& operand = module_->code[fixup.at].operands[fixup.operand];
      operand.kind = Kind::kLabel;
      operand.value = found->second;
    }
    function.registers = registers_;
    function.static_shared = shared_end_;
    if (!function.entry) {
      shared_registers_ = registers_;
      shared_of_functions_ = shared_;
      end_of_functions_ = shared_end_;
    }
  }

  void Statement() {
    const int line = Line();
    const std::string text = Next();
    if (text == "{") {
      scopes_.emplace_back();
    } else if (text == "}") {
      scopes_.pop_back();
    } else if (text == ";") {
    } else if (text == ".reg") {
      Registers();
    } else if (text == ".local" || text == ".shared" || text == ".param") {
      Declare(text, nullptr, &scopes_.back());
    } else if (text[0] == '.') {
      while (Next() != ";") {  // .pragma
      }
    } else if (Peek() == ":") {
      Next();
      if (Peek() == ".branchtargets" || Peek() == ".callprototype") {
        Fail(line, "indirect branches and calls");
      }
      labels_[text] = static_cast<int64_t>(module_->code.size());
    } else {
      const Operand guard = Guard(text);
      Emit(opcode_, guard, line);
    }
  }

  // Of "@!%p1 opcode": the predicate; leaves the opcode in opcode_.
  Operand Guard(const std::string& text) {
    opcode_ = text;
    Operand guard;
    if (text != "@") return guard;
    if (Peek() == "!") {
      Next();
      guard.negated = true;
    }
    guard.kind = Kind::kRegister;
    guard.reg = FindRegister(Next());
    opcode_ = Next();
    return guard;
  }

  void Registers() {
    Next();  // their type
    do {
      std::string name = Next();
      if (name == ",") name = Next();
      if (Peek() == "<") {
        Next();
        const int count = std::stoi(Next());
        Expect(">");
        scopes_.back().families[name] = {registers_, count};
        registers_ += count;
      } else {
        scopes_.back().registers[name] = NewRegister();
      }
    } while (Peek() == ",");
    Expect(";");
  }

  int FindRegister(const std::string& name) const {
    size_t digits = name.size();
    while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1])) != 0) --digits;
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->registers.find(name);
      if (found != scope->registers.end()) return found->second;
      const auto family = scope->families.find(name.substr(0, digits));
      if (family != scope->families.end() && digits < name.size()) {
        const int index = std::stoi(name.substr(digits));
        if (index < family->second.second) return family->second.first + index;
      }
    }
    return -1;
  }

  const Variable* FindVariable(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->variables.find(name);
      if (found != scope->variables.end()) return &found->second;
    }
    const auto found = module_->globals.find(name);
    return found == module_->globals.end() ? nullptr : &found->second;
  }

  static bool ParseNumber(const std::string& text, Operand* operand) {
    if (std::isdigit(static_cast<unsigned char>(text[0])) == 0) return false;
    operand->kind = Kind::kImmediate;
    if (text.compare(0, 2, "0f") == 0 || text.compare(0, 2, "0F") == 0 ||
        text.compare(0, 2, "0d") == 0 || text.compare(0, 2, "0D") == 0) {
      operand->value = static_cast<int64_t>(std::stoull(text.substr(2), nullptr, 16));
    } else if (text.find('.') != std::string::npos) {
      const double value = std::stod(text);  // as in createpolicy: nothing calculates with it
      std::memcpy(&operand->value, &value, 8);
    } else {
      std::string digits = text;
      if (digits.back() == 'U') digits.pop_back();
      operand->value = static_cast<int64_t>(std::stoull(digits, nullptr, 0));
    }
    return true;
  }

  void ParseList(const std::string& end, Operand* operand) {
    operand->kind = Kind::kVector;
    while (Peek() != end) {
      if (Peek() == ",") Next();
      operand->parts.push_back(ParseOperand());
    }
    Expect(end);
  }

  Operand ParseOperand() {
    Operand operand;
    const std::string text = Next();
    if (text == "{") {
      ParseList("}", &operand);
    } else if (text == "(") {
      ParseList(")", &operand);
    } else if (text == "[") {
      operand = ParseOperand();
      operand.kind = Kind::kAddress;
      if (Peek() == ",") {  // [map, {coordinates}]
        Operand pair;
        pair.kind = Kind::kVector;
        pair.parts.push_back(operand);
        Next();
        pair.parts.push_back(ParseOperand());
        operand = pair;
      }
      Expect("]");
    } else if (text == "!") {
      operand = ParseOperand();
      operand.negated = true;
    } else if (text == "-") {
      operand = ParseOperand();
      operand.value = -operand.value;
    } else if (text != "_" && !ParseNumber(text, &operand) && !ParseSpecial(text, &operand)) {
      Name(text, &operand);
    }
    if (Peek() == "+") {
      Next();
      const bool negative = Peek() == "-";
      if (negative) Next();
      const int64_t offset = std::stoll(Next(), nullptr, 0);
      operand.value += negative ? -offset : offset;
    } else if (Peek() == "|") {
      Next();
      Operand pair;
      pair.kind = Kind::kVector;
      pair.parts = {operand, ParseOperand()};
      return pair;
    }
    return operand;
  }

  void Name(const std::string& text, Operand* operand) {
    operand->reg = FindRegister(text);
    if (operand->reg >= 0) {
      operand->kind = Kind::kRegister;
    } else if (const Variable* variable = FindVariable(text)) {
      operand->kind = Kind::kAddress;
      operand->space = variable->space;
      operand->value = variable->offset;
      if (variable->data != nullptr) operand->value = reinterpret_cast<int64_t>(variable->data);
      if (variable->space == Space::kShared) {
        operand->dynamic = variable->offset == kDynamic;
        operand->value = operand->dynamic ? 0 : SharedPlace(text, *variable);
      }
    } else {
      operand->kind = Kind::kName;  // a label or a function
    }
    operand->name = text;
  }

  // The operands are read up to the semicolon, but for an instruction that the text lacks.
  void Emit(const std::string& opcode, const Operand& guard, int line, bool written = true) {
    Instruction in;
    in.words = SplitAtDots(opcode);
    in.text = std::to_string(line) + ": " + opcode;
    if (guard.kind == Kind::kRegister) {
      in.guard = guard.reg;
      in.guard_negated = guard.negated;
    }
    bool typed = false;
    for (const std::string& word : in.words) {
      Type type;
      if (!ParseType(word, &type)) continue;
      if (!typed) in.type = type;
      in.source = type;
      typed = true;
    }
    while (written && Peek() != ";") {
      if (Peek() == ",") Next();
      in.operands.push_back(ParseOperand());
    }
    if (written) Expect(";");
    if (in.words[0] == "bra") {
      fixups_.push_back({static_cast<int64_t>(module_->code.size()), 0, in.operands[0].name, line});
    }
    if (in.words[0] == "ret") {
      Operand slot;
      slot.kind = current_->entry ? Kind::kNone : Kind::kRegister;
      slot.reg = static_cast<int>(current_->return_slot);
      in.operands = {slot};
    }
    module_->code.push_back(std::move(in));
  }

  void Resolve(Instruction& in) {
    if (in.words[0] == "call") {
      in.run = FindControl(in);
      Call(in);  // behind it: its details are not those of a handler
      return;
    }
    in.simple = true;
    if ((in.run = FindScalar(in)) != nullptr || (in.run = FindMemory(in)) != nullptr) return;
    in.simple = false;
    if ((in.run = FindControl(in)) != nullptr || (in.run = FindTensor(in)) != nullptr ||
        (in.run = FindAsync(in)) != nullptr) {
      return;
    }
    throw std::runtime_error("PTX line " + in.text + ": no such instruction in this machine");
  }

  // detail: the first instruction, the register with the place to return to; operands become pairs
  // of bytes to copy: {from, to} ahead of the call. Results stay where the function leaves them:
  // the caller's variable is made the same.
  void Call(Instruction& in) {
    size_t i = 0;
    Operand results;
    if (in.operands[0].kind == Kind::kVector) results = in.operands[i++];
    const auto found = module_->functions.find(in.operands[i].name);
    if (found == module_->functions.end() || bodies_.count(found->first) == 0) {
      throw std::runtime_error("PTX line " + in.text + ": no body of " + in.operands[i].name);
    }
    const Function& callee = found->second;
    in.detail[0] = callee.begin;
    in.detail[1] = callee.return_slot;
    Operand copies;
    copies.kind = Kind::kVector;
    if (i + 1 < in.operands.size()) {
      const std::vector<Operand>& from = in.operands[i + 1].parts;
      for (size_t k = 0; k < from.size(); ++k) {
        Operand copy = from[k];
        copy.reg = static_cast<int>(callee.params[k].offset);
        copy.axis = static_cast<int>(callee.params[k].bytes);
        copies.parts.push_back(copy);
      }
    }
    if (!results.parts.empty()) {
      throw std::runtime_error("PTX line " + in.text + ": a call with a result");
    }
    in.operands = {copies};
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  std::unique_ptr<Module> module_;
  std::map<std::string, size_t> bodies_;
  std::map<std::string, std::map<std::string, Variable>> parameters_;
  std::vector<Scope> scopes_;
  std::map<std::string, int64_t> labels_;
  std::vector<Fixup> fixups_;
  const Function* current_ = nullptr;
  std::string opcode_;
  int64_t element_ = 1;
  int registers_ = 0, shared_registers_ = 0;
  std::map<std::string, int64_t> shared_, shared_of_functions_;
  int64_t shared_end_ = 0, end_of_functions_ = 0;
};

}  // namespace

std::unique_ptr<Module> Parse(const std::string& text) { return Parser(text).Parse(); }

}  // namespace virtual_gpu
