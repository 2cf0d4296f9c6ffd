"""Records of rows: their bytes, their file, and the export for MaxText."""

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from logitgen import DistillationLoss, LogitsDataset, LogitsFile, UsageError, collate
from logitgen.__main__ import main
from logitgen.student.export import export
from logitgen.student.records import tf_example, write_records

Capture = Callable[..., Path]

ROWS = [
    {"inputs": np.array([5, 300], "<u2"), "top_k_logits": np.array([[-1, -2], [0, 0]], "<f2")},
    {"inputs": np.arange(1000), "top_k_logits": np.linspace(-9, 0, 1000, dtype="<f4")},
]


def parts(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Read a protobuf message whose fields all have a length."""
    while message:
        tag, length = message[0], 0
        for place, byte in enumerate(message[1:]):
            length |= (byte & 127) << 7 * place
            if byte < 128:
                break
        start = place + 2
        assert tag & 7 == 2
        yield tag >> 3, message[start : start + length]
        message = message[start + length :]


def integers(content: bytes) -> list[int]:
    """Read packed varints."""
    found, bits = [0], 0
    for byte in content:
        found[-1] |= (byte & 127) << bits
        bits += 7
        if byte < 128:
            found.append(0)
            bits = 0
    return found[:-1]


def read_example(record: bytes) -> dict[str, list[Any]]:
    """Read a `tf.train.Example` as feature.proto lays it out: features, by name a float_list (2) or int64_list (3)."""
    ((field, features),) = parts(record)
    assert field == 1
    found = {}
    for _, entry in parts(features):
        (_, name), (_, feature) = parts(entry)
        ((kind, numbers),) = parts(feature)
        ((_, content),) = parts(numbers)
        found[name.decode()] = {2: lambda c: np.frombuffer(c, "<f4").tolist(), 3: integers}[kind](content)
    return found


def test_the_bytes_of_a_record_are_those_worked_out_by_hand() -> None:
    record = tf_example(ROWS[0])
    inputs = b"\x0a\x06inputs" + b"\x12\x07" + b"\x1a\x05" + b"\x0a\x03" + b"\x05" + b"\xac\x02"  # 300 = 2 * 128 + 44
    floats = bytes.fromhex("000080bf 000000c0 00000000 00000000")
    logits = b"\x0a\x0ctop_k_logits" + b"\x12\x14" + b"\x12\x12" + b"\x0a\x10" + floats
    assert record == b"\x0a\x39" + b"\x0a\x11" + inputs + b"\x0a\x24" + logits


@given(
    ids=npst.arrays(np.int64, st.integers(1, 200), elements=st.integers(0, 2**35 - 1)),
    logits=npst.arrays(np.float32, npst.array_shapes(max_dims=2), elements=st.floats(-1e4, 0, width=32)),
)
def test_a_record_holds_every_number(ids: np.ndarray, logits: np.ndarray) -> None:
    assert read_example(tf_example({"ids": ids, "logits": logits})) == {
        "ids": ids.tolist(),
        "logits": logits.ravel().tolist(),
    }


def test_array_record_reads_the_file(tmp_path: Path) -> None:
    module = pytest.importorskip("array_record.python.array_record_module")
    write_records(ROWS, tmp_path / "rows.array_record")
    reader = module.ArrayRecordReader(str(tmp_path / "rows.array_record"))
    assert reader.num_records() == 2
    assert reader.read([1, 0]) == [tf_example(ROWS[1]), tf_example(ROWS[0])]
    reader.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_in_a_few_words() -> None:
    pytest.importorskip("array_record.python.array_record_module")
    with pytest.raises(OSError, match=r"^write\(\) failed: No space left on device$"):
        write_records(ROWS, Path("/dev/full"))


def test_without_array_record_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], packed: Path
) -> None:
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    assert main(["export", str(packed), str(tmp_path / "rows.array_record"), "--format", "maxtext"]) == 2
    error = capsys.readouterr().err
    assert "needs array_record. Install it (pip install array_record), or" in " ".join(error.split())
    assert "Traceback" not in error
    assert not list(tmp_path.glob("*rows*"))


# MaxText.


@pytest.fixture
def packed(capture: Capture, teacher: Path, ragged: Path) -> Path:
    return capture(teacher=teacher, dataset=ragged, packing=True, max_length=33, top_k=8)


@pytest.fixture
def pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for array_record that pickles its records, where that package need not be."""

    class Writer:
        def __init__(self, path: str, options: str) -> None:
            self.path, self.records = Path(path), []
            assert options == "group_size:1"

        def write(self, record: bytes) -> None:
            self.records.append(record)

        def close(self) -> None:
            self.path.write_bytes(pickle.dumps(self.records))

    names = ["array_record", "array_record.python", "array_record.python.array_record_module"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].ArrayRecordWriter = Writer


def exported(path: Path, folder: Path) -> list[dict[str, np.ndarray]]:
    """Export a file, and read its rows as MaxText's ParseFeatures does: flat lists, folded at the length of inputs."""
    export(LogitsFile(path), folder / "rows.array_record", "maxtext")
    found = []
    for record in pickle.loads((folder / "rows.array_record").read_bytes()):
        lists = read_example(record)
        num_tokens = len(lists["inputs"])
        found.append(
            {
                "inputs": np.array(lists["inputs"], np.int32),
                "top_k_logits": np.array(lists["top_k_logits"], np.float32).reshape(num_tokens, -1),
                "top_k_indices": np.array(lists["top_k_indices"], np.int32).reshape(num_tokens, -1),
            }
        )
    return found


@pytest.mark.usefixtures("pickled")
@pytest.mark.parametrize("encoding", ["plain", "packed16", "packed"])
def test_maxtexts_features_are_the_tokens_and_the_kept_values(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, encoding: str
) -> None:
    path = capture(teacher=teacher, dataset=ragged, top_k=8, encoding=encoding)
    file, rows = LogitsFile(path), exported(path, tmp_path)
    with_positions = [kept for kept in map(file.row, range(len(file))) if len(kept["positions"])]
    for row, kept in zip(rows, with_positions, strict=True):
        assert row["inputs"].tolist() == kept["input_ids"].tolist()
        assert row["top_k_indices"].tolist() == [*kept["kept_ids"].tolist(), [0] * 8]
        assert row["top_k_logits"].tolist() == [*kept["kept_logprobs"].astype(float).tolist(), [0.0] * 8]


@pytest.mark.usefixtures("pickled")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_maxtexts_loss_over_the_features_is_that_of_the_file(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, temperature: float
) -> None:
    """As its `compute_loss` does it: both sides renormalised over the top k, entry t against the student's output at t.

    The sum over all positions, the last of each row too, as its packing has it: the student cannot tell them apart.
    """
    path = capture(teacher=teacher, dataset=ragged, top_k=8)
    rows, dataset = exported(path, tmp_path), LogitsDataset(path)
    student_VV = torch.randn(384, 384, generator=torch.Generator().manual_seed(0)).double()
    whole = collate(dataset[:])
    loss = DistillationLoss(dataset, tail="ignore", temperature=temperature)
    expected = loss(student_VV[whole["input_ids"]], whole).item() * int(whole["captured"].sum())

    def total(shift: int) -> float:
        summed = 0.0
        for row in rows:
            logits_TV = student_VV[torch.from_numpy(row["inputs"])].roll(shift, 0)
            student_TK = logits_TV.gather(-1, torch.from_numpy(row["top_k_indices"]).long())
            student_TK = (student_TK / temperature).log_softmax(-1)
            teacher_TK = (torch.from_numpy(row["top_k_logits"]).double() / temperature).log_softmax(-1)
            summed += (teacher_TK.exp() * (teacher_TK - student_TK)).sum().item() * temperature**2
        return summed

    assert total(0) == pytest.approx(expected, rel=1e-9)
    assert total(1) != pytest.approx(expected, rel=1e-3)


@pytest.mark.usefixtures("pickled")
def test_maxtext_takes_no_rows_of_which_it_would_train_positions_that_are_not_captured(
    capture: Capture, teacher: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a" * 9, "completion": "and so on"}] * 3)
    file = LogitsFile(capture(teacher=teacher, dataset=data, completion_only=True))
    lacking = sum(len(row["input_ids"]) - 1 - len(row["positions"]) for row in map(file.row, range(3)))
    with pytest.raises(UsageError, match=rf"all positions captured, .* lacks {lacking}\. Capture without --completion"):
        export(file, tmp_path / "rows.array_record", "maxtext")
    assert lacking > 0
    assert not (tmp_path / "rows.array_record").exists()


def test_maxtext_takes_no_drawn_tokens(capture: Capture, teacher: Path, ragged: Path, tmp_path: Path) -> None:
    file = LogitsFile(capture(teacher=teacher, dataset=ragged, capture="sample", top_k=8))
    with pytest.raises(UsageError, match=r"The export for maxtext needs a file of --capture topk, .* sample"):
        export(file, tmp_path / "rows.array_record", "maxtext")


@pytest.mark.usefixtures("pickled")
def test_maxtexts_rows_are_in_a_file_of_its_ending(packed: Path, tmp_path: Path) -> None:
    for name in ("rows", "rows.parquet"):
        with pytest.raises(UsageError, match=rf"for maxtext must end in \.array_record, got {name}\."):
            export(LogitsFile(packed), tmp_path / name, "maxtext")
    (tmp_path / "rows.array_record").write_text("mine")
    with pytest.raises(UsageError, match=r"exists already\. Name another output"):
        export(LogitsFile(packed), tmp_path / "rows.array_record", "maxtext")


@pytest.mark.usefixtures("pickled")
def test_rows_with_nothing_captured_are_left_out_and_the_command_says_so(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = capture(teacher=teacher, dataset=ragged, top_k=8), tmp_path / "rows.array_record"
    lengths = np.diff(LogitsFile(path).arrays["offsets"])
    assert sorted(lengths)[:4] == [0, 0, 1, 2]
    assert main(["export", str(path), str(output), "--format", "maxtext"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Exported 50 rows to" in said
    assert said.endswith("Nothing is captured of 3 rows.")
    assert len(pickle.loads(output.read_bytes())) == 50


def test_array_record_reads_what_the_command_exports(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = pytest.importorskip("array_record.python.array_record_module")
    output, file = tmp_path / "rows.array_record", LogitsFile(packed)
    assert main(["export", str(packed), str(output), "--format", "maxtext"]) == 0
    assert f"Exported {len(file)} rows to" in capsys.readouterr().out
    reader = module.ArrayRecordReader(str(output))
    assert [read_example(record)["inputs"] for record in reader.read_all()] == [
        file.row(number)["input_ids"].tolist() for number in range(len(file))
    ]
    reader.close()


def test_maxtexts_example_has_what_its_loader_needs() -> None:
    """Of 0.2.4: `configs/types.py`, and `train_distill.py`, whose `offline_data_dir` replaces `grain_train_files`."""
    text = (ROOT / "examples" / "maxtext.yml").read_text()
    config = yaml.safe_load(text)
    assert f" export teacher.h5 {config['offline_data_dir']} --format maxtext\n" in text
    assert config["grain_train_files"] == config["offline_data_dir"]
    assert (config["dataset_type"], config["grain_file_type"]) == ("grain", "arrayrecord")
    assert (config["train_data_columns"], config["tokenize_train_data"]) == (["inputs"], False)
    assert config["base_config"] == "post_train/distillation.yml"
