"""A backend whose queries choose the key blocks that they attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastattn import _views, functional
from fastattn.backends.apart import StepTensors
from fastattn.backends.paged import PagedAttentionBackend
from fastattn.functional._attributes import check_int
from fastattn.functional.topk import MAX_K
from fastattn.reference.block_selection import GRANULARITIES, KINDS, summary_shape


@dataclass(frozen=True)
class BlockChoice:
    """Which key blocks a query attends to; see :func:`fastattn.functional.select_key_blocks`.

    A sequence of at most `k` key blocks is attended to as a whole.

    Attributes
    ----------
    k : int
        Key blocks of a query and KV head, `first_blocks` and `last_blocks` included; at most 4096.
    granularity : {16, 32, 64, 128}
        Tokens of a key block. Blocks of 64 and 128 tokens have the fastest kernel on a GPU.
    kind : {"mean", "minmax", "pooled"}
        Summary of a block's keys. ``"pooled"`` needs ``layer.cache_k_pool_weights``.
    reduction : {"max", "sum"}
        How the scores of the query heads of a KV head become one.
    first_blocks, last_blocks : int
        Blocks that are taken in any case: at the start of the sequence, and up to the query.

    Raises
    ------
    TypeError
        If a number is not an integer.
    ValueError
        If an attribute is out of range.
    """

    k: int
    granularity: int = 64
    kind: str = "mean"
    reduction: str = "max"
    first_blocks: int = 1
    last_blocks: int = 2

    def __post_init__(self) -> None:
        check_int("BlockChoice", "k", self.k, 1, MAX_K)
        check_int("BlockChoice", "first_blocks", self.first_blocks, 0)
        check_int("BlockChoice", "last_blocks", self.last_blocks, 1)
        for name, values in (
            ("granularity", GRANULARITIES),
            ("kind", KINDS),
            ("reduction", ("max", "sum")),
        ):
            value = getattr(self, name)
            if value not in values:
                listed = ", ".join(map(str, values))
                raise ValueError(f"BlockChoice: {name}: expected one of {listed}, got {value!r}")
        if self.k < self.first_blocks + self.last_blocks:
            raise ValueError(
                f"BlockChoice: k: expected at least first_blocks + last_blocks = "
                f"{self.first_blocks + self.last_blocks}, got {self.k}"
            )


class BlockSparseAttentionBackend(PagedAttentionBackend):
    """Write the new tokens, update the summaries of their key blocks, and attend to chosen blocks.

    A step of a layer is four operators: the writer, ``update_block_summaries``,
    ``select_key_blocks`` and ``sparse_paged_attention``. None of them needs the host's lengths, so
    a CUDA graph may hold them. The caches are those of the other backends, and each layer also has
    a tensor of summaries, ``layer.cache_k_summaries``, of :meth:`get_summary_shape`. Its contents
    need no start value. A summary belongs to a physical block: where a server moves, copies or
    receives a block, it moves the summaries too, or calls ``update_block_summaries`` for its
    tokens.

    Parameters
    ----------
    fd_config, kv_num_heads, num_heads, head_dim
        As for the other backends. Q is not quantised.
    choice : BlockChoice
    """

    apart = True
    rotates_queries = False  # blocks are chosen by the queries of the model

    def __init__(
        self,
        fd_config: Any,
        kv_num_heads: int,
        num_heads: int,
        head_dim: int,
        *,
        choice: BlockChoice,
    ) -> None:
        super().__init__(fd_config, kv_num_heads, num_heads, head_dim)
        self.choice = choice
        if not self.config.causal:
            self._refuse("model_config.causal = False")
        if self.batch_invariant:
            self._refuse("batch_invariant, FastDeploy's deterministic mode,")
        if self._programs is not None:
            self._refuse("graph_opt_config.graph_opt_level above 0")
        if self._signals is not None:
            self._refuse("a prefill server's signal,", ": other servers get no summaries")

    def get_summary_shape(self, max_num_blocks: int) -> list[int]:
        """Shape of a layer's summaries, float32 or bfloat16."""
        heads, choice = (self.kv_num_heads, self.head_dim), self.choice
        return list(summary_shape(max_num_blocks, *heads, choice.granularity, choice.kind))

    def _refuse_masks(self, mask: Any, trees: Any, windows: Any, window: int) -> None:
        if mask is not None:
            self._refuse("forward_meta.attn_mask_offsets")
        if trees is not None:
            self._refuse("forward_meta.attn_mask")
        if windows is not None or window:
            self._refuse("a layer with a window")

    def _q_quant_for(self, cache: Any, shifts: bool) -> str:
        return "none"

    def _attend(
        self, step: StepTensors, options: dict[str, Any], query: Any, q_descale: Any, layer: Any
    ) -> Any:
        summaries = getattr(layer, "cache_k_summaries", None)
        if summaries is None:
            raise ValueError(
                f"{type(self).__name__}: layer.cache_k_summaries: expected a tensor "
                f"{self.get_summary_shape(step.key.shape[0])}, got None"
            )
        choice = self.choice
        blocks: dict[str, Any] = {"granularity": choice.granularity, "kind": choice.kind}
        cache: dict[str, Any] = {
            "cache_k_scales": step.scales[0],
            "cache_v_scales": step.scales[1],
            **{
                name: options[name]
                for name in ("cache_quant_type", "fp8_format", "k_rotation", "k_center")
            },
        }
        tables, starts, cached, new = step.seqs
        functional.update_block_summaries(
            summaries,
            step.key,
            step.value,
            tables,
            starts,
            cached,
            new,
            pool_weights=getattr(layer, "cache_k_pool_weights", None),
            **blocks,
            **cache,
        )
        selected = functional.select_key_blocks(
            query,
            summaries,
            tables,
            starts,
            cached,
            new,
            choice.k,
            reduction=choice.reduction,
            first_blocks=choice.first_blocks,
            last_blocks=choice.last_blocks,
            **blocks,
        )
        out = functional.sparse_paged_attention(
            query,
            step.key,
            step.value,
            tables,
            starts,
            cached,
            new,
            step.lengths[0],
            step.lengths[1],
            selected,
            granularity=choice.granularity,
            sinks=options["sinks"],
            out_scale=options["out_scale"],
            **cache,
        )
        return _views.flat(out)
