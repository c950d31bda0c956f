"""The package's structure: imports between packages, where names may appear, sizes, and the wheel."""

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
    "constructed": 0,
    "described": 0,
    "directories": 0,
    "files": 0,
    "garbage": 0,
    "locations": 0,
    "phases": 0,
    "prompts": 0,
    "ranges": 0,
    "ranks": 0,
    "schedules": 0,
    "strategies": 0,
    "pictures": 0,
    "streams": 0,
    "latents": 1,
    "families": 2,
    "geneval": 2,
    "objectives": 2,
    "rewards": 2,
    "samplers": 2,
    "shapes": 2,
    "data": 3,
    "metrics": 3,
    "roles": 3,
    "engines": 4,
    "methods": 5,
    "callbacks": 6,
    "components": 7,
    "configuration": 8,
    "planning": 9,
    "studies": 9,
    "commands": 10,
    "cli": 11,
    "__main__": 12,
}
# Imports between packages of one floor, with the reason for each.
SIDEWAYS = {
    ("constructed", "described"),  # rewards are known by their settings
    ("directories", "errors"),  # a directory of somebody else
    ("directories", "files"),  # marks are written atomically
    ("files", "errors"),  # a full disk
    ("locations", "errors"),  # a configuration that is not found
    ("pictures", "errors"),  # a file that is no picture
    ("prompts", "errors"),  # groups that are not whole
    ("ranges", "errors"),  # a number out of range
    ("schedules", "ranges"),  # levels are numbers in [0, 1]
    ("schedules", "errors"),  # a lowest level above the highest
    ("schedules", "streams"),  # levels are drawn for the rows of a batch
    ("rewards", "families"),  # latents are decoded before they are scored
    ("shapes", "geneval"),  # the Shapes detector is judged by GenEval's rules
    ("geneval", "families"),  # loading errors and sketches of the detector's networks
    ("rewards", "geneval"),  # the metadata that the Shapes detector needs
    ("rewards", "shapes"),  # the Shapes detector as a reward
}
LONGEST_FUNCTION = 60


def part_of(path: Path) -> str:
    """The subpackage, or top-level module, that a file is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of this package that a file imports anywhere, also for type annotations only."""
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


def test_every_part_has_a_floor():
    assert {part_of(path) for path in FILES} == set(FLOORS)


def test_imports_point_down_or_sideways_where_listed():
    used = set()
    for path in FILES:
        here = part_of(path)
        for there in imported_parts(path) - {here}:
            if FLOORS[there] == FLOORS[here]:
                assert (here, there) in SIDEWAYS, f"{path}: {here} -> {there}, sideways"
                used.add((here, there))
            else:
                assert FLOORS[there] < FLOORS[here], f"{path}: {here} -> {there}, up"
    assert used == SIDEWAYS


def test_no_family_is_named_outside_families():
    # The Shapes teacher belongs to one family; components.py lists every class.
    allowed = {"families", "shapes", "components"}
    exceptions = {"studies/shapes_teacher.py"}  # it makes the Shapes teacher
    named = set()
    for path in FILES:
        if part_of(path) in allowed:
            continue
        code = ast.unparse(without_docstrings(ast.parse(path.read_text(encoding="utf-8"))))
        if re.search(r"SD3|StableDiffusion|SDXL|Flux|sd3|sdxl|flux", code):
            named.add(str(path.relative_to(PACKAGE)))
    assert named == exceptions


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Remove docstrings: a paper's title in one is not a dependency."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def test_no_command_imports_another():
    commands = PACKAGE / "commands"
    found = set()
    for path in commands.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            parts = [name.split(".") for name in names if name.startswith("gdmd_lightning.commands.")]
            found |= {(path.stem, part[2]) for part in parts}
    assert found == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_has_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_no_function_is_longer_than_60_lines():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{path}: {node.name} has {lines} lines"


def test_no_file_is_read_in_a_way_that_runs_code():
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


def test_malicious_releases_are_excluded_and_not_installed():
    from importlib.metadata import version

    requirements = (ROOT / "setup.cfg").read_text()
    for name in ("lightning", "pytorch-lightning"):
        assert re.search(rf"^\s+{name}.*!=2\.6\.2,!=2\.6\.3", requirements, re.MULTILINE), name
        assert version(name) not in ("2.6.2", "2.6.3")


def test_wheel_has_every_module_config_and_asset(tmp_path):
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
    # Bare configuration names are found without a checkout.
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "from gdmd_lightning.locations import find_config; print(find_config('shapes.yaml'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(site / "gdmd_lightning" / "configs" / "shapes.yaml"), done.stderr
