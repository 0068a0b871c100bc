"""A recording to stand in for CUDA's where there is no card."""

import weakref

import torch

from p3s_cli.sd import nested


def again(work):
    """As a CUDA graph: the results stay where they are, a replay changes what is in them, and nothing is kept alive for it."""
    results, work = work(), weakref.ref(work)

    def replay():
        for fixed, new in zip(nested.tensors(results), nested.tensors(work()()), strict=True):
            with torch.no_grad():
                fixed.copy_(new)

    return replay, results
