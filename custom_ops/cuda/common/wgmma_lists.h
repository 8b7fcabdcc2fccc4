// Operand lists of the inline assembly in wgmma*.cuh.
#pragma once

// Accumulators as operands of inline assembly. `c` is their constraint: "+f", or "=f" where the
// product ignores what was in them (they are then no live registers before it).
#define FASTATTN_ACC4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define FASTATTN_ACC16(c, d, i)                                                   \
  FASTATTN_ACC4(c, d, i), FASTATTN_ACC4(c, d, i + 4), FASTATTN_ACC4(c, d, i + 8), \
      FASTATTN_ACC4(c, d, i + 12)
#define FASTATTN_ACC32(c, d) FASTATTN_ACC16(c, d, 0), FASTATTN_ACC16(c, d, 16)
#define FASTATTN_ACC64(c, d) \
  FASTATTN_ACC32(c, d), FASTATTN_ACC16(c, d, 32), FASTATTN_ACC16(c, d, 48)

#define FASTATTN_ACC128(c, d)                                               \
  FASTATTN_ACC64(c, d), FASTATTN_ACC16(c, d, 64), FASTATTN_ACC16(c, d, 80), \
      FASTATTN_ACC16(c, d, 96), FASTATTN_ACC16(c, d, 112)

// The names of accumulators in the assembly.
#define FASTATTN_LIST32                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_LIST64                                                                \
  FASTATTN_LIST32                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTATTN_LIST128                                                                   \
  FASTATTN_LIST64                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "     \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "       \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
  "%125, %126, %127"

// Expands to a product whose right operand has one of two types, and which adds to its accumulators
// if kAdd.
#define FASTATTN_FORMS(PRODUCT, is_first, first, second) \
  if constexpr (is_first) {                              \
    if constexpr (kAdd) {                                \
      PRODUCT(first, "+f", 1);                           \
    } else {                                             \
      PRODUCT(first, "=f", 0);                           \
    }                                                    \
  } else {                                               \
    if constexpr (kAdd) {                                \
      PRODUCT(second, "+f", 1);                          \
    } else {                                             \
      PRODUCT(second, "=f", 0);                          \
    }                                                    \
  }
