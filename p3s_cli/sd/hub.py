"""Where model files come from: a folder, the hub's cache, or the hub. No torch in here.

A source is a folder, a file, or a hub id `owner/name`, pinned to a revision as `owner/name@revision`.
Weights are only ever safetensors.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from p3s_cli import signals
from p3s_cli.errors import InputError
from p3s_cli.sd import fetching

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Part:
    """One folder of files a family is made of.

    `weights`: stem of its safetensors file, None for a part without. `any_of`: one of these must be
    there. `also`: taken where the repository has them. `variants`: infixes tried in this order.
    """

    name: str
    source: str
    subfolder: str | None = None
    weights: str | None = None
    any_of: tuple[str, ...] = ("config.json",)
    also: tuple[str, ...] = ()
    variants: tuple[str | None, ...] = (None, "fp16")
    optional: bool = False  # p3s works without it, less well

    @property
    def where(self) -> str:
        return named(split(self.source)[0], self.subfolder)


def split(source: str) -> tuple[str, str | None]:
    """`owner/name@revision` -> (owner/name, revision); (source, None) for a path or an unpinned id."""
    if "@" not in source or Path(source).exists():
        return source, None
    where, _, revision = source.rpartition("@")
    return where, revision


def is_id(source: str) -> bool:
    """Whether this reads like a hub id (whatever the hub may hold)."""
    where = split(source)[0]  # a revision may have slashes of its own, as refs/pr/15
    return where.count("/") == 1 and not where.startswith((".", "/", "~"))


def named(where: str, subfolder: str | None) -> str:
    return f"{where}/{subfolder}" if subfolder else where


def from_pretrained(
    kind: Any,
    source: str,
    subfolder: str | None = None,
    variants: Sequence[str | None] = (None,),
    remedy: str = "restore the folder",
    fetch: str = "p3s fetch",
    otherwise: str = "--model world needs neither",
    **options: Any,
) -> Any:
    """`kind.from_pretrained` from a folder or the cache, else from the hub, trying each variant of the files.

    `remedy` is what to do about a folder that cannot be read, `fetch` the command that brings the model, and `otherwise`
    what works without. Raises InputError that says what is missing or unreadable, and what to do.
    """
    where, revision = split(source)
    options |= {n: v for n, v in (("subfolder", subfolder), ("revision", revision)) if v is not None}
    tries = [{"variant": v} if v else {} for v in variants]
    error = None
    for given in tries:
        try:
            # what a signal raises inside, a library may take for a damaged file
            with signals.deferred():
                return kind.from_pretrained(where, local_files_only=True, **given, **options)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as caught:
            error = error or caught
    if Path(where).exists():
        raise InputError(
            f"{named(where, subfolder)} cannot be read ({fetching.first_line(error)}); {remedy}"
        ) from error

    def get(given: dict) -> Any:
        return kind.from_pretrained(where, **given, **options)

    return fetching.online(get, tries, named(where, subfolder), fetch, otherwise)


def load(kind: Any, part: Part, fetch: str = "p3s fetch", **options: Any) -> Any:
    """A model from a part's safetensors; by its folder, as the libraries ask the hub even for what they have.

    `fetch` is the command that brings the part. Raises InputError if it cannot be had, or its files lack tensors,
    which the libraries would draw at random.
    """
    inside, here = folder(part), Path(part.source).exists()
    if inside is None and not here:
        inside = bring(part, fetch)
    variants = part.variants if inside is None else (_variant(inside, part),)
    where = inside or Path(part.source, part.subfolder or "")
    options |= {"use_safetensors": True, "output_loading_info": True}
    remedy = "restore the folder" if here else f"run `{fetch}`"
    model, info = from_pretrained(kind, str(where), None, variants, remedy, **options)
    # no patch depends on a ViT's pooler, and many a published one comes without
    missing = sorted(k for k in info["missing_keys"] if not k.startswith("pooler."))
    if missing:
        raise InputError(
            f"{part.where} is no whole {kind.__name__}: it lacks {len(missing)} tensors ({missing[0]}, ...); "
            "restore it, or name another"
        )
    return model


def folder(part: Part) -> Path | None:
    """Where the part lies on this machine, whole; None if it, or a file of it, is missing."""
    inside = _inside(part)
    if inside is None or not any((inside / name).is_file() for name in part.any_of):
        return None
    return inside if part.weights is None or weight_files(inside, part) else None


def _inside(part: Part) -> Path | None:
    """Where the part's files lie on this machine, whichever of them are there."""
    where, revision = split(part.source)
    root = Path(where) if Path(where).is_dir() else snapshot(where, revision)
    return root / (part.subfolder or "") if root else None


