#!/usr/bin/env bash
# Lines and branches that the tests reach, of Python and of the C++ of the CPU kernels.
#
#   scripts/coverage.sh [PYTEST ARGUMENTS]
#
# Measures the last commit, in a clone under build/coverage whose library is compiled with gcov's
# counters. Needs g++ with gcov, and the .venv that scripts/test.sh makes; coverage and gcovr go to
# an environment of their own. Takes three times as long as the tests.
set -euo pipefail

cd "$(dirname "$0")/.."
work=$PWD/build/coverage
rm -rf "$work/tree" "$work/data"
mkdir -p "$work/data"
git clone -q . "$work/tree"
if [ ! -x "$work/venv/bin/gcovr" ]; then
  .venv/bin/python -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install -q --disable-pip-version-check \
    "coverage>=7.10" gcovr "setuptools>=77,<86"
  paths='import site; print(site.getsitepackages()[0])'
  .venv/bin/python -c "$paths" >"$("$work/venv/bin/python" -c "$paths")/paddle.pth"
fi
cat >"$work/coveragerc" <<END
[run]
branch = True
source_pkgs = fastattn
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
echo "Python:"
"$python" -m coverage report --format=total --precision=2
"$python" -m coverage json -q -o "$work/python.json"
"$python" -c "
import json
t = json.load(open('$work/python.json'))['totals']
for kind, found, of in ('lines', t['covered_lines'], t['num_statements']), (
    'branches', t['covered_branches'], t['num_branches']):
    print(f'{kind}: {found / of:.2%} ({found} out of {of})')"
echo "C++:"
"$work/venv/bin/gcovr" --root . --filter custom_ops/ --exclude-throw-branches \
  --merge-mode-functions merge-use-line-min --json-summary "$work/cpp.json" --print-summary \
  --output "$work/cpp.txt" -j 2 build/objects | tail -n 3
exit "${failed:-0}"
