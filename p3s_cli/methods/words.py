"""A word of a method's own: one embedding more, on copies of a family's tokenizer and text encoder."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from p3s_cli.errors import InputError
from p3s_cli.manifest import Manifest
from p3s_cli.methods.denoising import training_copy
from p3s_cli.sd import text
from p3s_cli.sd.family import Family


class _Embedding(nn.Module):
    """A frozen vocabulary and one row behind it: the only row that can learn."""

    def __init__(self, known: nn.Embedding, row: nn.Parameter):
        super().__init__()
        self.known, self.row = known, row

    def forward(self, ids: Tensor) -> Tensor:
        last = self.known.num_embeddings
        found = self.known(ids.clamp(max=last - 1))
        return torch.where((ids == last)[..., None], self.row.to(found.dtype), found)


class NewWord:
    """The subject's own word, which begins as the mean of its class word's embeddings.

    `row` (D,) is its embedding. With `instead_of_class` it stands where a prompt says identifier and class
    word together (it is a noun of its own), else where a prompt says the identifier (before the class word).
    """

    def __init__(self, family: Family, manifest: Manifest, instead_of_class: bool):
        self.tokenizer, self.text_encoder = copy.deepcopy(family.tokenizer), training_copy(family.text_encoder)
        self.name = f"<{manifest.identifier}>"
        if len(self.tokenizer) != self.text_encoder.config.vocab_size or not self.tokenizer.add_tokens([self.name]):
            raise InputError(f"the text encoder cannot be taught {self.name} as a new word; set another identifier")
        known = self.text_encoder.get_input_embeddings()
        begin = family.tokenizer(manifest.class_word, add_special_tokens=False).input_ids
        self.first = known.weight[begin].mean(0)
        self.row = nn.Parameter(self.first.clone())
        self.text_encoder.set_input_embeddings(_Embedding(known, self.row))
        identifier, class_word = re.escape(manifest.identifier), re.escape(manifest.class_word)
        noun = rf"(\s+{class_word}(?!\w))?" if instead_of_class else ""
        self._identifier = manifest.identifier
        self._replaced = re.compile(rf"(?<!\w){identifier}(?!\w){noun}", re.IGNORECASE)

    def spell(self, prompt: str) -> str:
        """The prompt with the new word where it says the identifier, or [V] in its stead."""
        return self._replaced.sub(self.name, text.fill(prompt, self._identifier))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text states (B, 77, D), float32, through which gradients flow to `row`."""
        return text.states(self.tokenizer, self.text_encoder, [self.spell(p) for p in prompts])

    def place(self, prompt: str) -> int:
        """Which of the text states of `encode` is the new word's. Raises ValueError if the prompt does not say it."""
        ids = self.tokenizer(self.spell(prompt)).input_ids
        return ids.index(self.tokenizer.convert_tokens_to_ids(self.name))

    def learnt(self, row: Tensor, strength: float, dtype: torch.dtype) -> NewWord:
        """Set the word at begin + strength (row - begin), and the text encoder to `dtype`, for sampling."""
        with torch.no_grad():
            self.row.copy_(self.first.lerp(row.to(self.first), strength))
        self.text_encoder.to(dtype)
        return self

    @torch.no_grad()
    def states(self, prompts: Sequence[str]) -> Tensor:
        """`encode` without gradients."""
        return self.encode(prompts)
