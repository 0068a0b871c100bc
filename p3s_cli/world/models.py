"""The shapes of the bundled family: SD v1-5's own classes, small.

What makes it faithful: 8x autoencoder with 4 channels, two ResNets per U-Net block, attention at
several resolutions, a frozen CLIP text encoder, a 16 x 16 patch grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

TEXT_WIDTH = 128
VOCABULARY = 640


def build_vae() -> AutoencoderKL:
    """Narrow at full resolution, where the time goes; no mid attention."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=128,
    )


def build_unet() -> UNet2DConditionModel:
    """16 x 16 latents, attention at 16, 8 and in the middle."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 160),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # in SD v1-5's configuration, too, this is the number of heads
        norm_num_groups=16,
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The contrastive pair; both towers are saved on their own as well."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=128,
        patch_size=8,
        projection_dim=TEXT_WIDTH,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH))


def build_scheduler() -> DDIMScheduler:
    """SD v1-5's noise schedule and DDIM settings."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """A small byte-level BPE in CLIP's own format, learnt from captions; any text tokenises."""
    backend = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY + 2 * len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        # every byte must also exist as the end of a word, which captions alone do not show
        special_tokens=["<|startoftext|>", "<|endoftext|>", *(f"{c}</w>" for c in alphabet)],
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.model.save(str(folder))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=77,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
