"""What byte-level BPE splits a text into before it merges: the regular expressions of models."""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache

#: Names of GGUF's ``tokenizer.ggml.pre``, and the rules that each means.
RULES = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "smaug-bpe": "llama3",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}


@cache
def _class(*initials: str) -> str:
    """Inside of a character class: all code points whose category starts with one of these."""
    ranges: list[str] = []
    first = None
    for code in range(sys.maxunicode + 2):
        inside = code <= sys.maxunicode and unicodedata.category(chr(code))[0] in initials
        if inside and first is None:
            first = code
        elif not inside and first is not None:
            ranges.append(f"\\U{first:08x}-\\U{code - 1:08x}")
            first = None
    return "".join(ranges)


@cache
def pattern(rule: str) -> re.Pattern[str]:
    """Regular expression whose matches are the pieces of a text.

    Source: the pre-tokenizers in the checkpoints' ``tokenizer.json``.
    """
    letters, numbers = _class("L"), _class("N")
    if rule in ("gpt2", "digits"):
        return re.compile(
            rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{letters}]+| ?[{numbers}]+"
            rf"| ?[^\s{letters}{numbers}]+|\s+(?!\S)|\s+"
        )
    number = f"[{numbers}]{{1,3}}" if rule == "llama3" else f"[{numbers}]"
    return re.compile(
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n{letters}{numbers}]?[{letters}]+|{number}"
        rf"| ?[^\s{letters}{numbers}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@cache
def _digit() -> re.Pattern[str]:
    return re.compile(f"([{_class('N')}])")


def split(text: str, rule: str) -> list[str]:
    """Pieces of a text; together they are the text."""
    if rule != "digits":
        return pattern(rule).findall(text)
    parts = [part for part in _digit().split(text) if part]
    return [piece for part in parts for piece in pattern(rule).findall(part)]
