"""The text tower learns to keep apart what contrast alone let run together.

Contrast asks of a caption only what tells its picture from the others of a batch: grounds and colours. What
it never needs, it folds: after `clip`, "spotted" and "striped" pointed the same way within six degrees, and
no U-Net that reads those states can tell them apart. Here each state has to name the words of its own noun
phrase, and the end of the text all of them, which also gathers at a noun the adjectives that belong to it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from p3s_cli.world.recipe.workshop import Workshop
from p3s_cli.world.scenes import caption

_LENGTH = 40  # tokens: longer than any caption, with some of the padding that the U-Net also reads
_KEEPING = 5.0  # weight of the former states, whose entries have variance 1
_SHARPNESS = 16.0  # of the cosines; fixed, so that only angles between states can lower the loss


class Naming(nn.Module):
    """A text tower with one direction for each token, whose cosine says how well a state names it, and a way back.

    The way back is linear: what the tower said before stays to be read in its states, and nothing of it is lost.
    """

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.text_model = clip.text_model
        width, tokens = clip.config.text_config.hidden_size, clip.config.text_config.vocab_size
        self.directions = nn.Parameter(torch.randn(tokens, width))
        self.back = nn.Parameter(torch.eye(width))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) token ids to (B, L, tokens) logits and the former states (B, L, D) as read from the present ones."""
        states = self.text_model(ids).last_hidden_state.float()
        logits = _SHARPNESS * F.normalize(states, dim=-1) @ F.normalize(self.directions, dim=-1).T
        return logits, states @ self.back


def stage_words(shop: Workshop) -> None:
    """Text alone, no pictures. `vision` then turns the other tower towards what came of it."""
    torch.manual_seed(shop.seed)
    tokenizer = CLIPTokenizer.from_pretrained(shop.family / "tokenizer")
    clip = CLIPModel.from_pretrained(shop.family / "clip").to(shop.device)
    naming, former = Naming(clip).to(shop.device), copy.deepcopy(clip.text_model)
    starts = torch.tensor(tokenizer.convert_tokens_to_ids(["a</w>", "an</w>", "and</w>"])).to(shop.device)
    known = _known(shop, tokenizer).to(shop.device)

    def draw(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        captions = shop.pool.captions(shop.pool.draw(shop.length("words").batch, generator), generator)
        ids = shop.tokens(captions)[:, :_LENGTH].to(shop.device).long()
        wanted = phrases(ids, starts, tokenizer.eos_token_id, len(known)) & known
        count = wanted.sum(-1, keepdim=True)
        return ids, wanted / count.clamp(min=1), count > 0

    def compute(drawn: tuple[Tensor, Tensor, Tensor], naming: Naming) -> tuple[Tensor, dict[str, Tensor]]:
        ids, target, said = drawn
        logits, read = naming(ids)
        with torch.no_grad():
            truth = former(ids).last_hidden_state
        # where nothing is to be said the target is zero, and so is its cross-entropy
        named = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="sum") / said.sum()
        lost = F.mse_loss(read, truth)
        return named + _KEEPING * lost, {"named": named.detach(), "lost": lost.detach()}

    shop.fit("words", naming, draw, compute, weight_decay=0.01, ema=0.0)
    if shop.ended("words"):  # until then the next piece, too, needs the former tower
        clip.save_pretrained(shop.family / "clip")


def phrases(ids: Tensor, starts: Tensor, end: int, tokens: int) -> Tensor:
    """(B, L, tokens), true where a token stands in the noun phrase so far, or anywhere before, from the end on.

    A phrase begins at one of `starts`; `end` is the token that closes a text and fills it up.
    """
    length = ids.shape[1]
    at = torch.arange(length, device=ids.device)
    first = torch.where(torch.isin(ids, starts), at, 0).cummax(1).values
    first = torch.where(ids == end, 0, first)
    inside = (at[None, None] <= at[None, :, None]) & (at[None, None] >= first[:, :, None])
    one_hot = F.one_hot(ids, tokens).float()
    return inside.float() @ one_hot > 0


def _known(shop: Workshop, tokenizer: CLIPTokenizer) -> Tensor:
    """(tokens,), true for the world's own words; identifiers without meaning are not to be named."""
    texts = [caption(scene, 0, full=True) for scene in shop.pool.scenes[:4096]]
    known = torch.zeros(len(tokenizer), dtype=torch.bool)
    known[sorted(set().union(*tokenizer(texts).input_ids))] = True
    known[[tokenizer.bos_token_id, tokenizer.eos_token_id]] = False
    return known
