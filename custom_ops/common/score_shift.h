// LSE and output of a query whose scores all lack the same number.
#pragma once

#include "common/normaliser.h"
#include "common/types.h"

namespace fastattn {

// Without a sink (-inf). A query that sees no key has no LSE, whatever its shift.
FASTATTN_HD float ShiftedLse(float lse, float shift) {
  return lse == -__builtin_huge_valf() ? lse : lse + shift;
}

// With a sink: the LSE, and the factor of an output that was normalised without it.
FASTATTN_HD Normaliser ShiftedNormaliser(float lse, float shift, float sink) {
  const bool empty = lse == -__builtin_huge_valf();
  Normaliser found = NormaliserOf(empty, lse * kLog2E, 1.0f, sink - shift);
  found.lse = ShiftedLse(found.lse, shift);
  return found;
}

}  // namespace fastattn
