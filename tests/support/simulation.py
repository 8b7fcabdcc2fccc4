"""A server simulated from a seed: what it admits, shares, moves and rejects is drawn.

Blocks of 64 tokens come from one pool. Requests are admitted, prefilled in chunks, may begin with
the cached tokens of another request (whose last block is copied before either writes it), decode
with drafts that are accepted or rejected, are preempted and computed again, and leave for the host
and come back into other blocks. Free blocks hold garbage. After a step outputs are compared with
what a request's own tokens give (:mod:`tests.support.simulation_kinds`), and blocks that the step
did not own with their bytes before it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np

from tests.support.holes import tree_masks
from tests.support.simulation_kind import Kind, Step
from tests.support.simulation_kinds import KINDS, make_kind

BLOCK = 64
SEED = 20261124

MOST_SEQS = 6
MOST_DRAFTS = 3
COLUMNS = -(-(Kind.most_tokens + MOST_DRAFTS) // BLOCK) + 1

#: Every so many steps all sequences are checked, and the bytes of blocks that nobody wrote.
CHECK_ALL = 25


def setting(name: str, default: int) -> int:
    """An integer of the environment: FASTATTN_SIMULATION_STEPS, _SEED or _EPISODE."""
    return int(os.environ.get(f"FASTATTN_SIMULATION_{name}", default))


@dataclasses.dataclass(eq=False)
class Request:
    """A sequence, with what a layer must find in its cache."""

    names: np.ndarray  # of its tokens: equal ones are the same token
    rows: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    prompt: int
    done: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)
    host: list[np.ndarray] | None = None  # its blocks' bytes while it is swapped out

    def __len__(self) -> int:
        return len(self.rows)


@dataclasses.dataclass(eq=False)
class Work:
    """A request's part of a step: some of its tokens, then drafts that will be rejected."""

    request: Request
    kept: int
    drafts: np.ndarray
    history: tuple[np.ndarray, ...]  # Q, K and V of the drafts

    @property
    def new(self) -> int:
        return self.kept + len(self.drafts)


class Pool:
    """Reference counts of blocks."""

    def __init__(self, num_blocks: int, rng: np.random.Generator) -> None:
        self.rng = rng
        self.refs = np.zeros(num_blocks, int)

    def free(self) -> int:
        return int((self.refs == 0).sum())

    def take(self) -> int:
        block = int(self.rng.choice(np.flatnonzero(self.refs == 0)))
        self.refs[block] = 1
        return block


