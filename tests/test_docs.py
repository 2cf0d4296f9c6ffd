"""The README tells the truth about the options, the modules and the commands."""

import dataclasses
import re
import subprocess
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from logitgen import LogitsFile
from logitgen.config import Config, parse_config

README = (ROOT / "README.md").read_text(encoding="utf-8")


def table_rows(heading: str) -> list[list[str]]:
    """The cells of the first table whose header row starts with this cell."""
    lines = README.split(f"| {heading} |", 1)[1].splitlines()[2:]
    table = lines[: next(index for index, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def test_the_option_table_is_the_option_list() -> None:
    expected = []
    types = typing.get_type_hints(Config)  # the fields' own are changed by the parser
    for field in dataclasses.fields(Config):
        default = "" if field.default in (dataclasses.MISSING, None) else str(field.default)
        meaning = field.metadata["help"].replace("%%", "%")
        choices = typing.get_args(types[field.name])
        if typing.get_origin(types[field.name]) is typing.Literal and "float32" not in choices:
            meaning += f" ({', '.join(choices)})"
        expected.append([f"`--{field.name}`", default, meaning])
    assert table_rows("option") == expected


def test_the_module_table_is_the_package() -> None:
    modules = {path.stem for path in (ROOT / "logitgen").glob("*.py")} - {"__init__", "__main__"}
    assert {name.strip("`") for name, _ in table_rows("module")} == modules


def test_a_module_imports_only_what_stands_before_it() -> None:
    order = re.search(r"`(config → [^`]*)`;\na module", README)
    assert order
    flow = order[1].replace("[file] → ", "").split(" → ")
    for position, name in enumerate(flow):
        source = (ROOT / "logitgen" / f"{name}.py").read_text()
        imported = set(re.findall(r"^from logitgen\.(\w+) import", source, re.MULTILINE))
        assert not imported & set(flow[position:]), name
    reader_side = "".join((ROOT / "logitgen" / f"{name}.py").read_text() for name in ("reader", "dataset"))
    assert not re.search(r"from logitgen\.(writer|rows|plan)", reader_side)


def test_every_dataset_of_the_file_is_in_the_table(capture: Callable[..., Path], teacher: Path, ragged: Path) -> None:
    documented = {name for names, *_ in table_rows("dataset") for name in re.findall(r"`(\w+)`", names)}
    kinds = [{}, {"capture": "sample", "encoding": "packed"}, {"capture": "hidden"}, {"capture": "full"}]
    options: dict[str, Any] = {"teacher": teacher, "dataset": ragged, "limit": 5, "overwrite": True}
    found = {name for kind in kinds for name in LogitsFile(capture(**options, **kind)).arrays}
    assert documented == found | {"head_bias"}  # which the tiny teacher's head does not have


def test_every_profile_exists_and_is_in_the_table() -> None:
    profiles = {path.name for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert set(re.findall(r"accelerate_configs/(\w+\.yaml)", README)) == profiles
    for name in profiles:
        assert "num_processes" in yaml.safe_load((ROOT / "accelerate_configs" / name).read_text())


def test_the_options_of_the_example_command_parse() -> None:
    command = re.search(r"generate\.py \\\n(.*?)```", README, re.DOTALL)
    assert command
    config = parse_config(command[1].replace("\\\n", " ").split())
    assert config.completion_only
    assert config.max_length == 4096


@pytest.mark.parametrize("target", re.findall(r"`make (\w+)`", README))
def test_every_make_target_of_the_readme_exists(target: str) -> None:
    assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_make_alone_lists_the_targets() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = ["help", "run", "test", "bench", "gpu", "fidelity", "distil", "chaos", "check", "format", "clean"]
    assert re.findall(r"^  make (\w+)", listed, re.MULTILINE) == targets
    assert max(map(len, listed.splitlines())) <= 80


def test_the_python_of_the_readme_that_reads_runs(
    capture: Callable[..., Path], teacher: Path, ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What trains is run in test_training."""
    monkeypatch.chdir(tmp_path)
    capture(teacher=teacher, dataset=ragged, output=tmp_path / "teacher.h5")
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "student" not in code)
    names: dict[str, object] = {}
    exec(code, names)
    assert "row" in names
