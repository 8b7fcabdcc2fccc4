"""A simulated server: every cache type against one oracle, and that the oracle sees faults.

The long run is marked slow. FASTATTN_SIMULATION_STEPS, _SEED and _EPISODE give another number of
steps, another seed, and one episode of a run.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import virtual_gpu
from tests.support.simulation import (
    BLOCK,
    SEED,
    Simulation,
    episodes,
    setting,
    simulate,
)
from tests.support.simulation_kinds import KINDS

#: Steps of the long run.
STEPS = {"cpu": 100_000, "gpu": 10_000}
#: Steps of an episode: options are drawn anew after them.
LENGTH = {"cpu": 250, "gpu": 100}

DYNAMIC = [name for name in KINDS if name.startswith("block_wise")]


def test_a_few_steps_of_every_kind(place):
    if virtual_gpu.there() and place == "gpu":
        pytest.skip("an interpreter of kernels is too slow for a server")
    counts = simulate(20 * len(KINDS), seed=setting("SEED", SEED), place=place, length=20)
    assert counts["hits"] and counts["preempted"] and counts["swapped in"], counts


@pytest.mark.slow
def test_a_long_run(place, capsys):
    if virtual_gpu.there() and place == "gpu":
        pytest.skip("an interpreter of kernels is too slow for a server")
    steps, seed = setting("STEPS", STEPS[place]), setting("SEED", SEED)
    with capsys.disabled():
        print(f"\nsimulation on {place}: {steps} steps, seed {seed}", flush=True)
    only = setting("EPISODE", -1)
    counts = simulate(steps, seed=seed, place=place, length=LENGTH[place], only=only)
    with capsys.disabled():
        print("  " + ", ".join(f"{key} {value}" for key, value in counts.items()))
    if only < 0 and steps >= 10_000:
        happens = {key: n for key, n in counts.items() if key != "replayed" or place == "gpu"}
        assert all(happens.values()), f"something never happened: {counts}"


def test_an_episode_repeats():
    """The same seed gives the same steps, bit by bit."""

    def outputs():
        simulation, seen = Simulation("block_wise_int8-e4m3", 3, 5), []
        run = simulation.kind.run
        simulation.kind.run = lambda step: seen.append(run(step)) or seen[-1]
        for _ in range(12):
            simulation.step()
        return [out.tobytes() for out in seen]

    first = outputs()
    assert len(first) > 5 and first == outputs()


class StandIn:
    """In a graph's place on a CPU: a replay runs the step with the tensors of the capture."""

    def __init__(self, kind, meta, rows):
        self.kind, self.meta, self.rows = kind, meta, rows
        self.out = kind.eager(meta, rows)

    def replay(self):
        self.out.copy_(self.kind.eager(self.meta, self.rows), True)
        if getattr(self.kind, "held_slots", None) is not None:
            self.kind.held_slots.copy_(self.kind.slots, True)

    def reset(self):
        pass


@pytest.mark.parametrize("name", [KINDS[i] for i in (0, 4, 8, 9, 13)])
def test_replays_fill_the_tensors_of_the_capture(name):
    """The GPU's part of the simulation, without a graph."""
    sim = Simulation(name, SEED, 1)
    sim.captures = True

    def capture(meta, rows):
        graph = StandIn(sim.kind, meta, rows)
        return graph, graph.out

    sim.kind.capture = capture
    while sim.counts["replayed"] < 4:
        sim.step()


def test_every_kind_has_its_turn():
    for steps, length in ((20 * len(KINDS), 20), (STEPS["gpu"], LENGTH["gpu"])):
        runs = list(episodes(steps, length))
        assert {name for _, name, _ in runs} == set(KINDS)
        assert sum(count for _, _, count in runs) == steps


# --- the oracle sees what is wrong ---------------------------------------------------------------


def other_block(sim, step, works):
    """An entry of a block table names another block."""
    for slot, work in enumerate(works):
        if work.request.done >= 1:
            entry = (work.request.done - 1) // BLOCK
            step.tables[slot, entry] = (step.tables[slot, entry] + 1) % sim.pool.refs.size
            return True
    return False


def one_less(sim, step, works):
    """A sequence has one cached token less: tokens lie, are rotated and are seen one too early."""
    for slot, work in enumerate(works):
        if work.request.done >= 1:
            step.cached[slot] -= 1
            return True
    return False


def one_more(sim, step, works):
    """A sequence has one cached token more: a slot of garbage is seen."""
    for slot, work in enumerate(works):
        if work.request.done >= 1 and (work.request.done + work.new) % BLOCK:
            step.cached[slot] += 1
            return True
    return False


