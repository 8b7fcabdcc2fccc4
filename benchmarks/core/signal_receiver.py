"""A process that takes messages off a System V queue, until the queue is removed.

It stands for FastDeploy's process that transfers caches, and does nothing with what it takes. It is
a process, not a thread: where Paddle waits for a GPU it holds the GIL, so a thread could not empty
the queue that the GPU's work waits for. Run as a file, it imports neither Paddle nor fastattn.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

_LIBC = ctypes.CDLL(None, use_errno=True)
_CREATE, _REMOVE = 0o1666, 0  # IPC_CREAT and everybody's rights; IPC_RMID
#: More than any message has.
_BYTES = 1 << 14


@contextlib.contextmanager
def receiver(key: int) -> Iterator[None]:
    """Have a process empty the queue of a key; the queue is removed behind that.

    Raises
    ------
    OSError
        If the system has no such queues.
    """
    queue = _LIBC.msgget(key, _CREATE)
    if queue < 0:
        raise OSError(ctypes.get_errno(), "msgget")
    try:
        command = [sys.executable, __file__, str(key)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()  # it is ready, or has ended
                yield
            finally:
                process.kill()
    finally:
        _LIBC.msgctl(queue, _REMOVE, None)


def _main() -> None:
    queue = _LIBC.msgget(int(sys.argv[1]), _CREATE)
    message = ctypes.create_string_buffer(ctypes.sizeof(ctypes.c_long) + _BYTES)
    os.write(1, b"ready\n")
    while _LIBC.msgrcv(queue, message, _BYTES, 0, 0) >= 0:
        pass


if __name__ == "__main__":
    _main()
