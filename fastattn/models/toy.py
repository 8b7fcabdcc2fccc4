"""The demo's toy of 0.8 M parameters as a language model: it comes with this package."""

from __future__ import annotations

from fastattn.demo import shipped
from fastattn.demo import text as english
from fastattn.demo.model import NORM_EPS, Config
from fastattn.models.config import ModelConfig
from fastattn.models.tokenizer import Tokenizer
from fastattn.models.weights import LayerWeights, Weights


class Characters(Tokenizer):
    """ASCII characters are the tokens."""

    def __init__(self) -> None:
        super().__init__([chr(i) for i in range(english.VOCABULARY)], {}, None)

    def encode(self, text: str, *, special: bool = False, bos: bool = True) -> list[int]:
        """Tokens of a text. A character outside ASCII becomes ``?``; the options change nothing."""
        return [int(token) for token in english.encode(text)]


def read_toy() -> tuple[ModelConfig, Weights, Tokenizer]:
    """The toy's configuration, weights and tokenizer. It has the layers of a Llama.

    Raises
    ------
    ValueError
        If its file is missing or damaged.
    """
    sizes = Config()
    given = shipped.load(sizes)
    names = ("attention_norm", "qkv", "attention_out", "mlp_norm", "gate_up", "down")
    layers = [
        LayerWeights(**{name: given[f"{i}.{name}"] for name in names}) for i in range(sizes.layers)
    ]
    config = ModelConfig(
        architecture="llama",
        layers=sizes.layers,
        hidden=sizes.hidden,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocabulary=sizes.vocabulary,
        context=sizes.context,
        norm_eps=NORM_EPS,
        softmax_scale=sizes.head_dim**-0.5,
        neox=False,
        rope_theta=sizes.rope_theta,
    )
    embedding = given["embedding"]
    return config, Weights(embedding, layers, given["norm"], embedding), Characters()
