"""``FASTATTN_SAMPLES``: what the layers of a server get of its prompts, for ``calibrate``."""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import os
from typing import Any

import ml_dtypes
import numpy as np
import paddle

from fastattn import env, functional
from fastattn.backends.forward_meta import optional
from fastattn.functional._cache_types import BLOCK_SIZE

LOGGER = logging.getLogger("fastattn")

#: A text of fewer tokens says little about a layer.
_FEWEST_TOKENS = 64
#: Queries of a text's last tokens: ``calibrate`` takes 64 of them.
_QUERIES = 128
#: Options of ``attention_step`` that say how Q, K and V come out of the projection.
_PROJECTION = (
    "num_heads",
    "num_kv_heads",
    "qkv_bias",
    "rms_norm_eps",
    "use_neox_rotary_style",
    "rotary_dim",
    "q_norm_weight",
    "k_norm_weight",
)


class SampleWriter:
    """Writes the first tokens of some prompts, one file a text.

    K and Q are rotated on the CPU, over copies of the step's tensors. So a sampled step takes long
    and leaves the server's caches as they are. Steps of captured and traced programs, prompts that
    go on from cached tokens, and prompts of fewer than 64 tokens give no text.

    Parameters
    ----------
    settings : SampleSettings
    rank : int
        Of this process among those that share the heads; its files have these heads only.
    """

    def __init__(self, settings: env.SampleSettings, rank: int) -> None:
        self.settings, self.rank = settings, rank
        self.written = self._number = 0
        self._meta: Any = None
        self._seq = -1
        self._tokens = 0
        self._lens: tuple[np.ndarray, ...] = ()
        self._arrays: dict[str, np.ndarray] = {}
        self._layers: set[int] = set()
        self._known: dict[int, tuple[Any, Any]] = {}  # tensors that were copied for this text

    def take(
        self, qkv: Any, rotary_embs: Any, options: dict[str, Any], layer: Any, meta: Any
    ) -> None:
        """Keep a layer's part of the text that the step has, if it has one.

        Parameters
        ----------
        qkv, rotary_embs, options
            Of the layer's ``attention_step``.
        layer : object
            With a `layer_id`.
        meta : ForwardMeta
        """
        if not paddle.in_dynamic_mode() or self.written == self.settings.texts:
            return
        try:
            self._take(qkv, rotary_embs, options, layer.layer_id, meta)
        except Exception as error:  # a full disk, say: the server goes on without samples
            LOGGER.warning("FASTATTN_SAMPLES: %s: no more samples are written", error)
            self.written = self.settings.texts
            self._arrays = {}

    def _take(
        self, qkv: Any, rotary_embs: Any, options: dict[str, Any], layer_id: int, meta: Any
    ) -> None:
        if self._meta is not meta or layer_id in self._layers:
            self.flush()
            self._begin(meta)
        self._layers.add(layer_id)
        if self._seq < 0 or self.written == self.settings.texts:
            return
        q, k, v = self._project(qkv, rotary_embs, options)
        name = f"layers.{layer_id}."
        self._arrays |= {f"{name}query": q[-_QUERIES:], f"{name}key": k, f"{name}value": v}

    def flush(self) -> None:
        """Write the text of the last step that had one, under the first free number."""
        if not self._arrays:
            return
        self.settings.folder.mkdir(parents=True, exist_ok=True)
        part = f"-rank{self.rank}" if self.rank else ""
        waiting = self.settings.folder / f".{os.getpid()}{part}"  # nobody reads half of a file
        with waiting.open("wb") as file:
            np.savez(file, **self._arrays)  # type: ignore[arg-type]
        for number in itertools.count(self._number):
            try:
                os.link(waiting, self.settings.folder / f"text{number}{part}.npz")
            except FileExistsError:  # of an earlier process, or of another replica
                continue
            self._number = number + 1
            break
        waiting.unlink()
        self.written += 1
        self._arrays = {}
        self._known.clear()

    def _begin(self, meta: Any) -> None:
        """Choose a sequence of a new step."""
        self._meta, self._seq = meta, -1
        self._layers.clear()
        if optional(meta, "step_use_cudagraph") or optional(meta, "is_dummy_or_profile_run"):
            return
        starts, cached, new = (
            np.array(x.numpy()).reshape(-1).astype(np.int64)
            for x in (meta.cu_seqlens_q, meta.seq_lens_decoder, meta.seq_lens_this_time)
        )
        batch = len(starts) - 1
        cached, new = cached[:batch], np.minimum(new[:batch], np.diff(starts))
        whole = np.flatnonzero((cached == 0) & (new >= _FEWEST_TOKENS))
        if len(whole):
            self._seq = int(whole[0])
            self._tokens = int(min(new[self._seq], self.settings.tokens))
            self._lens = starts, cached, new

    def _project(
        self, qkv: Any, rotary_embs: Any, options: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Q [n, H, D], K and V [n, KV, D] of the text, float32."""
        starts, cached, new = self._lens
        batch, count = len(new), self._tokens
        blocks = -(-count // BLOCK_SIZE)
        tables = np.full((batch, blocks), -1)
        tables[self._seq] = np.arange(blocks)
        only = np.zeros_like(new)
        only[self._seq] = count
        heads, kv_heads = options["num_heads"], options["num_kv_heads"]
        dim = int(qkv.shape[1]) // (heads + 2 * kv_heads)
        rows = _copied(qkv)
        zeros = np.zeros((blocks, kv_heads, BLOCK_SIZE, dim), rows.numpy().dtype)
        caches = [paddle.to_tensor(zeros, place=paddle.CPUPlace()) for _ in "kv"]
        seqs = [
            paddle.to_tensor(x.astype(np.int32), place=paddle.CPUPlace())
            for x in (tables, starts, cached, only)
        ]
        given = {name: self._on_host(options.get(name)) for name in _PROJECTION}
        table = self._on_host(rotary_embs)
        q, _ = functional.rope_write_cache_kv(
            rows, caches[0], caches[1], table, seqs[0], seqs[1], seqs[2], seqs[3], **given
        )
        first = int(starts[self._seq])
        k, v = (_floats(x).transpose(0, 2, 1, 3).reshape(-1, kv_heads, dim)[:count] for x in caches)
        return _floats(q).reshape(-1, heads, dim)[first : first + count], k, v

    def _on_host(self, x: Any) -> Any:
        """A weight's or a table's copy on the CPU, made once a text; other values as they are."""
        if not isinstance(x, paddle.Tensor):
            return x
        known = self._known.get(id(x))
        if known is None or known[0] is not x:
            self._known[id(x)] = known = x, _copied(x)
        return known[1]


def _copied(x: Any) -> Any:
    return paddle.to_tensor(np.array(x.numpy()), place=paddle.CPUPlace())


def _floats(x: Any) -> np.ndarray:
    """The values of a 16-bit tensor."""
    dtype = np.float16 if x.dtype == paddle.float16 else ml_dtypes.bfloat16
    values: np.ndarray = x.numpy().view(dtype).astype(np.float32)
    return values


@functools.cache
def writer(rank: int) -> SampleWriter | None:
    """The process's writer, which the backends of all layers share, or None without the variable.

    Parameters
    ----------
    rank : int
        Tensor-parallel rank.
    """
    settings = env.samples()
    if settings is None:
        return None
    LOGGER.info("FASTATTN_SAMPLES: prompts are written to %s", settings.folder)
    made = SampleWriter(settings, rank)
    atexit.register(made.flush)
    return made
