"""Tokenizers against slow models of what they do."""

from __future__ import annotations

import unicodedata

import pytest

from fastattn.models import pieces
from fastattn.models.config import ModelError
from fastattn.models.tokenizer import Tokenizer

TEXT = "The  cat's 1234 naïve 漢字\n\n\tif x:  # don't ½ ² end  "


def merged(symbols, rank):
    """Merge the best pair, the leftmost of equals, until there is none."""
    symbols = list(symbols)
    while True:
        pairs = [(rank(a, b), i) for i, (a, b) in enumerate(zip(symbols, symbols[1:]))]
        pairs = [pair for pair in pairs if pair[0] is not None]
        if not pairs:
            return symbols
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def byte_level(merges, rule="gpt-2", **options):
    from fastattn.models.tokenizer import _BYTE_TO_CHAR

    letters = [_BYTE_TO_CHAR[b] for b in range(256)]
    tokens = [*letters, *("".join(m) for m in merges), "<|end|>"]
    return Tokenizer.byte_level(tokens, merges, rule, special=[len(tokens) - 1], **options)


MERGES = [("a", "t"), ("t", "h"), ("c", "at"), ("Ġ", "cat"), ("h", "e"), ("th", "e"), ("1", "2")]


def test_byte_level_merges():
    tokenizer = byte_level(MERGES)
    order = {pair: i for i, pair in enumerate(MERGES)}
    for word in ("that", "cathe", "thethat", "attathe"):
        expected = merged(word, lambda a, b: order.get((a, b)))
        assert [tokenizer.tokens[i] for i in tokenizer.encode(word)] == expected


@pytest.mark.parametrize("rule", list(pieces.RULES))
def test_a_text_comes_back(rule):
    tokenizer = byte_level(MERGES, rule)
    assert "".join(pieces.split(TEXT, pieces.RULES[rule])) == TEXT
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("gpt2", "The| | cat|'s| 1234|  | x|\n\n|\t|if"),
        ("digits", "The| | cat|'s| |1|2|3|4|  | x|\n\n|\t|if"),
        ("llama3", "The| | cat|'s| |123|4|  | x|\n\n|\tif"),
        ("qwen2", "The| | cat|'s| |1|2|3|4|  | x|\n\n|\tif"),
    ],
)
def test_pieces(rule, expected):
    """By hand, from the regular expressions of the checkpoints."""
    assert pieces.split("The  cat's 1234   x\n\n\tif", rule) == expected.split("|")


def test_classes_are_unicodes():
    letters = pieces.pattern("gpt2")
    for character in "aé漢ʰª½²٣Ⅷ_-":
        found = letters.match(character + "a")[0]
        assert (len(found) == 2) == unicodedata.category(character).startswith("L"), character


def test_special_tokens_only_where_asked_for():
    tokenizer = byte_level(MERGES, bos=0, eos=None)
    end = len(tokenizer) - 1
    assert tokenizer.encode("cat<|end|>the", special=True, bos=False)[1] == end
    plain = tokenizer.encode("<|end|>")
    assert end not in plain and plain[0] == 0
    assert tokenizer.decode([end, *plain[1:]]) == "<|end|>"
    assert tokenizer.decode([end], special=True) == "<|end|>"


SCORES = {"▁t": 1.0, "he": 3.0, "▁the": 5.0, "th": 4.0, "▁th": 2.0}


def test_sentencepiece():
    letters = list("▁theca")
    known = {**{c: 0.0 for c in letters}, **SCORES}
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    tokens = [*known, *bytes_, "  "]
    tokenizer = Tokenizer.sentencepiece(
        tokens, [*known.values(), *[0.0] * 257], whole=[len(tokens) - 1], bos=0
    )

    def rank(a, b):
        return -known[a + b] if a + b in known else None

    for text in (" the cat", "thehe tht", " th"):
        expected = merged(text.replace(" ", "▁"), rank)
        found = tokenizer.encode(text, bos=False)
        assert [tokens[i] for i in found] == expected
        assert tokenizer.decode(found) == text
    text = "the\né  cat"  # what is no token becomes bytes; two blanks are a token of their own
    found = tokenizer.encode(text)
    assert found[0] == 0 and len(tokens) - 1 in found
    assert tokenizer.decode(found[1:]) == text


def test_what_is_refused():
    with pytest.raises(ModelError, match="'jais'"):
        byte_level(MERGES, "jais")
    with pytest.raises(ModelError, match="no token for"):
        Tokenizer.sentencepiece(["a"], [0.0]).encode("b")
