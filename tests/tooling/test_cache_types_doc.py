"""docs/cache_types.md and the README say of the cache types what the code does."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastattn.backends import FlashAttentionBackend, make_config
from fastattn.functional import _cache_types as types
from tests.support import ROOT

PAGE = (ROOT / "docs" / "cache_types.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BYTES = {"uint8": 1, "float32": 4, "bfloat16": 2}


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its head."""
    below = text.partition(f"## {heading}\n")[2]
    table = re.search(r"(^\|.*\n)+", below, re.M)
    assert table, heading
    lines = table[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def bytes_a_token(kind: str) -> int:
    """Of a layer with 8 KV heads of 128 channels, from the shapes that a server allocates."""
    backend = FlashAttentionBackend(make_config(max_model_len=512), 8, 32, 128)
    size = 2 if kind == "none" else 1
    total = sum(int(np.prod(shape)) * size for shape in backend.get_kv_cache_shape(1, kind))
    scales = backend.get_kv_cache_scale_shape(1, kind)
    if scales is not None:
        total += 2 * int(np.prod(scales[0])) * BYTES[scales[1]]
    return total // 64


def test_needs_has_every_type_with_its_name_in_fastdeploy():
    found = {row[0].strip("`"): row[1].strip("`") for row in rows(PAGE, "What each type needs")}
    assert set(found) == set(types.CACHE_QUANT_TYPES)
    named = {kind: name for name, kind in types.CONFIG_TYPES.items()}
    for kind, name in found.items():
        if kind == "none":
            assert name == "unset"
        elif name != "none of its own":
            assert name == named.get(kind, kind)
    assert set(named) <= {kind for kind, name in found.items() if name != "none of its own"}


def test_needs_has_the_head_dimensions():
    dims: tuple[int, ...] = ()
    for kind, _, _, text in rows(PAGE, "What each type needs"):
        if text != "the same":
            dims = tuple(sorted(map(int, re.findall(r"\d+", text.replace("values of 128", "")))))
        assert dims == types.HEAD_DIMS, kind


@pytest.mark.parametrize("row", rows(PAGE, "Side by side"), ids=lambda row: row[0].strip("`"))
def test_bytes_are_those_of_a_servers_cache(row):
    assert int(row[1]) == bytes_a_token(row[0].strip("`"))


def test_the_readme_names_every_type_with_its_bytes():
    seen = set()
    for _, names, size in rows(README, "Which cache type"):
        for kind in re.findall(r"`(none|(?:cache|block_wise)_\w+)`", names):
            assert int(size) == bytes_a_token(kind), kind
            seen.add(kind)
    assert seen == set(types.CACHE_QUANT_TYPES)


def test_a_table_is_found_below_its_heading():
    text = "## A\n\n| x |\n|---|\n| 1 |\n\n## B\n\nwords\n\n| y | z |\n|---|---|\n| 2 | 3 |\n"
    assert rows(text, "A") == [["1"]] and rows(text, "B") == [["2", "3"]]
