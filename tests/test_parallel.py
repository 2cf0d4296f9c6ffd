"""Teachers that several ranks, or several devices, hold together."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import programs
import pytest
import torch
import transformers
from conftest import launch, launch_command, save_teacher, write_jsonl
from families import ROWS, TREES, make
from launches import Ended, error_lines, exit_statuses, launch_changed, ranks_that_ran
from transformers import PreTrainedModel

from logitgen import LogitsFile, UsageError
from logitgen.file.drawn import is_certain
from logitgen.options import parse_config
from logitgen.teacher.model import Teacher

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "tensor parallel": (2, {"tp_size": 2}),
    "fully sharded": (2, {"fsdp_size": 2}),
    "2 replicas, tensor parallel": (4, {"tp_size": 2}),
    "2 replicas, fully sharded": (4, {"fsdp_size": 2}),
    "tensor parallel and fully sharded": (4, {"tp_size": 2, "fsdp_size": 2}),
}
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"top_k": 11},
    "packed draws": {"capture": "sample", "encoding": "packed", "top_k": 12},
    "hidden": {"capture": "hidden", "layers": "0,1"},
    "full": {"capture": "full"},
}
TP_FAMILIES = [
    "llama with a tied head",
    "gemma2 with both soft-caps",
    "cohere with a logit scale",
    "phi",  # whose head has a bias
    "qwen2 moe",
    "qwen2.5 vl",
]
NO_TP_PLAN = "gpt2"
BOUND = 1e-4
"""How far a log-prob may be from a direct forward pass, in nats, for parts of sums that are added up otherwise."""


class Runs:
    """Runs of one module, by name; each is launched when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[str, tuple[int, dict[str, Any]]] = {}
        self._ended: dict[str, Ended] = {}

    def add(self, name: str, num_ranks: int, **options: Any) -> None:
        places = {"output": self.folder / f"{name}.h5", "log_dir": self.folder / f"{name} logs"}
        self._runs[name] = num_ranks, places | options

    def options(self, name: str) -> dict[str, Any]:
        return dict(self._runs[name][1])

    def ended(self, name: str) -> Ended:
        if name not in self._ended:
            num_ranks, options = self._runs[name]
            self._ended[name] = launch(num_ranks, **options)
        return self._ended[name]

    def path(self, name: str) -> Path:
        ended, num_ranks = self.ended(name), self._runs[name][0]
        assert ended.returncode == 0, ended.stderr
        assert ranks_that_ran(self.folder / f"{name} logs") == [f"rank_{rank}" for rank in range(num_ranks)]
        return self.folder / f"{name}.h5"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make("llama")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel) -> Runs:
    """Every layout with every kind of capture, and what only some families have; 97 ids, which two do not divide."""
    folder = tmp_path_factory.mktemp("parallel")
    rows = [{"input_ids": ids} for ids in ROWS] + [{"input_ids": ids[::-1]} for ids in ROWS[:5]]
    common = {"dataset": str(write_jsonl(folder / "rows.jsonl", rows)), "batch_tokens": 32}
    own = common | {"teacher": str(save_teacher(folder / "llama", model, None))}
    runs = Runs(folder)
    for kind, options in KINDS.items():
        runs.add(f"one rank, {kind}", 1, **own, **options)
        for layout, (num_ranks, sizes) in LAYOUTS.items():
            runs.add(f"{layout}, {kind}", num_ranks, **own, **options, **sizes)
    runs.add("again", 2, **own, **KINDS["topk"], tp_size=2)
    for family in [*TP_FAMILIES, NO_TP_PLAN]:
        teacher = str(save_teacher(folder / family.replace(" ", "_"), make(family), None))
        runs.add(f"tp {family}", 2, **common, teacher=teacher, top_k=11, tp_size=2)
        runs.add(f"fsdp {family}", 2, **common, teacher=teacher, top_k=11, fsdp_size=2)
        runs.add(f"one {family}", 1, **common, teacher=teacher, top_k=11)
    runs.add("heads", 4, **own, tp_size=4)
    runs.add("mapped", 2, **own, device_map="auto")
    for name, sizes in (("fsdp", {"fsdp_size": 2}), ("tp", {"tp_size": 2}), ("two", {})):
        runs.add(f"pilot {name}", 2, **own | {"batch_tokens": 4096}, **sizes, dry_run=True)
    trees = {"dataset": str(write_jsonl(folder / "trees.jsonl", [{"input_ids": ids} for ids in TREES])), "top_k": 11}
    for name, num_ranks, sizes in (
        ("one", 1, {}),
        ("two", 2, {}),
        ("tp", 2, {"tp_size": 2}),
        ("fsdp", 2, {"fsdp_size": 2}),
    ):
        runs.add(f"trees {name}", num_ranks, **own | trees, **sizes)
    runs.add("trees whole", 1, **own | trees, share_prefixes=False)
    return runs


