#!/usr/bin/env bash
# Makes wheels that install without a compiler: one for each Paddle and place, for several Pythons.
#
#   scripts/build_wheels.sh [--paddles "3.3.1 2.6.2"] [--places "cpu cuda"]
#                           [--pythons "python3.9 python3.13"] [--out dist]
#
# Default: both Paddles, both places, and every Python from 3.9 to 3.13 that is found. A Python for
# which there is no such Paddle is left out with a line, and so are the CUDA wheels without nvcc.
# FASTATTN_ARCHS and FASTATTN_HEAD_DIMS choose what is compiled, as for any build. Environments with
# Paddle (a CPU one takes 0.9 GB) are kept in build/wheels. The wheels need a glibc and a libstdc++
# that are no older than this machine's let them be: scripts/check_wheel.py has the limits.
set -euo pipefail
cd "$(dirname "$0")/.."

paddles="3.3.1 2.6.2" places="cpu cuda" pythons="" out=dist
while [ "$#" -gt 0 ]; do
  case "$1" in
    --paddles) paddles=$2 ;;
    --places) places=$2 ;;
    --pythons) pythons=$2 ;;
    --out) out=$2 ;;
    *)
      sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
      exit 2
      ;;
  esac
  shift 2
done

: "${pythons:=$("${PYTHON:-python3}" scripts/check_install.py --pythons)}"
work=$PWD/build/wheels made=0
mkdir -p "$work"

# environment FOLDER PYTHON PACKAGE VERSION: a virtual environment with this Paddle
environment() {
  local folder=$1 python=$2 package=$3 version=$4 numpy=numpy
  case "$version" in 2.*) numpy="numpy<2" ;; esac
  [ ! -e "$folder/ready" ] || return 0
  rm -rf "$folder"
  "$python" -m venv "$folder" || return 1
  "$folder/bin/python" -m pip install -q --disable-pip-version-check "$package==$version" \
    "$numpy" "setuptools>=77,<86" "ninja>=1.10" 2>"$folder/pip.log" || return 1
  touch "$folder/ready"
}

# wheel_of PLACE VERSION: the wheel of the first Python, joined by the modules of the others
wheel_of() {
  local place=$1 version=$2 package=paddlepaddle cuda=off first="" folders=() folder python
  if [ "$place" = cuda ]; then package=paddlepaddle-gpu cuda=on; fi
  local to=$work/$version-$place
  rm -rf "$to"
  mkdir -p "$to"
  for python in $pythons; do
    folder=$work/env-$version-$place-$("$python" -c "import sys; print('%d.%d' % sys.version_info[:2])")
    if ! environment "$folder" "$python" "$package" "$version"; then
      echo "left out: $python has no $package==$version ($folder/pip.log)"
      continue
    fi
    if [ -z "$first" ]; then
      first=$folder
      "$folder/bin/python" setup_ops.py bdist_wheel "--cuda=$cuda" --dist-dir "$to"
    else
      folders+=("$to/$(basename "$folder")")
      "$folder/bin/python" setup_ops.py build_ext --modules "--cuda=$cuda" \
        --build-lib "$to/$(basename "$folder")"
    fi
  done
  if [ -z "$first" ]; then
    echo "no wheel for $package==$version: no Python here has it"
    return 0
  fi
  local wheel
  wheel=$("$first/bin/python" scripts/join_wheel.py "$to"/*.whl "${folders[@]}" --out "$out")
  "$first/bin/python" scripts/check_wheel.py "$wheel"
  made=$((made + 1))
}

for version in $paddles; do
  for place in $places; do
    if [ "$place" = cuda ] && ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
      echo "no CUDA wheel for Paddle $version: there is no nvcc (set PATH or CUDA_HOME)"
      continue
    fi
    echo "== Paddle $version, $place"
    wheel_of "$place" "$version"
  done
done
if [ "$made" = 0 ]; then
  echo "no wheel was made" >&2
  exit 1
fi
echo "wheels are in $out"
