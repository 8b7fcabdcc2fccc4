"""vLLM's operators in torch.ops: their registration, and FlashAttention-3 of ragged tensors."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import torch

#: Modules of vLLM whose import registers its operators.
MODULES = ("vllm._custom_ops", "vllm.vllm_flash_attn.flash_attn_interface")


def load_operators(file: Path | None) -> None:
    """Register vLLM's operators in torch.ops.

    Parameters
    ----------
    file : Path or None
        A Python file that loads the libraries with the operators. Its `unpack`, if it has one, is
        called with its folder, then its `load`. None means an installed vLLM.
    """
    if file is None:
        for name in MODULES:
            importlib.import_module(name)
        return
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file}: not a Python file")
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "unpack"):
        module.unpack(file.resolve().parent)
    module.load()


def attend_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
) -> torch.Tensor:
    """Causal attention of (T, heads, D) in bf16, aligned at the end.

    Parameters
    ----------
    q, k, v : torch.Tensor
    starts : (torch.Tensor, torch.Tensor)
        Starts of each sequence's queries and keys, and the ends; int32 (B + 1,).
    longest : (int, int)
        Maximum numbers of queries and keys of a sequence.
    """
    rows = None, None, None, None, *starts, None, None, None, *longest, None
    rotation, descales = (None,) * 5, (None,) * 3
    mask = q.shape[-1] ** -0.5, True, -1, -1, 0.0
    splits = True, None, 0, None, 0, None, 1, 0, None
    return torch.ops._vllm_fa3_C.fwd(q, k, v, *rows, *rotation, *descales, *mask, *splits)[0]
