"""What the text tower of `world` has to name, spelt out on one caption; the family taken up again as it was left."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recordings import again
from transformers import CLIPModel, CLIPTokenizer

import p3s_cli
from p3s_cli.sd import checkpoints, graphs
from p3s_cli.sd.captured import CapturedLoss
from p3s_cli.sd.weights import load_tensors
from p3s_cli.world.recipe import workshop
from p3s_cli.world.recipe.contrast import pooled
from p3s_cli.world.recipe.export import stage_export, stage_reopen
from p3s_cli.world.recipe.readers import stage_labels
from p3s_cli.world.recipe.tokens import Tokens
from p3s_cli.world.recipe.vision import kinds_of, of_patches, stage_vision, stage_vision_fresh
from p3s_cli.world.recipe.words import phrases, stage_words
from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.scenes import caption, sample_instance, sample_scene, solo
from p3s_cli.world.shapes import CATEGORIES

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


def test_asking_the_last_layer_for_the_class_token_alone_changes_nothing():
    tower = CLIPModel.from_pretrained(WEIGHTS / "clip").float().vision_model
    pixels = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(pooled(tower, tower.embeddings(pixels)), tower(pixels).pooler_output)


@pytest.mark.parametrize("stage", [stage_vision, stage_vision_fresh])
def test_a_round_of_the_vision_tower_leaves_the_text_tower_and_resumes_to_the_same_bits(tmp_path, stage):
    def trained(work: Path, *until: int | None) -> dict[str, torch.Tensor]:
        stage_reopen(Workshop(work, "cpu", seed=0, scenes=128))
        for stop in until:
            stage(Workshop(work, "cpu", seed=0, scenes=128, steps=3, batch=8, until=stop))
        return load_tensors(work / "family/clip/model.safetensors")[0]

    whole, pieces = trained(tmp_path / "whole", None), trained(tmp_path / "pieces", 2, None)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    before = load_tensors(WEIGHTS / "clip/model.safetensors")[0]
    still = {name for name in whole if torch.equal(whole[name], before[name].float())}
    assert still == {name for name in whole if name.startswith("text_model")}


def test_a_run_with_another_seed_or_length_does_not_go_on_from_the_one_before(tmp_path):
    """In the same folder: it learns what it learns in a folder of its own."""

    def trained(work, *runs):
        for seed, steps in runs:
            shop = Workshop(tmp_path / work, "cpu", seed=seed, scenes=64, steps=steps, batch=8)
            stage_reopen(shop)
            stage_labels(shop)
        return load_tensors(tmp_path / work / "family/readers/labels/model.safetensors")[0]

    for run in ((1, 2), (0, 3)):
        alone, after = trained(f"alone{run}", run), trained(f"after{run}", (0, 2), run)
        assert all(torch.equal(alone[name], after[name]) for name in alone)


@pytest.mark.parametrize("stage", [stage_words, stage_vision_fresh, stage_labels])
def test_a_stage_whose_steps_are_recorded_learns_the_same_bits(tmp_path, monkeypatch, stage):
    """All that a step needs reaches its recording through what is drawn, or is fixed: four steps, of which three are replays."""
    monkeypatch.setattr(graphs, "_now", lambda: 0.0)
    learnt = []
    for recorded in (False, True):
        monkeypatch.setattr(workshop, "possible", lambda device, steps, recorded=recorded: recorded)
        monkeypatch.setattr(workshop, "CapturedLoss", lambda *given: CapturedLoss(*given, again))
        work = tmp_path / str(recorded)
        shop = Workshop(work, "cpu", seed=0, scenes=64, steps=4, batch=12)
        stage_reopen(shop)
        stage(shop)
        learnt.append(checkpoints.newest(shop.checkpoints(stage.__name__.removeprefix("stage_")))[0])
    assert all(torch.equal(learnt[1][name], tensor) for name, tensor in learnt[0].items())


def test_patches_count_by_their_share_of_a_subject_whose_kind_is_known():
    rows = [solo(sample_instance(random.Random(seed), kind), seed) for seed, kind in enumerate(("dog", "cat"))]
    two = replace(rows[0], subjects=rows[0].subjects + rows[1].subjects)
    share = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 0.25], [1.0, 1.0, 1.0]])  # more in a scene of two kinds
    logits = torch.zeros(3, 3, len(CATEGORIES))
    logits[0, 0, CATEGORIES.index("dog")] = 50.0  # one patch is sure and right; all others know nothing
    blank, kinds = math.log(len(CATEGORIES)), kinds_of([*rows, two], share)
    torch.testing.assert_close(of_patches(logits, kinds), torch.tensor(blank * 0.75 / 1.75))
    logits[1, 2] = -50.0
    logits[1, 2, CATEGORIES.index("cat")] = 50.0
    torch.testing.assert_close(of_patches(logits, kinds), torch.tensor(blank * 0.5 / 1.75))
