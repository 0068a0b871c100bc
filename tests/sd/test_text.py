"""Prompts: nothing is lost unnoticed, and the subject never."""

import pytest

from p3s_cli.errors import InputError
from p3s_cli.sd import text


def fits(tokenizer, prompt):
    words = text.identify(prompt, "sks")
    text.check_subjects_survive(tokenizer, prompt, "sks")
    return words, text.lost_words(tokenizer, words)


def test_words_beyond_the_encoder_are_named(world):
    """77 tokens with the two that begin and end: 75 words of one token each fit, the 76th is lost."""
    spare = 75 - len(world.tokenizer("sks").input_ids[1:-1])
    words, lost = fits(world.tokenizer, "[V] " + " ".join(["dog"] * spare))
    assert lost == ""
    words, lost = fits(world.tokenizer, "[V] " + " ".join(["dog"] * spare) + " cat duck")
    assert lost == "cat duck"


def test_the_subject_is_never_cut_off(world):
    own = len(world.tokenizer("sks").input_ids[1:-1])
    fits(world.tokenizer, " ".join(["dog"] * (75 - own)) + " [V]")
    with pytest.raises(InputError, match=r"\[V\] lies beyond the 77 tokens"):
        fits(world.tokenizer, " ".join(["dog"] * (76 - own)) + " [V]")


def test_a_book_is_refused_before_it_is_read():
    with pytest.raises(InputError, match="2,001 characters.*give 2,000 at most"):
        text.identify("[V] " + "é" * 1997, "sks")


@pytest.mark.parametrize("prompt", ["a dog", "", "[v] dog", "a [V dog"])
def test_a_prompt_without_the_subject_is_refused(prompt):
    with pytest.raises(InputError, match=r"has no \[V\]"):
        text.identify(prompt, "sks")


def test_a_long_tail_that_happens_to_spell_the_identifier_is_only_warned_of(world):
    prompt = "a [V] dog " + "very " * 80 + "on two desks"
    assert text.check_words(world.tokenizer, prompt, "", ["sks"])[0].endswith('on two desks"')


@pytest.mark.parametrize("prompt", ["a [V]dog", "two [V]s", "a super[V] dog", "a [V1]dog", "a sign: '[V] dog'"])
def test_a_subject_glued_to_another_word_is_refused(prompt):
    """`sksdog` is another word, at which nothing was learnt, and so are `'s ks` and `skssks`; other punctuation is none."""
    with pytest.raises(InputError, match="word of its own"):
        text.identify(prompt, "sks")
    with pytest.raises(InputError, match="word of its own"):
        text.identify("[V1][V2] dogs", "sks", "sks")
    assert text.identify("the [V]'s hat, a ([V]) dog: [V]!", "sks") == "the sks's hat, a (sks) dog: sks!"


def test_text_that_is_no_unicode_is_refused():
    with pytest.raises(InputError, match="not valid Unicode"):
        text.identify("a [V] \ud800", "sks")


def test_a_subject_has_no_place_in_the_negative_prompt(world):
    with pytest.raises(InputError, match=r"the negative prompt says \[V\]"):
        text.check_words(world.tokenizer, "a [V] dog", "a [V] dog", ["sks"])
