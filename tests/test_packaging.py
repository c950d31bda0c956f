"""The house stands as it was drawn: floors, names that stay in their room, sizes, and a wheel with everything in it."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gdmd_lightning

PACKAGE = Path(gdmd_lightning.__file__).parent
ROOT = Path(__file__).parents[1]
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "__init__": 0,
    "errors": 0,
    "locations": 0,
    "memory_trace": 0,
    "prompts": 0,
    "schedules": 0,
    "families": 1,
    "geneval": 1,
    "objectives": 1,
    "rewards": 1,
    "samplers": 1,
    "shapes": 1,
    "data": 2,
    "metrics": 2,
    "roles": 2,
    "callbacks": 3,
    "methods": 3,
    "commands": 4,
    "components": 4,
    "__main__": 5,
    "cli": 5,
}
# Imports between rooms of one floor, each for a reason.
SIDEWAYS = {
    ("locations", "errors"),  # a configuration that is not found
    ("rewards", "families"),  # a reward's network without its weights
    ("shapes", "geneval"),  # the Shapes detector is judged by GenEval's rules
    ("rewards", "shapes"),  # the Shapes detector as a reward
    ("callbacks", "methods"),  # callbacks watch a method
    ("commands", "components"),  # parsers must know every class by its bare name
    ("__main__", "cli"),
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of this package that a file imports, at its top, within functions, or for its types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "gdmd_lightning":
            names = [f"gdmd_lightning.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [node.module or ""]
        else:
            continue
        parts = [name.split(".") for name in names if name.startswith("gdmd_lightning.")]
        found |= {part[1] if part[1] in FLOORS else "__init__" for part in parts}
    return found


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} == set(FLOORS)


def test_imports_point_down_or_sideways_where_named():
    used = set()
    for path in FILES:
        here = room(path)
        for there in imported_rooms(path) - {here}:
            if FLOORS[there] == FLOORS[here]:
                assert (here, there) in SIDEWAYS, f"{path}: {here} -> {there}, sideways"
                used.add((here, there))
            else:
                assert FLOORS[there] < FLOORS[here], f"{path}: {here} -> {there}, up"
    assert used == SIDEWAYS


def test_no_family_is_named_outside_its_room():
    # The embedded world is of one family; components.py lists every class.
    allowed = {"families", "shapes", "components"}
    # What makes the embedded pipeline, and what scores its teacher where there is no checkpoint to name a family.
    exceptions = {"commands/pretrain.py", "commands/evaluate.py"}
    named = set()
    for path in FILES:
        if room(path) in allowed:
            continue
        code = ast.unparse(without_docstrings(ast.parse(path.read_text(encoding="utf-8"))))
        if re.search(r"SD3|StableDiffusion|SDXL|Flux|sd3|sdxl|flux", code):
            named.add(str(path.relative_to(PACKAGE)))
    assert named == exceptions


def without_docstrings(tree: ast.Module) -> ast.Module:
    """A paper's title in a docstring is no dependency."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_and_say_why_they_exist(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 320
    assert ast.get_docstring(ast.parse(text)), "no docstring"


def test_nothing_that_is_read_can_run_code():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
            if called.endswith(".from_pretrained") and not called.startswith(("CLIPTokenizer", "AutoTokenizer")):
                assert keywords.get("trust_remote_code") in (None, "False"), f"{path}:{node.lineno}"
            assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load"), f"{path}:{node.lineno}"


def test_the_malicious_releases_are_excluded_and_not_installed():
    from importlib.metadata import version

    requirements = (ROOT / "setup.cfg").read_text()
    for name in ("lightning", "pytorch-lightning"):
        assert re.search(rf"^\s+{name}.*!=2\.6\.2,!=2\.6\.3", requirements, re.MULTILINE), name
        assert version(name) not in ("2.6.2", "2.6.3")


def test_a_wheel_holds_every_module_the_configs_and_the_assets(tmp_path):
    source = tmp_path / "source"
    for name in ("src", "configs", "setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            copy = ["cp", "-r", str(ROOT / name), str(source)]
            source.mkdir(exist_ok=True)
            subprocess.run(copy, check=True)
    subprocess.run(["rm", "-rf", *map(str, source.glob("src/*.egg-info"))], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=250)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"gdmd_lightning/{path.relative_to(PACKAGE)}" for path in FILES}
    configs = {f"gdmd_lightning/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assets = {f"gdmd_lightning/{p.relative_to(PACKAGE)}" for p in (PACKAGE / "assets").rglob("*") if p.is_file()}
    assert configs
    assert modules | configs | assets | {"gdmd_lightning/py.typed"} <= names
    assert not any(name.endswith((".pyc", ".ckpt")) for name in names)
    # And a bare name is found where there is no checkout.
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "from gdmd_lightning.locations import find_config; print(find_config('shapes.yaml'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(site / "gdmd_lightning" / "configs" / "shapes.yaml"), done.stderr
