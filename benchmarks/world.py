"""Is the bundled family good enough? Its parts and its images against ground truth. Prints a Markdown table.

    python benchmarks/world.py                      # all of it, on the committed weights
    python benchmarks/world.py --model runs/world/export --prompts 64 --sheet sheet.png

Everything is held out: scenes, individuals, captions. Images are made at guidance 5 with DDIM-50 from full
captions ("a striped red dog wearing a red hat on the beach") and judged by the family's own readers, whose
accuracy on true renders stands in the last rows. `pattern` and `accessory` count the prompts that name one.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image
from tables import machine, markdown
from torch import Tensor

from p3s_cli import pictures, stages
from p3s_cli.evals.metrics import intersection_over_union, roc_auc
from p3s_cli.evals.models import LabelReader, MetricModel
from p3s_cli.evals.protocols import protocol
from p3s_cli.sd import images, sample, text
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.weights import load_tensors
from p3s_cli.world.readers import GROUPS, true_labels
from p3s_cli.world.render import click, render
from p3s_cli.world.scenes import BACKGROUNDS, Scene, caption, lookalike_scene, sample_instance, sample_scene, solo
from p3s_cli.world.seeds import PROMPTS
from p3s_cli.world.shapes import CATEGORIES

BARS = {
    "psnr_db": 26.0,
    "clip_category": 0.97,
    "clip_background": 0.97,
    "category": 0.95,
    "background": 0.95,
    "colour": 0.90,
    "pattern": 0.85,
    "accessory": 0.85,
    "two_subjects": 0.70,
    "mask_iou_single": 0.85,
    "mask_iou_lookalike": 0.75,
    "identity_auc": 0.98,
    "identity_auc_decoded": 0.97,
    **{f"reader_{group}": 0.98 for group in GROUPS},
}


def scenes(count: int, subjects: int, first: int) -> list[Scene]:
    """Held-out scenes of so many subjects; two are of different categories."""
    found, seed = [], first
    while len(found) < count:
        scene = sample_scene(seed, counts=(subjects,))
        if len({s.instance.category for s in scene.subjects}) == subjects:
            found.append(scene)
        seed += 1
    return found


def drawn(of: list[Scene]) -> Tensor:
    return torch.cat([render(of[i : i + 64])[0] for i in range(0, len(of), 64)])


def pil(pixels: Tensor) -> list[Image.Image]:
    return [images.to_pil(p) for p in pixels]


def autoencoder(family: Family, of: list[Scene]) -> dict[str, float]:
    """Mean PSNR of held-out scenes after a round trip."""
    pixels = drawn(of)
    error = (images.decode(family.vae, images.encode(family.vae, pixels)) - pixels).square().mean((1, 2, 3))
    return {"psnr_db": (-10 * torch.log10(error)).mean().item()}


def zero_shot(family: Family, of: list[Scene]) -> dict[str, float]:
    """CLIP's choice among all categories, and among all backgrounds, for renders of one subject."""
    vectors = family.vision.embed(drawn(of))
    nouns = family.vision.embed_text([f"a photo of a {c}" for c in CATEGORIES])
    places = family.vision.embed_text([f"a photo {phrases[0]}" for phrases in BACKGROUNDS.values()])
    kinds = torch.tensor([CATEGORIES.index(s.subjects[0].instance.category) for s in of])
    grounds = torch.tensor([list(BACKGROUNDS).index(s.background) for s in of])
    return {
        "clip_category": ((vectors @ nouns.T).argmax(1) == kinds).float().mean().item(),
        "clip_background": ((vectors @ places.T).argmax(1) == grounds).float().mean().item(),
    }


def judged(reader: LabelReader, shown: list[Image.Image], of: list[Scene], named: bool) -> dict[str, float]:
    """Share of pictures whose label the reader finds, by group.

    With `named`, a pattern or accessory counts only where a caption names one (plain and bare go unnamed).
    """
    shares = {}
    for group in GROUPS:
        truth = [next(t for t in true_labels(s) if t.startswith(f"{group}/")) for s in of]
        read = reader.read(shown, group)
        unnamed = {"pattern/plain", "accessory/nothing"} if named else set()
        hits = [t == r[0] for t, r in zip(truth, read, strict=True) if t not in unnamed]
        shares[group] = fmean(hits)
    return shares


def both_categories(reader: LabelReader, shown: list[Image.Image], of: list[Scene]) -> float:
    wanted = [{f"category/{s.instance.category}" for s in scene.subjects} for scene in of]
    read = reader.read(shown, "category", top=2)
    return fmean(set(r) == w for r, w in zip(read, wanted, strict=True))


