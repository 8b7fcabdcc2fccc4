"""Which channels RoPE pairs in a checkpoint: by the architecture's name and the file's format."""

from __future__ import annotations

#: Architectures whose GGUF files pair neighbouring channels. Converters of Llama's family reorder
#: the rows of Q and K for it.
_GGUF_NEIGHBOURS = frozenset(
    (
        *("llama", "llama4", "deci", "baichuan", "internlm2", "minicpm", "xverse"),
        *("command-r", "cohere2", "olmo", "arctic", "deepseek", "deepseek2", "chatglm", "granite"),
        *("granitemoe", "ernie4_5", "ernie4_5-moe", "smollm3", "arcee", "bailingmoe"),
    )
)

#: Those whose GGUF files pair channels that are half of the rotated ones apart.
_GGUF_HALVES = frozenset(
    (
        *("falcon", "gptneox", "stablelm", "starcoder2", "phi2", "phi3", "phimoe", "plamo"),
        *("qwen", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3"),
        *("gemma3n", "olmo2", "olmoe", "codeshell", "orion", "nemotron", "exaone", "minicpm3"),
        *("gpt-oss", "dbrx", "grok", "openelm"),
    )
)

#: ``model_type`` of Hugging Face's checkpoints that pair neighbouring channels.
_HF_NEIGHBOURS = frozenset(
    ("cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "gptj", "codegen", "chatglm", "helium")
)

#: Those that pair channels half of the rotated ones apart.
_HF_HALVES = frozenset(
    (
        *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"),
        *("gemma", "gemma2", "gemma3", "gemma3_text", "phi", "phi3", "stablelm", "starcoder2"),
        *("falcon", "gpt_neox", "olmo", "olmo2", "olmoe", "granite", "nemotron", "gpt_oss"),
    )
)

_FORMATS = {
    "gguf": (_GGUF_HALVES, _GGUF_NEIGHBOURS),
    "hf": (_HF_HALVES, _HF_NEIGHBOURS),
}


def use_neox_rotary_style(architecture: str, file_format: str) -> bool:
    """Whether a checkpoint's RoPE pairs channels (i, i + R / 2), and not (2i, 2i + 1).

    The same model may differ by its file: Llama's checkpoints on Hugging Face pair channels half of
    the rotated ones apart, and converters to GGUF reorder Q and K so that neighbours are pairs.

    Parameters
    ----------
    architecture : str
        ``general.architecture`` of a GGUF file, or ``model_type`` of a ``config.json``.
    file_format : {"gguf", "hf"}

    Returns
    -------
    bool
        What :func:`rope_write_cache_kv` takes as `use_neox_rotary_style`.

    Raises
    ------
    ValueError
        If `file_format` is another one.
    NotImplementedError
        If the architecture is not known; the message lists those that are.

    Examples
    --------
    >>> from fastattn.functional import use_neox_rotary_style
    >>> use_neox_rotary_style("llama", "gguf"), use_neox_rotary_style("llama", "hf")
    (False, True)
    """
    if file_format not in _FORMATS:
        raise ValueError(
            f"use_neox_rotary_style: file_format: expected gguf or hf, got {file_format!r}"
        )
    halves, neighbours = _FORMATS[file_format]
    if architecture in halves:
        return True
    if architecture in neighbours:
        return False
    raise NotImplementedError(
        f"use_neox_rotary_style: architecture: {architecture!r} is not supported; supported: "
        + ", ".join(sorted(halves | neighbours))
    )
