"""Steps of a layer in a program that FastDeploy makes of its model (``graph_opt_level`` 1 and 2).

FastDeploy lets Paddle's SOT translate its model in a warm-up. Later it runs the code that SOT
generated, without its guards. So all that the translation reads in Python is a constant of every
later step, except tensors, which are found again along the same attributes. Here a layer is the
same operator as in dygraph. :func:`_learn` finds their arguments outside the translation, and
:class:`Programs` refuses a later step for which they would be wrong.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import paddle

from fastattn import _ops
from fastattn.backends.config import count_of, read, refuse
from fastattn.backends.forward_meta import optional
from fastattn.backends.kv_signals import KvSignals
from fastattn.backends.step_masks import last_keys
from fastattn.functional._attributes import ANY_LENGTH
from fastattn.functional._marker import unified

_LEVEL = "graph_opt_config.graph_opt_level"


class Programs:
    """What the programs of a backend's layers are made of.

    Attributes
    ----------
    layers : dict
        Arguments of the layers that were translated, by their index.
    lengths : (int, int)
        Upper bounds of a sequence's new tokens and keys. If the first one is too small, the step
        takes longer.
    """

    def __init__(self, backend: str, lengths: tuple[int, int]) -> None:
        self.layers: dict[int, Any] = {}
        self.lengths = lengths
        self._backend = backend
        self._translated: dict[str, Any] = {}

    @classmethod
    def of(
        cls, fd_config: Any, backend: str, q_quant: str, signals: KvSignals | None, config: Any
    ) -> Programs | None:
        """The programs of a configuration; None if the server makes none.

        Raises
        ------
        NotImplementedError
            If a program cannot have what the configuration requires.
        """
        level = count_of(fd_config, backend, _LEVEL, 0, 0)
        if level == 0:
            return None
        if level > 2:
            refuse(backend, _LEVEL, level, "supported: 0, 1, 2")
        if signals is not None:
            supported = "a program sends no signals of a prefill server; supported there: 0"
            refuse(backend, _LEVEL, level, supported)
        if q_quant != "none":
            refuse(backend, "q_quant", q_quant, f"supported with {_LEVEL} = {level}: none")
        # Then FastDeploy runs programs only in steps of decoding sequences, else in all steps.
        decodes = read(fd_config, "graph_opt_config.use_cudagraph", False) and read(
            fd_config, "graph_opt_config.full_cuda_graph", True
        )
        return cls(backend, (config.decode_tokens if decodes else ANY_LENGTH, config.max_model_len))

    def begin(self, forward_meta: Any) -> tuple[Any, dict[str, Any]]:
        """What :meth:`learn` needs of a step, which may run a program.

        Raises
        ------
        NotImplementedError
            If the programs were translated for steps with other fields.
        """
        for name in ("cascade_plan", "attn_mask"):
            if optional(forward_meta, name) is not None:
                self._refuse(name)
        constants = _constants(forward_meta)
        for name, was in self._translated.items():
            if constants[name] != was:
                self._refuse(name, f" = {constants[name]}: programs were translated for {was}")
        return weakref.ref(forward_meta), constants

    def _refuse(self, name: str, more: str = "") -> None:
        raise NotImplementedError(
            f"{self._backend}: forward_meta.{name}{more} is not supported with {_LEVEL} > 0"
        )

    def learn(self, backend: Any, layer: Any) -> None:
        """Find the arguments of a layer's operator, and note for which steps they are right."""
        step, self._translated = backend.attention_metadata.program
        if layer.layer_id in self.layers:
            return
        with paddle.base.dygraph.guard():
            facts = backend._facts_of(layer, step())
            if facts.head_windows is not None:
                raise NotImplementedError(
                    f"{self._backend}: windows of some heads, or with model_config.sink_size, are "
                    f"not supported with {_LEVEL} > 0"
                )
            options = facts.step[0]
            # SOT finds the attributes of this object. It finds no methods of a dataclass.
            self.layers[layer.layer_id] = SimpleNamespace(
                first=facts.first,
                dynamic=facts.dynamic,
                scales=(None, None) if facts.dynamic else facts.scales(step(), layer),
                tensors=options.tensors,
                attrs=options.attrs,
                masked_attrs=facts.masked_step[0].attrs,
                window=facts.window,
                own_table=backend.config.window_tables and backend._has_window(layer),
            )


def _constants(forward_meta: Any) -> dict[str, Any]:
    """What is a constant of a program: which tensors a step has, and their ranks."""
    found: dict[str, Any] = {}
    for name in ("attn_mask_offsets", "rotary_embs", "swa_rotary_embs"):
        tensor = optional(forward_meta, name)
        found[name] = "None" if tensor is None else f"a tensor of rank {len(tensor.shape)}"
    return {**found, "rope_already_applied": bool(optional(forward_meta, "rope_already_applied"))}


def program_step(backend: Any, qkv: Any, layer: Any, forward_meta: Any) -> Any:
    """A layer's step inside a translation. SOT translates this function."""
    qkv = _learn(qkv, backend, layer)
    own, caches = backend._programs.layers[layer.layer_id], forward_meta.caches
    key, value = caches[own.first], caches[own.first + 1]
    scales = own.scales
    if own.dynamic:
        scales = caches[own.first + 2], caches[own.first + 3]
    seqs = (
        forward_meta.block_tables,
        forward_meta.cu_seqlens_q,
        forward_meta.seq_lens_decoder,
        forward_meta.seq_lens_this_time,
    )
    table = None
    if not forward_meta.rope_already_applied:
        table = forward_meta.swa_rotary_embs if own.own_table else forward_meta.rotary_embs
    mask, attrs = forward_meta.attn_mask_offsets, own.attrs
    masked = mask is not None  # SOT does not translate `if tensor is not None`
    if masked:
        mask, attrs = mask.reshape([-1, 2]), own.masked_attrs
        if own.window:
            mask = last_keys(mask, own.window)
    # A graph of a part of a program gives more tokens than batch_id_per_token has. The starts of
    # sequences also tell which tokens are padding.
    inputs = (qkv, key, value, table, *seqs, None, *scales, mask)
    return _call(
        "attention_step", (*inputs, *own.tensors, None), (*backend._programs.lengths, *attrs)
    )


@unified
def _learn(qkv: Any, backend: Any, layer: Any) -> Any:
    """Return `qkv`. SOT does not translate this, so it runs as written, once for a layer."""
    backend._programs.learn(backend, layer)
    return qkv


@unified
def _call(op: str, inputs: tuple[Any, ...], attrs: tuple[Any, ...]) -> Any:
    """First output of an operator, in a form that SOT does not translate."""
    return _ops.call(op, inputs, attrs)[0]
