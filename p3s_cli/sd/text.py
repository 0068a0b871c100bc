"""Prompts to text states, with nothing lost on the way unnoticed."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from p3s_cli.errors import InputError

PLACEHOLDER = "[V]"
_LONGEST = 2_000  # characters
_PLACE = re.compile(r"\[V(\d*)\]")
# to another word or subject, or behind an apostrophe: CLIP's tokenizer takes the 's off 'sks
_GLUED = re.compile(r"[\w'\]]\[V\d*\]|\[V\d*\]\w")


def fill(prompt: str, *identifiers: str) -> str:
    """The prompt as the text encoder reads it: the subjects' identifiers where it says [V], or [V1], [V2], ..."""
    return _PLACE.sub(lambda place: identifiers[_subject(place)], prompt)


def _subject(place: re.Match) -> int:
    """Which subject a place is of, counted from zero."""
    return int(place[1] or 1) - 1


def identify(prompt: str, identifier: str, *others: str) -> str:
    """`fill`, after a look at the prompt.

    Raises InputError for a subject the prompt says nowhere, for a place that has no subject, and for one that is no word of
    its own: the text encoder would read another word.
    """
    check_text("prompt", prompt)
    if glued := _GLUED.search(prompt):
        raise InputError(
            f'the prompt "{prompt}" has no space around [V] in "{glued[0]}"; write it as a word of its own'
        )
    identifiers = (identifier, *others)
    if others and PLACEHOLDER in prompt:
        raise InputError(
            f'the prompt "{prompt}" says [V], but there are {len(identifiers)} subjects; write [V1], [V2] and so on'
        )
    numbers = {_subject(place) + 1 for place in _PLACE.finditer(prompt)}
    for n in range(1, len(identifiers) + 1):
        if n not in numbers:
            name = f"[V{n}]" if others else PLACEHOLDER
            raise InputError(
                f'the prompt "{prompt}" has no {name}; write {name} before the class word, as in "a {name} dog on the beach"'
            )
    if extra := numbers - set(range(1, len(identifiers) + 1)):
        raise InputError(f"the prompt says [V{min(extra)}], which is no subject; name one with --also")
    return fill(prompt, *identifiers)


def class_word(word: str) -> str:
    """The word as prompts will have it, without space around it.

    Raises InputError for one that has no letter, or what no screen shows, and for one with a place for a subject in it: prompts have theirs.
    """
    check_text("class word", word)
    if not word.isprintable() or not any(character.isalnum() for character in word):
        raise InputError(f"{word!r:.80} is no class word; give --class as a word such as dog, or leave it out")
    if place := _PLACE.search(word):
        raise InputError(f'the class word "{word}" says {place[0]}, which prompts put before it; leave that out')
    return word.strip()


def check_text(which: str, words: str) -> None:
    """Raises InputError for what no manifest can hold, bytes of a shell that are no text, and for a book.

    A tokenizer's time grows with the square of a word's length: five thousand letters take it minutes.
    """
    if len(words) > _LONGEST:
        raise InputError(
            f"the {which} has {len(words):,} characters, and a text encoder reads 77 tokens; give {_LONGEST:,} at most"
        )
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the {which} {words!a:.80} is not valid Unicode text; type it again") from error


def lost_words(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """What of the prompt lies beyond the tokenizer's length, as text; empty if all of it fits."""
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids[1:-1]
    return tokenizer.decode(ids[tokenizer.model_max_length - 2 :]).strip()


def check_subjects_survive(tokenizer: CLIPTokenizer, prompt: str, *identifiers: str) -> None:
    """Raises InputError if a subject's place is cut off with the tail of a prompt that is too long."""
    for place in _PLACE.finditer(prompt):
        if _tokens(tokenizer, fill(prompt[: place.end()], *identifiers)) > tokenizer.model_max_length - 2:
            raise InputError(
                f"{place[0]} lies beyond the {tokenizer.model_max_length} tokens the text encoder reads; move it towards the beginning of the prompt"
            )


def _tokens(tokenizer: CLIPTokenizer, words: str) -> int:
    """How many there are, without begin and end."""
    return len(tokenizer(words, truncation=False, verbose=False).input_ids) - 2


def check_words(tokenizer: CLIPTokenizer, prompt: str, negative: str, identifiers: Sequence[str]) -> list[str]:
    """Warnings for what of the prompts (with [V] in the first) the text encoder will not see; InputError if a subject is in it."""
    check_text("negative prompt", negative)
    if place := _PLACE.search(negative):
        raise InputError(f"the negative prompt says {place[0]}, and no subject can stand there; leave that out")
    check_subjects_survive(tokenizer, prompt, *identifiers)
    lost = {
        "prompt": lost_words(tokenizer, fill(prompt, *identifiers)),
        "negative prompt": lost_words(tokenizer, negative),
    }
    return [f'the {which} is too long; the text encoder does not see "{tail}"' for which, tail in lost.items() if tail]


def states(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]) -> Tensor:
    """Text states (B, 77, D), with a gradient if anything in the text encoder asks for one."""
    tokens = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    return text_encoder(tokens.input_ids.to(text_encoder.device)).last_hidden_state


@torch.no_grad()
def encode(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]) -> Tensor:
    """Text states (B, 77, D)."""
    return states(tokenizer, text_encoder, prompts)


def positions(tokenizer: CLIPTokenizer, prompts: Sequence[str], identifiers: Sequence[str], which: int) -> Tensor:
    """Where the tokens of subject `which` (from 0) stand in each prompt as `encode` pads it once filled, (B, 77) bool.

    Counted from its places in the prompt, for two subjects may share an identifier, and a class word, too.
    """
    last = tokenizer.model_max_length - 1  # the end's own place
    where = torch.zeros(len(prompts), last + 1, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        for place in _PLACE.finditer(prompt):
            if _subject(place) == which:
                first = 1 + _tokens(tokenizer, fill(prompt[: place.start()], *identifiers))
                where[row, first : min(first + _tokens(tokenizer, identifiers[which]), last)] = True
    return where
