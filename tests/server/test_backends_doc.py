"""The Python of docs/backends.md runs, and its tables name what the code knows."""

from __future__ import annotations

import re
from pathlib import Path

import paddle
import pytest

from fastattn import _plugin
from fastattn._plugin.patches import LENGTHS, PATCHES
from fastattn.backends import config, dsa, latent_config
from fastattn.functional._cache_types import CONFIG_TYPES
from tests.support import ROOT

DOC = ROOT / "docs" / "backends.md"
TEXT = DOC.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs(code):
    paddle.seed(0)
    exec(compile(code, str(DOC), "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) == 5


def test_the_tables_are_complete():
    for name in CONFIG_TYPES:
        assert f"`{name}`" in TEXT
    modules = (config, latent_config, dsa)
    source = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in modules)
    refused = re.findall(r'"(?:\w+_config)\.(\w+)"', source)
    for name in {"head_wise_swa_ratio", "sink_size", *refused}:
        if name not in ("max_model_len", "causal", "partial_rotary_factor", "num_key_value_heads",
                        "tensor_parallel_size", "tensor_parallel_rank",
                        "tensor_parallel_degree", "model_type"):  # fmt: skip
            assert name in TEXT, name
    for name in _plugin.REPLACED:
        assert name.replace("AttentionBackend", "").upper() in TEXT.replace("_", "")


def test_what_is_replaced_in_fastdeploy_is_listed():
    for patch in (*PATCHES, LENGTHS):
        name = patch.what.partition(":")[2]
        assert f"| `{name}` | {patch.why} | {patch.versions} | {patch.until} |\n" in TEXT
