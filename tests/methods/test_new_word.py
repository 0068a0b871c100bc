"""A new word stands for the identifier, and begins as its class word."""

import torch

from p3s_cli.methods.words import NewWord
from p3s_cli.sd import text


def test_a_new_word_begins_as_its_class_word_and_stands_for_the_identifier(family, subject):
    noun, modifier = (NewWord(family, subject.manifest, instead_of_class=n) for n in (True, False))
    prompt = "a sks dog, sksy dogs and SKS Dogs"
    assert noun.spell(prompt) == "a <sks>, sksy dogs and <sks> Dogs"
    assert modifier.spell(prompt) == "a <sks> dog, sksy dogs and <sks> Dogs"
    ids = modifier.tokenizer(modifier.spell("a sks dog")).input_ids
    assert ids[2] == len(family.tokenizer) and len(ids) == 5  # start, a, the word, dog, end
    theirs = text.encode(family.tokenizer, family.text_encoder, ["a dog on the beach", "a dog dog"])
    torch.testing.assert_close(noun.states(["a sks dog on the beach"]), theirs[:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(modifier.states(["a sks dog"]), theirs[1:], atol=1e-5, rtol=0)


def test_a_new_word_never_makes_a_prompt_longer(family, subject):
    """So a subject that the family's own tokenizer keeps (`check_subjects_survive`) is kept here too."""
    word = NewWord(family, subject.manifest, instead_of_class=False)
    for prompt in ("a sks dog", "a photo of a sks dog in the snow", "on the beach sks"):
        assert len(word.tokenizer(word.spell(prompt)).input_ids) <= len(family.tokenizer(prompt).input_ids)


def test_the_class_word_may_have_several_tokens(family, subject):
    manifest = subject.manifest.model_copy(update={"class_word": "pet"})
    ids = family.tokenizer("pet", add_special_tokens=False).input_ids
    assert len(ids) > 1
    rows = family.text_encoder.get_input_embeddings().weight[ids]
    torch.testing.assert_close(NewWord(family, manifest, True).first, rows.mean(0))
