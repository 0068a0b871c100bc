"""CLIP's vocabulary, which SD v1-5 speaks as well and single files do not carry. It ships with the package (MIT)."""

from __future__ import annotations

import gzip
from pathlib import Path

from transformers import CLIPTokenizer

_FILE = Path(__file__).parent / "profiles" / "sd15" / "tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 48_894  # the file holds more; the 49,408 tokens are 2 x 256 bytes, one for each of these, and two marks


def clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer of CLIP and of SD v1-5's text encoder: 49,408 tokens, texts of 77."""
    lines = gzip.decompress(_FILE.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 1 + _MERGES]]
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    # without a length of its own a tokenizer made from a bare vocabulary lets pipelines overflow
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=77)


def _byte_letters() -> list[str]:
    """A visible character for each byte, in the order of their tokens: the visible ones first, as themselves."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = 256 - len(visible)
    return [chr(b) for b in visible] + [chr(256 + i) for i in range(hidden)]
