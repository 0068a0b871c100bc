"""Every column of a protocol against a second implementation: numpy over transformers' own processors and models,
and torchmetrics."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import bootstrap
from torchmetrics.functional.classification import binary_auroc, binary_jaccard_index
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.functional.pairwise import pairwise_cosine_similarity
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, ViTConfig, ViTModel

from p3s_cli.evals.metrics import intersection_over_union, roc_auc
from p3s_cli.evals.models import Preprocessing
from p3s_cli.evals.protocols import protocol
from p3s_cli.evals.scores import summary, table
from p3s_cli.evals.scoring import Judge
from p3s_cli.evals.truth import Result, Truth

HOW = Preprocessing(40, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
THEIRS = CLIPImageProcessor(
    size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=HOW.mean, image_std=HOW.std
)
PROMPTS = ("a dog on the beach", "a dog in the snow wearing a hat", "a dog")


def picture(seed: int, width: int = 60, height: int = 48) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


class LeftHalf:
    """A finder that always finds the subject in the left half."""

    digest = "the left half"

    def blackened(self, picture: Image.Image) -> Image.Image:
        pixels = np.array(picture)
        pixels[:, pixels.shape[1] // 2 :] = 0
        return Image.fromarray(pixels)

    def place(self, picture: Image.Image) -> tuple[float, float]:
        return 0.25, 0.5


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_folder):
    """A tiny CLIP and a tiny DINO-like ViT, each in a folder, which see more of a picture than random ones do."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    where = tmp_path_factory.mktemp("models")
    vit = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False)
    clip = CLIPModel.from_pretrained(tiny_folder / "clip")
    with torch.no_grad():
        for model, factor in ((vit, 4.0), (clip.vision_model, 2.0)):
            for weight in (w for w in model.parameters() if w.ndim > 1):
                weight.mul_(factor)
        clip.text_projection.weight.neg_()  # so that words come out like these pictures rather than unlike them
    vit.save_pretrained(where / "vit")
    clip.save_pretrained(where / "clip")
    CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer").save_pretrained(where / "tokenizer")
    return {"clip": str(where / "clip"), "dino": str(where / "vit")}


@pytest.fixture(scope="module")
def judged(models, tmp_path_factory):
    """(protocol name -> its rows for three results, the results' pictures, the truth)"""
    folder, results = tmp_path_factory.mktemp("results"), []
    for k, prompt in enumerate(PROMPTS):
        picture(k).save(folder / f"{k}.png")
        results.append(Result(folder / f"{k}.png", str(k), prompt, k))
    real, other = (picture(10), picture(11), picture(12, 40, 70)), (picture(20), picture(21))
    finder = LeftHalf()
    truth = Truth("dog", real, other, tuple(map(finder.blackened, real)), "a spotted dog", finder)
    rows = {}
    for name in ("dreambooth", "kosmos-g", "p3s"):
        how = replace(protocol(name), models={key: (where, HOW) for key, where in models.items()})
        rows[name] = list(Judge(how, None).judge("p3s", truth, results, lambda key: False))
    return rows, [picture(k) for k in range(3)], truth


def unit(vectors) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def second(models):
    """Unit vectors by transformers alone: (of pictures by CLIP, of pictures by DINO, of texts by CLIP)."""
    clip, vit = CLIPModel.from_pretrained(models["clip"]).eval(), ViTModel.from_pretrained(models["dino"]).eval()
    tokenizer = CLIPTokenizer.from_pretrained(f"{models['clip']}/../tokenizer")

    def pixels(pictures):
        return THEIRS(list(pictures), return_tensors="pt").pixel_values

    @torch.no_grad()
    def by_clip(pictures):
        return unit(clip.visual_projection(clip.vision_model(pixels(pictures)).pooler_output))

    @torch.no_grad()
    def by_dino(pictures):
        return unit(vit(pixels(pictures)).last_hidden_state[:, 0])

    @torch.no_grad()
    def texts(words):
        return unit(
            clip.text_projection(clip.text_model(**tokenizer(words, padding=True, return_tensors="pt")).pooler_output)
        )

    return by_clip, by_dino, texts


def scores(rows, metric):
    return np.array([row.score for row in sorted(rows, key=lambda r: r.seed) if row.metric == metric])


