// A kernel out of PTX text, for tests of the machine itself.
#include <algorithm>
#include <exception>

#include "machine.h"

// 0, or 1 with what went wrong in `error`. Arguments are pointers to the parameters' values.
extern "C" __attribute__((visibility("default"))) int virtual_gpu_run(
    const char* text, const char* kernel, unsigned grid, unsigned block, unsigned cluster,
    int64_t shared, void** arguments, char* error, size_t error_bytes) {
  using namespace virtual_gpu;
  try {
    const auto module = Parse(text);
    Launch launch;
    launch.module = module.get();
    launch.function = &module->functions.at(kernel);
    launch.grid.x = grid;
    launch.block.x = block;
    launch.cluster.x = cluster;
    launch.dynamic_shared = shared;
    launch.params.resize(static_cast<size_t>(launch.function->param_bytes));
    for (size_t i = 0; i < launch.function->params.size(); ++i) {
      const Variable& param = launch.function->params[i];
      std::memcpy(launch.params.data() + param.offset, arguments[i],
                  static_cast<size_t>(param.bytes));
    }
    Run(launch);
    return 0;
  } catch (const std::exception& failure) {
    const std::string what = failure.what();
    const size_t bytes = std::min(what.size(), error_bytes - 1);
    std::memcpy(error, what.data(), bytes);
    error[bytes] = '\0';
    return 1;
  }
}
