"""Corrects stale starts of sequences in a buffer that a CUDA graph was captured with.

FastDeploy captures a step with the starts (``cu_seqlens_q``) of all its slots. Later it copies the
starts of the running sequences to the front of the same buffer and replays the graph. The rest of
the buffer still has the starts of an earlier step. Kernels expect starts in ascending order: they
search a token's sequence among them, and clear the range between two sequences. A stale start that
is smaller than the last valid one would assign a sequence's tokens to an inactive slot.
"""

from __future__ import annotations

from typing import Any

import paddle

#: Start of an inactive slot: past the tokens of every step.
NOWHERE = 2**30

#: Number of buffers that are remembered. FastDeploy has one per model.
_MOST_BUFFERS = 4


class StaleStarts:
    """Overwrites the starts after the starts of a step, if they may be stale.

    This writes to the buffer only in steps with fewer sequences than an earlier step.
    """

    def __init__(self) -> None:
        # For each address, the longest tensor seen there, and the number of its starts that may be
        # stale.
        self._buffers: dict[int, tuple[Any, int]] = {}

    def settle(self, starts: Any) -> None:
        """Make the buffer of a step's starts valid for a graph that reads all of it.

        Parameters
        ----------
        starts : Tensor, shape [B + 1], int32
            ``cu_seqlens_q`` of the step. Nothing is copied from the device.
        """
        if not paddle.in_dynamic_mode() or len(starts.shape) != 1 or starts.shape[0] < 1:
            return
        address, count = int(starts.data_ptr()), int(starts.shape[0])
        whole, dirty = self._buffers.get(address, (None, 0))
        if whole is None or whole.shape[0] < count:
            if len(self._buffers) >= _MOST_BUFFERS and address not in self._buffers:
                self._buffers.pop(next(iter(self._buffers)))
            whole = starts.view([count])  # the same memory, with a constant shape
        elif count < dirty:
            whole[count:dirty] = NOWHERE
        self._buffers.pop(address, None)  # the most recently used buffer is forgotten last
        self._buffers[address] = (whole, count)
