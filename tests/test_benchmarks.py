"""The benchmarks: what they compare really is the same work, and a difference is noticed."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from benchmarks import chats, padding, prefixes, reading, startup, student, without
from benchmarks.check import MismatchError, check, read_flat, read_ours
from benchmarks.comparison import COMPETITORS, code_lines
from benchmarks.gpu_speed import ALONE, PACKED, idle_share
from benchmarks.harness import Spread, measure
from benchmarks.leader import Bare
from benchmarks.synthetic import make_job, random_payload
from logitgen import DistillationLoss, LogitsDataset
from logitgen.file.reader import LogitsFile
from logitgen.head import Head
from logitgen.leader.writer import Writer
from logitgen.split.tree import CPU_COST, GPU_COST
from logitgen.student import chunks
from logitgen.teacher.model import Teacher

OTHERS = [
    "bash, file per process",
    "bash + merge",
    "Accelerate, gather",
    "torch.distributed, gather",
    "one HDF5 file, lock",
    "Zarr, parallel writers",
    "HDF5 group per row, gzip",
]


@pytest.mark.slow
def test_all_ways_to_capture_yield_the_same_rows_and_are_in_the_table(teacher: Path, ragged: Path, tmp_path: Path):
    options = {"teacher": teacher, "dataset": ragged, "rows": 12, "rounds": 1, "ranks": 2, "top_k": 8}
    options |= {"batch_tokens": 256, "output": tmp_path / "bench"}
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "benchmarks.comparison", "--no_ablation", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "bench" / "comparison.json").read_text())["data"]
    runs = {name: run for name, (run,) in data["rounds"].items()}
    assert list(runs) == ["logitgen", "forward passes alone", *OTHERS]
    assert re.findall(r"^(.+): [\d.]+ s, 12 rows as ours$", done.stdout, re.MULTILINE) == ["logitgen", *OTHERS]
    assert re.search(r"^forward passes alone: [\d.]+ s, [1-9][\d,]* tokens read$", done.stdout, re.MULTILINE)
    assert all(0 < runs[name]["first row, s"] < runs[name]["seconds"] for name in ["logitgen", *OTHERS])
    assert all(run["MB per rank"] > 50 for run in runs.values())
    assert runs["bash, file per process"]["files"] == 2
    assert runs["bash + merge"]["files"] == 1
    assert [name for name in runs if f"| {name} " not in done.stdout] == []


def test_bare_code_writes_the_same_bytes_as_the_writer(tmp_path: Path):
    job = make_job(300_000, top_k=9, vocab_size=1000, batch_tokens=600, row_tokens=60)
    sizes, done = job.payload_bytes, np.zeros(len(job.rows), bool)
    payloads = [(random_payload(2 * size)[size:] + number) % 64 for number, size in enumerate(sizes)]
    bare = Bare(tmp_path / "bare", job, in_places=True)
    with Writer(tmp_path / "ours", job.create_file(tmp_path / "ours"), job, done) as writer:
        for number, payload in enumerate(payloads):
            bare.write(number, torch.from_numpy(payload))
            writer.submit(number, payload)
        writer.finish()
    bare.close()
    assert len(done) > len(payloads) > 20
    with h5py.File(tmp_path / "ours") as ours, h5py.File(tmp_path / "bare") as theirs:
        differing = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
        assert differing == ["done"]  # which is not bare code's business
        assert np.count_nonzero(ours["kept_ids"]) > 0.9 * ours["kept_ids"].size


@pytest.fixture
def ours(capture: Callable[..., Path], teacher: Path, ragged: Path) -> LogitsFile:
    return LogitsFile(capture(teacher=teacher, dataset=ragged, limit=12, top_k=8, batch_tokens=256))


@pytest.fixture
def flat(ours: LogitsFile, tmp_path: Path) -> Path:
    """The same rows in a file of flat datasets, the last row first."""
    rows = [(number, ours.row(number)) for number in reversed(range(len(ours)))]
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["row"] = [number for number, _ in rows]
        file["num_tokens"] = [len(row["input_ids"]) for _, row in rows]
        for name in ("input_ids", "kept_ids", "kept_logprobs", "logsumexp", "target_logprob"):
            file[name] = np.concatenate([row[name] for _, row in rows])
    return tmp_path / "flat.h5"


def test_the_same_rows_in_another_order_pass(flat: Path, ours: LogitsFile):
    assert check(read_flat([flat]), ours) == 12


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("kept_logprobs", (7, 3), lambda before: before - 0.1, "has kept_logprobs"),
        ("kept_ids", (7, 0), lambda before: (before + 1) % 384, "has log-probs of kept_ids"),
        ("kept_ids", (7, slice(None)), lambda before: before[0], "keeps a token twice"),
        ("logsumexp", 7, lambda before: before + 0.01, "has logsumexp"),
        ("target_logprob", 7, lambda before: np.nan, "has target_logprob nan"),
        ("input_ids", 7, lambda before: (before + 1) % 384, "has other tokens"),
        ("row", 3, lambda before: before + 1, "there twice"),
        ("row", 3, lambda before: 99, "no such row among 12"),
    ],
)
def test_a_wrong_value_is_noticed(flat: Path, ours: LogitsFile, name, index, value, message):
    with h5py.File(flat, "r+") as file:
        file[name][index] = value(file[name][index])
    with pytest.raises(MismatchError, match=message):
        check(read_flat([flat]), ours)


def test_a_missing_row_is_noticed(flat: Path, ours: LogitsFile):
    rows = [(number, row) for number, row in read_flat([flat]) if number != 5]
    with pytest.raises(MismatchError, match="1 of 12 rows are missing, row 5 the first"):
        check(rows, ours)


def test_a_missing_position_is_noticed(ours: LogitsFile):
    rows = {number: ours.row(number) for number in range(len(ours))}
    rows[9] = {name: values if name == "input_ids" else values[:-1] for name, values in rows[9].items()}
    with pytest.raises(MismatchError, match="Row 9 has other positions"):
        check(rows.items(), ours)


def test_nearly_equal_log_probs_may_come_in_another_order(ours: LogitsFile):
    rows = {number: {name: values.copy() for name, values in ours.row(number).items()} for number in range(len(ours))}
    logprobs, ids = rows[9]["kept_logprobs"], rows[9]["kept_ids"]
    position, first = np.unravel_index(np.argmin(-np.diff(logprobs.astype(np.float32))), (len(ids), 7))
    assert logprobs[position, first] - logprobs[position, first + 1] < 1e-3
    ids[position, [first, first + 1]] = ids[position, [first + 1, first]]
    assert check(rows.items(), ours) == 12


@pytest.mark.parametrize("piece", without.REPLACED)
def test_our_capture_with_a_piece_replaced_yields_the_same_rows(
    ours: LogitsFile, capture, teacher: Path, ragged: Path, tmp_path: Path, monkeypatch, piece: str
):
    monkeypatch.setattr(*without.REPLACED[piece])
    path = capture(
        teacher=teacher, dataset=ragged, limit=12, top_k=8, batch_tokens=256, output=tmp_path / f"{piece}.h5"
    )
    assert check(read_ours([path]), ours) == 12


def test_a_file_per_rank_and_a_merge_yields_the_same_rows(capture, teacher: Path, ragged: Path, tmp_path: Path):
    ours = LogitsFile(capture(teacher=teacher, dataset=ragged, top_k=8))
    middle = len(ours) // 2
    parts = [
        capture(teacher=teacher, dataset=ragged, top_k=8, split=f"train[{span}]", output=tmp_path / f"{span}.h5")
        for span in (f":{middle}", f"{middle}:")
    ]
    without.merge(parts, tmp_path / "merged.h5")
    assert check(read_ours([tmp_path / "merged.h5"]), ours) == len(ours)
    assert not any(part.exists() for part in parts)


def test_lines_of_code_are_those_that_do_something(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("benchmarks.comparison.COMPETITORS", tmp_path)
    (tmp_path / "some.py").write_text(
        '"""Doc\n\nstring."""\n\n# Why.\nx = """two\nlines"""  # why\n\n'
        'def f():\n    """Doc."""\n    return (\n        x\n    )\n'
    )
    (tmp_path / "some.sh").write_text("#!/bin/bash\n# Why.\n\nwait\n")
    assert code_lines("some.py") == 6
    assert code_lines("some.sh some.py") == 7
    assert COMPETITORS.is_dir()


def test_a_command_is_measured_with_its_lines_and_memory():
    program = "import sys, time; held = bytearray(200_000_000); print('now', flush=True); time.sleep(0.5)"
    measured = measure([sys.executable, "-c", program])
    assert 0 < measured.seconds_of("now") < measured.wall_seconds - 0.4
    ((resident_bytes, private_bytes),) = measured.largest(1)
    assert resident_bytes > private_bytes > 200_000_000
    assert measured.seconds_of("never") is None


def test_a_command_that_fails_says_what_it_printed():
    with pytest.raises(RuntimeError, match="status 3:\nlast words"):
        measure([sys.executable, "-c", "print('last words'); raise SystemExit(3)"])


def test_the_spread_of_rounds_is_their_least_and_most():
    spread = Spread.of([3.0, 1.0, 5.0])
    assert spread == (3.0, 1.0, 5.0)
    assert f"{spread:.1f}" == "3.0 (1.0-5.0)"


def test_a_ratio_is_taken_within_each_round():
    assert Spread.of([3.0, 1.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, 0.5, 3.0)


def test_batches_of_a_made_up_file_are_read_and_trained_from(tmp_path: Path, monkeypatch):
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(reading, "STUDENT", tiny)
    words = ["--megabytes=5", "--workers", "0", "1", "--seconds=0.1", "--steps=1", "--rounds=1"]
    monkeypatch.setattr(sys, "argv", ["reading", *words, f"--output={tmp_path}"])
    reading.main()
    data = json.loads((tmp_path / "reading.json").read_text())["data"]
    assert data["positions"] == pytest.approx(5e6 / 264, rel=0.3)
    assert min(data["training"]) > 0
    assert set(data["reading"]) == {"0", "1"}
    assert all(len(rates) == 1 and rates[0] > 0 for rates in data["reading"].values())


def test_a_made_up_file_holds_what_a_loss_accepts(tmp_path: Path):
    reading.write_file(tmp_path / "made_up.h5", make_job(10**6, 64, 32_000, 1024, 256))
    dataset = LogitsDataset(tmp_path / "made_up.h5")
    lengths = [len(row["input_ids"]) for row in dataset]
    assert min(lengths) < 100 < 400 < max(lengths)
    for row in dataset:
        assert (row["kept_ids"].sort(-1).values.diff() > 0).all()
        assert row["kept_ids"].max() < 32_000
        assert (row["kept_logprobs"].diff() < 0).all()
        assert (row["kept_logprobs"].exp().sum(-1) < 1).all()


@pytest.mark.slow
def test_the_command_for_gpus_does_all_its_parts_on_a_cpu_with_tiny_shapes(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.gpu", f"--output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    parts = ["speed", "stages", "passes", "prefixes", "student", "memory", "numbers", "attention", "files", "ranks"]
    assert re.findall(r"^(\w+), \d+ s:$", done.stdout, re.MULTILINE) == parts
    assert {path.name for path in tmp_path.iterdir()} == {f"gpu_{part}.json" for part in parts}
    data = {part: json.loads((tmp_path / f"gpu_{part}.json").read_text())["data"] for part in parts}
    ways = {row["teacher, way"] for row in data["speed"]}
    assert ways > {f"tiny Llama, {way}" for way in (ALONE, PACKED, "hidden", "head in one piece", "synchronous copy")}
    assert all(row["tokens/s"] > 0 and min(row["forward passes = 1"]) > 0 for row in data["speed"])
    off = {row["precision"]: row for row in data["numbers"]}
    assert all(off[f"float32, {rows}"]["largest"] < 1e-5 for rows in ("few long rows", "many short rows"))
    assert 0 < off["bfloat16, few long rows"]["rows alone, mean"] < 0.1
    assert [row[""] for row in data["files"]] in (["True", "True"], ["True", "ended before"])
    assert [row["ranks"] for row in data["ranks"]] == ["1 ranks", "2 ranks", "--tp_size 2", "--fsdp_size 2"]


def test_the_gpu_is_idle_between_kernels_and_busy_in_overlapping_ones():
    spans = [(0, 10), (5, 20), (30, 40), (32, 35)]
    assert idle_share(spans) == 10 / 40


def test_loading_takes_memory_and_time(teacher: Path):
    found = startup.loading(str(teacher))
    weights = AutoModelForCausalLM.from_pretrained(teacher)
    assert found["weight_bytes"] == sum(weight.nbytes for weight in weights.parameters())
    assert found["load_seconds"] > 0 < found["hash_seconds"]


def test_chats_are_measured_with_a_template_that_keeps_and_one_that_forgets(teacher: Path, tmp_path: Path, monkeypatch):
    words = ["chats", f"--teacher={teacher}", "--rows=6", "--turns=4", "--rounds=1", f"--output={tmp_path}"]
    monkeypatch.setattr(sys, "argv", words)
    chats.main()
    table = json.loads((tmp_path / "chats.json").read_text())["data"]
    assert [row["rows"] for row in table] == [6, 6, 6, 6, 6, 12]


def test_a_plan_with_much_padding_stands_beside_a_dearer_one_with_at_most_2_percent():
    rows = prefixes.rows_of("8 short completions", 64, 1000, prefixes.SPREAD)
    found = prefixes.compare_plans(rows, 8192, GPU_COST, None, 0)
    assert found["padding, %"] > 2 >= found["at most 2 %: padding, %"]
    assert found["cost"] > 1
    fitting = prefixes.compare_plans(prefixes.rows_of("8 completions", 64, 1000), 8192, CPU_COST, None, 0)
    assert fitting == {"padding, %": 0, "passes": 4, "saved, %": pytest.approx(100 * 7 * 400 / (8 * 499))}


def test_the_passes_of_a_plan_are_timed(teacher: Path):
    model = AutoModelForCausalLM.from_pretrained(teacher)
    rows = prefixes.rows_of("8 short completions", 32, 50, prefixes.SPREAD)
    found = prefixes.compare_plans(rows, 8192, CPU_COST, Teacher(model, model.config.vocab_size), 2)
    assert found["seconds"].least > 0


def test_padding_is_counted_as_worked_out_by_hand():
    lengths, batches = np.array([3, 1, 5, 5]), [[0, 1], [2, 3]]
    line = padding.line_of("TokenBatches", lengths, batches)
    assert line["padding, %"] == pytest.approx(100 * 2 / 16)
    assert (line["batches"], line["tokens, median"], line["least"], line["most, with padding"]) == (2, 7, 4, 10)
    assert padding.line_of(padding.FREE, lengths, batches)["padding, %"] == 0


def test_token_batches_hold_at_most_5_percent_of_padding(teacher: Path, tmp_path: Path, monkeypatch):
    texts = [word * number for number in range(1, 80) for word in ("words of prose ", "a longer row of many words ")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["padding", f"--teacher={teacher}", f"--dataset={tmp_path / 'rows.jsonl'}", f"--output={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [*words, "--rows=1000"])
    padding.main()
    shares = {
        (row["rows"], row["way"]): row["padding, %"]
        for row in json.loads((tmp_path / "padding.json").read_text())["data"]
    }
    assert len(shares) == 8
    for rows in ("rows.jsonl, 158", "log-normal, 1,000"):
        assert 0 <= shares[rows, "TokenBatches"] <= 5 < shares[rows, "random rows"]
        assert shares[rows, padding.FREE] == 0


def test_the_ways_of_the_students_head_give_one_loss_and_chunks_hold_less(monkeypatch: pytest.MonkeyPatch):
    num_positions, vocab_size = 64, 500
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 4 * vocab_size)
    attributes = {"capture": "topk", "vocab_size": vocab_size, "tokenizer_size": vocab_size}
    loss = DistillationLoss(SimpleNamespace(attributes=attributes, head=None))
    head = Head(weight_VD=torch.randn(vocab_size, 8, requires_grad=True), bias_V=None, scale=1.0, soft_cap=0.0)
    hidden_BTD = torch.randn(1, num_positions, 8, requires_grad=True)
    arguments = loss, head, hidden_BTD, student.make_batch(num_positions, vocab_size, k=4)
    found = [student.peak_bytes_of(way, *arguments) for way in student.WAYS.values()]
    assert [value for _, value in found] == pytest.approx(
        [loss(hidden_BTD @ head.weight_VD.T, arguments[3]).item()] * 3
    )
    plain, chunked, measured = (peak for peak, _ in found)
    assert plain > 4 * num_positions * vocab_size
    assert chunked < 4 * num_positions * vocab_size
    assert measured < 4 * num_positions * vocab_size


def test_the_benchmark_of_the_students_head_compares_every_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(student, "HEADS", {"tiny": (300, 8)})
    monkeypatch.setattr(sys, "argv", ["student", "--positions=16", "--top_k=4", "--rounds=1", f"--output={tmp_path}"])
    student.main()
    report = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if "tiny" in line]
    by_kind: dict[str, list[float]] = {}
    for _, kept, *_, value in rows:
        by_kind.setdefault(kept, []).append(float(value))
    assert by_kind.keys() >= {"top 4", "hidden states"}
    for values in by_kind.values():
        assert values == pytest.approx([values[0]] * len(values), rel=1e-4)
