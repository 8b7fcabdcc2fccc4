"""What each peer of the committed rows does, in what it differs from ours, how it was timed.

A peer is another library's way to a row's result. What stands beside ours in a table, a goal or a
plot is :func:`fastest` of a row: the least time among its peers that do the same work. The same
work is the same operation on the same inputs, from keys stored with as many bits; in prefill its
products have as many bits too. Everything else in which a peer differs is a caveat, which the page
tells in a footnote.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

#: Ways of the same run that are floors.
COPY, READ, EMPTY = "copy of as many bytes", "reading as many bytes", "empty kernel"
#: Our own other ways, floors, and times of something else than the row: never a peer.
_OWN = (
    COPY, READ, EMPTY, "exact lengths", "host", "vLLM, host", "its parts alone", "default",
    "budget", "rotation alone", "K as it is", "one rank", "no signal", "e4m3 queries", "bf16 keys",
    "merge, then quantize_fp8", "logits, then top-k", "itself, nothing registered",
    "Paddle's registry", "host, exact lengths", "two operators", "paged_attention, all keys",
)  # fmt: skip
_OWN_STARTS = ("mla_gather_cache, then", "writing bf16 keys")
#: What a page says of times in brackets.
CORRECTED = "In brackets: as measured, where the correction decides who is faster"
#: Time of an empty kernel in a CUDA graph of one call, which FlashMLA's and DeepGEMM's times
#: contain: docs/measurements.md, "Selection and logits of the indexer".
EMPTY_US = 4.4
#: Times of peers that were launched call by call show the host below so many us.
LAUNCHED_US = 60.0
#: Rows of `paged_mqa_logits` in FP8 with one query -> DeepGEMM's time over ours where both sides
#: were launched alike: docs/experiments/merge_indexer.md, "Pages again", the kept kernels. Less an
#: empty kernel, its committed times still contain what its flush of the L2 cache costs.
ALIKE = {
    (1, 8): 0.989,
    (16, 8): 1.039,
    (64, 8): 1.094,
    (1, 64): 0.974,
    (128, 64): 0.987,
}
_PAGES_AGAIN = "ROOT/docs/experiments/merge_indexer.md#pages-again"


class Peer(NamedTuple):
    """A peer of some rows: what it does and how it was timed."""

    op: str  # pattern of the rows' operator
    shape: str  # pattern that their shapes contain
    start: str  # of the name in the rows
    label: str
    keys: str = ""  # "pages" or "contiguous"; "" where ours are no question
    levels: int = 0  # in which it sums FP8 products; 0: it has none
    output: str = ""  # its type, where ours is another one
    queries: str = ""  # likewise
    differs: tuple[str, ...] = ()  # more caveats
    other_work: str = ""  # what it does instead of the row's work
    has_empty: bool = False  # its time contains an empty kernel of EMPTY_US
    by_call: bool = False  # launched call by call: no use below LAUNCHED_US


_PAGED, _CONTIGUOUS = "paged_attention", "flash_attention"
_PREFILL, _BF16_KEYS = "(paged|flash)_attention", r"^prefill (bf16 q, bf16|bfloat16) "
#: Bf16 queries over codes.
_CODES = r"^prefill bf16 q, (cache|block_wise)_"
_NO_LSE, _TWO = ("it writes no LSE, ours does",), ("two kernels",)
_LIMIT = ("its `max_model_len` just holds the sequences",)
_ROPE_WRITE = "`rotary_embedding`, then `reshape_and_cache_flash`"
_EIGHT_BITS, _E4M3_KEYS = "(cache_int8|block_wise_(fp8|int8)) ", "e4m3 keys with one scale a head"
_SCALE = "one scale a tensor, ours one a token and head"

#: The first that fits a row is its peer.
PEERS = (
    *(Peer(_PAGED, f"^decode {rows}", start, label, "pages", queries=queries, differs=differs,
           by_call=True)
      for rows, differs in (("cache_fp8 ", ()), (_EIGHT_BITS, (_E4M3_KEYS,)))
      for start, label, queries in (("vllm_fa3_fp8", "FlashAttention-3 FP8", "e4m3"),
                                    ("vllm_triton_fp8", "vLLM Triton FP8", ""))),
    Peer(_PAGED, "^decode ", "vllm_triton_int8", "vLLM Triton INT8", "pages", by_call=True),
    Peer(_PAGED, "^decode ", "vllm_fa3_bf16", "FlashAttention-3 bf16", "pages", by_call=True),
    *(Peer(_PREFILL, f"^prefill {rows}", start, label, keys, levels, output, differs=differs)
      for rows, differs in (("block_wise_fp8 ", (_SCALE,)), ("(cache_fp8|e4m3) ", ()))
      for start, label, keys, levels, output in (
          ("vllm_fa3_fp8_paged", "FlashAttention-3 FP8, page 64", "pages", 2, ""),
          ("vllm_fa3_fp8_varlen", "FlashAttention-3 FP8, contiguous", "contiguous", 2, ""),
          ("cudnn_fp8", "cuDNN FP8", "contiguous", 1, "FP8"))),
    *(Peer(_PREFILL, rows, start, label, "contiguous", other_work=other)
      for rows, other in ((_BF16_KEYS, ""), (_CODES, "attends to bf16 keys"))
      for start, label in (("vllm_fa3_bf16", "FlashAttention-3 bf16"),
                           ("cudnn_bf16", "cuDNN bf16"))),
    Peer("layer step", _EIGHT_BITS, "vLLM rope + write + Q + FA3 FP8",
         "rotation, write, Q, FlashAttention-3 FP8",
         differs=("vLLM's kernels one by one", _E4M3_KEYS)),
    *(Peer("layer step", "", start, label, differs=differs, other_work=other)
      for start, label, differs, other in (
          ("vLLM rope + write + Q + FA3 FP8",
           "rotation, write, Q, FlashAttention-3 FP8", ("vLLM's kernels one by one",), ""),
          ("vLLM rope + write + FA3 BF16",
           "rotation, write, FlashAttention-3", ("vLLM's kernels one by one",), ""),
          *((f"{start} {limit}{mark}", label, (*more, *why), other)
            for start, label in (("FastDeploy + vLLM's FA3", "FastDeploy's prefill path"),
                                 ("FastDeploy", "FastDeploy's operator"))
            for limit, more in (("32k", ()), ("8k", _LIMIT))
            for mark, why, other in (
                (", wrong output", (), "its output is wrong"),
                (", other rope", ("the other kind of RoPE, as many bytes",), ""),
                ("", (), ""))))),
    Peer("sparse step", ", eager$", "vLLM, eager", "vLLM's kernels"),
    Peer("sparse step", "", "vLLM", "vLLM's kernels"),
    Peer("mla_attention", "", "FlashMLA BF16", "FlashMLA bf16", has_empty=True),
    Peer("mla_attention", "", "FlashMLA FP8", "FlashMLA FP8", has_empty=True,
         differs=("e4m3 products with a larger error, ours of 16 bits",)),
    Peer("mla_sparse_attention", "^prefill fp8_656", "FlashMLA", "FlashMLA", has_empty=True,
         other_work="attends to bf16 keys"),
    Peer("mla_sparse_attention", "", "FlashMLA, padded", "FlashMLA", has_empty=True,
         differs=("heads padded to 64",)),
    Peer("mla_sparse_attention", "", "FlashMLA", "FlashMLA", has_empty=True),
    Peer("(paged_)?mqa_logits", ", fp8$", "DeepGEMM", "DeepGEMM", has_empty=True),
    Peer("(paged_)?indexer_topk", "", "DeepGEMM, then", "DeepGEMM, then vLLM's top-k",
         has_empty=True),
    *(Peer("topk_indices", "", start, label) for start, label in (
        ("vllm persistent", "vLLM `persistent_topk`"),
        ("vllm cooperative", "vLLM `cooperative_topk`"),
        ("vllm top_k_per_row_prefill", "vLLM `top_k_per_row_prefill`"),
        ("vllm top_k_per_row_decode", "vLLM `top_k_per_row_decode`"),
        ("torch.topk", "`torch.topk`"))),
    Peer("(rope_)?write_cache_kv", "", "vllm reshape_and_cache_flash", "`reshape_and_cache_flash`"),
    Peer("rope_write_cache_kv", "", "vllm rope", _ROPE_WRITE),
    Peer("mla_(write_cache|qkv_norm_rope_write)", "", "vLLM", "vLLM's writer"),
    Peer("indexer_q_rope_quant", "", "vllm triton fused_indexer", "vLLM Triton"),
    Peer("merge_attn_states, fused", "", "vllm_cuda_fused", "vLLM CUDA", differs=_NO_LSE),
    Peer("merge_attn_states, fused", "", "vllm_cuda_unfused", "vLLM CUDA", differs=_TWO),
    Peer("merge_attn_states, fused", "", "vllm_triton_fused", "vLLM Triton", differs=_NO_LSE),
    Peer("host", "^paged_attention", "vllm fa3 paged", "FlashAttention-3 FP8"),
    Peer("host", "^flash_attention", "vllm fa3 varlen", "FlashAttention-3 bf16"),
    Peer("host", "^write_cache", "vllm reshape", "`reshape_and_cache_flash`"),
    Peer("host", "^rope_write", "vllm rope", _ROPE_WRITE),
    Peer("host", "^merge", "merge, vllm", "vLLM CUDA, fused", differs=_NO_LSE),
    Peer(_PAGED, "B\\d+ H", "NumPy", "NumPy, K and V in fp32"),
)  # fmt: skip


class RowLike(Protocol):
    """A call at a shape and the times beside it: those of peers corrected, and as measured."""

    op: str
    shape: str
    us: float
    peers: Mapping[str, float]
    as_measured: Mapping[str, float]


class Rival(NamedTuple):
    """The peer that a row is compared with."""

    peer: Peer
    us: float  # corrected
    ratio: float  # its time over ours: below 1 it is ahead
    us_as_measured: float
    as_measured: float  # the ratio by that time

    @property
    def verdict_changed(self) -> bool:
        """Whether the correction decides who is faster."""
        return (self.ratio < 1) != (self.as_measured < 1)


@functools.cache
def declared(op: str, shape: str, name: str) -> Peer | None:
    """What a name in the rows stands for; None for our own ways and for floors.

    Raises
    ------
    KeyError
        If nothing says what the peer does.
    """
    if name in _OWN or name.startswith(_OWN_STARTS):
        return None
    for peer in PEERS:
        if (
            name.startswith(peer.start)
            and re.fullmatch(peer.op, op)
            and re.search(peer.shape, shape)
        ):
            return peer
    raise KeyError(f"{op}, {shape}: gpu_tables/peers.py does not say what {name!r} does")


def lender(op: str, shape: str) -> str:
    """Shape of the row whose peers stand beside a row of another 8-bit type too; "" for none.

    The benchmark writes the peers of decode over e4m3 keys beside `cache_fp8` only.
    """
    if op != _PAGED or not re.match(f"decode {_EIGHT_BITS}", shape):
        return ""
    return re.sub(_EIGHT_BITS, "cache_fp8 ", shape, count=1)


def corrected(op: str, shape: str, name: str, us: float) -> float | None:
    """Time of a peer without an empty kernel; None where the host is in it."""
    try:
        peer = declared(op, shape, name)
    except KeyError:
        return us
    if peer is None:
        return us
    if peer.by_call and us < LAUNCHED_US:
        return None
    return us - EMPTY_US if peer.has_empty else us


def is_hidden(op: str, shape: str, as_measured: Mapping[str, float]) -> bool:
    """Whether a row's fastest peer of the same work has no time, as the host is in it.

    No other peer is named then: it is slower than the one without a time.
    """
    same = {}
    for name, us in as_measured.items():
        peer = declared(op, shape, name)
        if peer is not None and not peer.other_work:
            same[name] = us
    if not same:
        return False
    least = min(same, key=lambda name: same[name])
    return corrected(op, shape, least, same[least]) is None


def alike(op: str, shape: str) -> float | None:
    """A peer's time over ours where both were launched alike, of rows that have it."""
    match = re.fullmatch(r"batch (\d+), (\d+)k keys, 1 queries, fp8", shape)
    if op != "paged_mqa_logits" or not match:
        return None
    return ALIKE.get((int(match[1]), int(match[2])))


