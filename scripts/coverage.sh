#!/usr/bin/env bash
# Lines and branches that the tests reach, of Python and of the C++ of the CPU kernels.
#
#   scripts/coverage.sh [PYTEST ARGUMENTS]
#
# Measures the last commit, in a clone under build/coverage whose library is compiled with gcov's
# counters. Needs g++ with gcov, and the .venv that scripts/test.sh makes; the package coverage goes
# to an environment of its own. Takes three times as long as the tests.
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
patch = subprocess
END

cd "$work/tree"
export PYTHONPATH=$work/tree COVERAGE_RCFILE=$work/coveragerc FASTATTN_ARCHS=none
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
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
