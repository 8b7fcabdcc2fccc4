"""Configurations, random weights, rotary tables, and what prompts are projected to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.support.tensors import BF16

HIDDEN, HEADS, LATENT, ROPE, INDEX_DIM = 256, 4, 512, 64, 128
EPS = 1e-6
MAX_POSITIONS = 512
#: Models have 1024 or 1536. No operator sees it, nor the rank of V4's output projection.
QUERY_RANK = 256

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class V32Config:
    """DeepSeek-V3.2 or GLM-5: latent attention over the tokens that an indexer selects."""

    name: str
    q_lora: int = QUERY_RANK
    nope: int = 128
    v_dim: int = 128
    index_heads: int = 64
    index_interleaved: bool = False  #: rotates neighbours; else channels i and i + 32
    mscale: float = 0.1 * math.log(40) + 1
    topk: int = 2048

    @property
    def softmax_scale(self) -> float:
        """That of a head before absorption."""
        return float((self.nope + ROPE) ** -0.5 * self.mscale**2)


@dataclass(frozen=True)
class V4Config:
    """DeepSeek-V4: a window of tokens, and all that is older in compressed entries.

    `ratio` 0 is a layer of the window alone, 4 one with an indexer, 128 one that sees all entries.
    """

    name: str
    ratio: int
    q_lora: int = QUERY_RANK
    o_lora: int = 192
    groups: int = 1
    index_heads: int = 64
    topk: int = 512
    window: int = 128

    softmax_scale = float(LATENT**-0.5)


V32 = V32Config("v32")
GLM = V32Config("glm", nope=192, v_dim=256, index_heads=32, index_interleaved=True, mscale=1.0)
V32_CONFIGS = {
    "v32": V32,
    "glm": GLM,
    # Fewer tokens than prompts have, so that there is something to select.
    "v32_top48": replace(V32, topk=48),
    "glm_top21": replace(GLM, topk=21),
}

_PRO = {"groups": 2, "topk": 1024}
V4_CONFIGS = {
    "flash_window": V4Config("flash", 0),
    "flash_c4": V4Config("flash", 4),
    "flash_c128": V4Config("flash", 128),
    "pro_c4": V4Config("pro", 4, **_PRO),
    "pro_c128": V4Config("pro", 128, **_PRO),
    "flash_c4_top19": V4Config("flash", 4, topk=19),
}

#: Layers that are spread over 2 or 4 processes: a group of the output projection for each head.
RANK_CONFIGS = {
    "ranks_v32": replace(V32, topk=48),
    "ranks_v32_ties": replace(V32, topk=48),
    "ranks_c4": V4Config("flash", 4, groups=4, topk=19),
    "ranks_c4_ties": V4Config("flash", 4, groups=4, topk=19),
    "ranks_c128": V4Config("flash", 128, groups=4),
}


def with_ties(weights: Weights) -> Weights:
    """One head counts in the index weights, so that half of all logits are exactly 0.

    Where that head's weight is negative these are the largest, and the top-k ends among them.
    """
    index_weights = np.zeros_like(weights["iw"])
    index_weights[:, 0] = weights["iw"][:, 0]
    return {**weights, "iw": index_weights}


def frequencies(config: Any) -> np.ndarray:
    """Angle of each of 32 pairs at position 1, fp64."""
    compressed = isinstance(config, V4Config) and config.ratio > 0
    theta = 160000.0 if compressed else 10000.0
    plain = theta ** -(np.arange(ROPE // 2) / (ROPE // 2))
    if not compressed:
        return plain
    # YaRN: pairs that turn less than once in the original context are slowed down, those that turn
    # more than 32 times are not, and those between are mixed.
    factor, original = 16.0, 65536.0

    def pair(turns: float) -> float:
        return ROPE / 2 * math.log(original / (2 * math.pi * turns)) / math.log(theta)

    low, high = math.floor(pair(32.0)), math.ceil(pair(1.0))
    slow = np.clip((np.arange(ROPE // 2) - low) / (high - low), 0.0, 1.0)
    return plain * (1 - slow) + plain / factor * slow


def rotary_table(config: Any) -> np.ndarray:
    """32 cosines and 32 sines of each position, fp32."""
    angles = np.arange(MAX_POSITIONS)[:, None] * frequencies(config)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def rotate(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Rotate the last axis of x [T, ..., 64], neighbours as pairs, by rows of a table [T, 64]."""
    table = table.reshape(len(x), *[1] * (x.ndim - 2), ROPE).astype(np.float64)
    cos, sin = table[..., : ROPE // 2], table[..., ROPE // 2 :]
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * weight


def bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(BF16)


def _matrix(rng: np.random.Generator, *shape: int, gain: float = 1.0) -> np.ndarray:
    return rng.standard_normal(shape) * (gain / math.sqrt(shape[-2]))


def _wide(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """The largest matrix of a layer, in fp32: its product is rounded to bf16 next."""
    return rng.standard_normal((rows, columns), np.float32) / np.float32(math.sqrt(rows))


def _norm_weight(rng: np.random.Generator, size: int) -> np.ndarray:
    """Blocks of 64 channels differ by up to a factor of 16, so that no two scales are alike."""
    blocks = np.exp2(rng.uniform(-2, 2, -(-size // 64))).repeat(64)[:size]
    return (blocks * rng.uniform(0.7, 1.3, size)).astype(np.float32).astype(np.float64)


def v32_weights(config: V32Config, seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    heads, q_dim = HEADS, config.nope + ROPE
    return {
        "qa": _matrix(rng, HIDDEN, config.q_lora),
        "qa_norm": _norm_weight(rng, config.q_lora),
        "kva": _matrix(rng, HIDDEN, LATENT + ROPE),
        "kva_norm": _norm_weight(rng, LATENT) * 0.5,
        "qb": _matrix(rng, config.q_lora, heads * q_dim),
        "uk": _matrix(rng, heads, config.nope, LATENT),  # [H, nope, latent]
        "uv": _matrix(rng, heads, LATENT, config.v_dim),
        "o": _matrix(rng, heads * config.v_dim, HIDDEN),
        "iq": _wide(rng, config.q_lora, config.index_heads * INDEX_DIM),
        "ik": _matrix(rng, HIDDEN, INDEX_DIM),
        "ik_norm": rng.uniform(0.5, 1.5, INDEX_DIM),
        "ik_bias": rng.uniform(-0.3, 0.3, INDEX_DIM),
        "iw": _matrix(rng, HIDDEN, config.index_heads),
    }


def v4_weights(config: V4Config, seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    f4 = np.float32
    weights = {
        "qa": _matrix(rng, HIDDEN, config.q_lora),
        "qa_norm": _norm_weight(rng, config.q_lora),
        "kv": _matrix(rng, HIDDEN, LATENT),
        "kv_norm": _norm_weight(rng, LATENT),
        "qb": _matrix(rng, config.q_lora, HEADS * LATENT),
        "sinks": rng.normal(size=HEADS).astype(f4) * f4(2),
        "wo_a": _matrix(rng, config.groups, HEADS // config.groups * LATENT, config.o_lora),
        "wo_b": _matrix(rng, config.groups * config.o_lora, HIDDEN),
    }
    overlap = 2 if config.ratio == 4 else 1
    for name, head in (("latent", LATENT), ("index", INDEX_DIM)):
        if config.ratio == 4 or (config.ratio and name == "latent"):
            weights[f"{name}_kv_score"] = _matrix(rng, HIDDEN, 2 * overlap * head, gain=1.5)
            weights[f"{name}_ape"] = rng.normal(size=(config.ratio, overlap * head)).astype(f4)
            weights[f"{name}_norm"] = _norm_weight(rng, head).astype(f4)
    if config.ratio == 4:
        weights["iq"] = _wide(rng, config.q_lora, config.index_heads * INDEX_DIM)
        weights["iw"] = _matrix(rng, HIDDEN, config.index_heads)
    return weights


def prompts(total: int, seed: int) -> np.ndarray:
    """Hidden states of all tokens; they differ in size."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((total, HIDDEN)) * np.exp2(rng.uniform(-1, 1, (total, 1)))


def _index_order(config: V32Config) -> np.ndarray:
    """Channels of an index head as the operator wants them: rotated ones last, pairs as neighbours.

    A model rotates the first 64. A logit is a sum over channels and their order does not matter, as
    long as it is the same for queries and keys; nor does it to a scale, which all channels share.
    """
    if config.index_interleaved:
        rotated = np.arange(ROPE)
    else:
        rotated = np.arange(ROPE).reshape(2, ROPE // 2).T.ravel()
    return np.concatenate([np.arange(ROPE, INDEX_DIM), rotated])


def project_v32(
    config: V32Config, w: Weights, x: np.ndarray, positions: np.ndarray
) -> dict[str, np.ndarray]:
    """What the operators get of each token, rounded to bf16 where a model has bf16."""
    tokens, table = len(x), rotary_table(config)[positions]
    qr = bf16(rms(x @ w["qa"], w["qa_norm"])).astype(np.float64)
    kv = x @ w["kva"]
    q = (qr @ w["qb"]).reshape(tokens, HEADS, -1)
    absorbed = (q[..., : config.nope].transpose(1, 0, 2) @ w["uk"]).transpose(1, 0, 2)
    key = x @ w["ik"]
    key = key - key.mean(axis=-1, keepdims=True)
    key = key / np.sqrt((key**2).mean(axis=-1, keepdims=True) + EPS) * w["ik_norm"] + w["ik_bias"]
    order = _index_order(config)
    index_q = (qr.astype(np.float32) @ w["iq"]).reshape(tokens, -1, INDEX_DIM)[..., order]
    key, plain = key[:, order], INDEX_DIM - ROPE
    return {
        "latent": bf16(rms(kv[:, :LATENT], w["kva_norm"])),
        "rope": bf16(rotate(kv[:, LATENT:], table)),
        "q": bf16(np.concatenate([absorbed, rotate(q[..., config.nope :], table)], axis=-1)),
        "index_q": bf16(index_q),
        "index_k": bf16(np.concatenate([key[:, :plain], rotate(key[:, plain:], table)], axis=-1)),
        "index_w": (x @ w["iw"]).astype(np.float32),
    }


def project_v4(config: V4Config, w: Weights, x: np.ndarray) -> dict[str, np.ndarray]:
    """What the operators get of each token; norms and rotations of heads are theirs."""
    tokens = len(x)
    qr = bf16(rms(x @ w["qa"], w["qa_norm"])).astype(np.float64)
    made = {
        "q": bf16((qr @ w["qb"]).reshape(tokens, HEADS, LATENT)),
        "kv": bf16(rms(x @ w["kv"], w["kv_norm"])),
    }
    for name in ("latent", "index"):
        if f"{name}_kv_score" in w:
            made[f"{name}_kv_score"] = (x @ w[f"{name}_kv_score"]).astype(np.float32)
    if config.ratio == 4:
        made["index_q"] = bf16((qr.astype(np.float32) @ w["iq"]).reshape(tokens, -1, INDEX_DIM))
        made["index_w"] = (x @ w["iw"]).astype(np.float32)
    return made