def test_every_column_of_the_field_s_protocol_by_hand(judged, second):
    (rows, pictures, truth), (by_clip, by_dino, texts) = judged, second
    rows = rows["dreambooth"]
    clip, dino, dark = by_clip(pictures), by_dino(pictures), by_dino(map(LeftHalf().blackened, pictures))
    expected = {
        "DINO": (dino @ by_dino(truth.real).T).mean(1),
        "CLIP-I": (clip @ by_clip(truth.real).T).mean(1),
        "CLIP-T": (clip * texts(list(PROMPTS))).sum(1),
        "DINO-M": (dark @ by_dino(truth.masked).T).mean(1),
        "CLIP-ES": clip @ texts([truth.other_text])[0],
        "selectivity": (dino @ by_dino(truth.real).T).mean(1) > (dino @ by_dino(truth.other).T).mean(1),
    }
    assert {row.metric for row in rows} == set(expected)
    for metric, values in expected.items():
        np.testing.assert_allclose(scores(rows, metric), values, atol=1e-3, err_msg=metric)
    through = {row.metric for row in rows if LeftHalf.digest in row.reference}  # another finder, another score
    assert through == {"DINO-M"}
    assert np.ptp(expected["DINO"]) > 5e-3  # results differ by more than what is tolerated


def test_kosmos_g_compares_with_the_first_picture_alone(judged, second):
    (rows, pictures, truth), (by_clip, by_dino, _) = judged, second
    for metric, by in (("DINO", by_dino), ("CLIP-I", by_clip)):
        expected = by(pictures) @ by(truth.real[:1])[0]
        np.testing.assert_allclose(scores(rows["kosmos-g"], metric), expected, atol=1e-3)
        assert abs(expected - scores(rows["dreambooth"], metric)).max() > 2e-3


def test_the_papers_variances_are_numpys(judged):
    rows = judged[0]["p3s"]
    columns = table(rows, protocol("p3s"))["p3s"]
    for column, of in (("CLIP-Iv", "CLIP-I"), ("DINO-v", "DINOv2")):
        assert columns[column].value == pytest.approx(np.var(scores(rows, of)))


def test_clip_t_and_clip_i_are_torchmetrics_clip_score(judged, models):
    """torchmetrics' score is 100 times the mean cosine, between pictures and texts or pictures and pictures."""
    rows, pictures, truth = judged
    clip = CLIPModel.from_pretrained(models["clip"]).eval()
    adapted = SimpleNamespace(  # torchmetrics expects the vectors that transformers 4 gave
        config=clip.config,
        to=lambda device: adapted,
        get_image_features=lambda pixels: clip.get_image_features(pixel_values=pixels).pooler_output.detach(),
        get_text_features=lambda ids, mask: clip.get_text_features(ids, mask).pooler_output.detach(),
    )
    processor = CLIPProcessor(THEIRS, CLIPTokenizer.from_pretrained(f"{models['clip']}/../tokenizer"))

    def tensors(pictures):
        return [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures]

    means = {n: scores(rows["dreambooth"], n).mean() for n in ("CLIP-T", "CLIP-I")}
    words = clip_score(tensors(pictures), list(PROMPTS), lambda: (adapted, processor))
    assert 100 * max(0.0, means["CLIP-T"]) == pytest.approx(words.item(), abs=0.1)
    pairs = [
        clip_score(tensors(pictures), tensors([real] * len(pictures)), lambda: (adapted, processor)).item()
        for real in truth.real
    ]
    assert 100 * means["CLIP-I"] == pytest.approx(np.mean(pairs), abs=0.1)
    assert min(pairs) > 0 < words  # torchmetrics would call less than nothing nothing


def test_the_mean_over_pairs_auc_and_iou_are_torchmetrics_own():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 8, generator=g), torch.randn(5, 8, generator=g)
    ours = (torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T).mean(1)
    torch.testing.assert_close(ours, pairwise_cosine_similarity(a, b, reduction="mean"))
    same, different = torch.rand(7, generator=g).round(decimals=1), torch.rand(9, generator=g).round(decimals=1)
    labels = torch.cat([torch.ones(7), torch.zeros(9)]).long()
    assert roc_auc(same, different) == pytest.approx(binary_auroc(torch.cat([same, different]), labels).item())
    mask, truth = torch.rand(2, 12, 12, generator=g) > 0.5
    theirs = binary_jaccard_index(mask.long(), truth.long()).item()
    assert intersection_over_union(mask, truth) == pytest.approx(theirs)


def test_the_interval_is_scipys_percentile_bootstrap_over_subjects():
    values = np.random.default_rng(1).normal(0.6, 0.1, 30)
    ours = summary({str(k): [v] for k, v in enumerate(values)}, np.mean)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=2_000, rng=0).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=4e-3) and ours.high == pytest.approx(theirs.high, abs=4e-3)
    assert theirs.high - theirs.low > 0.05  # the tolerance is a small part of the interval
