"""CLIP's tokenizer, from a model's files, or the one SD v1-5 speaks, which ships with the package (MIT)."""

from __future__ import annotations

import gzip
from pathlib import Path

from transformers import CLIPTokenizer

from p3s_cli.errors import InputError
from p3s_cli.sd import hub

_FILE = Path(__file__).parent / "profiles" / "sd15" / "tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 48_894  # the file holds more; the 49,408 tokens are 2 x 256 bytes, one for each of these, and two marks


_LENGTH = 77  # tokens that CLIP's text encoder reads


def read_tokenizer(part: hub.Part, fetch: str) -> CLIPTokenizer:
    """The tokenizer of a model; `fetch` is the command that brings it.

    Raises InputError if it has no vocabulary: where the files are missing, transformers makes one that
    takes every word for the same, and says nothing.
    """
    inside = hub.folder(part)
    if inside is None and not Path(part.source).exists():
        inside = hub.bring(part, fetch)
    here = {name for name in (*part.any_of, *part.also) if inside and (inside / name).is_file()}
    if "tokenizer.json" not in here and not {"vocab.json", "merges.txt"} <= here:
        raise InputError(f"{part.where} has no vocabulary (tokenizer.json, or vocab.json and merges.txt); restore it")
    tokenizer = hub.from_pretrained(CLIPTokenizer, str(inside), fetch=fetch)
    # without a length of its own a tokenizer made from a bare vocabulary lets prompts overflow
    tokenizer.model_max_length = min(tokenizer.model_max_length, _LENGTH)
    return tokenizer


def clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer of CLIP and of SD v1-5's text encoder: 49,408 tokens."""
    lines = gzip.decompress(_FILE.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 1 + _MERGES]]
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=_LENGTH)


def _byte_letters() -> list[str]:
    """A visible character for each byte, in the order of their tokens: the visible ones first, as themselves."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = 256 - len(visible)
    return [chr(b) for b in visible] + [chr(256 + i) for i in range(hidden)]
