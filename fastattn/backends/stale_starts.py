"""Starts of sequences that no longer run, in the buffer that a CUDA graph was captured with.

FastDeploy captures a step with the starts (``cu_seqlens_q``) of all its slots. Later it copies
those of the sequences that run into the front of the same buffer and replays the graph, for which
the rest is what an earlier step left there. Kernels take starts to be in order: they look a token's
sequence up among them, and clear what lies between two sequences. A stale start that is smaller
than the last good one would give a sequence's tokens to a slot that rests.
"""

from __future__ import annotations

from typing import Any

import paddle

#: Start of a slot that does not run: past the tokens of every step.
NOWHERE = 2**30

#: Buffers that are remembered; FastDeploy has one a model.
_MOST_BUFFERS = 4


class StaleStarts:
    """Puts the starts behind those of a step out of the way, where there may be any.

    That is a write to the buffer only in steps of fewer sequences than a step before them.
    """

    def __init__(self) -> None:
        # By address: the longest tensor seen there, and the number of its starts that may be stale.
        self._buffers: dict[int, tuple[Any, int]] = {}

    def settle(self, starts: Any) -> None:
        """Make the buffer of a step's starts good for a graph that reads all of it.

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
            whole = starts.view([count])  # the same memory, with a shape that stays
        elif count < dirty:
            whole[count:dirty] = NOWHERE
        self._buffers.pop(address, None)  # the one that was used last is forgotten last
        self._buffers[address] = (whole, count)
