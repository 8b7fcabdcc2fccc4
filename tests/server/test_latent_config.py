"""Configurations of the backends of latent caches: what they mean, and what is refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from fastattn import backends

MLA, DSA = backends.MLAAttentionBackend, backends.DSAAttentionBackend
BACKENDS = pytest.mark.parametrize("backend", [MLA, DSA])


def config_of(**changes):
    """A good configuration of either backend but for options ``section__name``."""
    config = backends.make_latent_config(
        max_model_len=64, qk_nope_head_dim=128, index_n_heads=64, index_topk=2048
    )
    for path, value in changes.items():
        section, _, name = path.partition("__")
        if not hasattr(config, section):
            setattr(config, section, SimpleNamespace())
        setattr(getattr(config, section), name, value)
    return config


def make(backend, heads=16, **changes):
    return backend(config_of(**changes), 1, heads, 576)


#: What both refuse, and what each does alone.
BOTH = [
    ({"model_config__kv_lora_rank": 256}, "kv_lora_rank = 256"),
    ({"model_config__qk_rope_head_dim": 32}, "qk_rope_head_dim = 32"),
    ({"graph_opt_config__graph_opt_level": 1}, "graph_opt_level = 1"),
    ({"quant_config__kv_cache_quant_type": "int8"}, "kv_cache_quant_type = 'int8'"),
    ({"model_config__window_size": 24}, "window_size = 24"),
    ({"parallel_config__pd_disaggregation_mode": "odd"}, "pd_disaggregation_mode = 'odd'"),
    ({"heads": 129}, "num_heads = 129"),
    ({"heads": 0}, "num_heads = 0"),
]
SPARSE = [
    ({"model_config__index_head_dim": 64}, "index_head_dim = 64"),
    ({"model_config__index_n_heads": 12}, "index_n_heads = 12"),
    ({"model_config__index_topk": 5000}, "index_topk = 5000"),
    ({"model_config__causal": False}, "causal = False"),
    ({"parallel_config__pd_disaggregation_mode": "per_chunk"}, "which does not move index keys"),
    ({"scheduler_config__splitwise_role": "decode"}, "splitwise_role = 'decode'"),
    ({"cache_config__kvcache_storage_backend": "mooncake"}, "kvcache_storage_backend"),
    ({"cache_config__num_cpu_blocks": 7}, "num_cpu_blocks = 7"),
]


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [*((kind, *case) for kind in (MLA, DSA) for case in BOTH), *((DSA, *case) for case in SPARSE)],
)
def test_what_is_not_supported_is_refused_by_name(backend, changes, message):
    with pytest.raises(NotImplementedError, match=f"{backend.__name__}: .*{message}"):
        make(backend, **changes)


@BACKENDS
def test_what_a_process_asks_for(backend, monkeypatch):
    with pytest.raises(ValueError, match="fd_config: expected a configuration"):
        backend(None, 1, 16, 576)
    monkeypatch.setenv("FD_DETERMINISTIC_MODE", "1")
    with pytest.raises(NotImplementedError, match="FD_DETERMINISTIC_MODE"):
        make(backend)


def test_a_quantised_type_of_a_cache_that_is_not():
    with pytest.raises(NotImplementedError, match="kv_cache_quant_type = 'block_wise_fp8'"):
        make(MLA).get_kv_cache_shape(3, "block_wise_fp8")


YARN = "model_config__rope_scaling"
#: Values of a wrong kind: what is named, and what was expected.
WRONG = [
    ({"model_config__max_model_len": "64"}, r"max_model_len: expected an int >= 1, got '64'"),
    ({"model_config__max_model_len": None}, r"max_model_len: expected an int >= 1, got None"),
    ({"model_config__max_model_len": 0}, r"max_model_len: expected an int >= 1, got 0"),
    ({"model_config__qk_nope_head_dim": 1.5}, r"qk_nope_head_dim: expected an int >= 1, got 1.5"),
    ({"cache_config__block_size": True}, r"block_size: expected an int >= 1, got True"),
    ({"graph_opt_config__graph_opt_level": "x"}, r"graph_opt_level: expected an int >= 0, got 'x'"),
    ({"scheduler_config__max_num_seqs": "8"}, r"max_num_seqs: expected an int >= 0, got '8'"),
    ({YARN: 40.0}, r"model_config\.rope_scaling: expected a dict, got 40\.0"),
    ({YARN: [1]}, r"model_config\.rope_scaling: expected a dict, got \[1\]"),
    *(
        ({YARN: {"factor": 40.0, name: value}}, rf"rope_scaling\['{name}'\]: expected a finite num")
        for name in ("factor", "mscale_all_dim")
        for value in (float("inf"), float("nan"), -float("inf"), -2, "40", True, [1], np.inf)
    ),
]


@BACKENDS
@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_values_of_a_wrong_kind(backend, changes, message):
    with pytest.raises(ValueError, match=rf"^{backend.__name__}: fd_config\..*{message}"):
        make(backend, **changes)


@BACKENDS
@pytest.mark.parametrize("heads", ["16", None, 16.0, True])
def test_heads_of_a_wrong_kind(backend, heads):
    with pytest.raises(TypeError, match=f"^{backend.__name__}: num_heads: expected int, got"):
        make(backend, heads=heads)


@pytest.mark.parametrize("name", ["index_n_heads", "index_topk", "index_head_dim"])
@pytest.mark.parametrize("value", [None, "64", 0, 2.0])
def test_sizes_of_an_indexer(name, value):
    with pytest.raises(ValueError, match=rf"model_config\.{name}: expected an int >= 1, got"):
        make(DSA, **{f"model_config__{name}": value})


@BACKENDS
def test_yarn_scales_scores_twice(backend):
    for rope, factor in (
        ({"factor": 40.0, "mscale_all_dim": 1.0}, 0.1 * np.log(40) + 1),
        ({"factor": np.float32(40), "mscale_all_dim": 1}, 0.1 * np.log(40) + 1),
        ({"factor": 40}, 1),
        ({"factor": 1.0, "mscale_all_dim": 1.0}, 1),
        ({"factor": None, "mscale_all_dim": 1.0}, 1),
        ({}, 1),
        (None, 1),
    ):
        scale = make(backend, **{YARN: rope}).config.softmax_scale
        assert scale == pytest.approx(192**-0.5 * factor**2)


def test_rotation_of_a_model_by_its_type():
    """GLM pairs neighbouring channels, DeepSeek-V3.2 channels half of the rotated ones apart."""
    for changes, want in (
        ({}, False),
        ({"indexer_rope_interleave": True}, True),
        ({"indexer_rope_interleave": None, "model_type": "glm_moe_dsa"}, True),
        ({"indexer_rope_interleave": None, "model_type": "deepseek_v32"}, False),
    ):
        backend = make(DSA, **{f"model_config__{name}": value for name, value in changes.items()})
        assert backend.indexer.interleaved is want
