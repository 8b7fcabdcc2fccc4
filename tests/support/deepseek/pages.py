"""Pages of a cache, as a server hands them out: any order, reused, padded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tests.support.tensors import to_numpy, to_paddle

#: What is in every byte that no token owns: NaN as fp32, bf16, e4m3 and UE8M0.
POISON = 0xFF


@dataclass(frozen=True)
class PageFormat:
    """Bytes of a page: rows of its tokens, then their scales, then padding.

    `dtype` and `shape` (of a page) are those of the tensor; by default a page is its bytes.
    """

    tokens: int
    row: int
    scales: int = 0
    alignment: int = 1
    dtype: str = "uint8"
    shape: tuple[int, ...] = ()

    @property
    def stride(self) -> int:
        """Bytes from a page to the next."""
        size = self.tokens * (self.row + self.scales)
        return -(-size // self.alignment) * self.alignment


#: Latents of V3.2; of V4, in the window or compressed 1 : 4 or 1 : 128 (their pages hold 256
#: positions, padded for a kernel that copies boxes of them); index keys.
LATENT_656 = PageFormat(64, 656, shape=(64, 1, 656))
INDEX_132 = PageFormat(64, 128, 4, shape=(64, 132))
WINDOW_584 = PageFormat(64, 576, 8, alignment=576)
COMPRESSED_584 = {4: WINDOW_584, 128: PageFormat(2, 576, 8, alignment=576)}
INDEX_132_PADDED = PageFormat(64, 128, 4, alignment=576)


def state_format(ratio: int, head: int) -> PageFormat:
    """States of a compressor, fp32: values and scores, twice for groups that overlap."""
    tokens, width = (4, 4 * head) if ratio == 4 else (8, 2 * head)
    return PageFormat(tokens, width * 4, dtype="float32", shape=(tokens, width))


class Pool:
    """A cache tensor of several sequences and their block tables.

    Pages are taken in a random order, those given back first. A page that is given back is poisoned
    and leaves the table: whoever still needs its tokens fails.
    """

    def __init__(self, fmt: PageFormat, seq_tokens: list[int], place: str, seed: int) -> None:
        self.format, self.place = fmt, place
        blocks = [-(-n // fmt.tokens) for n in seq_tokens]
        self.tables = np.full((len(blocks), max([*blocks, 1]) + 1), -1, np.int32)
        self.given = [0] * len(blocks)  # pages that each sequence has ever had
        pages = sum(blocks) + 2
        self.free = np.random.default_rng(seed).permutation(pages).tolist()
        self._upload(np.full((pages, fmt.stride), POISON, np.uint8))

    def _upload(self, data: np.ndarray) -> None:
        shape = self.format.shape or (self.format.stride,)
        self.tensor = to_paddle(data.view(self.format.dtype).reshape(len(data), *shape), self.place)

    def bytes(self) -> np.ndarray:
        """The cache, [pages, stride]."""
        data = to_numpy(self.tensor)
        return data.reshape(len(data), math.prod(data.shape[1:])).view(np.uint8)

    @property
    def num_pages(self) -> int:
        """Pages, assigned or not."""
        return int(self.tensor.shape[0])

    def grow(self, tokens: np.ndarray) -> None:
        """Give each sequence the pages of its first `tokens` tokens that it never had."""
        for seq, count in enumerate(tokens):
            blocks = -(-int(count) // self.format.tokens)
            for block in range(self.given[seq], blocks):
                self.tables[seq, block] = self.free.pop(0)
            self.given[seq] = max(self.given[seq], blocks)

    def release(self, first: np.ndarray) -> None:
        """Take the pages back whose tokens are all before `first` of each sequence."""
        gone: list[int] = []
        for table, position in zip(self.tables, first):
            old = table[: max(0, int(position)) // self.format.tokens]
            gone += old[old >= 0].tolist()
            old[:] = -1
        if gone:
            data = self.bytes().copy()
            data[gone] = POISON
            self._upload(data)
            self.free[:0] = gone

    def slots(self, seqs: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Slot of each token, int64; -1 for one without a page."""
        page = self.tables[seqs, positions // self.format.tokens].astype(np.int64)
        return np.where(page < 0, -1, page * self.format.tokens + positions % self.format.tokens)

    def tokens(self, seq: int, count: int) -> tuple[int, np.ndarray]:
        """First position of a sequence that has a page, and the bytes of tokens from it on."""
        fmt, live = self.format, np.flatnonzero(self.tables[seq] >= 0)
        first = min(count, int(live[0]) * fmt.tokens) if len(live) else count
        at = self.slots(np.full(count - first, seq), np.arange(first, count))
        assert (at >= 0).all(), "a token without a page"
        pages = self.bytes()
        rows, scales = self._planes(pages)
        index = at // fmt.tokens, at % fmt.tokens
        return first, np.concatenate([rows[index], scales[index]], axis=1)

    def _planes(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        fmt, n = self.format, len(pages)
        end = fmt.tokens * fmt.row
        rows = pages[:, :end].reshape(n, fmt.tokens, fmt.row)
        scales = pages[:, end : end + fmt.tokens * fmt.scales]
        return rows, scales.reshape(n, fmt.tokens, fmt.scales)

    def check_the_rest(self, counts: np.ndarray) -> None:
        """Bytes that belong to no token are as they were: padding, free pages, later tokens."""
        pages = self.bytes().copy()
        fmt = self.format
        for seq, count in enumerate(counts):
            positions = np.arange(int(count))
            at = self.slots(np.full(len(positions), seq), positions)
            for slot in at[at >= 0]:
                page, row = divmod(int(slot), fmt.tokens)
                pages[page, row * fmt.row : (row + 1) * fmt.row] = POISON
                begin = fmt.tokens * fmt.row + row * fmt.scales
                pages[page, begin : begin + fmt.scales] = POISON
        assert (pages == POISON).all(), "bytes that no token owns were written"
