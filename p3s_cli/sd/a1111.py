"""Settings of an image as A1111 writes them into a PNG's `parameters`, which many tools and sites read."""

from __future__ import annotations

from collections.abc import Sequence

_SAMPLERS = {
    "ddim": "DDIM",
    "dpm++": "DPM++ 2M",
    "dpm++_karras": "DPM++ 2M Karras",
    "dpm++_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "pndm": "PLMS",
    "lms": "LMS",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
}


def parameters(
    prompt: str,
    negative_prompt: str,
    *,
    steps: int,
    sampler: str,
    guidance: float,
    seed: int,
    size: tuple[int, int],
    model: str,
    version: str,
    loras: Sequence[tuple[str, float]] = (),
) -> str:
    """Prompt, negative prompt, and one line of settings; `size` is (height, width) in pixels."""
    words = " ".join([prompt, *(f"<lora:{name}:{strength:g}>" for name, strength in loras)])
    settings = {
        "Steps": steps,
        "Sampler": _SAMPLERS.get(sampler, sampler),
        "CFG scale": f"{guidance:g}",
        "Seed": seed,
        "Size": f"{size[1]}x{size[0]}",
        "Model": model,
        "Version": version,
    }
    lines = [words, *([f"Negative prompt: {negative_prompt}"] if negative_prompt else [])]
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in settings.items())])
