"""Steps of models with an indexer: what the bench makes of them; nothing here looks at a time."""

from __future__ import annotations

import json
import runpy
import types

import numpy as np
import pytest

from benchmarks.cases import sparse_models as facts
from benchmarks.cases import sparse_step as bench
from benchmarks.core import cuda, peers
from benchmarks.core.devices import Cpu
from benchmarks.core.report import Report
from fastattn.cli import main
from tests.support import ROOT

V32, V4 = "V3.2 TP8", "V4-Flash TP8"


@pytest.fixture(params=[V32, V4])
def model(request):
    return facts.MODELS[request.param]


@pytest.fixture(params=list(facts.CPU_QUICK_STEPS))
def seqs(request):
    return facts.CPU_QUICK_STEPS[request.param]


@pytest.fixture
def layer(model, seqs):
    return bench.SparseLayer(bench.SparseStep(Cpu(quick=True), model, seqs))


def test_the_cpu_has_a_row_of_each_part(tmp_path):
    path = tmp_path / "report.json"
    assert main(["bench", "--op", "step", "--quick", "--json", str(path)]) == 0
    shapes = {row.shape for row in Report.read(path).rows}
    for name, model in facts.MODELS.items():
        for step in facts.CPU_QUICK_STEPS:
            assert {f"{name} {step}", *(f"{name} {step}, {x}" for x in model.parts)} <= shapes


def test_what_is_chosen_lies_in_the_sequence_up_to_the_token(layer, model, seqs):
    step, found = layer.step, layer.run(model.parts)
    seq = np.repeat(np.arange(len(seqs)), [new for _, new in seqs])
    positions = np.concatenate([np.arange(c, c + n) for c, n in seqs])
    tables, chosen = step.tables.numpy(), found["selection"].numpy()
    slots, lengths = (x.numpy() for x in found["slots"])
    assert chosen.shape == (len(positions), step.topk)
    for at, row, of_row, length, b in zip(positions, chosen, slots, lengths, seq):
        seen = (at + 1) // model.ratio
        assert length == min(seen, step.topk)
        assert (np.diff(row[:length]) > 0).all() and row[0] >= 0 and row[length - 1] < seen
        wanted = tables[b, row[:length] // facts.PAGE] * facts.PAGE + row[:length] % facts.PAGE
        np.testing.assert_array_equal(of_row[:length], wanted)
    attended = found["attention"].astype("float32").numpy()
    assert np.isfinite(attended).all() and (np.abs(attended).sum(axis=-1) > 0).all()


def test_the_new_tokens_are_written_where_the_tables_say(layer, model, seqs):
    step = layer.step
    caches = {"cache": (layer.cache, step.slots), "index": (layer.index, step.slots)}
    if model.window:
        caches["near"] = (layer.near, step.window_slots)
    before = {name: cache.numpy() for name, (cache, _) in caches.items()}
    layer.run(model.parts)
    for name, (cache, slots) in caches.items():
        differs = (cache.numpy() != before[name]).any(axis=-1)
        pages = {int(slot) // facts.PAGE for slot in slots.numpy() if slot >= 0}
        assert pages and {int(page) for page in np.nonzero(differs.any(axis=1))[0]} == pages


def test_a_window_is_the_last_tokens(layer, model, seqs):
    if not model.window:
        pytest.skip("without a window")
    slots, counts = (x.numpy() for x in layer.step.seen)
    positions = np.concatenate([np.arange(c, c + n) for c, n in seqs])
    np.testing.assert_array_equal(counts, np.minimum(positions + 1, model.window))
    for row, count, own in zip(slots, counts, layer.step.window_slots.numpy()):
        assert row[count - 1] == own and (row[:count] >= 0).all()
        assert len(set(row[:count].tolist())) == count


def test_sequences_end_at_each_place_of_a_group():
    assert facts.decode(5, 64) == [(63, 1), (62, 1), (61, 1), (60, 1), (63, 1)]
    assert facts.entries(facts.MODELS[V4], facts.decode(4, 64)) == [16, 15, 15, 15]
    assert all(max(c + n for c, n in seqs) == 32768 for seqs in facts.STEPS.values())


def test_layers_exceed_the_cache_together():
    for model in facts.MODELS.values():
        for seqs in facts.STEPS.values():
            count = facts.layer_count(model, seqs)
            read = sum(facts.entries(model, seqs)) * 132
            read += sum(n for _, n in seqs) * facts.chosen(model, seqs) * model.token_bytes
            assert 1 <= count <= 48 and count * read > 60e6


class Fake(Cpu):
    """A device that takes a microsecond for anything that runs."""

    def us(self, calls):
        for call in calls:
            call()
        return 1.0


def test_vllm_stands_beside_the_same_parts(tmp_path, monkeypatch):
    step = "16 behind 240"
    same = {"section": "sparse_step", "model": V4, "step": step, "peer": "vLLM"}
    rows = [
        {**same, "part": "sum", "us": 5.0, "eager_us": 6.0, "host_us": 7.0},
        {**same, "part": "selection", "us": 2.0},
        {**same, "part": "selection", "us": 2.0, "model": "another"},
    ]
    path = tmp_path / "peers.json"
    path.write_text(json.dumps({"rows": rows}))
    monkeypatch.setenv("FASTATTN_BENCH_PEERS", str(path))
    peers._rows.cache_clear()
    monkeypatch.setitem(bench._STEPS, "cpu quick", {step: facts.CPU_QUICK_STEPS[step]})
    monkeypatch.setattr(facts, "layer_count", lambda model, seqs: 2)
    lists = []

    def eager(works, rounds):
        lists.append([len(work) for work in works])
        return [(8.0 * len(work), 4.0 * len(work)) for work in works]

    monkeypatch.setattr(cuda, "median_eager_us", eager)
    try:
        found = list(bench.sparse_step(Fake(quick=True)))
    finally:
        peers._rows.cache_clear()
    assert lists == [[64]] * 4 and {row.op for row in found} == {"sparse step"}
    beside = {(row.shape, row.peer): row.peer_us for row in found if row.peer}
    shared = f"{V4} {step}, parts of vLLM"
    assert {k: v for k, v in beside.items() if "vLLM" in k[1]} == {
        (f"{shared}, graph", "vLLM"): 5.0,
        (f"{shared}, eager", "vLLM, eager"): 6.0,
        (f"{shared}, eager", "vLLM, host"): 7.0,
        (f"{V4} {step}, selection", "vLLM"): 2.0,
    }
    hosts = {shape for shape, peer in beside if peer == "host"}
    assert hosts == {f"{m} {step}{x}, eager" for m in facts.MODELS for x in ("", ", parts of vLLM")}


def test_other_programs_run_the_facts_without_the_package():
    path = ROOT / "benchmarks" / "cases" / "sparse_models.py"
    alone = types.SimpleNamespace(**runpy.run_path(str(path)))
    assert alone.STEPS == facts.STEPS
    for name, model in alone.MODELS.items():
        assert model == facts.MODELS[name]
        assert set(model.vllm_parts) < set(model.parts)
