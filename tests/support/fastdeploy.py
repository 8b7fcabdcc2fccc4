"""A FastDeploy worker's side of the backends, through the stand-in of FastDeploy's interface.

It allocates caches, loads scales, cuts heads and fills a ``ForwardMeta`` as FastDeploy's model
runner does, and checks every layer against the dense fp64 model of :mod:`tests.support.serving`.
What it does is what ``scripts/check_fastdeploy.py`` finds in FastDeploy's own Python:

- ``max_len_tensor_cpu`` is zeros: only FastDeploy's own backends fill it, in their layer 0.
- There are more slots than sequences. A server either cuts everything to the sequences that run, as
  FastDeploy does, or passes block tables and cached lengths of all slots (:data:`PASSED`), where
  free slots hold what their last sequence left.
- ``exist_prefill`` and the like are set after ``init_attention_metadata``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from fastattn.backends import fastdeploy as plugin
from fastattn.reference.layout import BLOCK_SIZE
from tests.support.bounds import assert_error_ratio
from tests.support.serving import MAX_MODEL_LEN, Model
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

#: The function of the stand-in that the plug-in replaces. Its source is not FastDeploy's.
STAND_IN = "CUDAPlatform.get_attention_backend_cls"

STUB = Path(__file__).parent / "fastdeploy_stub"

#: FastDeploy's ``kv_cache_quant_type`` and the cache type of a layer.
KINDS = {
    None: "none",
    "int8": "cache_int8",
    "float8_e4m3fn": "cache_fp8",
    "block_wise_fp8": "block_wise_fp8",
}

BACKENDS = {
    "APPEND_ATTN": "AppendAttentionBackend",
    "FLASH_ATTN": "FlashAttentionBackend",
    "FLASH_MASK_ATTN": "FlashMaskAttentionBackend",
}

#: Backends of latent caches.
LATENT = {"MLA_ATTN": "MLAAttentionBackend", "DSA_ATTN": "DSAAttentionBackend"}

#: A backend's name of FastDeploy's development branch, and the class that serves it.
DECODE_UNIFIED = ("DECODE_UNIFIED_ATTN", "AppendAttentionBackend")


#: What a runner passes: whether of all slots, and the rank of the lengths.
PASSED = {"all, rank 2": (True, 2), "all": (True, 1), "running": (False, 1)}

#: Slots of a server that no sequence has, behind those that run.
FREE_SLOTS = 2


@pytest.fixture
def fastdeploy(monkeypatch):
    """A fresh stand-in, as a new process would import it."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "fastdeploy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(STUB))
    monkeypatch.delenv("FD_PLUGINS", raising=False)
    monkeypatch.delenv("FD_ATTENTION_BACKEND", raising=False)
    monkeypatch.setenv("FASTATTN_IGNORED", STAND_IN)
    yield importlib.import_module("fastdeploy")
    for name in [n for n in sys.modules if n.partition(".")[0] == "fastdeploy"]:
        del sys.modules[name]


@pytest.fixture
def registered(fastdeploy, monkeypatch):
    """A process of FastDeploy with the plug-in; FLASH_ATTN unless a test says otherwise."""
    monkeypatch.setenv("FD_ATTENTION_BACKEND", "FLASH_ATTN")
    plugin.register()
    return fastdeploy


def chosen() -> Any:
    """The class of backends that FastDeploy makes."""
    attention = importlib.import_module("fastdeploy.model_executor.layers.attention")
    return attention.get_attention_backend()


def make_fd_config(
    model: Model, kind: str | None = None, *, size: int = 1, rank: int = 0, layers: int = 1
) -> SimpleNamespace:
    """The fields of an ``FDConfig`` that a backend of FastDeploy reads."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=MAX_MODEL_LEN,
            head_dim=model.head_dim,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            num_hidden_layers=layers,
            start_layer_index=0,
            rope_theta=500.0,
            partial_rotary_factor=(model.rotary_dim or model.head_dim) / model.head_dim,
        ),
        cache_config=SimpleNamespace(block_size=BLOCK_SIZE, enable_prefix_caching=True),
        speculative_config=SimpleNamespace(
            method=None, num_speculative_tokens=1, model_type="main"
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=size,
            tensor_parallel_rank=rank,
            expert_parallel_rank=None,
            pd_disaggregation_mode="None",
        ),
        scheduler_config=SimpleNamespace(splitwise_role="mixed", max_num_seqs=8),
        graph_opt_config=SimpleNamespace(full_cuda_graph=False),
        quant_config=None if kind is None else SimpleNamespace(kv_cache_quant_type=kind),
        enable_rope_3d_runtime=False,
    )


def make_model(kind: str | None, **options: Any) -> Model:
    """A model whose scales are FastDeploy's: bfloat16; one a channel for INT8."""
    return Model(KINDS.get(kind, kind), scale_dtype=BF16, per_channel=kind == "int8", **options)


