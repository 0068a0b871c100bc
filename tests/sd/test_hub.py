"""Sources, pinned revisions, the cache, and a fetch from a hub that runs in this test."""

import errno
import fnmatch
import hashlib
import http.server
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from huggingface_hub import constants, errors
from PIL import Image
from safetensors import SafetensorError

from p3s_cli import setup, signals
from p3s_cli.errors import InputError
from p3s_cli.sd import controlnet, fetching, hub, profile
from p3s_cli.sd.family import load
from p3s_cli.sd.fingerprints import fingerprint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIP = ("model.safetensors", "config.json", "preprocessor_config.json")


def blob_name(file: Path) -> str:
    """What the hub calls a file: sha256 if it is large, git's blob hash if it is small."""
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def repository(weights: Path, name: str) -> dict[str, Path]:
    """The files of a made-up repository: the bundled family, or its CLIP pair with a tokenizer beside it."""
    if "control" in name:
        return {f.name: f for f in (weights / "control").iterdir()}
    if "clip" in name:
        words = [f for f in (weights / "tokenizer").iterdir()]
        return {n: weights / "clip" / n for n in CLIP} | {f.name: f for f in words}
    index = weights / "p3s.json"  # stands for a model_index.json that lists no safety checker
    return {str(f.relative_to(weights)): f for f in weights.rglob("*") if f.is_file()} | {"model_index.json": index}


@pytest.fixture
def cache(world, tmp_path, monkeypatch):
    """A hub cache that holds tiny/world and SD v1-5's CLIP (both the bundled family's) as the client leaves them."""
    clip, revision = hub.split(profile.find("sd15").clip)
    for name, commit in (("tiny/world", COMMIT), (clip, revision)):
        root = tmp_path / f"models--{name.replace('/', '--')}"
        (root / "blobs").mkdir(parents=True)
        for path, file in repository(Path(world.profile.base), name).items():
            blob = root / "blobs" / blob_name(file)
            blob.write_bytes(file.read_bytes())
            link = root / "snapshots" / commit / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_source_is_pinned_behind_an_at_sign_unless_it_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.split("a/b@v1") == ("a/b", "v1") and hub.split("a/b") == ("a/b", None)
    (tmp_path / "me@home").mkdir()
    assert hub.split("me@home") == ("me@home", None)


def test_a_revision_may_have_slashes_of_its_own():
    assert hub.is_id("a/b") and hub.is_id("a/b@refs/pr/15") and not hub.is_id("a/b/c") and not hub.is_id("./a@b/c")


def full():
    error = OSError(errno.ENOSPC, "No space left on device")
    try:
        raise error
    finally:  # as the hub's client, and those who call it, wrap it
        raise ValueError("could not be saved")


def gives(error):
    def get(given):
        raise error

    return get


def answers(kind):
    """One of the client's own errors, as a server's answer makes it."""
    error = kind.__new__(kind)
    OSError.__init__(error, "404 Client Error. (Request ID: 1)")
    return error


@pytest.mark.parametrize(
    ("get", "kind", "words"),
    [
        (gives(OSError("a/b has no whole unet in safetensors")), InputError, "has no whole unet in safetensors"),
        (gives(type("ConnectError", (Exception,), {})("reset by peer")), InputError, "reset by peer"),
        (gives(answers(errors.RepositoryNotFoundError)), InputError, "has no such repository"),
        (gives(answers(errors.GatedRepoError)), InputError, "accept the terms"),
        (gives(SafetensorError("header too large")), InputError, "header too large"),
        (lambda given: full(), fetching.NoRoomError, "no room to fetch it into"),
    ],
    ids=["no safetensors", "connection lost", "no repository", "gated", "damaged", "disk full"],
)
def test_why_a_model_could_not_be_fetched_is_said(monkeypatch, get, kind, words):
    """And not that there is no network, where there is one."""
    monkeypatch.setattr(fetching, "offline", lambda: False)
    monkeypatch.setattr(fetching, "_reachable", lambda: True)
    with pytest.raises(kind, match=words) as raised:
        fetching.online(get, [{}, {}], "it", "p3s fetch it")
    assert type(raised.value) is kind and "`p3s fetch it`" in str(raised.value)
    assert "without a network" not in str(raised.value)


