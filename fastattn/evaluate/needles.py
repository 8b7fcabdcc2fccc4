"""Needles: facts at several depths of a long text, and whether the model still knows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn.models.served import Session
from fastattn.models.tokenizer import Tokenizer
from fastattn.reference.numerics import Array

_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Dakar", "Hanoi", "Turin")
_CHUNK = 1024  # tokens of the long text at a time


@dataclass(frozen=True)
class Needles:
    """A long text with facts in it, and questions.

    Attributes
    ----------
    tokens : array of int, shape [T]
    questions : list of (array of int, array of int)
        How a sentence starts, and how it ended in the text.
    """

    tokens: Array
    questions: list[tuple[Array, Array]]


@dataclass(frozen=True)
class Found:
    """Of all questions: the share whose every token was the likeliest, and the loss a token."""

    recalled: float
    loss: float


def hide(tokenizer: Tokenizer, text: str, length: int, seed: int = 0) -> Needles:
    """A text of `length` tokens, questions included, with eight facts at even depths.

    Raises
    ------
    ValueError
        If the text is too short, or the length leaves no room for it between the facts.
    """
    rng = np.random.default_rng(seed)
    numbers = rng.choice(np.arange(1000, 10000), len(_CITIES), replace=False)
    starts = [f"The secret number of {city} is" for city in _CITIES]
    facts = [
        tokenizer.encode(f"\n{start} {number}.\n", bos=False)
        for start, number in zip(starts, numbers)
    ]
    questions = []
    for start, number in zip(starts, numbers):
        asked = tokenizer.encode("\n" + start, bos=False)
        whole = tokenizer.encode(f"\n{start} {number}", bos=False)
        questions.append((np.array(asked), np.array(whole[len(asked) :])))
    longest = max(len(a) + len(b) for a, b in questions)
    room = length - longest - sum(map(len, facts))
    if room < 1:
        raise ValueError(
            f"needles: {length} tokens have no room for {len(facts)} facts and a question; "
            f"expected at least {length - room + 1}"
        )
    hay = tokenizer.encode(text)
    if len(hay) < room:
        raise ValueError(f"expected a text of {room} tokens, got {len(hay)}")
    cuts = np.linspace(0.02, 0.98, len(facts)) * room
    parts: list[int] = []
    at = 0
    for cut, fact in zip(cuts.astype(int), facts):
        parts += [*hay[at:cut], *fact]
        at = cut
    parts += hay[at:room]
    return Needles(np.array(parts, np.int64), questions)


def ask(session: Session, needles: Needles, progress: Any = None) -> Found:
    """Put the long text into a session's cache, then ask every question after it.

    Parameters
    ----------
    session : Session
        Of one sequence, with room for all of it.
    needles : Needles
    progress : callable, optional
        Gets numbers of tokens.
    """
    session.rewind(0)
    for at in range(0, len(needles.tokens), _CHUNK):
        chunk = needles.tokens[at : at + _CHUNK]
        session.forward(chunk[None])
        if progress is not None:
            progress(len(chunk))
    right, losses = [], []
    for start, answer in needles.questions:
        session.rewind(len(needles.tokens))
        step = np.concatenate([start, answer])
        hidden = session.forward(step[None])[len(start) - 1 : -1]
        logits = session.dense.logits(hidden).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        own = logits[np.arange(len(answer)), answer]
        losses.append(float((np.log(np.exp(logits).sum(axis=1)) - own).mean()))
        right.append(bool((logits.argmax(axis=1) == answer).all()))
    return Found(float(np.mean(right)), float(np.mean(losses)))