class Worker:
    """One rank's model runner: sequences of `lengths` tokens in the end, over layers of one model.

    Parameters
    ----------
    model : Model
        The whole model; a rank takes its heads of it.
    kind : str or None
        ``kv_cache_quant_type``.
    lengths : list of int
    place : str
    size, rank : int
        Tensor-parallel ranks.
    layers : int
    shared : int
        Sequence 1 starts with the first `shared` blocks of sequence 0 (prefix cache).
    passed : str
        One of :data:`PASSED`.
    """

    def __init__(
        self,
        model: Model,
        kind: str | None,
        lengths: list[int],
        place: str = "cpu",
        *,
        size: int = 1,
        rank: int = 0,
        layers: int = 2,
        shared: int = 0,
        passed: str = "running",
    ) -> None:
        attention = importlib.import_module("fastdeploy.model_executor.layers.attention")
        meta = importlib.import_module("fastdeploy.model_executor.forward_meta")
        self.meta_class, self.modes = meta.ForwardMeta, meta.ForwardMode
        rng = np.random.default_rng(5)
        self.model, self.kind, self.place = model, kind, place
        self.all_slots, self.length_rank = PASSED[passed]
        self.q_heads = model.heads // size
        self.kv_heads = max(1, model.kv_heads // size)
        self.first_q, self.first_kv = rank * self.q_heads, rank * model.kv_heads // size
        self.tokens = [
            rng.normal(size=(layers, n, model.width)).astype(model.dtype) for n in lengths
        ]
        self.cached = [0] * len(lengths)
        self.fd_config = make_fd_config(model, kind, size=size, rank=rank, layers=layers)
        self.backend = chosen()(
            self.fd_config,
            kv_num_heads=self.kv_heads,
            num_heads=self.q_heads,
            head_dim=model.head_dim,
            encoder_block_shape_q=64,
            decoder_block_shape_q=16,
        )
        self._assign_blocks(lengths, shared, rng)
        self.caches = self._allocate(layers)
        self.rotary_embs = self.on(model.table)
        device = paddle.CPUPlace() if place == "cpu" else paddle.CUDAPlace(0)
        self.layers = [
            attention.Attention(
                self.fd_config,
                i,
                device,
                scales=self._scales(),
                use_neox_rotary_style=model.neox,
                q_norm_weight=self.on(model.q_norm_weight),
                k_norm_weight=self.on(model.k_norm_weight),
            )
            for i in range(layers)
        ]

    def on(self, array: Any) -> Any:
        return None if array is None else to_paddle(np.array(array), self.place)

    def _assign_blocks(self, lengths: list[int], shared: int, rng: Any) -> None:
        """Tables [max_num_seqs, blocks], -1 where unused; free slots have a sequence's blocks."""
        needed = [-(-n // BLOCK_SIZE) for n in lengths]
        self.num_blocks = sum(needed) + 2
        order = rng.permutation(self.num_blocks)
        self.tables = np.full((len(lengths) + FREE_SLOTS, max(needed) + 1), -1)
        self.tables[len(lengths) :] = order[0]
        for seq, count in enumerate(needed):
            self.tables[seq, :count] = order[sum(needed[:seq]) :][:count]
        if shared:
            self.tables[1, :shared] = self.tables[0, :shared]
            self.tokens[1][:, : shared * BLOCK_SIZE] = self.tokens[0][:, : shared * BLOCK_SIZE]

    def _allocate(self, layers: int) -> list[Any]:
        """Zeros, uint8 for every quantised kind; scales have the model's dtype."""
        key, value = self.backend.get_kv_cache_shape(
            max_num_blocks=self.num_blocks, kv_cache_quant_type=self.kind
        )
        dtype = self.model.dtype if self.kind is None else np.uint8
        caches = []
        for _ in range(layers):
            caches += [np.zeros(key, dtype), np.zeros(value, dtype)]
            if self.model.cache_quant_type.startswith("block_wise"):
                caches += [np.zeros(key[:3], BF16) for _ in "kv"]
        return [self.on(cache) for cache in caches]

    def _scales(self) -> list[np.ndarray] | None:
        """s of ``x ~ code * s / max_bound``: all heads' for FP8, the rank's channels' for INT8."""
        if self.model.k_scales is None:
            return None
        bound, dim = 127.0 if self.kind == "int8" else 448.0, self.model.head_dim
        both = [x.astype(np.float64) * bound for x in (self.model.k_scales, self.model.v_scales)]
        if self.kind == "int8":
            own = slice(self.first_kv * dim, (self.first_kv + self.kv_heads) * dim)
            return [x[own] for x in both]
        return both

    def metadata(self, new: list[int], prefill: list[bool], num_tokens: int) -> dict[str, Any]:
        """Fields of a step's ForwardMeta, as arrays."""
        running, slots = len(new), len(self.tables)
        lens = np.array(new)
        cached = np.full(slots, 77)  # free slots keep what their last sequence left
        cached[:running] = self.cached[:running]
        encoder = np.full(slots, 5)
        encoder[:running] = np.where(prefill, lens, 0)
        batch_ids = np.full(num_tokens, -1)
        batch_ids[: lens.sum()] = np.repeat(np.arange(running), lens)
        passed = slots if self.all_slots else running
        shape = (-1, 1) if self.length_rank == 2 else (-1,)
        return {
            "seq_lens_encoder": encoder[:passed].reshape(shape),
            "seq_lens_decoder": cached[:passed].reshape(shape),
            "seq_lens_this_time": lens.reshape(shape),
            "cu_seqlens_q": np.concatenate([[0], np.cumsum(lens)]),
            "batch_id_per_token": batch_ids,
            "block_tables": self.tables[:passed],
            "max_len_tensor_cpu": np.zeros(9),
        }

    def host_lengths(self, new: list[int], prefill: list[bool]) -> Any:
        """``max_len_tensor_cpu`` as FastDeploy's own backends fill it; 6 to 8 are stale."""
        lens, cached = np.array(new), np.array(self.cached[: len(new)])
        encoder = np.where(prefill, lens, 0)
        active = lens > 0
        keys = cached + lens
        most = np.full(9, 123456)
        rows = (lens, encoder, cached[active], keys[active], keys[active & (encoder == 0)])
        most[:5] = [max(x, default=0) for x in rows]
        most[5] = most[3]
        return int32(most, "cpu")

    def make_meta(self, arrays: dict[str, Any], **fields: Any) -> Any:
        tensors = {
            name: int32(array, "cpu" if name == "max_len_tensor_cpu" else self.place)
            for name, array in arrays.items()
        }
        return self.meta_class(
            **{
                **tensors,
                "caches": self.caches,
                "rotary_embs": self.rotary_embs,
                "attn_backend": self.backend,
                "forward_mode": self.modes.MIXED,
                "step_use_cudagraph": False,
                "is_dummy_or_profile_run": False,
                **fields,
            }
        )

    def rank_qkv(self, layer: int, new: list[int], padding: int) -> np.ndarray:
        """The rank's columns of the fused projection, for the step's tokens."""
        model, dim = self.model, self.model.head_dim
        parts = [x[layer, done : done + n] for x, done, n in zip(self.tokens, self.cached, new)]
        qkv = np.concatenate([*parts, np.full((padding, model.width), 3, model.dtype)])
        heads = qkv.reshape(len(qkv), model.width // dim, dim)
        k, v = model.heads, model.heads + model.kv_heads
        own = np.concatenate(
            [
                heads[:, self.first_q : self.first_q + self.q_heads],
                heads[:, k + self.first_kv : k + self.first_kv + self.kv_heads],
                heads[:, v + self.first_kv : v + self.first_kv + self.kv_heads],
            ],
            axis=1,
        )
        return own.reshape(len(qkv), own.shape[1] * dim)

    def step(
        self,
        new: list[int],
        *,
        prefill: list[bool] | None = None,
        padding: int = 0,
        advance: list[int] | None = None,
        host_lengths: bool = False,
        after_init: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        """Run all layers and check them; sequences advance by `advance`, by default by `new`.

        `host_lengths`: ``max_len_tensor_cpu`` is filled. `after_init`: fields that are set between
        ``init_attention_metadata`` and the first layer.
        """
        prefill = [n > 1 for n in new] if prefill is None else prefill
        if host_lengths:
            fields["max_len_tensor_cpu"] = self.host_lengths(new, prefill)
        meta = self.make_meta(self.metadata(new, prefill, sum(new) + padding), **fields)
        self.backend.init_attention_metadata(meta)
        meta.__dict__.update({"exist_prefill": any(prefill), **(after_init or {})})
        for i, layer in enumerate(self.layers):
            qkv = self.on(self.rank_qkv(i, new, padding))
            before = to_numpy(qkv).copy()
            out = to_numpy(layer(qkv=qkv, forward_meta=meta))
            assert np.array_equal(to_numpy(qkv).view(np.uint16), before.view(np.uint16))
            self.check(i, new, out, padding)
        advance = new if advance is None else advance
        self.cached = [done + n for done, n in zip(self.cached, advance)]

    def check(self, layer: int, new: list[int], out: np.ndarray, padding: int = 0) -> None:
        dim, start = self.model.head_dim, 0
        dtype = "float16" if self.model.dtype == np.float16 else "bfloat16"
        assert out.shape == (sum(new) + padding, self.q_heads * dim)
        own = slice(self.first_q * dim, (self.first_q + self.q_heads) * dim)
        for seq, n in enumerate(new):
            if n == 0:
                continue
            tokens = self.tokens[seq][layer, : self.cached[seq] + n]
            exact, naive = (
                self.model.attention(tokens, self.cached[seq], p)[:, own]
                for p in ("float64", dtype)
            )
            part = out[start : start + n]
            start += n
            assert_error_ratio(part, exact, naive, dtype, f"layer {layer}, sequence {seq}")
        assert not out[start:].any(), "padding tokens"