def rivals(row: RowLike, *, other_work: bool = False) -> list[Rival]:
    """Peers of a row that do the same work, the fastest first; or those that do other work.

    None where :func:`is_hidden`.
    """
    found: list[Rival] = []
    if not other_work and is_hidden(row.op, row.shape, row.as_measured):
        return found
    for name, us in row.peers.items():
        peer = declared(row.op, row.shape, name)
        if peer is not None and bool(peer.other_work) == other_work:
            ratio = alike(row.op, row.shape) or us / row.us
            measured = row.as_measured[name]
            found.append(Rival(peer, us, ratio, measured, measured / row.us))
    return sorted(found, key=lambda rival: rival.us)


def fastest(row: RowLike | None) -> Rival | None:
    """The fastest peer of a row that does the same work, if one was timed."""
    found = rivals(row) if row else []
    return found[0] if found else None


def caveats(row: RowLike, peer: Peer) -> list[str]:
    """In what a peer differs from ours, as a footnote has it."""
    ours = {_PAGED: "pages", _CONTIGUOUS: "contiguous"}.get(row.op, "")
    found = []
    if peer.other_work:
        found.append(f"other work: {peer.other_work}")
    if ours and peer.keys and peer.keys != ours:
        found.append("contiguous keys, ours in pages" if ours == "pages" else "keys in pages")
    if peer.levels == 1:
        found.append("sums of FP8 products in one level, ours in two")
    if peer.output:
        found.append(f"{peer.output} output, ours bf16")
    if peer.queries:
        found.append(f"{peer.queries} queries, ours bf16")
    found += peer.differs
    if alike(row.op, row.shape):
        found.append(f"both sides launched alike in another run ([how]({_PAGES_AGAIN}))")
    elif peer.has_empty:
        found.append(f"less an empty kernel of {EMPTY_US} us")
    return found


