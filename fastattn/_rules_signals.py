"""Rules for arguments of cache signals, as in `_rules`."""

from __future__ import annotations

import re

from fastattn._rules import Call

_CHANNEL = re.compile(r"|queue:-?\d+|shm:[^:/]+:[^:/]+")


def channel(call: Call, name: str) -> None:
    if not _CHANNEL.fullmatch(call.attrs[name]):
        text = f"expected '', queue:<key> or shm:<layer>:<step>, got '{call.attrs[name]}'"
        call.fail(ValueError, name, text)


def batch(call: Call, name: str) -> None:
    if not 0 <= call.attrs[name] <= 512:
        text = "expected 0 to 512 sequences, which a message has room for, got "
        call.fail(ValueError, name, f"{text}{call.attrs[name]}")
