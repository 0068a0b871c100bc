"""P3S eq. 3 and the paper's condition on it."""

import torch

from p3s_cli.paper.inpaint import fill_region, harmonic_fill, region_similarity, remove_negative


def halves(size=32):
    """A red left and a green right half; the right one is the region."""
    image, region = torch.zeros(3, size, size), torch.zeros(size, size, dtype=torch.bool)
    image[0, :, : size // 2], image[1, :, size // 2 :] = 1, 1
    region[8:24, 20:28] = True
    return image, region


def colour_features(image):
    """Stand-in for a vision tower: mean colour of 4 x 4 pixel patches."""
    return torch.nn.functional.avg_pool2d(image, 4).permute(1, 2, 0) + 1e-3


POINT = [(0.2, 0.5)]


def test_region_grows_by_the_margin_but_never_into_the_subject():
    subject, negative = torch.zeros(2, 21, 21, dtype=torch.bool)
    negative[10, 10] = subject[10, 12] = True
    region = fill_region(subject, negative, 3.0)
    assert region[10, 7] and not region[10, 6] and region[12, 12] and not region[13, 13]  # a disk of radius 3
    assert not region[10, 12]
    assert not fill_region(subject, torch.zeros_like(negative), 3.0).any()


def test_classical_filler_restores_a_flat_colour_and_a_linear_ramp_and_touches_nothing_else():
    ramp = torch.linspace(0, 1, 40).expand(3, 40, 40).clone()
    region = torch.zeros(40, 40, dtype=torch.bool)
    region[15:25, 15:25] = True
    hole = torch.where(region, torch.rand(3, 40, 40), ramp)
    filled = harmonic_fill(hole, region)
    assert (filled - ramp).abs().max() < 0.05  # a ramp is harmonic, so it is its own best fill
    assert torch.equal(filled[:, ~region], ramp[:, ~region])
    flat = harmonic_fill(torch.full((3, 40, 40), 0.3), region)
    assert (flat - 0.3).abs().max() < 1e-5


def test_a_filler_that_paints_the_subject_again_is_refused_and_the_next_seed_taken():
    image, region = halves()
    image[:, region] = torch.tensor([[0.9], [0.3], [0.0]])  # a look-alike of the red subject
    tried = []

    def filler(picture, where, seed):
        tried.append(seed)
        colour = torch.tensor([1.0, 0, 0] if seed == 7 else [0, 0, 1.0])
        return torch.where(where, colour.view(3, 1, 1), picture)

    made = remove_negative(image, region, POINT, colour_features, filler, seed=7, attempts=3)
    assert tried == [7, 8] and made.filler == "model, seed 8"
    assert made.after < made.before
    assert torch.equal(made.image[:, ~region], image[:, ~region])


def test_after_all_seeds_the_classical_filler_is_used():
    image, region = halves()
    image[:, region] = torch.tensor([[0.9], [0.3], [0.0]])
    made = remove_negative(
        image,
        region,
        POINT,
        colour_features,
        lambda p, w, s: torch.where(w, p.new_tensor([1.0, 0, 0]).view(3, 1, 1), p),
    )
    assert made.filler == "classical" and made.after < made.before


def test_nothing_to_remove_leaves_the_photo_as_it_is():
    image, region = halves()
    made = remove_negative(image, torch.zeros_like(region), POINT, colour_features, None)
    assert made.filler == "none" and torch.equal(made.image, image)


def test_region_similarity_is_the_mean_cosine_over_its_patches():
    image, _ = halves()
    left, right = torch.zeros(2, 32, 32, dtype=torch.bool)
    left[:, :16] = right[:, 16:] = True
    features = colour_features(image)
    assert abs(region_similarity(features, left, POINT) - 1) < 1e-3
    assert region_similarity(features, right, POINT) < 0.01
