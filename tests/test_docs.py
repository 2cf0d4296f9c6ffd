"""The README and docs/ tell the truth about options, commands, attributes, datasets, links and code."""

import argparse
import dataclasses
import importlib
import json
import re
import shlex
import shutil
import subprocess
import typing
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import CHAT_TEMPLATE, PAGES, ROOT, make_tokenizer

from benchmarks import __main__ as benchmarks
from logitgen import DistillationLoss, LogitsFile, UsageError
from logitgen import __main__ as program
from logitgen.config import Config
from logitgen.options import parse_config
from logitgen.rerun import TOLERANCES
from logitgen.split.tokens import tokenize
from logitgen.student.measure import _MEASURES

README, DESIGN = PAGES["README.md"], PAGES["docs/design.md"]
MOST_LINES, MOST_BYTES = 200, 12_000
"""Of the README: more belongs into docs/."""

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TYPES = {"text": str, "integer": int, "number": float, "dictionary": dict}
"""How the table of attributes calls them."""


def table_rows(heading: str) -> list[list[str]]:
    """The cells of the one table whose header row starts with this cell."""
    (page,) = (text for text in PAGES.values() if f"\n| {heading} |" in text)
    _, table = page.split(f"\n| {heading} |")
    lines = table.splitlines()[2:]
    lines = lines[: next(index for index, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([\w-]+)`", cell)


def code_of(page: str) -> list[str]:
    """All that a page shows as code and not as Python, inline or a line of a block, a command in one piece."""
    blocks = [block for language, block in FENCED.findall(PAGES[page]) if language != "python"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`]+)`", FENCED.sub("", PAGES[page]))
    return [" ".join(text.split()) for text in [*lines, *spans]]


CODE = sorted({(page, text) for page in PAGES for text in code_of(page)})


# The README and its pages.


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES
    assert len(README.encode()) <= MOST_BYTES


def test_the_readme_links_every_page() -> None:
    assert set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README)) == PAGES.keys() - {"README.md"}


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"README.md"}))
def test_a_page_opens_with_the_use_of_it(page: str) -> None:
    assert re.match(r"# \w.*\n\nAfter this page you ", PAGES[page])


# Links.


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKS = sorted(
    {
        (page, link)
        for page, text in PAGES.items()
        for link in re.findall(r"\]\(([^)]+)\)", FENCED.sub("", text))
        if not re.match(r"https?:", link)
    }
)


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_to_a_file_and_a_heading_in_it(page: str, link: str) -> None:
    name, _, anchor = link.partition("#")
    target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
    assert target.is_file()
    assert not anchor or anchor in anchors(target.read_text(encoding="utf-8"))


# Tables.


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


@pytest.mark.parametrize("cells", table_rows("a row"), ids=lambda cells: cells[0])
def test_a_row_of_the_table_of_shapes_has_the_completions_it_says(cells: list[str]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["</s>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", "</s>")
    row, expected = json.loads(cells[0].strip("`")), re.findall("`([^`]+)`", cells[1])
    config = Config(teacher="m", dataset="d", output="o", completion_only=True)
    found = tokenize(datasets.Dataset.from_list([row]), tokenizer, config)
    kept = [
        [token for token, mark in zip(ids, mask, strict=True) if mark]
        for ids, mask in zip(found["input_ids"], found["completion_mask"], strict=True)
    ]
    assert [" ".join(map(str, ids)) if "input_ids" in row else tokenizer.decode(ids) for ids in kept] == expected


def test_the_argument_table_is_that_of_the_loss() -> None:
    documented = {name.strip("`"): default.strip("`") for name, default, _ in table_rows("argument")}
    options = [field for field in dataclasses.fields(DistillationLoss) if field.init and field.name != "dataset"]
    assert documented == {field.name: str(field.default) for field in options}


def test_the_table_of_measures_has_all_that_are_logged() -> None:
    assert [name.strip("`") for name, _ in table_rows("measure")] == list(_MEASURES["topk"])