def test_a_damaged_metric_model_is_named_offline_and_comes_anew_where_it_can(cache, monkeypatch):
    _, how = next(iter(setup.PROTOCOLS["dreambooth"].models.values()))
    models = {"CLIP": (f"tiny/world@{COMMIT}", how)}
    monkeypatch.setitem(setup.PROTOCOLS, "dreambooth", replace(setup.PROTOCOLS["dreambooth"], models=models))
    snapshot = cache / f"models--tiny--world/snapshots/{COMMIT}"
    whole = (snapshot / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    link, blob = snapshot / "model.safetensors", cache / "models--tiny--world/blobs" / hashlib.sha256(whole).hexdigest()
    link.symlink_to(blob)

    def brought(content):
        return lambda self: link.exists() or (blob.write_bytes(content), link.symlink_to(blob))

    monkeypatch.setattr(setup.MetricModel, "load", brought(whole))
    assert [p.state for p in setup.fetch("dreambooth")] == ["present"]
    blob.write_bytes(whole[:-1] + b"?")
    with pytest.raises(InputError, match="model.safetensors is damaged and HF_HUB_OFFLINE is set"):
        setup.fetch("dreambooth")
    monkeypatch.setattr(fetching, "offline", lambda: False)
    assert [p.state for p in setup.fetch("dreambooth")] == ["repaired"] and link.read_bytes() == whole
    link.unlink()
    monkeypatch.setattr(setup.MetricModel, "load", brought(whole[:-1] + b"?"))
    with pytest.raises(InputError, match="model.safetensors did not arrive as the hub says it is"):
        setup.fetch("dreambooth")


def test_every_model_named_in_the_package_is_pinned_to_a_commit():
    sd15 = profile.find("sd15")
    for source in (sd15.base, sd15.clip, sd15.inpainter):
        assert len(hub.split(source)[1]) == 40


def test_a_pinned_family_loads_from_the_cache_and_another_revision_does_not(world, cache):
    family = load(f"tiny/world@{COMMIT}")
    assert all(
        torch.equal(a, b)
        for a, b in zip(family.unet.state_dict().values(), world.unet.state_dict().values(), strict=True)
    )
    assert family.fingerprint == world.fingerprint and family.vision.width == world.vision.width
    with pytest.raises(InputError, match="tiny/world/unet is not on this machine"):
        _ = load("tiny/world@v2").unet


def test_fetch_checks_what_is_there_and_names_the_damaged_file(cache):
    parts = {p.name: p for p in setup.fetch(f"tiny/world@{COMMIT}")}
    assert parts["vae"].why is None and "HF_HUB_OFFLINE is set" in parts["inpainter"].why
    states = {name: part.state for name, part in parts.items()}
    assert states["unet"] == states["clip"] == "present" and states["inpainter"] == "missing"
    blob = (cache / f"models--tiny--world/snapshots/{COMMIT}/vae/diffusion_pytorch_model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="vae/diffusion_pytorch_model.safetensors is damaged and HF_HUB_OFFLINE"):
        setup.fetch(f"tiny/world@{COMMIT}")


def unreadable(unet):
    return [unet / "diffusion_pytorch_model.safetensors.index.json"], "{"


def of_other_tensors(unet):
    (index,), _ = unreadable(unet)
    return [index], index.read_text().replace("conv_in.weight", "conv_in.wait")


def half_gone(unet):
    gone, damaged = sorted(unet.glob("*-of-00002.safetensors"))
    gone.unlink()
    return [damaged, unet / "config.json"], "?"


@pytest.mark.parametrize("damage", [unreadable, of_other_tensors, half_gone])
def test_whatever_of_a_part_is_damaged_comes_anew(cache, world, monkeypatch, damage):
    """As the documentation says of every file. The hub's client leaves a file that is there as it is, so that a part whose
    index is damaged stayed without a whole U-Net however often it was fetched."""
    snapshot, blobs = cache / f"models--tiny--world/snapshots/{COMMIT}", cache / "models--tiny--world/blobs"
    served = repository(Path(world.profile.base), "tiny/world")
    files, text = damage(snapshot / "unet")
    for file in files:
        file.resolve().write_text(text)

    def download(repo, revision, allow_patterns):
        wanted = served if repo == "tiny/world" else {}
        for path in (p for p in wanted if any(fnmatch.fnmatch(p, pattern) for pattern in allow_patterns)):
            link, blob = snapshot / path, blobs / blob_name(served[path])
            if not link.exists():
                link.unlink(missing_ok=True)
                shutil.copyfile(served[path], blob)
                link.symlink_to(blob)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match="unet/.* is damaged and HF_HUB_OFFLINE is set"):
        setup.fetch(f"tiny/world@{COMMIT}")
    monkeypatch.setattr(fetching, "offline", lambda: False)
    monkeypatch.setattr(fetching, "_reachable", lambda: True)
    for state in ("repaired", "present"):
        parts = {p.name: p for p in setup.fetch(f"tiny/world@{COMMIT}")}
        assert (parts["unet"].state, parts["vae"].state) == (state, "present")
    assert all((snapshot / path).read_bytes() == file.read_bytes() for path, file in served.items())


def test_an_interruption_while_a_model_is_read_is_no_damaged_model(tmp_path):
    """A library in another language says what it likes of an exception that a signal raises inside it."""

    class Reader:
        @staticmethod
        def from_pretrained(*args, **options):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException as error:
                raise ValueError("a header that is too large") from error

    with pytest.raises(signals.Interrupted), signals.raising():
        hub.from_pretrained(Reader, str(tmp_path))


def test_the_fingerprint_fetches_what_no_stage_has_needed_yet(cache, world, monkeypatch):
    """A photo without a look-alike is masked without the autoencoder, and `finetune` comes before it has encoded anything."""
    there, aside = cache / f"models--tiny--world/snapshots/{COMMIT}/vae", cache / "aside"
    there.rename(aside)
    with pytest.raises(InputError, match="tiny/world/vae is not on this machine"):
        _ = load(f"tiny/world@{COMMIT}").fingerprint
    monkeypatch.setattr(hub, "bring", lambda part, fetch: aside.rename(there))
    assert load(f"tiny/world@{COMMIT}").fingerprint == world.fingerprint


def test_the_same_files_have_one_fingerprint_in_the_cache_and_in_a_folder(cache, world):
    """The cache names small files by git's hash."""
    cached, own = (profile.find(name) for name in (f"tiny/world@{COMMIT}", world.profile.base))
    assert fingerprint(cached, "unet", "vae") == fingerprint(own, "unet", "vae") is not None


def test_a_damaged_index_leaves_open_what_the_base_has(cache):
    index = cache / f"models--tiny--world/snapshots/{COMMIT}/model_index.json"
    index.unlink()
    index.write_text('{"safety_checker": [')
    assert hub.lists(f"tiny/world@{COMMIT}", "safety_checker", online=False)


def test_doctor_names_a_configuration_that_is_none(cache, world, tmp_path):
    shutil.copytree(world.profile.base, tmp_path / "base")
    (tmp_path / "base/vae/config.json").write_text('{"in_channels": ')
    with pytest.raises(InputError, match="base/vae/config.json.* is no configuration of its model"):
        setup.doctor(str(tmp_path / "base"), "cpu")


def test_a_missing_shard_makes_a_part_missing(cache):
    part = profile.find(f"tiny/world@{COMMIT}").part("unet")
    assert len(hub.files(hub.folder(part), part)) == 4  # configuration, two shards and their index
    next(cache.glob(f"models--tiny--world/snapshots/{COMMIT}/unet/*-00002-of-*")).unlink()
    assert hub.folder(part) is None


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as a download takes."""

    def __init__(self, weights, *args):
        self.weights = weights
        super().__init__(*args)

    def do_GET(self):
        path, api = self.path.split("?")[0].strip("/"), "api/models/"
        if path.startswith(api):
            owner, name, _, commit = path.removeprefix(api).split("/")
            return self.answer(json.dumps(self.tree(f"{owner}/{name}")).encode(), {"Content-Type": "application/json"})
        owner, name, _, commit, inside = (*path.split("/", 4), *[""] * 5)[:5]
        file = repository(self.weights, f"{owner}/{name}").get(inside)
        if file is None:
            return self.answer(b"", {"X-Error-Code": "EntryNotFound"} if inside else {}, 404 if inside else 200)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_name(file)}"', "Accept-Ranges": "bytes"}
        return self.answer(file.read_bytes(), headers)

    do_HEAD = do_GET

    def tree(self, name):
        entries = []
        for path, file in repository(self.weights, name).items():
            size, oid = file.stat().st_size, blob_name(file)
            large = {"lfs": {"oid": oid, "size": size, "pointerSize": 100}} if len(oid) == 64 else {}
            entries.append({"type": "file", "path": path, "size": size, "oid": oid, **large})
        return entries

    def answer(self, body, headers, status=200):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def weights(world, tmp_path):
    """What the made-up hub serves: the bundled family, and a ControlNet in shards of half precision."""
    root = tmp_path / "served"
    shutil.copytree(world.profile.base, root / "weights")
    (root / "family.json").write_text("{}")
    net = ControlNetModel.from_unet(world.unet, conditioning_embedding_out_channels=(8, 8, 16, 16)).half()
    net.save_pretrained(root / "weights/control", variant="fp16", max_shard_size="5MB")
    return root / "weights"


def test_fetch_brings_a_whole_family_from_a_hub_and_repairs_what_is_damaged(weights, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, weights))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = (
        "import json; from p3s_cli import setup; from p3s_cli.sd import hub, profile\n"
        f"name = 'tiny/world@{COMMIT}'\n"
        f"net = 'tiny/control@{COMMIT}'; named = {{'control': [net]}}\n"
        "first = [p.state for p in setup.fetch(name, **named)]\n"
        "unet, vae = (hub.folder(profile.find(name).part(n)) for n in ('unet', 'vae'))\n"
        "for file in (*unet.glob('*.index.json'), *vae.glob('*.safetensors')):\n"
        "    file.resolve().chmod(0o644); file.resolve().write_bytes(b'?')\n"
        "second, third = setup.fetch(name, **named), setup.doctor(name, **named).parts\n"
        "print(json.dumps([first, [p.state for p in second], [p.state for p in third]]))\n"
        "from p3s_cli.sd import controlnet; from diffusers import ControlNetModel\n"
        "from p3s_cli.sd import fetching; fetching.online = None  # the hub is not asked again\n"
        "hub.load(ControlNetModel, controlnet.part(net))"
    )
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    here |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | here)
    server.shutdown()
    assert out.returncode == 0, out.stderr
    first, second, third = json.loads(out.stdout)
    assert set(first) == {"fetched"} and sorted(set(second)) == ["present", "repaired"] and set(third) == {"present"}
    assert second.count("repaired") == 2


def test_what_a_stage_names_is_looked_for_and_the_command_that_brings_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    report = setup.doctor("sd15", "cpu", vision="dinov2", inpainter="a/b", control=["canny", "c/d"])
    parts = {p.name: p for p in report.parts}
    assert parts["masks"].needed and parts["inpainter"].needed and parts["canny"].needed and parts["c/d"].needed
    assert parts["masks"].source == "facebook/dinov2-small" and parts["clip"].source == "openai/clip-vit-large-patch14"
    assert "p3s fetch sd15 --vision dinov2 --inpainter a/b --control canny --control c/d " in report.advice[0]
    with pytest.raises(InputError, match="no ControlNet is called 'fog'"):
        setup.fetch("sd15", control=["fog"])
    with pytest.raises(InputError, match="control_v11p_sd15_canny is not on .* with `p3s fetch world --control canny`"):
        controlnet.load_guide(load("world", "cpu"), "canny", Image.new("RGB", (8, 8)), 1.0, (64, 64))


def test_a_tower_for_masks_alone_does_not_stand_for_the_familys_clip_pair(tiny_folder, tmp_path):
    base, vit = shutil.copytree(tiny_folder, tmp_path / "base"), tmp_path / "vit"
    shutil.rmtree(base / "clip")
    vit.mkdir()
    (vit / "config.json").write_text('{"model_type": "vit"}')
    parts = {p.name: p for p in setup.doctor(str(base), "cpu", vision=str(vit)).parts}
    assert parts["clip"].state == "missing" and parts["masks"].source == str(vit)
    pair = {p.name: p for p in setup.doctor(str(base), "cpu", vision=str(tiny_folder / "clip")).parts}
    assert pair["clip"].state == "present" and "masks" not in pair  # one that is a pair does


def test_doctor_finds_what_the_stages_find_and_its_command_can_be_typed(tiny_folder, tmp_path, monkeypatch):
    """Of `--vision=~/clip` no shell makes a path; and a path may have a space."""
    monkeypatch.setenv("HOME", str(tmp_path))
    base = shutil.copytree(tiny_folder, tmp_path / "my base")
    named = {"vision": "~/my base/clip", "inpainter": "~/my base"}
    report = setup.doctor("~/my base", "cpu", control=["not/here"], **named)
    sources = {p.name: p.source for p in report.parts}
    assert sources["clip"] == str(base / "clip") and sources["inpainter"] == str(base / "unet")
    assert setup.Wanted.named("~/my base", **named, control=None).profile == load("~/my base", "cpu", **named).profile
    command = report.advice[0].split(": ", 1)[1].split("   (")[0]
    options = ["--vision", str(base / "clip"), "--inpainter", str(base), "--control", "not/here"]
    assert shlex.split(command) == ["p3s", "fetch", str(base), *options]


def test_doctor_sees_a_single_file_and_a_card_that_torch_cannot_use(monkeypatch, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"12345")
    card = tmp_path / "nvidia-smi"
    card.write_text("#!/bin/sh\n")
    card.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", None)
    unseen = "NVIDIA card that torch is built without"
    assert not any(unseen in line for line in setup.doctor("world", "cpu").advice)
    monkeypatch.setenv("PATH", str(tmp_path))
    report = setup.doctor(str(tmp_path / "m.safetensors"), "cpu")
    assert (report.parts[0].name, report.parts[0].bytes, report.parts[0].state) == ("checkpoint", 5, "present")
    assert any(unseen in line for line in report.advice)