def assert_equals_direct_passes(path: Path, model: PreTrainedModel) -> None:
    """Compare what a file's rows say with the model's own forward, a row at a time."""
    file = LogitsFile(path)
    assert file.arrays["done"].all()
    for index in range(len(file)):
        row = file.row(index)
        with torch.no_grad():
            logits_TV = model(input_ids=torch.from_numpy(row["input_ids"].astype(np.int64))[None]).logits[0].float()
        logprobs_PV = logits_TV.log_softmax(-1).numpy()[row["positions"]]
        targets_P = row["input_ids"][1:].astype(np.int64)
        own_P = np.take_along_axis(logprobs_PV, targets_P[:, None], 1)[:, 0]
        rtol = 2**-11 if row["target_logprob"].dtype == np.float16 else 0
        np.testing.assert_allclose(row["target_logprob"], own_P, rtol=rtol, atol=BOUND)
        if "logsumexp" in row:
            np.testing.assert_allclose(row["logsumexp"], logits_TV.logsumexp(-1).numpy()[row["positions"]], atol=BOUND)
        if "kept_ids" in row:
            own_PK = np.take_along_axis(logprobs_PV, row["kept_ids"].astype(np.int64), 1)
            rounding, known = file.layout.rounding(row["kept_logprobs"]), np.ones(own_PK.shape, np.bool_)
            if file.layout.capture == "sample":  # the others are in test_capture
                known = is_certain(row["kept_logprobs"])
                assert known.any() or not len(known)
            assert (np.abs(row["kept_logprobs"] - own_PK) <= rounding + BOUND)[known].all()
        if file.layout.capture == "topk":
            best_PK = np.sort(logprobs_PV, 1)[:, ::-1][:, : file.layout.top_k]
            np.testing.assert_allclose(own_PK, best_PK, atol=BOUND)
        if "logits" in row:
            np.testing.assert_allclose(row["logits"], logits_TV.numpy()[row["positions"]], rtol=2**-11, atol=BOUND)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shared_teacher_says_what_a_direct_forward_pass_says(
    runs: Runs, model: PreTrainedModel, layout: str, kind: str
) -> None:
    path = runs.path(f"{layout}, {kind}")
    assert_equals_direct_passes(path, model)
    assert "joined on every rank" not in runs.ended(f"{layout}, {kind}").stderr
    one = runs.path(f"one rank, {kind}")
    if "tensor" not in layout:
        assert path.read_bytes() == one.read_bytes()
        return
    about, about_one = LogitsFile(path).attributes, LogitsFile(one).attributes
    assert about.pop("settings") == about_one.pop("settings") | {"tp_size": 2}
    assert about == about_one  # the teacher's fingerprint among them
    shared, alone = LogitsFile(path).arrays, LogitsFile(one).arrays
    if kind == "hidden":
        for name in ("hidden", "hidden_0", "hidden_1"):
            np.testing.assert_allclose(shared[name], alone[name], atol=BOUND)
        assert (shared["head_weight"] == alone["head_weight"]).all()
    if kind == "packed draws":
        rows = [(LogitsFile(path).row(row), LogitsFile(one).row(row)) for row in range(len(ROWS))]
        assert all((here["kept_ids"] == there["kept_ids"]).all() for here, there in rows)  # the same draws


def test_runs_of_one_layout_write_the_same_bytes_however_many_replicas(runs: Runs) -> None:
    once = runs.path("tensor parallel, topk").read_bytes()
    assert runs.path("again").read_bytes() == once
    assert runs.path("2 replicas, tensor parallel, topk").read_bytes() == once


@pytest.mark.parametrize("family", TP_FAMILIES)
def test_families_of_all_kinds_can_be_shared(runs: Runs, family: str) -> None:
    """Tied heads, soft-caps, scales, biases and experts."""
    assert_equals_direct_passes(runs.path(f"tp {family}"), make(family))
    assert runs.path(f"fsdp {family}").read_bytes() == runs.path(f"one {family}").read_bytes()
    assert "cannot be run in chunks" not in runs.ended(f"tp {family}").stderr


