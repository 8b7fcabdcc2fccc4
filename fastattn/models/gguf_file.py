"""Models in GGUF files, by the package ``gguf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastattn.functional.rotary_styles import use_neox_rotary_style
from fastattn.models.config import ARCHITECTURES, ModelConfig, ModelError
from fastattn.models.tokenizer import Tokenizer
from fastattn.models.weights import LayerNames, NamedReader, Weights, read_weights
from fastattn.reference.numerics import Array

_NAMES = LayerNames(
    attention_norm="blk.{}.attn_norm",
    q="blk.{}.attn_q",
    k="blk.{}.attn_k",
    v="blk.{}.attn_v",
    attention_out="blk.{}.attn_output",
    mlp_norm="blk.{}.ffn_norm",
    gate="blk.{}.ffn_gate",
    up="blk.{}.ffn_up",
    down="blk.{}.ffn_down",
    q_norm="blk.{}.attn_q_norm",
    k_norm="blk.{}.attn_k_norm",
    attention_post_norm="blk.{}.post_attention_norm",
    mlp_post_norm="blk.{}.post_ffw_norm",
)

#: Embedding, last norm, head.
_ENDS = ("token_embd.weight", "output_norm.weight", "output.weight")

#: Types of tokens.
_CONTROL, _USER_DEFINED = 3, 4

#: Gemma 3 alternates five layers of a window and one of all keys.
GEMMA3_PATTERN = 6


class _Fields:
    """Metadata of a file."""

    def __init__(self, reader: Any, path: Path) -> None:
        self._fields, self._path = reader.fields, path

    def get(self, name: str, default: Any = None) -> Any:
        field = self._fields.get(name)
        return default if field is None else field.contents()

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise ModelError(f"{self._path}: {name} is missing")
        return value


def _config(fields: _Fields) -> ModelConfig:
    architecture = fields.need("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"architecture {architecture!r} is not supported; supported: "
            + ", ".join(ARCHITECTURES)
        )
    prefix = f"{architecture}."
    if int(fields.get(prefix + "expert_count", 0)):
        raise ModelError("mixtures of experts are not supported")
    heads, hidden = (
        int(fields.need(prefix + name)) for name in ("attention.head_count", "embedding_length")
    )
    layers = int(fields.need(prefix + "block_count"))
    head_dim = int(fields.get(prefix + "attention.key_length", hidden // heads))
    rotated = int(fields.get(prefix + "rope.dimension_count", head_dim))
    if rotated != head_dim:
        raise ModelError(f"{rotated} of {head_dim} channels are rotated, which is not supported")
    scaling = fields.get(prefix + "rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ModelError(f"rope.scaling.type {scaling!r} is not supported")
    gemma = architecture == "gemma3"
    # As llama.cpp has it: only the 27B model, which has 62 layers, scales by another size.
    scale_of = hidden // heads if gemma and layers == 62 else head_dim
    return ModelConfig(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(fields.get(prefix + "attention.head_count_kv", heads)),
        head_dim=head_dim,
        vocabulary=len(fields.need("tokenizer.ggml.tokens")),
        context=int(fields.need(prefix + "context_length")),
        norm_eps=float(fields.need(prefix + "attention.layer_norm_rms_epsilon")),
        softmax_scale=float(scale_of) ** -0.5,
        neox=use_neox_rotary_style(architecture, "gguf"),
        rope_theta=float(fields.get(prefix + "rope.freq_base", 1e4)),
        rope_factor=float(fields.get(prefix + "rope.scaling.factor", 1.0))
        if scaling == "linear"
        else 1.0,
        window=int(fields.get(prefix + "attention.sliding_window", 0)) if gemma else 0,
        full=tuple((n + 1) % GEMMA3_PATTERN == 0 for n in range(layers)) if gemma else (),
        gelu=gemma,
        embedding_scale=hidden**0.5 if gemma else 1.0,
    )


def _tokenizer(fields: _Fields) -> Tokenizer:
    kind = fields.need("tokenizer.ggml.model")
    tokens = fields.need("tokenizer.ggml.tokens")
    types = fields.get("tokenizer.ggml.token_type", [])
    bos = int(fields.get("tokenizer.ggml.bos_token_id", -1))
    # Without a word, files of SentencePiece have one and others have none.
    adds = bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama"))
    common = {
        "special": [i for i, t in enumerate(types) if t == _CONTROL],
        "whole": [i for i, t in enumerate(types) if t == _USER_DEFINED],
        "bos": bos if adds and bos >= 0 else None,
        "eos": fields.get("tokenizer.ggml.eos_token_id"),
    }
    if kind == "gpt2":
        merges = [tuple(m.split(" ", 1)) for m in fields.need("tokenizer.ggml.merges")]
        pre = fields.get("tokenizer.ggml.pre", "default")
        return Tokenizer.byte_level(tokens, merges, pre, **common)
    if kind == "llama":
        space = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
        scores = fields.need("tokenizer.ggml.scores")
        return Tokenizer.sentencepiece(tokens, scores, add_space_prefix=space, **common)
    raise ModelError(f"tokenizer {kind!r} is not supported; supported: gpt2, llama")


def read_gguf(path: Path) -> tuple[ModelConfig, Weights, Tokenizer]:
    """A model of a GGUF file, its weights as float32.

    Raises
    ------
    ModelError
        If the package ``gguf`` is missing, or the file is no model that this package runs.
    """
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            f"{path}: reading GGUF needs the package gguf: pip install gguf, or fastattn[models] "
            f"({error})"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ModelError(f"{path}: no GGUF file: {error}") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> Array | None:
        tensor = tensors.get(name)
        if tensor is None:
            return None
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in tensor.shape[::-1])
        return np.ascontiguousarray(values, np.float32).reshape(shape)

    fields = _Fields(reader, path)
    try:
        config = _config(fields)
        named = NamedReader(read)
        mlp = int(fields.need(f"{config.architecture}.feed_forward_length"))
        factors = named.find("rope_freqs.weight", config.head_dim // 2)
        weights = read_weights(named, config, _NAMES, mlp, _ENDS, factors)
        return config, weights, _tokenizer(fields)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
