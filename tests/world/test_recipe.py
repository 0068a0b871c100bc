"""What the text tower of `world` has to name, spelt out on one caption; the family taken up again as it was left."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

import p3s_cli
from p3s_cli.sd.weights import load_tensors
from p3s_cli.world.recipe.export import stage_export, stage_reopen
from p3s_cli.world.recipe.tokens import Tokens
from p3s_cli.world.recipe.words import phrases
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.scenes import caption, sample_scene

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


def test_the_committed_family_is_exported_as_it_was_reopened(tmp_path: Path):
    shop = Workshop(tmp_path, "cpu", seed=0, scenes=0)
    stage_reopen(shop)
    stage_export(shop)
    committed = sorted(p.relative_to(WEIGHTS) for p in WEIGHTS.rglob("*.safetensors"))
    assert committed == sorted(p.relative_to(tmp_path / "export") for p in tmp_path.glob("export/**/*.safetensors"))
    assert (tmp_path / "export/p3s.json").read_bytes() == (WEIGHTS / "p3s.json").read_bytes()
    for name in committed:
        theirs, ours = load_tensors(WEIGHTS / name)[0], load_tensors(tmp_path / "export" / name)[0]
        assert all(torch.equal(ours[k], t) for k, t in theirs.items()) and len(ours) == len(theirs)


def test_captions_are_tokenised_word_by_word_as_they_are_whole():
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    captions = [caption(sample_scene(seed), seed, full=seed % 2 == 0) for seed in range(300)] + [""]
    whole = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(Tokens(tokenizer)(captions).long(), whole)


@pytest.mark.parametrize(("processor", "dtype"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32)])
def test_no_processor_is_asked_for_a_precision_that_it_only_emulates(tmp_path, monkeypatch, processor, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    with Workshop(tmp_path, "cpu", seed=0, scenes=0).autocast():
        assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(3, 2)).dtype == dtype
