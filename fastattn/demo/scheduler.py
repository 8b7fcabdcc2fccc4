"""Choice of the tokens of a step: decoding requests and prefill chunks, within a token budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastattn.backends.config import BLOCK_SIZE
from fastattn.demo.blocks import BlockPool, block_keys
from fastattn.reference.numerics import Array


@dataclass(frozen=True)
class Sampling:
    """Rule for the next token. Temperature 0 is greedy."""

    temperature: float = 0.7
    top_k: int = 20
    seed: int = 0


@dataclass(eq=False)
class Request:
    """A sequence that is served.

    Attributes
    ----------
    tokens : list of int
        Prompt and generated tokens.
    computed : int
        Number of its tokens whose K and V are in the cache.
    reused : int
        Number of tokens that were in the cache when the request was first admitted.
    logits : list of array
        Logits of every token, kept if `keep_logits` is set.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    keep_logits: bool = False
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    reused: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    logits: list[Any] = field(default_factory=list)
    preemptions: int = 0

    def __post_init__(self) -> None:
        if len(self.prompt) == 0:
            raise ValueError("Request: prompt: expected at least one token")
        self.tokens = [int(t) for t in self.prompt]
        self.random = np.random.default_rng(self.sampling.seed)

    @property
    def pending(self) -> int:
        """Number of tokens that have not run yet; 1 for a decoding request."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> list[int]:
        """New tokens."""
        return self.tokens[len(self.prompt) :]

    @property
    def done(self) -> bool:
        """Whether nothing is left to run."""
        return len(self.generated) >= self.max_new_tokens and (
            self.max_new_tokens > 0 or self.pending == 0
        )

    def sample(self, logits: Array) -> int:
        """Choose the next token from logits ``[vocabulary]``."""
        if self.sampling.temperature <= 0:
            return int(np.argmax(logits))
        best = np.argsort(-logits, kind="stable")[: self.sampling.top_k]
        scaled = logits[best].astype(np.float64) / self.sampling.temperature
        weights = np.exp(scaled - scaled.max())
        return int(self.random.choice(best, p=weights / weights.sum()))


@dataclass(frozen=True)
class ScheduledTokens:
    """Tokens of a request in this step: `count` tokens from `start` on."""

    request: Request
    start: int
    count: int

    @property
    def tokens(self) -> list[int]:
        """The tokens themselves."""
        return self.request.tokens[self.start : self.start + self.count]

    @property
    def is_prefill(self) -> bool:
        """Whether they belong to a prompt, or to tokens that a preempted request computes again."""
        return self.count > 1 or self.start < len(self.request.prompt)

    @property
    def is_last(self) -> bool:
        """Whether the request's next token can be sampled after this step."""
        return self.start + self.count == len(self.request.tokens)


class Scheduler:
    """First come, first served. The youngest request is preempted if no block is free.

    Parameters
    ----------
    pool : BlockPool
    max_seqs : int
        Maximum number of running requests.
    token_budget : int
        Maximum number of tokens of a step.
    chunk : int
        Maximum number of tokens of a prompt in one step.
    reuse_prefixes : bool
        Whether to search for a new request's first blocks in those that others have filled.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_seqs: int,
        token_budget: int,
        chunk: int,
        reuse_prefixes: bool = True,
    ) -> None:
        for name, value in (("max_seqs", max_seqs), ("token_budget", token_budget)):
            if value < 1:
                raise ValueError(f"Scheduler: {name}: expected at least 1, got {value}")
        if chunk < 1:
            raise ValueError(f"Scheduler: chunk: expected at least 1, got {chunk}")
        self.pool = pool
        self.max_seqs = max_seqs
        self.token_budget = max(token_budget, max_seqs)  # every decoding request fits
        self.chunk = chunk
        self.reuse_prefixes = reuse_prefixes
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises
        ------
        ValueError
            If it could not run even alone.
        """
        longest = len(request.prompt) + max(request.max_new_tokens - 1, 0)
        if _blocks_for(longest) > self.pool.num_blocks:
            raise ValueError(
                f"a request of {longest} tokens needs {_blocks_for(longest)} cache blocks, there "
                f"are {self.pool.num_blocks}"
            )
        self.waiting.append(request)

    def schedule(self) -> list[ScheduledTokens]:
        """Tokens of the next step, with blocks for all of them; empty if all requests are done."""
        scheduled: dict[Request, ScheduledTokens] = {}
        for decoding in (True, False):  # a long prompt must not delay the next tokens of others
            for request in list(self.running):
                if (request.pending == 1) == decoding and request in self.running:
                    self._plan(request, scheduled)
        self._admit(scheduled)
        return [scheduled[request] for request in self.running if request in scheduled]

    def commit(self, run: ScheduledTokens) -> None:
        """Record that tokens have run. The request's full blocks can be shared from now on."""
        request = run.request
        request.computed = run.start + run.count
        if not self.reuse_prefixes:
            return
        full = request.computed // BLOCK_SIZE
        if full > len(request.keys):
            request.keys = block_keys(request.tokens[: full * BLOCK_SIZE])
        for block, key in zip(request.blocks[:full], request.keys):
            self.pool.publish(block, key)

    def finish(self, request: Request) -> None:
        """Remove a request and release its blocks."""
        self.running.remove(request)
        self._release(request)

    def _plan(self, request: Request, scheduled: dict[Request, ScheduledTokens]) -> None:
        left = self.token_budget - sum(run.count for run in scheduled.values())
        count = min(request.pending, self.chunk, left)
        if count <= 0:
            return
        while len(request.blocks) < _blocks_for(request.computed + count):
            if self.pool.available:
                request.blocks.append(self.pool.allocate())
                continue
            victim = self.running[-1]
            self._preempt(victim)
            scheduled.pop(victim, None)
            if victim is request:
                return
        scheduled[request] = ScheduledTokens(request, request.computed, count)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.computed = 0
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _admit(self, scheduled: dict[Request, ScheduledTokens]) -> None:
        while self.waiting and len(self.running) < self.max_seqs:
            if sum(run.count for run in scheduled.values()) >= self.token_budget:
                return
            request = self.waiting[0]
            shared: list[int] = []
            if self.reuse_prefixes:
                # The last token always runs, because its logits give the next token.
                keys = block_keys(request.tokens[: len(request.tokens) - 1])
                shared = self.pool.acquire_prefix(keys)
            if _blocks_for(len(request.tokens)) - len(shared) > self.pool.available:
                self.pool.release(shared)
                return
            self.waiting.popleft()
            request.blocks = shared
            request.computed = len(shared) * BLOCK_SIZE
            if request.preemptions == 0:
                request.reused = request.computed
            self.running.append(request)
            self._plan(request, scheduled)

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
        request.keys = []


def _blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)