def snapshot(repo: str, revision: str | None) -> Path | None:
    """The cached files of a repository at a revision (a commit, a branch or a tag), whatever of them is there."""
    from huggingface_hub import constants

    base = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    commit = revision or "main"
    if not _COMMIT.fullmatch(commit):
        ref = base / "refs" / commit
        commit = ref.read_text().strip() if ref.is_file() else "absent"
    found = base / "snapshots" / commit
    return found if found.is_dir() else None


def weight_files(inside: Path, part: Part) -> list[Path]:
    """The safetensors files of the first variant that is whole; empty if none is."""
    return next((found for v in part.variants if (found := _files_of(inside, part, v))), [])


def _variant(inside: Path, part: Part) -> str | None:
    return next((v for v in part.variants if _files_of(inside, part, v)), None)


def _files_of(inside: Path, part: Part, variant: str | None) -> list[Path]:
    stem = f"{part.weights}.{variant}" if variant else part.weights
    single = inside / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    index = inside / _index(part.weights, variant)
    if not index.is_file():
        return []
    shards = [inside / n for n in _shards(index)]
    return shards if all(s.is_file() for s in shards) else []


def _index(stem: str | None, variant: str | None) -> str:
    return f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"


def _shards(index: Path) -> list[str]:
    """Names of the files an index speaks of; none if it is not one."""
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def lists(source: str, component: str, online: bool = False) -> bool:
    """Whether a pipeline has this component, as its model_index.json says; unknown counts as yes, if a folder has it."""
    where, revision = split(source)
    here = Path(where).is_dir()
    if here and not (Path(where) / component).is_dir():
        return False
    found = Path(where) if here else snapshot(where, revision)
    index = found / "model_index.json" if found else None
    if online and not here and not fetching.offline() and not (index and index.is_file()):
        with contextlib.suppress(InputError):
            index = bring(Part("index", source, any_of=("model_index.json",))) / "model_index.json"
    if index is None or not index.is_file():
        return True
    try:
        return bool((json.loads(index.read_text()).get(component) or [None])[0])
    except (ValueError, AttributeError, TypeError, LookupError):  # damaged; whoever loads the part says more
        return True


def bring(part: Part, fetch: str = "p3s fetch") -> Path:
    """Fetch a part from the hub into the cache, what is there already excepted. Returns its folder.

    Raises InputError where there is no network, or the hub has no such safetensors.
    """
    from huggingface_hub import snapshot_download

    repo, revision = split(part.source)
    prefix = f"{part.subfolder}/" if part.subfolder else ""

    def get(given: dict) -> Path:
        names = [*part.any_of, *part.also, *_weight_patterns(part.weights, given["variant"])]
        snapshot_download(repo, revision=revision, allow_patterns=[prefix + n for n in names])
        found = folder(part)
        if found is None:
            raise OSError(f"{repo} has no whole {part.name} in safetensors")
        return found

    return fetching.online(
        get, [{"variant": v} for v in (part.variants if part.weights else (None,))], part.where, fetch
    )


def _weight_patterns(stem: str | None, variant: str | None) -> list[str]:
    if stem is None:
        return []
    whole = f"{stem}.{variant}" if variant else stem
    return [f"{whole}.safetensors", f"{whole}-*-of-*.safetensors", _index(stem, variant)]


def files(inside: Path, part: Part) -> list[Path]:
    """The files of a part that is here: its weights, the index of their shards, and what else it asks for."""
    others = [inside / n for n in (*part.any_of, *part.also) if (inside / n).is_file()]
    return others + (_indexed(inside, part) if part.weights else [])


def remains(part: Part) -> list[Path]:
    """The files of a part of which one is missing, or a damaged index names others than are there; of every variant."""
    inside, variants = _inside(part), part.variants if part.weights else ()
    names = [*part.any_of, *part.also, *(p for v in variants for p in _weight_patterns(part.weights, v))]
    return [f for n in names for f in sorted(inside.glob(n)) if f.is_file()] if inside else []


def loaded(inside: Path, part: Part) -> list[Path]:
    """The files that a part is loaded from, by name: its configuration, its weights, and the index of their shards."""
    return sorted([inside / "config.json", *_indexed(inside, part)])


def _indexed(inside: Path, part: Part) -> list[Path]:
    found, index = weight_files(inside, part), inside / _index(part.weights, _variant(inside, part))
    return [*found, index] if len(found) > 1 else found
