"""Metric models: their preprocessing and vectors, against transformers' own."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel

import p3s_cli
from p3s_cli.errors import InputError
from p3s_cli.evals.models import LabelReader, MetricModel, Preprocessing
from p3s_cli.evals.protocols import protocol
from p3s_cli.evals.scoring import Judge
from p3s_cli.world.readers import LABELS, build_identity_encoder, build_label_reader


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (90, 90)])
def test_clip_preprocessing_is_transformers_own(size):
    ours = protocol("dreambooth").models["clip"][1]
    theirs = CLIPImageProcessor()(picture(*size), return_tensors="pt").pixel_values
    # both resize 8-bit pixels with PIL; what is left is the last bit of the division by 255
    assert torch.allclose(ours([picture(*size)]), theirs, atol=2e-2)
    assert (ours([picture(*size)]) - theirs).abs().mean() < 2e-3


def test_a_constant_picture_becomes_its_standardised_value():
    how = Preprocessing(64, 48, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    out = how([Image.new("RGB", (100, 70), (255, 0, 51))])
    assert out.shape == (1, 3, 48, 48)
    assert torch.allclose(out[0].flatten(1).mean(1), torch.tensor([1.0, -1.0, 0.2]), atol=1e-6)


def test_clip_scores_are_the_models_own_logits(world):
    where = str(world.folder / "clip")
    ours = MetricModel(where, protocol("world").models["clip"][1])
    images, texts = [picture(128, 128, k) for k in range(3)], ["a dog in the snow", "a red car"]
    clip = CLIPModel.from_pretrained(where, dtype=torch.float32).eval()
    tokens = world.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = clip(pixel_values=ours.preprocessing(images), **tokens)
    assert torch.allclose(
        ours.images(images) @ ours.texts(texts).T, out.logits_per_image / clip.logit_scale.exp(), atol=1e-5
    )


def test_a_fingerprint_is_of_the_weights_and_not_of_their_place(tmp_path):
    torch.manual_seed(0)
    model, how = build_identity_encoder(), protocol("world").models["identity"][1]
    for folder in ("a", "b"):
        model.save_pretrained(tmp_path / folder)
    a, b = (MetricModel(str(tmp_path / f), how).fingerprint for f in ("a", "b"))
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(tmp_path / "c")
    assert a == b != MetricModel(str(tmp_path / "c"), how).fingerprint


def test_a_readers_fingerprint_is_of_what_it_reads_by_as_well(tmp_path):
    """An encoder alone has no classifier; labels come from it."""
    reader, how = build_label_reader(), protocol("world").models["labels"][1]
    prints = []
    for shift in (0.0, 1.0):
        with torch.no_grad():
            reader.classifier[-1].bias.add_(shift)
        reader.save_pretrained(tmp_path / str(shift))
        where = str(tmp_path / str(shift))
        prints.append((MetricModel(where, how).fingerprint, LabelReader(where, how).fingerprint))
    assert prints[0][0] == prints[1][0] and prints[0][1] != prints[1][1]


def test_a_reader_answers_each_group_by_its_own_largest_logit(tmp_path):
    torch.manual_seed(0)
    build_label_reader().save_pretrained(tmp_path / "labels")
    reader = LabelReader(str(tmp_path / "labels"), protocol("world").models["labels"][1])
    logits = reader.logits([picture(128, 128)])[0]
    colours = [i for i, label in enumerate(LABELS) if label.startswith("colour/")]
    best = max(colours, key=lambda i: logits[i].item())
    assert reader.read([picture(128, 128)], "colour") == [[LABELS[best]]]


def test_a_metric_model_that_is_not_here_is_named(tmp_path):
    where, how = protocol("dreambooth").models["dino"]
    model = MetricModel(where, how, command="p3s fetch dreambooth")
    with pytest.raises(
        InputError, match="dino-vits16 is not on this machine.*with `p3s fetch dreambooth`.*another --protocol"
    ):
        model.images([picture(64, 64)])


def test_a_vocabulary_that_is_missing_is_never_made_up(tmp_path):
    """transformers makes a tokenizer of two tokens of a folder without one, and every text would score the same."""
    how = protocol("world").models["clip"][1]
    folder = shutil.copytree(Path(p3s_cli.__file__).parent / "world/weights/clip", tmp_path / "clip")
    with pytest.raises(InputError, match="has no vocabulary"):
        MetricModel(str(folder), how).texts(["a dog"])


def test_weights_that_a_folder_lacks_are_never_made_up(tmp_path):
    torch.manual_seed(0)
    build_identity_encoder().save_pretrained(tmp_path)  # a trunk without a head is no reader of labels
    with pytest.raises(InputError, match="classifier"):
        LabelReader(str(tmp_path), protocol("world").models["labels"][1])


def test_a_protocol_of_another_family_is_no_matter_of_fetching(tiny_folder):
    """Its readers lie in that family's folder, and nowhere on the hub."""
    for folder in (tiny_folder, None):
        with pytest.raises(
            InputError, match="protocol world judges by models in its own family's folder.*another --protocol"
        ):
            Judge(protocol("world"), folder).load()
    with pytest.raises(InputError, match="with `p3s fetch dreambooth`"):
        Judge(protocol("dreambooth"), tiny_folder).load()
