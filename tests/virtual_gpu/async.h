// What async.cc and copies.cc share.
#pragma once

#include "machine.h"

namespace virtual_gpu {

// Bytes have arrived that the mbarrier at `address` (.shared) waits for.
void CompleteBytes(Warp& warp, uint32_t address, int64_t bytes);

// Address, as .shared, of an operand whose instruction may also take a generic one.
uint32_t SharedAddressOf(const Warp& warp, const Operand& operand, int lane);

// Of cp.async..., with the kinds of them that do not copy.
Handler FindCopy(Instruction& in);

[[noreturn]] void UnknownForm(const Instruction& in);

}  // namespace virtual_gpu