def test_prefixes_are_shared_by_any_number_of_ranks(runs: Runs, model: PreTrainedModel) -> None:
    one = runs.path("trees one")
    assert LogitsFile(one).attributes["computation"]["prefixes"] == "read once"
    assert runs.path("trees two").read_bytes() == one.read_bytes()
    assert_equals_direct_passes(one, model)


def test_tensor_parallel_ranks_share_prefixes(runs: Runs, model: PreTrainedModel) -> None:
    path = runs.path("trees tp")
    assert LogitsFile(path).attributes["computation"]["prefixes"] == "read once"
    assert_equals_direct_passes(path, model)


def test_fully_sharded_ranks_read_rows_whole_and_say_why(runs: Runs) -> None:
    path, whole = runs.path("trees fsdp"), runs.path("trees whole")
    assert "with --fsdp_size, all ranks must run the teacher equally often." in runs.ended("trees fsdp").stderr
    settings = [LogitsFile(each).attributes.pop("settings") for each in (path, whole)]
    assert settings[0] == settings[1] | {"share_prefixes": True}
    arrays, expected = LogitsFile(path).arrays, LogitsFile(whole).arrays
    assert all((arrays[name] == expected[name]).all() for name in ("kept_ids", "kept_logprobs", "logsumexp"))


def test_a_family_without_a_tensor_parallel_plan_can_only_be_sharded(runs: Runs) -> None:
    refused = runs.ended(f"tp {NO_TP_PLAN}")
    assert exit_statuses(refused) == [2, 2]
    assert "Share it with --fsdp_size." in refused.stderr
    assert runs.path(f"fsdp {NO_TP_PLAN}").read_bytes() == runs.path(f"one {NO_TP_PLAN}").read_bytes()


def test_more_ranks_than_key_value_heads_are_refused(runs: Runs) -> None:
    refused = runs.ended("heads")
    assert exit_statuses(refused) == [2] * 4
    assert "Choose one that divides its key-value heads" in refused.stderr


def test_several_ranks_do_not_each_take_all_devices(runs: Runs) -> None:
    refused = runs.ended("mapped")
    assert exit_statuses(refused) == [2, 2]
    assert "--device_map must run on one rank, got 2" in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp_size=0"], "--tp_size must be at least 1, got 0."),
        (["--fsdp_size=-1"], "--fsdp_size must be at least 1, got -1."),
        (["--device_map=auto", "--tp_size=2"], "--device_map is for one rank that has the whole teacher"),
    ],
)
def test_options_that_say_nothing_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_config(["--teacher=t", "--dataset=d", "--output=o", *options])


@pytest.mark.parametrize("name", ["fsdp", "tp", "two"])
def test_a_pilot_of_several_ranks_measures_the_mass_of_the_top_k_once(
    runs: Runs, model: PreTrainedModel, name: str
) -> None:
    ended = runs.ended(f"pilot {name}")
    assert ended.returncode == 0, ended.stderr
    rows = [*ROWS, *(ids[::-1] for ids in ROWS[:5])]
    with torch.no_grad():
        parts = [model(torch.tensor([ids])).logits[0, :-1].double().softmax(-1) for ids in rows if len(ids) > 1]
    mass_PV = torch.cat(parts).sort(-1, descending=True).values.cumsum(-1)
    assert f"at {len(mass_PV):,} positions of the pilot" in " ".join(ended.stdout.split())
    for k in (8, 16, 32, 64):
        shown = re.search(rf"^top {k} .* B +([0-9.]+)% +([0-9.]+)%", ended.stdout, re.MULTILINE)
        assert shown
        expected = (float(mass_PV[:, k - 1].mean()), float(mass_PV[:, k - 1].quantile(0.1)))
        assert [float(share) / 100 for share in shown.groups()] == pytest.approx(expected, abs=1.1e-4)


KILL = """
import os, signal
from logitgen import generate
compute, calls = generate.capture_batch, []
def dying(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(*arguments)
generate.capture_batch = dying
"""


def assert_killed_rank_ends_the_run(folder: Path, **options: Any) -> None:
    """Have rank 1 killed while rank 0 waits for it in a forward pass, in the real launcher."""
    ended = launch_changed(folder, KILL, **options)
    assert ended.returncode == 1
    assert ranks_that_ran(folder / "logs") == ["rank_0", "rank_1"]
    assert len(error_lines(ended)) == 1
    assert "ended without an error message" in error_lines(ended)[0]
    done = LogitsFile(folder / "out.h5.partial", partial=True).arrays["done"]
    assert 0 < np.count_nonzero(done) < len(done)


