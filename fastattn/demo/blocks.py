"""Cache blocks: their reference counts, and an index of known prefixes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np

from fastattn.backends.config import BLOCK_SIZE


def block_keys(tokens: Sequence[int]) -> list[bytes]:
    """Key of every full block of a sequence. It covers the tokens of the block and all tokens
    before.
    """
    keys: list[bytes] = []
    parent = b""
    for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE):
        block = np.asarray(tokens[end - BLOCK_SIZE : end], np.int64).tobytes()
        parent = hashlib.sha256(parent + block).digest()
        keys.append(parent)
    return keys


class BlockPool:
    """Cache blocks with reference counts, and an index of full ones by content.

    A block is free, in use (one reference per request) or idle. No request uses an idle block, but
    it holds a published prefix. If no block is free, the least recently used idle block is taken.
    Only full blocks are published, and published blocks are never written again, so sharing copies
    nothing.

    Parameters
    ----------
    num_blocks : int
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free = deque(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Number of blocks that :meth:`allocate` can still give."""
        return len(self._free) + len(self._idle)

    @property
    def in_use(self) -> int:
        """Number of blocks that some request holds."""
        return self.num_blocks - self.available

    def references(self, block: int) -> int:
        """Number of requests that hold a block."""
        return self._references[block]

    def allocate(self) -> int:
        """Take a block for one request.

        Raises
        ------
        RuntimeError
            If every block is in use.
        """
        if self._free:
            block = self._free.popleft()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        else:
            raise RuntimeError(f"all {self.num_blocks} cache blocks are in use")
        self._references[block] = 1
        return block

    def acquire_prefix(self, keys: Sequence[bytes]) -> list[int]:
        """Take the blocks of the longest published prefix of `keys`."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._idle.pop(block, None)
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Let other requests share a full block, unless its content is shared already."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Release one request's blocks. The end of a prefix is evicted before its beginning."""
        for block in reversed(blocks):
            if self._references[block] <= 0:
                raise ValueError(f"block {block} is not in use")
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
