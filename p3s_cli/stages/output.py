"""The images of one call of generate: where they go, whether they are there already, what is recorded of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from p3s_cli import pictures
from p3s_cli.atomic import sha256
from p3s_cli.manifest import Stage
from p3s_cli.sd import images
from p3s_cli.subject import Subject, digest, hashes


class Output:
    """Files named after the prompt's words and a hash of what the images depend on (`record`), one for each seed."""

    def __init__(self, subject: Subject, record: dict, seeds: Sequence[int], metadata: bool):
        self.subject, self.record, self.seeds, self.metadata = subject, record, seeds, metadata
        slug = re.sub(r"[^a-z0-9]+", "-", record["prompt"].lower()).strip("-")[:48] or "image"
        stem = f"outputs/{slug}-{digest(record)[:8]}"
        self.paths = {s: subject.path(f"{stem}-{s:04d}.png") for s in seeds}
        self.grid = subject.path(f"{stem}-{seeds[0]:04d}x{len(seeds)}.grid.png")
        self._verdicts: dict[int, str] = {}

    def made(self, seed: int) -> bool:
        """Whether the image of this seed is there as it was made, with the metadata that is wanted and no other."""
        path, known = self.paths[seed], images.read_metadata(self.paths[seed])
        recorded = self._artifacts().get(self._name(path))
        whole = path.is_file() and recorded in (None, sha256(path))
        if not self.metadata:
            return whole and known is None and recorded is not None
        return whole and known is not None and self._without_verdict(known) == self.record | {"seed": seed}

    def saved(self, seed: int) -> bool:
        """Whether this call has written the image of this seed."""
        return seed in self._verdicts

    def save(self, seed: int, image: Image.Image, verdict: str, parameters: str) -> None:
        self._verdicts[seed] = verdict
        known = self.record | {"seed": seed, "safety": verdict} if self.metadata else None
        images.save_png(self.paths[seed], image, known, parameters if self.metadata else None)

    def finish(self, heading: str) -> None:
        """Write the grid and the manifest's record together: where there is a grid, its images are recorded."""
        tiles = [(f"seed {s}", images.load_image(self.paths[s])) for s in self.seeds]
        sheet = pictures.sheet([(heading, tiles)], self.record["prompt"])
        names, grid = [self._name(p) for p in self.paths.values()], self._name(self.grid)
        inputs, seed = digest(self.record), self.seeds[0]
        before = next((s for s in self._stages() if s.seed == seed), None)  # of more images, perhaps, or fewer
        kept = {n: sha for n, sha in before.artifacts.items() if self.subject.path(n).is_file()} if before else {}
        told = before.result.get("safety", {}) if before else {}
        result = {"safety": {n: v for n, v in told.items() if n in kept} | dict(zip(names, self.safety(), strict=True))}
        with self.subject.changing() as folder:
            images.save_png(folder / grid, sheet)
            artifacts = kept | hashes(self.subject.root, *names) | hashes(folder, grid)
            stage = Stage(inputs=inputs, settings=self.record, seed=seed, artifacts=artifacts, result=result)
            others = [g for g in self.subject.manifest.generated if g.inputs != inputs or g.seed != seed]
            self.subject.manifest.generated = [*others, stage]

    def safety(self) -> tuple[str, ...]:
        """The safety checker's word on each image, as it was when the image was made."""
        return tuple(self._verdicts.get(s) or self._recorded(self._name(self.paths[s])) for s in self.seeds)

    def _recorded(self, name: str) -> str:
        known = images.read_metadata(self.subject.path(name)) or {}
        told = [stage.result.get("safety", {}).get(name) for stage in self._stages()]
        return known.get("safety") or next((verdict for verdict in told if verdict), "off")

    def _artifacts(self) -> dict[str, str]:
        return {name: sha for stage in self._stages() for name, sha in stage.artifacts.items()}

    def _stages(self) -> list[Stage]:
        inputs = digest(self.record)
        return [stage for stage in self.subject.manifest.generated if stage.inputs == inputs]

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.subject.root))

    @staticmethod
    def _without_verdict(known: dict) -> dict:
        return {key: value for key, value in known.items() if key != "safety"}