def a_scale_of_v(sim, step, works):
    """The scale of the latest cached token's V is twice what it was."""
    for work in works:
        if 1 <= work.request.done < 30:
            arrays, at = sim.kind.read(), work.request.done - 1
            place = arrays[3][work.request.blocks[at // BLOCK], :, at % BLOCK]
            place[...] = place + 1 if place.dtype == np.uint8 else place * 2
            sim.kind.write(arrays)
            return True
    return False


def a_scale_of_a_latent(sim, step, works):
    """A tile of the latest cached token has twice its scale."""
    for work in works:
        if 1 <= work.request.done < 30:
            arrays, at = sim.kind.read(), work.request.done - 1
            page = arrays[0].reshape(-1, 64, 656)[work.request.blocks[at // BLOCK]]
            page[at % BLOCK, 512:516] = (page[at % BLOCK, 512:516].view("<f4") * 2).view(np.uint8)
            sim.kind.write(arrays)
            return True
    return False


def other_rows(sim, step, works):
    """Rows of the step's tokens belong to the neighbour."""
    step.rows[:] = np.roll(step.rows, 1, axis=0)
    return True


#: A step that is refused is seen, too: two sequences that write one block, a block that is nowhere.
SEEN = (AssertionError, ValueError)
SAYS = r"^sequence \d|^cache tensor \d|^ForwardMeta.for_step"


def assert_seen(name, fault, episode):
    """Some step in which `fault` does something fails, the third one at the latest."""
    sim = Simulation(name, SEED, episode)
    sim.check_all_always = True
    done = []
    sim.spoil = lambda step, works: done.append(fault(sim, step, works))
    with pytest.raises(SEEN, match=SAYS):
        for _ in range(2000):
            if sum(done) == 3:
                break
            sim.step()
    assert sum(done) >= 1


@pytest.mark.parametrize("fault", [other_block, one_less, one_more, other_rows])
@pytest.mark.parametrize("name", [KINDS[i] for i in (0, 1, 4, 6, 7, 8, 11)])
def test_a_wrong_step_is_seen(name, fault):
    assert_seen(name, fault, 1)


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_wrong_scale_is_seen(name):
    assert_seen(name, a_scale_of_v, 2)


@pytest.mark.parametrize("name", ["latent-fp8_656", "latent-sparse"])
def test_a_wrong_scale_of_a_latent_is_seen(name):
    assert_seen(name, a_scale_of_a_latent, 2)


@pytest.mark.parametrize("name", ["cache_int8-e4m3", "cache_fp8-e4m3"])
def test_wrong_scales_of_a_layer_are_seen(name):
    sim = Simulation(name, SEED, 3)
    sim.kind.model.v_scales = sim.kind.model.v_scales * np.float32(1.03)
    with pytest.raises(AssertionError, match=SAYS):
        for _ in range(60):
            sim.step()


def episode_with(name, wanted) -> Simulation:
    """The first episode of a kind whose layer has something."""
    return next(sim for i in range(300) if wanted((sim := Simulation(name, SEED, i)).kind))


def assert_some_step_fails(sim):
    sim.check_all_always = True
    with pytest.raises(AssertionError, match=SAYS):
        for _ in range(400):
            sim.step()


@pytest.mark.parametrize("name", [KINDS[0], DYNAMIC[0], DYNAMIC[-1]])
def test_steps_without_their_trees_are_seen(name):
    sim = episode_with(name, lambda kind: kind.tree_size > 2)
    sim.kind.mask = lambda step: {}
    assert_some_step_fails(sim)


@pytest.mark.parametrize("name", [KINDS[0], DYNAMIC[0], DYNAMIC[-1]])
def test_other_first_tokens_beside_a_window_are_seen(name):
    sim = episode_with(name, lambda kind: kind.apart and kind.windows[-1][1] == 5)
    sim.kind.windows[-1] = (sim.kind.windows[-1][0], 4)
    assert_some_step_fails(sim)


@pytest.mark.parametrize("name", ["block_wise_int4-e4m3", "cache_fp8-e4m3"])
def test_keys_without_their_feedback_are_seen(name):
    sim = episode_with(name, lambda kind: kind.model.fed_back)
    sim.kind.model.k_feedback = None
    assert_some_step_fails(sim)


def test_a_shared_block_that_is_not_copied_is_seen():
    """In some episode: the two requests must write other tokens at the same positions."""
    with pytest.raises(SEEN, match=SAYS):
        for episode in range(10):
            sim = Simulation("none-e4m3", SEED, episode)
            sim.check_all_always = sim.shares_parts = True
            sim.copies_on_write = False
            for _ in range(80):
                sim.step()


def test_blocks_that_come_back_without_their_scales_are_seen():
    sim = Simulation("block_wise_fp8-e4m3", SEED, 4)
    sim.check_all_always = True
    swap_out = sim._swap_out

    def without_scales(request):
        swap_out(request)
        request.host[2:] = [np.ones_like(x) for x in request.host[2:]]

    sim._swap_out = without_scales
    with pytest.raises(AssertionError, match=SAYS):
        for _ in range(300):
            sim.step()


def test_a_failure_says_how_to_repeat_it(monkeypatch):
    def fails(self):
        self.steps += 1
        if self.steps == 7:
            raise AssertionError("something is wrong")

    monkeypatch.setattr(Simulation, "step", fails)
    expected = (
        r"seed 5, episode 0, step 7 of it on cpu \(none-e4m3: .*\): something is wrong\n"
        "repeat it: FASTATTN_SIMULATION_SEED=5 FASTATTN_SIMULATION_EPISODE=0 pytest -m slow "
        "tests/server/test_simulation.py -k cpu"
    )
    with pytest.raises(AssertionError, match=expected):
        simulate(100, seed=5, length=20)