def shown(rival: Rival | None, write: Callable[[float], str]) -> str:
    """Time of a peer; where a correction decides who is faster, as measured too."""
    if rival is None:
        return "-"
    measured = f" ({write(rival.us_as_measured)})" if rival.verdict_changed else ""
    return write(rival.us) + measured


def shown_ratio(rival: Rival | None) -> str:
    """Its time over ours, likewise."""
    if rival is None:
        return "-"
    measured = f" ({rival.as_measured:.2f})" if rival.verdict_changed else ""
    return f"{rival.ratio:.2f}{measured}"


class Notes:
    """Footnotes of a table: the same text has the same number."""

    def __init__(self) -> None:
        self._texts: dict[str, int] = {}

    def mark(self, text: str) -> str:
        """Number of a footnote, as a superscript; nothing for no text."""
        if not text:
            return ""
        number = self._texts.setdefault(text, len(self._texts) + 1)
        return f"<sup>{number}</sup>"

    def of(self, row: RowLike, peer: Peer) -> str:
        """Mark of a peer's caveats beside a row."""
        return self.mark("; ".join(caveats(row, peer)))

    def text(self) -> str:
        """The footnotes as a paragraph, with a blank line before it; nothing without one."""
        told = (f"<sup>{number}</sup> {_sentence(text)}" for text, number in self._texts.items())
        joined = " ".join(told)
        return f"\n\n{joined}" if joined else ""


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."
