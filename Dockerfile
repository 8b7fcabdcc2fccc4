# An image with fastattn and a CPU build of Paddle.
#
# THIS FILE HAS BEEN BUILT NOWHERE. Its RUN commands were run by hand, one by one, on Debian 12 with
# its Python 3.11, apart from `apt-get`: there only the names of the packages were looked up. So a
# mistake in COPY, ARG or the two stages would not have been seen.
#
#   docker build -t fastattn .
#   docker run --rm fastattn                     # show-config --check
#   docker run --rm fastattn demo --model toy
#
# For GPUs, on which nothing of it was tried at all: name a base image with nvcc and Python, and
#   docker build --build-arg BASE=... --build-arg PADDLE=paddlepaddle-gpu==2.6.2 \
#     --build-arg NUMPY="numpy<2" --build-arg CUDA=on --build-arg FASTATTN_ARCHS=90a -t fastattn .
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
ARG PADDLE=paddlepaddle==3.3.1
ARG NUMPY=numpy
ARG CUDA=off
ARG FASTATTN_ARCHS=90a
RUN apt-get update && \
    apt-get install -y --no-install-recommends g++ python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/fastattn && \
    /opt/fastattn/bin/python -m pip install --no-cache-dir "${PADDLE}" "${NUMPY}" \
      "setuptools>=77,<86" "ninja>=1.10"
COPY . /src
WORKDIR /src
RUN FASTATTN_ARCHS="${FASTATTN_ARCHS}" /opt/fastattn/bin/python setup_ops.py install "--cuda=${CUDA}"

# The second stage has no compiler and no sources.
FROM ${BASE}
RUN apt-get update && \
    apt-get install -y --no-install-recommends python3 libgomp1 libstdc++6 && \
    rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/fastattn /opt/fastattn
WORKDIR /tmp
ENTRYPOINT ["/opt/fastattn/bin/python", "-m", "fastattn"]
CMD ["show-config", "--check"]
