"""What stands around the code agrees with it: the package, CI, hooks, versions and the pages for contributors."""

import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

import logitgen
from logitgen.__main__ import main

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKE_TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
HOOKS = ROOT / ".pre-commit-config.yaml"
YAML_FILES = [
    HOOKS,
    ROOT / "CITATION.cff",
    *ROOT.glob(".github/**/*.yml"),
    *ROOT.glob("accelerate_configs/*.yaml"),
    *ROOT.glob("examples/*.yaml"),
]


def jobs() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]


def commands() -> list[str]:
    """What CI and the hooks run."""
    hooks = yaml.safe_load(HOOKS.read_text(encoding="utf-8"))["repos"][0]["hooks"]
    return [hook["entry"] for hook in hooks] + [
        step["run"] for job in jobs().values() for step in job["steps"] if "run" in step
    ]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_a_yaml_file_holds_names_and_values(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_ci_and_hooks_call_make_targets_that_exist() -> None:
    called = {target for command in commands() for target in re.findall(r"\bmake ([a-z-]+)", command)}
    assert called == {"lint", "types", "test", "test-long"}  # together `make check`
    told = set(re.findall(r"`make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert "quick" in told
    assert called | told <= set(MAKE_TARGETS)


OLDEST_PYTHON = PROJECT["project"]["requires-python"].removeprefix(">=")


def test_every_job_of_ci_runs_the_oldest_python_that_the_package_allows_and_the_newest() -> None:
    for job in jobs().values():
        versions = job["strategy"]["matrix"]["python"]
        assert versions[0] == OLDEST_PYTHON
        assert int(versions[-1].removeprefix("3.")) >= 14


def test_all_name_the_same_oldest_python() -> None:
    assert PROJECT["tool"]["mypy"]["python_version"] == OLDEST_PYTHON
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{OLDEST_PYTHON.replace('.', '')}"
    classifiers = "\n".join(PROJECT["project"]["classifiers"])
    assert re.findall(r"Python :: (3\.\d+)", classifiers)[0] == OLDEST_PYTHON
    for page in ("README.md", "CONTRIBUTING.md"):
        assert re.findall(r"Python (3\.\d+)", (ROOT / page).read_text(encoding="utf-8")) == [OLDEST_PYTHON]


def test_ci_tests_several_pythons_and_the_installed_wheel() -> None:
    assert len(jobs()["check"]["strategy"]["matrix"]["python"]) > 1
    (outside,) = (step for step in jobs()["wheel"]["steps"] if "working-directory" in step)
    assert "logitgen --help" in outside["run"]


def test_the_project_has_one_version() -> None:
    changelog = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = next(version for version in changelog if version != "Unreleased")
    assert {PROJECT["project"]["version"], str(citation["version"]), newest} == {logitgen.__version__}
    assert citation["license"] == PROJECT["project"]["license"]


def test_the_console_script_can_be_called() -> None:
    module, _, function = PROJECT["project"]["scripts"]["logitgen"].partition(":")
    assert getattr(import_module(module), function) is main


@pytest.mark.parametrize("started_as", ["/usr/local/bin/logitgen", "logitgen/__main__.py"])
def test_help_names_the_command_as_it_was_started(
    started_as: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started_as])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    command = "python -m logitgen" if started_as.endswith(".py") else "logitgen"
    assert shown.startswith(f"usage: {command} [-h] COMMAND")
    assert re.findall(r"^    (\w+)  +\S.*\.$", shown, re.MULTILINE) == [
        "preview",
        "status",
        "inspect",
        "verify",
        "export",
        "evaluate",
    ]
    assert f"\n  {command} inspect teacher.h5 --row 1" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "logitgen" / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["logitgen"]
    assert PROJECT["tool"]["setuptools"]["packages"]["find"]["include"] == ["logitgen*"]


def test_every_file_that_contributors_are_told_of_exists() -> None:
    named = re.findall(r"`([\w./]+(?:/|\.\w+))`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_contributors_are_told_of_every_helper_of_the_tests() -> None:
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    helpers = {path.name for path in (ROOT / "tests").glob("*.py") if not path.name.startswith("test_")}
    assert {name for name in helpers if f"`tests/{name}`" not in told} == set()


def test_a_test_file_says_what_it_covers() -> None:
    for path in (ROOT / "tests").glob("*.py"):
        assert re.match(r'"""\S.*[.:"]', path.read_text(encoding="utf-8")), path.name
