#!/usr/bin/env bash
# Measures which lines and branches the tests reach, in Python and in the C++ of the CPU kernels.
#
#   scripts/coverage.sh [PYTEST ARGUMENTS]
#
# It measures the last commit, in a clone under build/coverage whose library is compiled with gcov's
# counters. It needs g++ with gcov, and the .venv of scripts/test.sh. The package coverage is
# installed in a separate environment. A run takes three times as long as the tests.
set -euo pipefail

cd "$(dirname "$0")/.."
work=$PWD/build/coverage
rm -rf "$work/tree" "$work/data"
mkdir -p "$work/data"
git clone -q . "$work/tree"
if [ ! -x "$work/venv/bin/coverage" ]; then
  .venv/bin/python -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install -q --disable-pip-version-check \
    "coverage>=7.10" "setuptools>=77,<86"
  paths='import site; print(site.getsitepackages()[0])'
  .venv/bin/python -c "$paths" >"$("$work/venv/bin/python" -c "$paths")/paddle.pth"
fi
cat >"$work/coveragerc" <<END
[run]
branch = True
source_pkgs = fastattn, benchmarks
parallel = True
data_file = $work/data/run
patch = subprocess, fork
END

cd "$work/tree"
export PYTHONPATH=$work/tree COVERAGE_RCFILE=$work/coveragerc FASTATTN_ARCHS=none
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=$work/venv/bin/python
CXX="${CXX:-g++} --coverage -fprofile-update=atomic" "$python" setup_ops.py build_ext --inplace
find build -name '*.gcda' -delete # what the build itself ran
"$python" -m coverage run -m pytest -n auto --maxprocesses 8 --dist worksteal "$@" || failed=1
"$python" -m coverage combine -q
"$python" -m coverage json -q -o "$work/python.json"
echo "Python"
"$python" - "$work/python.json" <<'END'
import json, sys
totals = json.load(open(sys.argv[1]))["totals"]
for kind, ran, of in (("lines", "covered_lines", "num_statements"),
                      ("branches", "covered_branches", "num_branches")):
    print(f"{kind}: {totals[ran] / totals[of]:.2%} ({totals[ran]} of {totals[of]})")
END
echo "C++"
"$python" scripts/gcov_totals.py build/objects custom_ops --missed "$work/cpp_missed.txt"
exit "${failed:-0}"