class Simulation:
    """One episode: a layer of some kind and options, and a server around it.

    Parameters
    ----------
    name : str
        Kind of the layer, of :data:`KINDS`.
    seed, episode : int
        What everything is drawn from.
    place : str
    """

    def __init__(self, name: str, seed: int, episode: int, place: str = "cpu") -> None:
        self.rng = rng = np.random.default_rng([seed, episode])
        self.place = place
        kind, options = make_kind(name, rng, place)
        self.kind: Kind = kind
        self.most_seqs = int(rng.integers(1, MOST_SEQS + 1))
        self.shares_parts = bool(rng.random() < 0.6)  # of a block, or only whole blocks
        self.converts = bool(rng.random() < 0.5)  # blocks for the host to the other layout
        # What all requests of some episodes begin with.
        system = int(rng.integers(BLOCK, 140)) if rng.random() < 0.4 else 0
        self.system = rng.integers(1 << 62, size=system), kind.tokens(rng, system)
        self.check_all_always = False
        self.copies_on_write = True
        self.captures = place == "gpu"
        self.spoil: Callable[[Step, list[Work]], None] | None = None
        self.pool = Pool(int(rng.integers(5, 6 + 4 * self.most_seqs)), rng)
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.swapped: list[Request] = []
        self.kept: list[Request] = []  # ended, with blocks that others may begin with
        self.dirty: list[int] = []  # blocks that became free
        self.counts = dict.fromkeys(COUNTED, 0)
        self.steps = 0
        self.about = f"{name}: {options}; {self.pool.refs.size} blocks, {self.most_seqs} sequences"
        arrays = kind.arrays(self.pool.refs.size)
        for block in range(self.pool.refs.size):
            self._spill(arrays, block)
        kind.write(arrays)
        self.memory: list[np.ndarray] | None = None  # the caches on the host, while it moves blocks

    # --- memory

    def _moved(self) -> list[np.ndarray]:
        """The caches on the host, to be changed before the step."""
        if self.memory is None:
            self.memory = self.kind.read()
        return self.memory

    def _flush(self) -> None:
        """Fill what became free with garbage, and write the caches if they have changed."""
        for block in self.dirty:
            if self.pool.refs[block] == 0 and self.rng.random() < 0.8:
                self._spill(self._moved(), block)
        self.dirty.clear()
        if self.memory is not None:
            self.kind.write(self.memory)
            self.memory = None

    def _spill(self, arrays: list[np.ndarray], block: int) -> None:
        """Codes and scales that are NaN, the largest ones, or random bytes."""
        way = int(self.rng.integers(4))
        for array in arrays:
            if array.dtype == np.uint8:
                own = array[block]
                fill = self.rng.integers(0, 256, own.shape).astype(np.uint8)
                array[block] = (0x7F, 0xFF, fill, fill)[way]
            elif way == 3:
                own = array[block].reshape(-1).view(np.uint8)
                noise = self.rng.integers(0, 256, own.shape).astype(np.uint8)
                array[block] = noise.view(array.dtype).reshape(array[block].shape)
            else:
                array[block] = (np.nan, np.inf, -np.inf)[way]

    def _release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.pool.refs[block] -= 1
            assert self.pool.refs[block] >= 0
            if self.pool.refs[block] == 0:
                self.dirty.append(block)
        blocks.clear()

    # --- requests

    def _submit(self) -> None:
        """A request of its own tokens, or one that begins like another."""
        rng, kind = self.rng, self.kind
        longest = min(kind.most_tokens, BLOCK * self.pool.refs.size - MOST_DRAFTS)
        length = int(rng.integers(2, longest + 1))
        names, rows = rng.integers(1 << 62, size=length), kind.tokens(rng, length)
        others = self.running + self.waiting + self.swapped + self.kept
        if others and rng.random() < 0.6:
            other = others[int(rng.integers(len(others)))]
            most = min(length - 1, len(other))
            same = most if rng.random() < 0.4 else int(rng.integers(most + 1))
            names[:same], rows[:same] = other.names[:same], other.rows[:same]
        for mine, system in zip((names, rows), self.system):
            mine[: len(system)] = system[:length]
        known = kind.project(rows, np.arange(length))
        prompt = int(rng.integers(1, length + 1))
        self.waiting.append(Request(names, rows, *known, prompt=prompt))

    def _admit(self) -> None:
        request = self.waiting.pop(0)
        source = self._prefix_of(request)
        if source is not None:
            shared = self._same(source, request)
            request.done = shared
            request.blocks = source.blocks[: -(-shared // BLOCK)]
            self.pool.refs[request.blocks] += 1
            self.counts["hits"] += 1
        self.running.append(request)
        self.counts["admitted"] += 1

    def _same(self, source: Request, request: Request) -> int:
        """Cached tokens of `source` that `request` begins with, all but its last one at most."""
        most = min(source.done, len(request) - 1)
        equal = source.names[:most] == request.names[:most]
        count = most if equal.all() else int(np.argmin(equal))
        return count if self.shares_parts else count // BLOCK * BLOCK

    def _prefix_of(self, request: Request) -> Request | None:
        sources = [x for x in self.running + self.kept if self._same(x, request) > 0]
        return max(sources, key=lambda x: self._same(x, request)) if sources else None

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request.blocks)
        request.done = 0
        self.waiting.insert(0, request)
        self.counts["preempted"] += 1

    def _swap_out(self, request: Request) -> None:
        self.running.remove(request)
        arrays = self._moved()
        request.host = [
            self._layout(i, array[request.blocks].copy(), "fastattn", "fastdeploy")
            for i, array in enumerate(arrays)
        ]
        self._release(request.blocks)
        self.swapped.append(request)
        self.counts["swapped out"] += 1

    def _swap_in(self, request: Request) -> None:
        assert request.host is not None
        count = len(request.host[0])
        if self.pool.free() < count:
            return
        self.swapped.remove(request)
        request.blocks = [self.pool.take() for _ in range(count)]
        for i, (array, held) in enumerate(zip(self._moved(), request.host)):
            array[request.blocks] = self._layout(i, held, "fastdeploy", "fastattn")
        request.host = None
        self.running.append(request)
        self.counts["swapped in"] += 1

    def _layout(self, index: int, blocks: np.ndarray, src: str, dst: str) -> np.ndarray:
        converts = self.converts and len(blocks) > 0
        return self.kind.convert(index, blocks, src, dst) if converts else blocks

    def _end(self, request: Request) -> None:
        self.running.remove(request)
        self.counts["ended"] += 1
        if self.rng.random() < 0.6:
            self.kept.append(request)
        else:
            self._release(request.blocks)

    def _events(self) -> None:
        rng = self.rng
        if len(self.waiting) < 3 and rng.random() < 0.4:
            self._submit()
        while len(self.kept) > 4 or (self.kept and rng.random() < 0.02):
            self._release(self.kept.pop(0).blocks)
        if self.running and rng.random() < 0.03:
            self._preempt(self.running[int(rng.integers(len(self.running)))])
        if self.running and rng.random() < 0.05:
            self._swap_out(self.running[int(rng.integers(len(self.running)))])
        room = len(self.running) < self.most_seqs
        if self.swapped and room and rng.random() < 0.3:
            self._swap_in(self.swapped[int(rng.integers(len(self.swapped)))])
        while self.waiting and len(self.running) < self.most_seqs and rng.random() < 0.7:
            self._admit()

    # --- a step

    def _make_room(self, count: int, request: Request) -> bool:
        """Whether `count` blocks are free, of kept prefixes and other requests' if need be."""
        while self.pool.free() < count:
            others = [x for x in self.running if x is not request and x not in self.scheduled]
            if self.kept:
                self._release(self.kept.pop(0).blocks)
            elif others:
                victim = others[-1]
                if self.rng.random() < 0.5:
                    self._preempt(victim)
                else:
                    self._swap_out(victim)
            else:
                return False
        return True

    def _work_of(self, request: Request) -> Work | None:
        """What a request does in this step; None if it rests."""
        rng, left = self.rng, len(request) - request.done
        if rng.random() < 0.08:
            return None
        none = self.kind.tokens(rng, 0)
        if request.done < request.prompt:
            count = int(
                rng.integers(1, min(self.kind.most_chunk, request.prompt - request.done) + 1)
            )
            return Work(request, count, none, ())
        drafts = int(rng.integers(MOST_DRAFTS + 1)) if rng.random() < 0.5 else 0
        accepted = int(rng.integers(drafts + 1))
        kept = min(1 + accepted, left)
        rejected = drafts - accepted
        if not rejected:
            return Work(request, kept, none, ())
        rows = self.kind.tokens(rng, rejected)
        start = request.done + kept
        known = self.kind.project(rows, np.arange(start, start + rejected))
        self.counts["rejected"] += rejected
        return Work(request, kept, rows, known)

    def _own_blocks(self, work: Work) -> bool:
        """Give a request the blocks that it writes, of its own; False: there are none."""
        request, new = work.request, work.new
        first, last = request.done // BLOCK, (request.done + new - 1) // BLOCK
        shared = [
            i
            for i in range(first, min(last + 1, len(request.blocks)))
            if self.copies_on_write and self.pool.refs[request.blocks[i]] > 1
        ]
        missing = max(last + 1 - len(request.blocks), 0)
        if not self._make_room(len(shared) + missing, request):
            return False
        for i in shared:
            if self.pool.refs[request.blocks[i]] == 1:  # the other one had to go
                continue
            copy, arrays = self.pool.take(), self._moved()
            for array in arrays:
                array[copy] = array[request.blocks[i]]
            self._release([request.blocks[i]])
            request.blocks[i] = copy
            self.counts["copied"] += 1
        request.blocks += [self.pool.take() for _ in range(missing)]
        return True

    def _schedule(self) -> list[Work]:
        works: list[Work] = []
        self.scheduled: list[Request] = []
        for request in list(self.running):
            if request not in self.running:
                continue  # it had to go
            work = self._work_of(request)
            if work is not None and self._own_blocks(work):
                works.append(work)
                self.scheduled.append(request)
        return works

    def _make_step(self, works: list[Work]) -> Step:
        """Arrays of a step: of those that have tokens, or of all slots, in any order."""
        rng = self.rng
        decoding = all(work.request.done >= work.request.prompt for work in works)
        captured = decoding and self.captures and rng.random() < 0.7
        slots = MOST_SEQS if captured or rng.random() < 0.3 else len(works)
        tables = np.full((slots, COLUMNS), -1, np.int32)
        if rng.random() < 0.3:  # entries that nobody needs may be left from other requests
            tables[:] = rng.integers(0, self.pool.refs.size, tables.shape)
        cached, new = np.zeros((2, slots), np.int32)
        prefill = [False] * slots
        if slots > len(works):  # slots that rest may keep a length, without blocks
            cached[len(works) :] = rng.integers(0, 40, slots - len(works))
        for slot, work in enumerate(works):
            request = work.request
            tables[slot, : len(request.blocks)] = request.blocks
            cached[slot], new[slot] = request.done, work.new
            prefill[slot] = request.done < request.prompt
        tokens = int(new.sum())
        padding = int(rng.integers(1, 4)) if rng.random() < 0.15 else 0
        if captured:
            padding = MOST_SEQS * (1 + MOST_DRAFTS) - tokens
        rows = [x for w in works for x in (w.request.rows[w.request.done :][: w.kept], w.drafts)]
        rows.append(self.kind.tokens(rng, padding))
        shared = 0 if captured else self._shared_prefix(works)
        tells = bool(shared) or rng.random() < 0.8
        trees = None if captured else self._draw_trees(slots, new)
        step = Step(
            cached,
            new,
            prefill,
            tables,
            np.concatenate(rows),
            padding,
            shared,
            tells,
            captured,
            trees,
        )
        self.counts["cascades"] += shared > 0
        self.counts["replayed"] += captured
        return step

    def _draw_trees(self, slots: int, new: np.ndarray) -> np.ndarray | None:
        """What the new tokens of each slot see of each other, sometimes."""
        size = self.kind.tree_size
        if not size or self.rng.random() < 0.2:
            return None
        self.counts["trees"] += 1
        return tree_masks(self.rng, new[:slots], size)

    def _shared_prefix(self, works: list[Work]) -> int:
        """Tokens that all sequences of a step have in the same blocks, sometimes."""
        if not self.kind.has_cascade or len(works) < 2 or self.rng.random() < 0.3:
            return 0
        most = min(work.request.done for work in works) // BLOCK
        tables = [work.request.blocks[:most] for work in works]
        same = [len(set(blocks)) == 1 for blocks in zip(*tables)]
        return BLOCK * (same.index(False) if False in same else len(same))

    def step(self) -> None:
        """One step of the server."""
        self._events()
        works = self._schedule()
        self.rng.shuffle(works)  # type: ignore[arg-type]
        self._flush()
        self.steps += 1
        if not works:
            self.counts["idle"] += 1
            return
        step = self._make_step(works)
        everything = self.check_all_always or self.steps % CHECK_ALL == 0
        before = self.kind.read() if everything else None
        if self.spoil is not None:
            self.spoil(step, works)
        out = self.kind.run(step)
        self._check(works, step, out, everything)
        if before is not None:
            self._check_bytes(before, works)
        for work in works:
            request = work.request
            request.done += work.kept
            if request.done == len(request):
                self._end(request)

    def _check(self, works: list[Work], step: Step, out: np.ndarray, everything: bool) -> None:
        """Compare all sequences, or one that is drawn."""
        chosen = range(len(works)) if everything else [int(self.rng.integers(len(works)))]
        ends = np.cumsum([work.new for work in works])
        assert not out[int(ends[-1]) :].any(), "padding tokens"
        for i in chosen:
            work = works[i]
            request, end = work.request, work.request.done + work.kept
            parts = [request.q[request.done : end], request.k[:end], request.v[:end]]
            if len(work.drafts):
                parts = [np.concatenate(pair) for pair in zip(parts, work.history)]
            own = slice(int(ends[i]) - work.new, int(ends[i]))
            try:
                self.kind.check_choice(own, request.blocks, *parts[:2])
                prompt = step.trees is None or step.prefill[i]
                tree = None if prompt else step.trees[i]  # type: ignore[index]
                self.kind.check(out[own], *parts, **({} if tree is None else {"tree": tree}))
            except AssertionError as error:
                raise AssertionError(
                    f"sequence {i} of {len(works)}: {work.new} new tokens after {request.done} "
                    f"in blocks {request.blocks}: {error}"
                ) from error

    def _check_bytes(self, before: list[np.ndarray], works: list[Work]) -> None:
        """Blocks that no sequence of the step writes keep their bytes."""
        others = np.ones(self.pool.refs.size, bool)
        for work in works:
            done, blocks = work.request.done, work.request.blocks
            others[blocks[done // BLOCK : (done + work.new - 1) // BLOCK + 1]] = False
        for i, (old, now) in enumerate(zip(before, self.kind.read())):
            old, now = (x.reshape(len(x), -1).view(np.uint8)[others] for x in (old, now))
            assert np.array_equal(old, now), f"cache tensor {i}: bytes of other blocks changed"


#: What an episode counts.
COUNTED = (
    "admitted",
    "hits",
    "copied",
    "preempted",
    "swapped out",
    "swapped in",
    "rejected",
    "cascades",
    "trees",
    "replayed",
    "ended",
    "idle",
)


def episodes(steps: int, length: int) -> Iterator[tuple[int, str, int]]:
    """Number, kind and steps of the episodes that make `steps` steps."""
    for number, start in enumerate(range(0, steps, length)):
        yield number, KINDS[number % len(KINDS)], min(length, steps - start)


def simulate(
    steps: int,
    *,
    seed: int = SEED,
    place: str = "cpu",
    length: int,
    only: int = -1,
) -> dict[str, int]:
    """Run `steps` steps in episodes of `length`; returns what happened, counted.

    `only` is the number of the one episode to run, if it is not negative.

    Raises
    ------
    AssertionError
        If a step is wrong or refused. It says seed, episode and step, and how to repeat them.
    """
    total = dict.fromkeys(COUNTED, 0)
    for number, name, count in episodes(steps, length):
        if only not in (-1, number):
            continue
        simulation = Simulation(name, seed, number, place)
        try:
            for _ in range(count):
                simulation.step()
        except Exception as error:
            if "no CUDA kernel in this build" in str(error):
                raise  # the test is skipped
            raise AssertionError(
                f"seed {seed}, episode {number}, step {simulation.steps} of it on {place} "
                f"({simulation.about}): {error}\nrepeat it: FASTATTN_SIMULATION_SEED={seed} "
                f"FASTATTN_SIMULATION_EPISODE={number} pytest -m slow "
                f"tests/server/test_simulation.py -k {place}"
            ) from error
        finally:
            simulation.kind.close()
        for key, value in simulation.counts.items():
            total[key] += value
    return total
