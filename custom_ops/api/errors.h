// Errors of an operator's function, as Paddle's executor knows them.
//
// The executor of Paddle 3 turns an EnforceNotMet into a Python exception. Any other exception of a
// kernel ends the process.
#pragma once

#include <exception>
#include <new>
#include <string>

#if __has_include("paddle/common/flags.h")  // from Paddle 3 on
#include "paddle/common/enforce.h"
#define FASTATTN_PADDLE_ERRORS
#endif

namespace fastattn::api {

#if defined(FASTATTN_PADDLE_ERRORS)

// Paddle's code for a message of Fail (check.h), which starts with the name of Python's exception.
inline common::ErrorCode CodeOf(const std::string& message) {
  const auto starts = [&message](const char* text) { return message.rfind(text, 0) == 0; };
  if (starts("[ValueError]")) return common::ErrorCode::INVALID_ARGUMENT;
  if (starts("[TypeError]")) return common::ErrorCode::INVALID_TYPE;
  if (starts("[NotImplementedError]")) return common::ErrorCode::UNIMPLEMENTED;
  if (message.find("ResourceExhausted") != std::string::npos) {
    return common::ErrorCode::RESOURCE_EXHAUSTED;
  }
  return common::ErrorCode::PRECONDITION_NOT_MET;
}

[[noreturn]] inline void ThrowPaddleError(common::ErrorCode code, const std::string& message) {
  throw common::enforce::EnforceNotMet(common::ErrorSummary(code, message), __FILE__, __LINE__);
}

// The result of f(), whose exceptions become Paddle's.
template <typename F>
auto WithPaddleErrors(F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (const common::enforce::EnforceNotMet&) {
    throw;
  } catch (const std::bad_alloc&) {
    ThrowPaddleError(common::ErrorCode::RESOURCE_EXHAUSTED, "out of memory");
  } catch (const std::exception& error) {
    const std::string message = error.what();
    ThrowPaddleError(CodeOf(message), message);
  }
}

#else

template <typename F>
auto WithPaddleErrors(F&& f) -> decltype(f()) {
  return f();
}

#endif

}  // namespace fastattn::api