def test_what_to_choose_follows_from_the_tables_of_the_benchmarks() -> None:
    """The numbers of one are the differences of the others, rounded."""
    (kind, little, other, small, tail, divergence, tokens) = (measured for _, _, measured in table_rows("where"))
    angles = {name.strip("*"): [float(angle) for angle in cells[7:9]] for name, *cells in table_rows("method")}
    students, far, near = (
        {name: [re.split("[ (]", cell)[0] for cell in cells] for name, *cells in table_rows(heading)}
        for heading in ("trained on", "far student, trained on", "near student, trained on")
    )
    exact, alone, top = (
        students[name] for name in ("teacher in memory", "cross-entropy", "file, topk 64, packed, forward KL")
    )
    drawn, ghost = (f"file, sample 64, packed, {loss}" for loss in ("forward KL", "ghost token"))
    above = [
        float(near[f"file, {kind} 12, forward KL"][0]) - float(near["teacher in memory"][0])
        for kind in ("sample", "topk")
    ]
    assert f"near its teacher ends {abs(float(near[drawn][1])):.3f} nats" in kind
    assert f"a far one {float(far[drawn][0]) - float(exact[0]):.3f} and {float(top[1]):.2f}" in kind
    assert f"{float(students['file, sample 12, forward KL'][1]):.3f} nats above" in little
    assert f"from the top 12 {float(students['file, topk 12, forward KL'][1]):.2f} nats" in little
    assert f"a near one {above[0]:.3f} instead of {above[1]:.3f}" in little
    assert f"a near student ends {float(near[ghost][1]):.3f} nats" in other
    for text in (kind, other):
        assert f"the top 64 {float(near['file, topk 64, packed, forward KL'][1]):.3f}" in text
    jsd, reverse = (far[f"file, topk 64, packed, {loss}"] for loss in ("JSD", "reverse KL"))
    shares = jsd[2], top[3], reverse[2], near["file, topk 64, packed, forward KL"][3]
    assert shares[3] == near["file, topk 64, packed, JSD"][3]
    for share, said in zip(shares, re.findall(r"at ([\d.]+) %", divergence), strict=True):
        assert share == f"{said}%"
    for loss, said in zip((jsd[1], reverse[1]), re.findall(r"higher by ([\d.]+)", divergence), strict=True):
        assert f"{float(loss) - float(top[2]):.2f}" == said
    assert students["file, hidden, forward KL"][0] == exact[0]
    sizes = [float(students[name][-1]) for name in ("file, hidden, forward KL", "file, topk 64, packed, forward KL")]
    assert f"{round(sizes[0] / sizes[1], -2):.0f} times" in small
    assert (
        f"is {round(angles['renormalised top 64'][1])} degrees off instead of {round(angles['topk 64, plain'][1])}"
        in tail
    )
    assert f"lower by {float(exact[2]) - float(alone[2]):.2f} nats" in tokens
    assert f"higher by {float(alone[1]):.2f}" in tokens


def test_the_better_loss_of_a_gradient_follows_from_the_table_of_students() -> None:
    rule = " ".join(PAGES["docs/training.md"].split())
    rows = [[float(cell.replace(",", "")) for cell in cells[1:6]] for cells in table_rows("student")]
    assert all(certain > min(top, drawn) for _, _, top, drawn, certain in rows)
    nearer = {(nats, positions): drawn < top for nats, positions, top, drawn, _ in rows}
    assert "from 0.75 nats on if a step has 512 positions, and at 0.6 to 0.7 nats if it has 2,048" in rule
    assert all(found for (nats, positions), found in nearer.items() if nats > 0.75 and positions >= 512)
    assert all(found for (nats, positions), found in nearer.items() if nats > 0.6 and positions >= 2048)
    assert not all(found for (nats, positions), found in nearer.items() if nats > 0.75)
    near = {
        positions: (round(top), round(drawn), drawn < top) for nats, positions, top, drawn, _ in rows if nats < 0.75
    }
    assert "the top 64 are 2 degrees from the exact gradient, and the drawn tokens 3" in rule
    assert near[512] == (2, 3, False)
    assert [is_nearer for *_, is_nearer in near.values()] == [False, False, True, True]


def test_the_module_table_is_the_package() -> None:
    """What each may import is tested in test_rooms."""
    source = ROOT / "logitgen"
    modules = {path.relative_to(source).with_suffix("").as_posix() for path in source.rglob("*.py")}
    named = [name.strip("`") for name, _ in table_rows("package or module")]
    assert len(named) == len(set(named))
    assert set(named) == {name for name in modules if not name.endswith("__init__")}


@pytest.fixture
def files(capture: Callable[..., Path], teacher: Path, ragged: Path, tmp_path: Path) -> list[LogitsFile]:
    """One file of every kind."""
    kinds = [
        {},
        {"capture": "sample", "encoding": "packed"},
        {"capture": "hidden", "encoding": "packed", "layers": "1"},
        {"capture": "full"},
    ]
    options: dict[str, Any] = {"teacher": teacher, "dataset": ragged, "limit": 5}
    return [
        LogitsFile(capture(**options, **kind, output=tmp_path / f"{number}.h5")) for number, kind in enumerate(kinds)
    ]


