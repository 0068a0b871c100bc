"""What the text tower of `world` has to name, spelt out on one caption."""

from pathlib import Path

import torch
from transformers import CLIPTokenizer

import p3s_cli
from p3s_cli.world.recipe.words import phrases

WEIGHTS = Path(p3s_cli.__file__).parent / "world" / "weights"


def test_a_state_names_its_own_noun_phrase_and_the_end_names_all():
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    ids = tokenizer(["a spotted red cat and a blue dog"], padding="max_length", max_length=12, return_tensors="pt")
    starts = torch.tensor(tokenizer.convert_tokens_to_ids(["a</w>", "an</w>", "and</w>"]))
    inside = phrases(ids.input_ids, starts, tokenizer.eos_token_id, len(tokenizer))[0]

    def words(position: int) -> set[str]:
        return {
            t.removesuffix("</w>") for t in tokenizer.convert_ids_to_tokens(inside[position].nonzero()[:, 0].tolist())
        }

    assert words(4) == {"a", "spotted", "red", "cat"}  # at the noun, its adjectives
    assert words(8) == {"a", "blue", "dog"}  # not those of the other noun
    everything = {"<|startoftext|>", "<|endoftext|>", "a", "spotted", "red", "cat", "and", "blue", "dog"}
    assert words(9) == words(11) == everything  # at the end of the text and in what fills it up
