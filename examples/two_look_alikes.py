"""One photo, two look-alikes: choose the left one and draw it somewhere else. No network needed.

python examples/two_look_alikes.py [FOLDER] [TUNING_STEPS] [SAMPLING_STEPS]
"""

import sys
from pathlib import Path

from p3s_cli import finetune, generate, mask
from p3s_cli.sd.images import save_png, to_pil
from p3s_cli.world.render import render
from p3s_cli.world.scenes import lookalike_scene

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "two-look-alikes")
tuning, sampling = (int(a) for a in (sys.argv[2:4] + ["300", "50"][len(sys.argv[2:4]) :]))

scene = lookalike_scene(seed=20_000_001)
left, right = scene.subjects
save_png(folder / "photo.png", to_pil(render([scene])[0][0]))

found = mask(
    folder / "photo.png",
    [(left.x, left.y)],
    [(right.x, right.y)],
    folder / "subject",
    left.instance.category,
    model="world",
)
print("masks:", found.pictures[1])
finetune(found.subject, steps=tuning)
made = generate(found.subject, f"a [V] {left.instance.category} in the snow", n=2, steps=sampling)
print("images:", made.grid)
