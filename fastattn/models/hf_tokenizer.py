"""Tokenizers in ``tokenizer.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastattn.models.config import ModelError
from fastattn.models.tokenizer import Tokenizer


def _rule(told: Any) -> str:
    """Name of the rules that a ``pre_tokenizer`` means."""
    text = json.dumps(told)
    if "Digits" in text:
        return "smollm"
    if r"\\p{N}{1,3}" in text:
        return "llama-bpe"
    if r"\\p{N}" in text:
        return "qwen2"
    return "gpt-2"


def _pair(merge: Any) -> tuple[str, ...]:
    return tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder.

    Raises
    ------
    ModelError
        If it is of another kind than BPE.
    """
    told = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = told["model"]
    if model.get("type") != "BPE":
        raise ModelError(
            f"tokenizer of type {model.get('type')!r} is not supported; supported: BPE"
        )
    vocabulary = dict(model["vocab"])
    added = told.get("added_tokens", [])
    vocabulary.update({entry["content"]: entry["id"] for entry in added})
    size = max(vocabulary.values()) + 1
    tokens = [f"<unused {i}>" for i in range(size)]
    for token, i in vocabulary.items():
        tokens[i] = token
    special = [entry["id"] for entry in added if entry.get("special")]
    merges = [_pair(merge) for merge in model["merges"]]
    whole = [entry["id"] for entry in added if not entry.get("special")]
    options: dict[str, Any] = {
        "special": special,
        "whole": whole,
        **_ends(folder, vocabulary, told),
    }
    if model.get("byte_fallback"):
        ranks = {pair: i for i, pair in enumerate(merges)}
        prefix = "Prepend" in json.dumps(told.get("normalizer"))
        return Tokenizer(tokens, ranks, None, add_space_prefix=prefix, **options)
    return Tokenizer.byte_level(tokens, merges, _rule(told.get("pre_tokenizer")), **options)


def _ends(folder: Path, vocabulary: dict[str, int], told: Any) -> dict[str, int | None]:
    """First and last token of texts: from ``tokenizer_config.json``, if it is there."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def token(name: str) -> int | None:
        value = config.get(name)
        return vocabulary.get(value["content"] if isinstance(value, dict) else value or "")

    bos = token("bos_token")
    name = None if bos is None else next(t for t, i in vocabulary.items() if i == bos)
    # Some checkpoints say so in the configuration, some in the post-processor.
    adds = config.get(
        "add_bos_token", name is not None and name in json.dumps(told.get("post_processor"))
    )
    return {"bos": bos if adds else None, "eos": token("eos_token")}