def test_every_dataset_of_the_files_is_in_the_table_with_its_dtype(files: list[LogitsFile]) -> None:
    documented = {name: dtype for names, dtype, _ in table_rows("dataset") for name in names_in(names)}
    found = {name: array for file in files for name, array in file.arrays.items()}
    assert documented.keys() == found.keys() | {"head_bias"}  # which the tiny teacher's head does not have
    for name, array in found.items():
        assert str(array.dtype) in documented[name] or "teacher's" in documented[name], name
        assert len(re.findall(r"\[([^]]*)\]", documented[name])[0].split(",")) == array.ndim, name


def test_every_attribute_of_the_files_is_in_the_table_with_its_type(files: list[LogitsFile]) -> None:
    documented = {
        name: TYPES[kind]
        for names, kinds, _ in table_rows("attribute")
        for name, kind in zip(names_in(names), kinds.split(", "), strict=True)
    }
    found = {name: value for file in files for name, value in file.attributes.items()}
    assert {name: type(value) for name, value in found.items()} == documented


def test_the_limits_of_verify_are_in_the_table() -> None:
    documented = {
        dtype: tuple(float(re.findall(r"[\d.]+", cell)[0]) for cell in limits)
        for dtypes, *limits in table_rows("dtype")
        for dtype in dtypes.split(", ")
    }
    expected = {dtype: (mean, 100 * agreement) for dtype, (mean, agreement) in TOLERANCES.items()}
    assert documented == expected


def test_every_profile_is_in_the_table() -> None:
    profiles = {path.name for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    used = [name for _, command in table_rows("profile") for name in re.findall(r"accelerate_configs/(\S+)", command)]
    assert sorted(used) == sorted(profiles)
    for name in profiles:
        assert "num_processes" in yaml.safe_load((ROOT / "accelerate_configs" / name).read_text())


# Commands and their options.


def parser_of_commands() -> argparse.ArgumentParser:
    """Catch the parser of `python -m logitgen` before it parses."""
    caught: list[argparse.ArgumentParser] = []

    def catch(self: argparse.ArgumentParser, *_: object) -> None:
        caught.append(self)
        raise UsageError("caught")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program._Parser, "parse_known_args", catch)
        program.main([])
    return caught[0]


