"""The packages stand in the order a row walks; modules and functions stay small enough to hold in the head."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SOURCE = ROOT / "logitgen"
MODULES = sorted(path.relative_to(SOURCE).with_suffix("").as_posix() for path in SOURCE.rglob("*.py"))
MAY_IMPORT = {
    "file": {"errors"},
    "split": {"errors", "console", "config", "tokenizer", "file"},
    "teacher": {"errors", "console", "config", "head", "file", "split"},
    "ranks": {"errors", "console", "file"},
    "leader": {"errors", "console", "head", "file", "split"},
    "student": {"errors", "head", "tokenizer", "file"},
}
"""Rooms each package may look into besides itself."""


def imported_by(module: str) -> set[str]:
    """The modules of logitgen that a module imports, as paths below it."""
    found = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("logitgen"):
            package = "/".join(node.module.split(".")[1:])
            below = [f"{package}/{name.name}".strip("/") for name in node.names]
            found |= {name if name in MODULES else package for name in below}
        elif isinstance(node, ast.Import):
            found |= {"/".join(n.name.split(".")[1:]) for n in node.names if n.name.startswith("logitgen.")}
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_it_says(package: str) -> None:
    for module in MODULES:
        if module.startswith(f"{package}/"):
            assert {name.split("/")[0] for name in imported_by(module)} <= MAY_IMPORT[package] | {package}, module


def test_no_package_is_without_its_rule() -> None:
    assert {path.parent.name for path in SOURCE.glob("*/__init__.py")} == set(MAY_IMPORT)


def test_no_two_modules_import_each_other() -> None:
    """Not even in a circle of several."""
    left = {module: imported_by(module) - {module, "__init__"} for module in MODULES if module != "__init__"}
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_a_file_is_read_and_verified_without_torch() -> None:
    code = "import sys, logitgen.file.reader, logitgen.file.verify; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = ended.stdout.split()
    assert "logitgen.file.verify" in modules
    assert not {"torch", "transformers", "datasets", "rich"} & set(modules)


@pytest.mark.parametrize("path", [ROOT / "generate.py", *SOURCE.rglob("*.py")], ids=lambda path: path.stem)
def test_modules_and_functions_stay_small(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 40, node.name


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_says_what_lives_there_and_what_it_imports(package: str) -> None:
    said = (SOURCE / package / "__init__.py").read_text(encoding="utf-8")
    assert len(said.strip().splitlines()) <= 5
    for room in set(re.findall(r"`(\w+)`", said)) & MAY_IMPORT.keys():
        assert room in MAY_IMPORT[package] | {package}