def generated(family: Family, of: list[Scene], steps: int, guidance: float, batch: int = 32) -> Iterator[Tensor]:
    """One image (3, H, W) for each scene's full caption."""
    side = family.unet.config.sample_size

    def eps(x: Tensor, t: Tensor, states: Tensor, with_subject: bool) -> Tensor:
        return family.unet(x, t, states).sample

    for i in range(0, len(of), batch):
        captions = [caption(s, 0, full=True) for s in of[i : i + batch]]
        states = text.encode(family.tokenizer, family.text_encoder, [*captions, ""])
        scheduler = sample.build_scheduler("ddim", family.scheduler_config)
        seeds = range(PROMPTS + i, PROMPTS + i + len(captions))
        shape, how = (4, side, side), {"steps": steps, "guidance": guidance}
        latents = sample.sample(eps, states[:-1], states[-1:], scheduler, seeds, shape, **how)
        yield from images.decode(family.vae, latents)


def identity(family: Family, encoder: MetricModel, individuals: int) -> dict[str, float]:
    """ROC AUC of cosines, same individual against another of its category, on renders and after a round trip."""
    rng = random.Random(PROMPTS)
    who = [sample_instance(rng, CATEGORIES[k % len(CATEGORIES)]) for k in range(individuals)]
    pixels = [drawn([solo(w, PROMPTS + 2 * k + view) for k, w in enumerate(who)]) for view in (0, 1)]
    back = [images.decode(family.vae, images.encode(family.vae, p)) for p in pixels]
    scores = {}
    for name, (first, second) in (("identity_auc", pixels), ("identity_auc_decoded", back)):
        cosines = encoder.images(pil(first)) @ encoder.images(pil(second)).T
        alike = torch.tensor([[a.category == b.category for b in who] for a in who])
        own = torch.eye(individuals, dtype=torch.bool)
        scores[name] = roc_auc(cosines[own], cosines[alike & ~own])
    return scores


def masks(family: Family, count: int) -> dict[str, float]:
    """Mean IoU of the subject's mask: one click on a lone subject, one on each of two look-alikes."""
    single, pairs = scenes(count, 1, PROMPTS + 500_000), [lookalike_scene(PROMPTS + 600_000 + k) for k in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        return {
            "mask_iou_single": fmean(_mask_iou(family, Path(folder) / f"s{k}", s) for k, s in enumerate(single)),
            "mask_iou_lookalike": fmean(_mask_iou(family, Path(folder) / f"p{k}", s) for k, s in enumerate(pairs)),
        }


def _mask_iou(family: Family, at: Path, scene: Scene) -> float:
    pixels, truth = render([scene])
    images.save_png(at.with_suffix(".png"), images.to_pil(pixels[0]))
    clicks = [[click(truth[0, i])] for i in range(len(scene.subjects))]
    made = stages.mask(at.with_suffix(".png"), clicks[0], clicks[1] if len(clicks) > 1 else (), at, "x", family=family)
    tensors, _ = load_tensors(at / made.reference / "mask.safetensors")
    return intersection_over_union(tensors["subject"].bool(), truth[0, 0])


def contact_sheet(path: Path, shown: list[Image.Image], of: list[Scene]) -> None:
    tiles = [(caption(s, 0, full=True), image) for s, image in zip(of, shown, strict=True)][:64]
    rows = [("" if i else "uncurated: the first 64 prompts", tiles[i : i + 8]) for i in range(0, len(tiles), 8)]
    images.save_png(path, pictures.sheet(rows, "world"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="world")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=512, help="images of one subject; a quarter as many of two")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--sheet", type=Path, help="write the first 64 images here")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    family = load(args.model, args.device, "float32")  # on any device: its bars are of that precision
    models = protocol("world").models
    reader, encoder = (
        kind(str(family.folder / models[key][0]), models[key][1], family.device)
        for kind, key in ((LabelReader, "labels"), (MetricModel, "identity"))
    )
    one, two = scenes(args.prompts, 1, PROMPTS), scenes(max(1, args.prompts // 4), 2, PROMPTS + 100_000)
    found = autoencoder(family, one[:256]) | zero_shot(family, one)
    made = pil(torch.stack(list(generated(family, one, args.steps, args.guidance))))
    found |= judged(reader, made, one, named=True)
    pairs = pil(torch.stack(list(generated(family, two, args.steps, args.guidance))))
    found["two_subjects"] = both_categories(reader, pairs, two)
    found |= masks(family, 64) | identity(family, encoder, 512)
    found |= {f"reader_{group}": share for group, share in judged(reader, pil(drawn(one)), one, named=False).items()}
    if args.sheet:
        contact_sheet(args.sheet, made, one)
    if args.json:
        print(json.dumps({name: round(value, 4) for name, value in found.items()}))
        return
    rows = [{"measure": n, "found": found[n], "bar": bar, "met": found[n] >= bar} for n, bar in BARS.items()]
    print(f"{machine()}, {args.prompts} prompts, DDIM-{args.steps}, guidance {args.guidance:g}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
