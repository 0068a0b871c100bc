"""The rules of the house: who may import whom, no cycles, and a command line that starts fast."""

import ast
import subprocess
import sys
from pathlib import Path

import p3s_cli

ROOT = Path(p3s_cli.__file__).parent
LEAVES = {"config", "errors", "atomic", "signals"}  # may be imported by all

# room -> the rooms it may import
ALLOWED = {
    "paper": set(),
    "sd": set(),
    "evals": {"sd"},  # where model files come from
    "pictures": set(),
    "manifest": set(),
    "subject": {"manifest"},
    "lock": {"subject"},
    "methods": {"manifest", "paper", "sd", "subject"},
    "segment": {"paper"},
    "stages": {"lock", "manifest", "methods", "paper", "pictures", "sd", "segment", "subject"},
    "world": {"sd"},
    "benches": {"stages", "world", "evals", "lock", "methods", "sd", "segment", "subject"},
    "story": {"stages", "world", "evals", "pictures", "sd"},
    "setup": {"evals", "methods", "sd"},
    "pipeline": {"methods", "sd", "subject"},
    "cli": {"stages", "benches", "story", "methods", "setup"},  # of methods only the names
}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def modules(path: Path) -> set[str]:
    """Every module of ours that a file names in an import, wherever in it, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return {name.removeprefix("p3s_cli.") for name in found if name.startswith("p3s_cli.")}


def imports(path: Path) -> set[str]:
    return {name.split(".")[0] for name in modules(path)}


def test_imports_go_one_way():
    for path in ROOT.rglob("*.py"):
        own = room(path)
        if own == "__init__":
            continue
        foreign = imports(path) - LEAVES - {own, "__version__"}
        assert own in LEAVES or foreign <= ALLOWED[own], f"{path}: {foreign - ALLOWED.get(own, set())}"


def test_no_module_comes_back_to_itself():
    """A package's own file stands for itself, and a name in a module for that module."""
    files = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in ROOT.rglob("*.py")
    }
    del files["__init__"]  # names everything, for users, and is imported for its version
    needs = {name: {_module(m, files) for m in modules(path)} - {name, ""} for name, path in files.items()}
    while free := [name for name, wanted in needs.items() if not wanted & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs, needs


def _module(name: str, files: dict[str, Path]) -> str:
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name


def test_the_library_never_prints():
    for path in ROOT.rglob("*.py"):
        if "cli" not in path.parts and "recipe" not in path.parts:
            calls = [
                n
                for n in ast.walk(ast.parse(path.read_text()))
                if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
            ]
            assert not any(c.func.id == "print" for c in calls), path


def test_what_the_package_names_is_no_module_and_stays_what_it_is():
    """A submodule of a function's name takes its place once it is imported, even by `from p3s_cli import` itself."""
    named: dict = {}
    exec(f"from p3s_cli import {', '.join(p3s_cli.__all__)}", named)
    for name in p3s_cli.__all__:
        assert callable(named[name]) and getattr(p3s_cli, name) is named[name], name


def test_help_subject_and_config_never_load_torch():
    script = (
        "import sys; from typer.testing import CliRunner; from p3s_cli.cli import app; import p3s_cli.config, p3s_cli.errors; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; assert CliRunner().invoke(app, ['--version']).exit_code == 0; "
        "import p3s_cli.subject; "
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_masks_never_load_diffusers(tmp_path):
    """Nor what it brings: where no model fills in, importing it would take longer than finding the masks."""
    script = (
        "import sys; from pathlib import Path; from p3s_cli import stages; from p3s_cli.sd import images; "
        "from p3s_cli.world.render import render; from p3s_cli.world.scenes import lookalike_scene; "
        "photo = Path(sys.argv[1]); images.save_png(photo, images.to_pil(render([lookalike_scene(1)])[0][0])); "
        "stages.mask(photo, [(40, 80)], [(90, 80)], photo.with_suffix(''), 'thing', model='world'); "
        "print([m for m in ('diffusers', 'peft', 'matplotlib') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "thing.png")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
