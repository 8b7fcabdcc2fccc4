"""A worker whose signals nobody takes: Ctrl-C ends its wait, and other handlers run in it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import paddle
import pytest

from fastattn import _ops, env
from tests.support import kv_receiver

pytestmark = pytest.mark.skipif(
    _ops.helpers() is None, reason="handlers of Python run through fastattn._direct"
)

#: Fills the queue, so that the next signal has to wait.
START = """
import ctypes, os, signal, subprocess, sys
import paddle
from fastattn import _ops
from tests.support.kv_receiver import LIBC, Message, receive

# What a shell starts in the background ignores Ctrl-C, and its children do, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
key, layer_name, step_name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
channel = f"queue:{key}"
paddle.set_device("cpu")
caches = [paddle.zeros([1, 1, 64, 64]) for _ in "kv"]
lengths = [paddle.to_tensor([n], dtype="int32") for n in (4, 0)]

def send(layer, *caches):
    return _ops.call("send_kv_signal", caches, (layer, channel))

_ops.call("begin_kv_signals", tuple(lengths), (1, False, channel))
_ops.call("begin_kv_signals", tuple(lengths), (1, False, f"shm:{layer_name}:{step_name}"))
queue = LIBC.msgget(key, 0)
assert queue >= 0
filler = Message()
filler.mtype = 1

def fill():
    while LIBC.msgsnd(queue, ctypes.byref(filler), ctypes.sizeof(filler.text), 0o4000) == 0:
        pass

def interrupted(call, seconds=0.3):
    fill()
    # Another process: no other thread runs while a program does.
    pid = os.getpid()
    timer = subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -INT {pid}"])
    try:
        call()
        sum(range(1000))
        raise SystemExit("it was not interrupted")
    except KeyboardInterrupt:
        timer.wait()
"""

DYGRAPH = """
interrupted(lambda: send(0, *caches))
while receive(queue, wait=False) is not None:
    pass
send(0, *caches)  # the layer counts as not signalled: it can be sent again
assert receive(queue, wait=False) == [1, 0, 0, 0, 4]
send(0, *caches)
assert receive(queue, wait=False) is None

# A handler that raises nothing lets the wait go on; this one makes room.
fill()
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append(receive(queue, wait=False)))
signal.setitimer(signal.ITIMER_REAL, 0.2)
send(1, *caches)
assert len(seen) == 1
"""

PROGRAM = """
from fastattn.functional._marker import unified

@unified
def call(key, value):
    return _ops.call("send_kv_signal", (key, value), (0, channel))

def layer(key, value):
    for _ in range(2):
        call(key, value)
    return key + 1

program = paddle.jit.to_static(layer, full_graph=True)
program(*caches)
_ops.call("begin_kv_signals", tuple(lengths), (1, False, channel))
interrupted(lambda: program(*caches))  # once for all signals of the step
"""


@pytest.fixture
def channel(tmp_path):
    """Key of a queue, and two names in shared memory, that nobody else has; a file for code."""
    key = uuid.uuid4().int & 0x7FFFFFF | 0x1000000
    names = [f"fastattn_test_{uuid.uuid4().hex}" for _ in range(2)]
    yield key, names, tmp_path / "worker.py"
    opened = kv_receiver.LIBC.msgget(key, 0)
    if opened >= 0:
        kv_receiver.LIBC.msgctl(opened, 0, None)  # IPC_RMID
    for name in names:
        Path("/dev/shm", name).unlink(missing_ok=True)


def run(channel, code, **variables):
    """Run the code in a process; its stderr, and the modes of queue and shared memory."""
    key, names, file = channel
    file.write_text(START + code)  # tracing reads a function's source
    process = subprocess.run(
        [sys.executable, str(file), str(key), *names],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
        check=False,
    )
    assert process.returncode == 0, process.stderr
    queues = [line.split() for line in Path("/proc/sysvipc/msg").read_text().splitlines()[1:]]
    modes = [int(words[2], 8) for words in queues if int(words[0]) == key]
    modes += [stat.S_IMODE(Path("/dev/shm", name).stat().st_mode) for name in names]
    return process.stderr, modes


def test_a_wait_is_interrupted(channel):
    told, modes = run(channel, DYGRAPH)
    assert modes == [0o600] * 3
    assert "send_kv_signal" not in told


@pytest.mark.skipif(not hasattr(paddle, "pir"), reason="this Paddle traces no backend")
def test_a_wait_in_a_program_is_interrupted(channel):
    told, modes = run(channel, PROGRAM, FASTATTN_SIGNAL_MODE="640")
    assert "interrupted: layers from 0 on of this step are not signalled" in told
    assert modes == [0o640] * 3


@pytest.mark.slow
def test_a_long_wait_is_told_once(channel):
    code = "for _ in range(2):\n    interrupted(lambda: send(0, *caches), 5.5)\n"
    told, _ = run(channel, code)
    text = "fastattn: send_kv_signal: layer 0 has waited for 5 s: queue:"
    assert told.count(text) == 1


@pytest.mark.parametrize(
    ("text", "mode"), [("", 0o600), ("600", 0o600), ("0666", 0o666), ("660", 0o660)]
)
def test_modes(monkeypatch, text, mode):
    monkeypatch.setenv("FASTATTN_SIGNAL_MODE", text)
    assert env.kv_signal_mode() == mode


@pytest.mark.parametrize("text", ["438", "0o666", "rw", "66", "1666", "066"])
def test_what_is_no_mode_warns_and_is_the_default(monkeypatch, text):
    monkeypatch.setenv("FASTATTN_SIGNAL_MODE", text)
    with pytest.warns(UserWarning, match=f"FASTATTN_SIGNAL_MODE: expected 600 to .*{text}"):
        assert env.kv_signal_mode() == 0o600