def options_of_commands() -> dict[str, set[str]]:
    """The options of every command of `python -m logitgen`."""
    (subparsers,) = (
        action for action in parser_of_commands()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return {
        name: {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
        for name, parser in subparsers.choices.items()
    }


def options_in_source(path: str) -> set[str]:
    """The options of a script, as its source names them."""
    return set(re.findall(r'"(--\w+)"', (ROOT / path).read_text(encoding="utf-8")))


def options_of_benchmark(name: str) -> set[str]:
    """The options of a benchmark: catch its parser before it parses."""
    caught: list[argparse.ArgumentParser] = []

    def catch(self: argparse.ArgumentParser) -> None:
        caught.append(self)
        raise UsageError("caught")

    run = importlib.import_module(f"benchmarks.{name}").main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        with pytest.raises(UsageError):
            run()
    return {option for action in caught[0]._actions for option in action.option_strings}


def options_of_launcher() -> set[str]:
    return {option for action in launch_command_parser()._actions for option in action.option_strings}


def check_capture(words: list[str]) -> None:
    """Parse the options of a run; `...` stands for those that are left out, as does nothing at all."""
    required = ["--teacher", "T", "--dataset", "D", "--output", "O"] if not words or "..." in words else []
    parse_config([*required, *(word for word in words if word != "...")])


def check(command: str) -> bool:
    """Check a command against the program it starts; return whether it is one that can be checked."""
    words = shlex.split(command, comments=True)
    match words:
        case ["accelerate", "launch", *rest]:
            if {"generate.py", "logitgen.generate"}.isdisjoint(rest):
                rest = [*(word for word in rest if word != "..."), "generate.py"]
            check_capture(launch_command_parser().parse_args(rest).training_script_args)
        case ["python", "-m", "logitgen", "preview", *rest]:
            _, others = parser_of_commands().parse_known_args(["preview", *rest])
            check_capture([*others, "--output", "O"])
        case ["python", "-m", "logitgen", *rest]:
            parser_of_commands().parse_args(rest)
        case ["python", "-m", "benchmarks", *names]:
            assert set(names) <= set(benchmarks.ALL)
        case ["python", "-m", module, *rest] if module.startswith("benchmarks."):
            words = {word for word in rest if word.startswith("--")}
            assert words <= options_of_benchmark(module.removeprefix("benchmarks."))
        case ["python", "-m", "examples.distil", *rest]:
            assert {word for word in rest if word.startswith("--")} <= options_in_source("examples/distil.py")
        case [script, *rest] if script.endswith(".py"):
            assert {word for word in rest if word.startswith("--")} <= options_in_source(script)
        case ["sbatch", *rest]:
            script = rest.index("examples/slurm.sbatch")
            assert [word for word in rest[:script] if word.startswith("-")] in ([], ["--nodes"])
            check_capture(rest[script + 1 :])
        case ["make", target, *_]:
            subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)
        case _:
            return False
    return True


STARTS = (
    "accelerate launch ",
    "python -m logitgen ",
    "python -m benchmarks",
    "python -m examples",
    "tests/chaos.py ",
    "sbatch ",
    "make ",
)
COMMANDS = [(page, text) for page, text in CODE if text.startswith(STARTS) and " COMMAND" not in text]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_one_that_its_program_takes(page: str, command: str) -> None:
    assert check(command)


def test_commands_of_every_program_were_found() -> None:
    assert {start for start in STARTS if any(text.startswith(start) for _, text in COMMANDS)} == set(STARTS)


def test_an_option_in_the_text_exists_and_takes_its_value() -> None:
    known = {f"--{field.name}" for field in dataclasses.fields(Config)} | {"--config"} | options_of_launcher()
    known = known.union(*options_of_commands().values(), *map(options_of_benchmark, benchmarks.ALL))
    known |= options_in_source("examples/distil.py")
    choices = {f"--{name}": typing.get_args(hint) for name, hint in typing.get_type_hints(Config).items()}
    for page, text in CODE:
        if text.startswith("--"):
            words = text.split()
            assert {word for word in words if word.startswith("--")} <= known, (page, text)
            for option, value in pairwise(words):
                texts = [choice for choice in choices.get(option, ()) if isinstance(choice, str)]
                assert value.startswith("--") or not texts or value in texts, (page, text)


def test_the_command_table_is_that_of_the_program() -> None:
    documented: dict[str, set[str]] = {}
    command = ""
    for name, options, _ in table_rows("command | options"):
        command = name.strip("`") or command
        documented.setdefault(command, set()).update(names_in(options))
    assert documented == options_of_commands()


def test_the_example_of_the_readme_says_what_it_means() -> None:
    command = re.search(r"generate\.py \\\n(.*?)```", README, re.DOTALL)
    assert command
    config = parse_config(command[1].replace("\\\n", " ").split())
    assert config.completion_only
    assert config.max_length == 4096


def test_make_alone_lists_the_targets() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = ["help", "run", "test", "test-long", "quick"]
    targets += ["bench", "gpu", "fidelity", "distil", "chaos", "check", "format", "clean"]
    assert re.findall(r"^  make ([\w-]+)", listed, re.MULTILINE) == targets
    assert max(map(len, listed.splitlines())) <= 80


# Python.


PYTHON = [(page, code) for page in PAGES for language, code in FENCED.findall(PAGES[page]) if language == "python"]


def test_the_python_that_reads_runs(
    capture: Callable[..., Path], teacher: Path, ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What trains is run in test_training, and what merges in test_adapter."""
    monkeypatch.chdir(tmp_path)
    capture(teacher=teacher, dataset=ragged, output=tmp_path / "teacher.h5")
    capture(teacher=teacher, dataset=ragged, output=tmp_path / "hidden.h5", capture="hidden", encoding="packed")
    capture(teacher=teacher, dataset=ragged, output=tmp_path / "layers.h5", capture="hidden", layers="0,1")
    for name in ("part_0", "part_1", "part_2", "part_3", "chat", "code"):
        shutil.copy("teacher.h5", f"{name}.h5")
    reading = [(page, code) for page, code in PYTHON if "student" not in code and "peft" not in code]
    assert {page for page, _ in reading} >= {"docs/format.md", "docs/scaling.md"}
    for page, code in reading:
        names: dict[str, Any] = {}
        exec(compile(code, page, "exec"), names)
        assert {"row", "dataset", "file"} & names.keys()
