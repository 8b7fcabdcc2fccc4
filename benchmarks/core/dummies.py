"""Custom operators that do nothing, as many as a server registers."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import paddle

#: FastDeploy's operator library registers about as many.
COUNT = 300

_SOURCE = r"""
#define PADDLE_NO_PYTHON
#include "paddle/phi/api/all.h"
#include "paddle/phi/api/ext/op_meta_info.h"

using paddle::Tensor;

std::vector<Tensor> Nothing(const Tensor& x0, const Tensor&, const Tensor&, const Tensor&,
                            const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  return {x0};
}

static const bool built = [] {
  for (int i = 0; i < COUNT; ++i) {
    std::vector<std::string> inputs;
    for (int k = 0; k < 12; ++k) inputs.push_back("input_tensor_" + std::to_string(k));
    paddle::OpMetaInfoBuilder("fastattn_bench_dummy_" + std::to_string(i), 0)
        .Inputs(std::move(inputs))
        .Outputs({"out"})
        .SetKernelFn(PD_KERNEL(Nothing));
  }
  return true;
}();
"""


@functools.lru_cache(maxsize=1)
def register_dummies() -> bool:
    """Build and register the operators; False where there is no C++ compiler."""
    from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op

    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return False
    root = Path(paddle.__file__).parent
    includes = [f for p in ("include", "include/third_party") for f in ("-isystem", str(root / p))]
    libraries = [f"-L{root / p}" for p in ("base", "libs") if (root / p).is_dir()]
    folder = Path(tempfile.mkdtemp(prefix="fastattn-bench-"))  # the library stays open
    source, library = folder / "dummies.cc", folder / "dummies.so"
    source.write_text(_SOURCE.replace("COUNT", str(COUNT)), encoding="utf-8")
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", *includes]
    output = ["-o", str(library), *libraries, "-l:libpaddle.so"]
    done = subprocess.run([compiler, *flags, str(source), *output], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the bench's operators did not compile:\n{done.stderr[-2000:]}")
    load_op_meta_info_and_register_op(str(library))
    return True
