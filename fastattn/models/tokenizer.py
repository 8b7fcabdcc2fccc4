"""Byte-level BPE and SentencePiece's BPE, as checkpoints describe them."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence
from typing import Any

from fastattn.models import pieces
from fastattn.models.config import ModelError

_SPACE = "\u2581"  # SentencePiece's blank


def _byte_characters() -> dict[int, str]:
    """Character that stands for each byte in a vocabulary of GPT-2's kind."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


_BYTE_TO_CHAR = _byte_characters()
_CHAR_TO_BYTE = {c: b for b, c in _BYTE_TO_CHAR.items()}


def _splitter(words: Iterable[str]) -> re.Pattern[str] | None:
    """Finds the longest of the words first; None if there are none."""
    found = sorted(map(re.escape, words), key=len, reverse=True)
    return re.compile(f"({'|'.join(found)})") if found else None


class Tokenizer:
    """Text to tokens and back.

    Parameters
    ----------
    tokens : sequence of str
        The vocabulary.
    ranks : dict
        (left, right) -> when this pair is merged: the least first.
    rule : str or None
        How a text is split before (:mod:`fastattn.models.pieces`); None for SentencePiece.
    special : iterable of int
        Tokens that stand for no text.
    whole : iterable of int
        Tokens that are found in any text before it is merged.
    bos, eos : int, optional
        What a text starts with, and what ends one.
    add_space_prefix : bool
        Whether a text of SentencePiece gets a blank in front.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        ranks: Any,
        rule: str | None,
        *,
        special: Iterable[int] = (),
        whole: Iterable[int] = (),
        bos: int | None = None,
        eos: int | None = None,
        add_space_prefix: bool = False,
    ) -> None:
        self.tokens = list(tokens)
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.bos, self.eos = bos, eos
        self._ranks, self._rule = ranks, rule
        self._add_space_prefix = add_space_prefix
        self._special = {self.tokens[i]: int(i) for i in special}
        self._whole = {self._surface(self.tokens[i]): int(i) for i in whole}
        self._as_text = frozenset(self._whole.values())
        self._known: dict[str, list[int]] = {}
        self._at_whole = _splitter(self._whole)
        self._at_any = _splitter({**self._whole, **self._special})

    @classmethod
    def byte_level(
        cls, tokens: Sequence[str], merges: Iterable[tuple[str, ...]], pre: str, **options: Any
    ) -> Tokenizer:
        """GPT-2's kind.

        Parameters
        ----------
        tokens : sequence of str
        merges : iterable of (str, str)
            Pairs in the order of preference.
        pre : str
            Name of the rules by which a text is split: see :data:`fastattn.models.pieces.RULES`.
        **options
            See the class.

        Raises
        ------
        ModelError
            If the rules are unknown.
        """
        if pre not in pieces.RULES:
            raise ModelError(
                f"tokenizer.ggml.pre {pre!r} is not supported; supported: "
                + ", ".join(pieces.RULES)
            )
        ranks = {pair: i for i, pair in enumerate(merges)}
        return cls(tokens, ranks, pieces.RULES[pre], **options)

    @classmethod
    def sentencepiece(
        cls, tokens: Sequence[str], scores: Sequence[float], **options: Any
    ) -> Tokenizer:
        """SentencePiece's BPE: two neighbours are merged if that is a token; the best score first.

        Parameters
        ----------
        tokens : sequence of str
        scores : sequence of float
        **options
            See the class.
        """
        return cls(tokens, _Scores(tokens, scores), None, **options)

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, *, special: bool = False, bos: bool = True) -> list[int]:
        """Tokens of a text.

        Parameters
        ----------
        text : str
        special : bool
            Whether names of special tokens in the text mean those tokens.
        bos : bool
            Whether the first token is the one that this model's texts start with, if it has one.
        """
        found = [self.bos] if bos and self.bos is not None else []
        if self._rule is None and self._add_space_prefix and text:
            text = " " + text
        known = {**self._whole, **self._special} if special else self._whole
        splitter = self._at_any if special else self._at_whole
        for part in [text] if splitter is None else splitter.split(text):
            token = known.get(part)
            if token is not None:
                found.append(token)
            elif part:
                found += self._encode(part)
        return found

    def _surface(self, token: str) -> str:
        """What a token is in a text."""
        return token.replace(_SPACE, " ") if self._rule is None else token

    def _encode(self, text: str) -> list[int]:
        if self._rule is None:
            return self._merge(list(text.replace(" ", _SPACE)))
        found: list[int] = []
        for piece in pieces.split(text, self._rule):
            known = self._known.get(piece)
            if known is None:
                known = self._merge([_BYTE_TO_CHAR[b] for b in piece.encode()])
                self._known[piece] = known
            found += known
        return found

    def _merge(self, symbols: list[str]) -> list[int]:
        """Tokens of symbols whose best pair is merged again and again."""
        parts: list[str | None] = list(symbols)
        count = len(parts)
        following = list(range(1, count + 1))
        before = list(range(-1, count - 1))
        queue: list[tuple[float, int, int, str]] = []

        def push(i: int) -> None:
            j = following[i]
            left, right = parts[i], parts[j] if j < count else None
            if left is None or right is None:
                return
            rank = self._ranks.get((left, right))
            if rank is not None:
                heapq.heappush(queue, (rank, i, j, left + right))

        for i in range(count):
            push(i)
        while queue:
            _, i, j, merged = heapq.heappop(queue)
            left, right = parts[i], parts[j]
            if left is None or right is None or following[i] != j or left + right != merged:
                continue
            parts[i], parts[j] = merged, None
            following[i] = following[j]
            if following[i] < count:
                before[following[i]] = i
            if before[i] >= 0:
                push(before[i])
            push(i)
        return [token for part in parts if part is not None for token in self._ids_of(part)]

    def _ids_of(self, part: str) -> list[int]:
        """A symbol's token, or its bytes' tokens."""
        token = self.ids.get(part)
        if token is not None:
            return [token]
        names = [f"<0x{byte:02X}>" for byte in part.encode()]
        if all(name in self.ids for name in names):
            return [self.ids[name] for name in names]
        raise ModelError(f"the vocabulary has no token for {part!r}")

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Text of tokens; special ones are left out unless asked for.

        A character whose bytes are incomplete becomes U+FFFD.
        """
        data = b""
        for i in tokens:
            token = self.tokens[int(i)]
            if token in self._special:
                data += token.encode() if special else b""
            elif int(i) in self._as_text:
                data += self._surface(token).encode()
            elif self._rule is not None:
                data += bytes(_CHAR_TO_BYTE[c] for c in token)
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                data += bytes([int(token[3:5], 16)])
            else:
                data += token.replace(_SPACE, " ").encode()
        text = data.decode("utf-8", "replace")
        return text[1:] if self._add_space_prefix and text.startswith(" ") else text


class _Scores:
    """Ranks of pairs by the score of what they make."""

    def __init__(self, tokens: Sequence[str], scores: Sequence[float]) -> None:
        self._of = {token: -float(score) for token, score in zip(tokens, scores)}

    def get(self, pair: tuple[str, str]) -> float | None:
        return self._of.get(pair[0] + pair[1])