def test_a_killed_sharded_run_is_resumed_by_one_rank(
    tmp_path: Path, teacher: Path, ragged: Path, capture: Callable[..., Path]
) -> None:
    options = {"teacher": teacher, "dataset": ragged, "batch_tokens": 100}
    assert_killed_rank_ends_the_run(tmp_path, **options, fsdp_size=2)
    undisturbed = capture(**options, output=tmp_path / "undisturbed.h5")
    assert capture(**options).read_bytes() == undisturbed.read_bytes()


@pytest.mark.slow
def test_a_killed_tensor_parallel_run_resumes_to_the_same_bytes(tmp_path: Path, teacher: Path, ragged: Path) -> None:
    options = {"teacher": teacher, "dataset": ragged, "batch_tokens": 100, "tp_size": 2}
    assert_killed_rank_ends_the_run(tmp_path, **options)
    for name in ("out.h5", "undisturbed.h5"):
        ended = launch(2, output=tmp_path / name, log_dir=tmp_path, **options)
        assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out.h5").read_bytes() == (tmp_path / "undisturbed.h5").read_bytes()


def test_a_tensor_parallel_file_is_not_gone_on_with_by_other_sizes(
    tmp_path: Path, runs: Runs, capture: Callable[..., Path]
) -> None:
    """The sums are rounded otherwise."""
    output = tmp_path / "out.h5"
    output.write_bytes(runs.path("tensor parallel, topk").read_bytes())
    with pytest.raises(UsageError, match="--tp_size 2 and 1"):
        capture(**runs.options("one rank, topk") | {"output": output})


def test_sizes_that_do_not_divide_the_ranks_are_refused(teacher: Path, ragged: Path, tmp_path: Path) -> None:
    ended = launch(2, teacher=teacher, dataset=ragged, output=tmp_path / "out.h5", log_dir=tmp_path, tp_size=4)
    assert error_lines(ended) == [
        "error: --tp_size 4 and --fsdp_size 1 need a multiple of 4 ranks, got 2. "
        "Use accelerate launch --num_processes 4 ..."
    ]
    assert exit_statuses(ended) == [2, 2]


def test_profiles_that_have_accelerate_shard_the_teacher_are_refused(
    teacher: Path, ragged: Path, tmp_path: Path
) -> None:
    """On a machine without GPUs their processes would each believe to be alone."""
    profile = tmp_path / "fsdp.yaml"
    profile.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nuse_cpu: true\nnum_machines: 1\n"
        "num_processes: 2\nmixed_precision: 'no'\nfsdp_config:\n  fsdp_version: 2\n"
    )
    command = launch_command(2, teacher=teacher, dataset=ragged, output=tmp_path / "out.h5", log_dir=tmp_path)
    command[command.index("accelerate_configs/cpu.yaml")] = str(profile)
    ended = programs.run(command)
    assert len(set(error_lines(ended))) == 1
    assert error_lines(ended)[0].startswith(
        "error: The launch profile turns on FSDP, which Accelerate uses for training only."
    )
    assert exit_statuses(ended) == [2, 2]
    assert not list(tmp_path.glob("out.h5*"))


def test_a_teacher_larger_than_memory_is_read_from_disk_layer_by_layer(
    tmp_path: Path, model: PreTrainedModel, capture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --device_map auto; on a GPU, what it cannot hold would be in the host's memory."""
    folder = save_teacher(tmp_path / "teacher", model, None)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in ROWS])
    options = {"teacher": folder, "dataset": data, "batch_tokens": 32}
    kinds: list[dict[str, Any]] = [{"top_k": 11}, {"capture": "hidden"}]
    whole = [capture(**options, **kind, output=tmp_path / f"whole {kind}.h5").read_bytes() for kind in kinds]
    monkeypatch.setattr(transformers.integrations.accelerate, "get_balanced_memory", lambda *_, **__: {"cpu": 60_000})
    parts: list[set[Any]] = []
    loaded = Teacher.__init__

    def noted(self: Teacher, model: PreTrainedModel, *arguments: Any, **options: Any) -> None:
        parts.append(set(model.hf_device_map.values()))
        loaded(self, model, *arguments, **options)

    monkeypatch.setattr(Teacher, "__init__", noted)
    for kind, expected in zip(kinds, whole, strict=True):
        path = capture(**options, **kind, output=tmp_path / f"{kind}.h5", device_map="auto")
        assert path.read_bytes() == expected
    assert parts == [{"cpu", "disk"}] * 2
