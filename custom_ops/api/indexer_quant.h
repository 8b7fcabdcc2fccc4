// Names of the indexer's formats.
#pragma once

#include <string>

#include "api/check.h"
#include "params/indexer.h"

namespace fastattn::api {

// `with_wide`: whether the operator has rows of 512 channels, too.
inline IndexerQuant ParseIndexerQuant(const char* op, const std::string& name,
                                      bool with_wide = false) {
  if (name == "fp8") return IndexerQuant::kFp8;
  if (name == "mxfp4") return IndexerQuant::kMxfp4;
  if (with_wide && name == "fp8_512") return IndexerQuant::kFp8Wide;
  Fail("ValueError", op, "quant", "expected fp8", with_wide ? ", mxfp4 or fp8_512" : " or mxfp4",
       ", got '", name, "'");
}

}  // namespace fastattn::api
