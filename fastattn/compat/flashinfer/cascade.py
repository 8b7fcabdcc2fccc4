"""FlashInfer's module of this name: partial results are merged."""

from fastattn.compat._flashinfer_pages import merge_state, merge_state_in_place, merge_states

__all__ = ["merge_state", "merge_state_in_place", "merge_states"]
