# shellcheck shell=bash
# The other scripts source this file. It prepares .venv with Paddle and this package.
#
#   FASTATTN_PADDLE   requirement for Paddle, default paddlepaddle==3.3.1
#   PYTHON            Python that makes .venv, default python3
#
# Existing parts are kept, so only the first run takes minutes.

setup_env() { # setup_env EXTRAS
  local extras=$1 paddle=${FASTATTN_PADDLE:-paddlepaddle==3.3.1} numpy=numpy
  case "$paddle" in *==2.*) numpy="numpy<2" ;; esac # Paddle 2 was made for NumPy 1
  if ! .venv/bin/python -c "" 2>/dev/null; then
    echo "making .venv"
    rm -rf .venv
    "${PYTHON:-python3}" -m venv .venv
  fi
  if ! command -v "${CXX:-g++}" >/dev/null; then
    echo "a C++ compiler is needed: install g++ 8 or newer (apt-get install g++)" >&2
    return 1
  fi
  echo "installing $paddle"
  .venv/bin/python -m pip install -q --disable-pip-version-check \
    "$paddle" "$numpy" "setuptools>=77,<86"
  .venv/bin/python setup_ops.py build_ext --inplace
  .venv/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation \
    -e ".$extras" "$numpy"
}
