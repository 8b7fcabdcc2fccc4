"""The measurement: every row over the same windows, then greedy text, then needles."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastattn.evaluate.needles import Found, Needles, ask
from fastattn.evaluate.score import Scores, Summary, join, rows_at_a_time, score, summarise
from fastattn.models import LanguageModel, exact
from fastattn.models.served import LayerPlan, Session, greedy
from fastattn.reference.numerics import Array

#: Gets a number of units of work, and a word on what was done.
Progress = Callable[[float, str], None]

#: Work of a token in forward passes and comparisons, and of a generated one, which has all of the
#: weights to itself.
TOKEN, GENERATED = 1.0, 12.0


@dataclass
class Row:
    """What is measured, and what was found.

    Attributes
    ----------
    name : str
    plans : list of LayerPlan, or None
        None is the model in fp32 without a cache.
    quantize_q, default : bool
    bytes_per_token : float
        In the caches of all layers.
    windows : list of Scores
    seconds : float
        Of forward passes over the windows.
    tokens : int
        In them.
    same_tokens : list of int
        For each prompt, how many greedy tokens are the base's.
    texts : list of list of int
        The greedy tokens.
    decode_per_second : float
        Greedy tokens a second.
    needles : dict
        By length.
    """

    name: str
    plans: list[LayerPlan] | None
    quantize_q: bool = False
    default: bool = False
    bytes_per_token: float = 0.0
    windows: list[Scores] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    same_tokens: list[int] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    decode_per_second: float = 0.0
    needles: dict[int, Found] = field(default_factory=dict)

    @property
    def prefill_per_second(self) -> float:
        """Tokens of windows a second, everything but the logits."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def summary(self, base: Row) -> Summary:
        """Against the base."""
        return summarise(self.windows, base.windows)


class Measurement:
    """A model and the rows that are compared. The first row is the base.

    Parameters
    ----------
    model : LanguageModel
    rows : sequence of Row
    place : paddle.Place, optional
        Of caches and attention; of the dense layers, too, if it is a GPU.
    dense_place : paddle.Place, optional
        Of the dense layers in Paddle; by default they are NumPy's.
    progress : callable, optional
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: Sequence[Row],
        *,
        place: Any = None,
        dense_place: Any = None,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.rows, self.place = model, list(rows), place
        self.dense = model.dense if dense_place is None else model.on(dense_place)
        self._progress = progress

    def _tell(self, work: float, note: str) -> None:
        if self._progress is not None:
            self._progress(work, note)

    def _session(self, row: Row, length: int) -> Session:
        assert row.plans is not None
        return Session(
            self.dense, row.plans, length=length, place=self.place, quantize_q=row.quantize_q
        )

    def perplexities(self, windows: Sequence[Array], *, seconds: float | None = None) -> None:
        """Scores of all rows over windows of tokens; after so many seconds none is begun.

        Two windows are in any case: one has no standard error.
        """
        begin = time.perf_counter()
        length = max(map(len, windows))
        sessions = [None if row.plans is None else self._session(row, length) for row in self.rows]
        for row, session in zip(self.rows, sessions):
            row.bytes_per_token = 0.0 if session is None else session.bytes_per_token
            if session is not None:  # the first steps of a session are slower
                session.forward(windows[0][None, :8])
        for number, tokens in enumerate(windows):
            if seconds is not None and number > 1 and time.perf_counter() - begin > seconds:
                break
            hidden = []
            for row, session in zip(self.rows, sessions):
                start = time.perf_counter()
                if session is None:
                    hidden.append(exact.forward(self.model.dense, tokens))
                else:
                    session.rewind(0)
                    hidden.append(session.forward(tokens[None]))
                row.seconds += time.perf_counter() - start
                row.tokens += len(tokens)
                self._tell(len(tokens) * TOKEN, f"window {number + 1}, {row.name}")
            self._score(hidden, tokens)

    def _score(self, hidden: Sequence[Any], tokens: Array) -> None:
        """Compare all rows' logits of a window, some positions at a time."""
        step = rows_at_a_time(self.model.config.vocabulary)
        parts: list[list[Scores]] = [[] for _ in self.rows]
        for at in range(0, len(tokens) - 1, step):
            end = min(at + step, len(tokens) - 1)
            base = self._logits(hidden[0][at:end])
            one_by_one = (self._logits(h[at:end]) for h in hidden[1:])
            own, others = score(base, one_by_one, tokens[at + 1 : end + 1])
            for part, found in zip(parts, [own, *others]):
                part.append(found)
            self._tell((end - at) * TOKEN * len(self.rows), "comparing")
        for row, part in zip(self.rows, parts):
            row.windows.append(join(part))

    def _logits(self, hidden: Any) -> Array:
        dense = self.model.dense if isinstance(hidden, np.ndarray) else self.dense
        return dense.logits(hidden)

    def agreement(self, prompts: Sequence[Sequence[int]], new: int) -> None:
        """Greedy continuations, and how far they are the base's."""
        length = max(map(len, prompts)) + new
        served = [row for row in self.rows if row.plans is not None]
        for row in served:
            session = self._session(row, length)
            list(greedy(session, prompts[0], 2))  # warm
            seconds = 0.0
            for prompt in prompts:
                session.rewind(0)
                tokens: list[int] = []
                for token in greedy(session, prompt, new):
                    if not tokens:
                        start = time.perf_counter()  # after the prompt
                    tokens.append(token)
                    self._tell(GENERATED, f"greedy text, {row.name}")
                seconds += time.perf_counter() - start
                row.texts.append(tokens)
            row.decode_per_second = len(prompts) * (new - 1) / max(seconds, 1e-9)
            row.same_tokens = [_common(own, base) for own, base in zip(row.texts, served[0].texts)]

    def find_needles(self, needles: Needles, length: int) -> None:
        """Ask every served row what a long text said."""
        for row in self.rows:
            if row.plans is None:
                continue
            session = self._session(row, length)
            name = f"needles in {length} tokens, {row.name}"
            row.needles[length] = ask(
                session, needles, lambda tokens, name=name: self._tell(tokens * TOKEN, name)
            )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at the start that are the same."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))
