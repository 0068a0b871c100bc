"""Scores: images and vectors in, numbers out. What embeds the images is the caller's choice."""

from __future__ import annotations

from scipy.stats import mannwhitneyu
from torch import Tensor


def intersection_over_union(mask: Tensor, truth: Tensor) -> float:
    """IoU of two bool masks (H, W); 1.0 if both are empty."""
    union = (mask | truth).sum().item()
    return (mask & truth).sum().item() / union if union else 1.0


def nearer(results: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Selectivity: whether each result's mean cosine with `chosen` exceeds that with `other`.

    Unit vectors (B, D), (K, D), (K', D) -> (B,) bool.
    """
    return (results @ chosen.T).mean(1) > (results @ other.T).mean(1)


def roc_auc(same: Tensor, different: Tensor) -> float:
    """Area under the ROC curve: the chance that a `same` score exceeds a `different` one, ties counting half."""
    wins = mannwhitneyu(same.numpy(), different.numpy()).statistic  # U counts exactly those pairs
    return float(wins) / (len(same) * len(different))
