"""The file as a torch dataset: items, batches, worker processes."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_llama, make_tokenizer, write_jsonl
from files import ARRAYS, ATTRIBUTES, FULL, write_file
from launches import imported_by
from tokenizers import Tokenizer, models
from torch.utils.data import ConcatDataset, DataLoader, Subset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import logitgen
from logitgen import DistillationLoss, FormatError, LogitsDataset, UsageError, collate, distil
from logitgen.student.dataset import IGNORED_LABEL, check_ids

Capture = Callable[..., Path]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_file(tmp_path / "out.h5")


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(left) == list(right)
    for name, values in left.items():
        assert values.dtype == right[name].dtype
        assert torch.equal(values, right[name]), name


def test_items_are_tensors_a_model_takes(path: Path) -> None:
    dataset = LogitsDataset(str(path))
    assert len(dataset) == 3
    row = dataset[2]
    assert {name: (values.dtype, list(values.shape)) for name, values in row.items()} == {
        "input_ids": (torch.int64, [5]),
        "positions": (torch.int64, [2]),
        "logsumexp": (torch.float32, [2]),
        "target_logprob": (torch.float32, [2]),
        "kept_ids": (torch.int64, [2, 2]),
        "kept_logprobs": (torch.float32, [2, 2]),
    }
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert row["positions"].tolist() == [1, 3]
    assert row["logsumexp"].tolist() == [5.5, 6.5]
    assert row["target_logprob"].tolist() == [-0.5, -0.5]
    assert row["kept_ids"].tolist() == [[7, 0], [9, 1]]
    assert row["kept_logprobs"].tolist() == [[-0.5, -3], [-0.5, -1.25]]


def test_items_of_a_full_capture_hold_all_logits(tmp_path: Path) -> None:
    row = LogitsDataset(write_file(tmp_path / "out.h5", FULL, capture="full", top_k=0))[0]
    assert row["logits"].dtype == torch.float32
    assert row["logits"].tolist() == [list(range(10)), list(range(10, 20))]
    assert "kept_ids" not in row


def test_ids_above_16_bits_stay_what_they_are(tmp_path: Path) -> None:
    ids = np.array([0, 65_535, 65_536, 131_071, 131_072, 199_999, 1, 2, 3], "<u4")
    kept = np.array([[199_999, 0], [65_536, 1], [131_072, 2], [70_000, 3]], "<u4")
    path = write_file(tmp_path / "out.h5", ARRAYS | {"input_ids": ids, "kept_ids": kept}, vocab_size=200_000)
    dataset = LogitsDataset(path)
    assert torch.cat([row["input_ids"] for row in dataset]).tolist() == ids.tolist()
    assert torch.cat([row["kept_ids"] for row in dataset]).tolist() == kept.tolist()


def test_a_changed_item_leaves_the_file_alone(path: Path) -> None:
    dataset = LogitsDataset(path)
    for values in dataset[0].values():
        values.zero_()
    assert dataset[0]["input_ids"].tolist() == [1, 2, 3]
    assert dataset[0]["target_logprob"].tolist() == [-1, -2]


def test_rows_can_be_counted_from_the_end_and_iterated_over(path: Path) -> None:
    dataset = LogitsDataset(path)
    assert dataset[-1]["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert [row["input_ids"].tolist() for row in dataset] == [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    with pytest.raises(IndexError, match=r"Row must be between 0 and 2, got 3\."):
        dataset[3]


def test_the_dataset_knows_the_run_that_made_the_file(path: Path) -> None:
    dataset = LogitsDataset(path)
    assert dataset.attributes["teacher"] == "some/teacher"
    assert dataset.settings == ATTRIBUTES["settings"]


def test_an_incomplete_file_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "out.h5", ARRAYS | {"done": np.array([0, 0, 1], "u1")})
    with pytest.raises(FormatError, match="2 of 3 rows are missing"):
        LogitsDataset(path)


def test_a_batch_is_padded_as_worked_out_by_hand(path: Path) -> None:
    batch = collate(list(LogitsDataset(path)), pad_token_id=99)
    expected: dict[str, Any] = {
        "input_ids": [[1, 2, 3, 99, 99], [4, 99, 99, 99, 99], [5, 6, 7, 8, 9]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
        "captured": [[True, True, False, False, False], [False] * 5, [False, True, False, True, False]],
        "labels": [[-100, 2, 3, -100, -100], [-100] * 5, [-100, -100, 7, -100, 9]],
        "logsumexp": [[3.5, 4.5, 0, 0, 0], [0] * 5, [0, 5.5, 0, 6.5, 0]],
        "target_logprob": [[-1, -2, 0, 0, 0], [0] * 5, [0, -0.5, 0, -0.5, 0]],
        "kept_ids": [
            [[2, 7], [9, 3], [0, 0], [0, 0], [0, 0]],
            [[0, 0]] * 5,
            [[0, 0], [7, 0], [0, 0], [9, 1], [0, 0]],
        ],
        "kept_logprobs": [
            [[-1, -1.25], [-0.25, -2], [0, 0], [0, 0], [0, 0]],
            [[0, 0]] * 5,
            [[0, 0], [-0.5, -3], [0, 0], [-0.5, -1.25], [0, 0]],
        ],
    }
    assert {name: values.tolist() for name, values in batch.items()} == expected
    dtypes = {name: values.dtype for name, values in batch.items()}
    whole = {"input_ids", "attention_mask", "labels", "kept_ids"}
    assert {name for name, dtype in dtypes.items() if dtype == torch.int64} == whole
    assert dtypes["captured"] == torch.bool
    assert {dtypes[name] for name in ("logsumexp", "target_logprob", "kept_logprobs")} == {torch.float32}


def test_a_batch_free_of_padding_is_one_row_as_worked_out_by_hand(path: Path) -> None:
    batch = collate(list(LogitsDataset(path)), padding_free=True)
    captured, nothing = [[2, 7], [9, 3], [7, 0], [9, 1]], [0, 0]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4]]
    assert batch["position_ids"].dtype == torch.int64
    assert batch["captured"].int().tolist() == [[1, 1, 0, 0, 0, 1, 0, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100, -100, 7, -100, 9]]
    assert batch["kept_ids"].tolist() == [
        [*captured[:2], nothing, nothing, nothing, captured[2], nothing, captured[3], nothing]
    ]
    assert batch["logsumexp"].tolist() == [[3.5, 4.5, 0, 0, 0, 5.5, 0, 6.5, 0]]
    assert "attention_mask" not in batch


def test_a_batch_free_of_padding_is_as_trl_and_transformers_make_it(path: Path) -> None:
    """Theirs have no captured positions, so every token but a row's first is a label."""
    rows = list(LogitsDataset(path))
    batch = collate(rows, padding_free=True)
    examples = [{"input_ids": row["input_ids"].tolist()} for row in rows]
    for theirs in (
        DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(examples),
        DataCollatorWithFlattening()(examples),
    ):
        for name in ("input_ids", "position_ids"):
            assert torch.equal(batch[name], theirs[name])
        labelled = batch["labels"] != IGNORED_LABEL
        assert torch.equal(batch["labels"][labelled], theirs["labels"][labelled])
        assert "attention_mask" not in theirs


def test_lengths_are_those_of_the_rows_of_all_files(path: Path) -> None:
    dataset = LogitsDataset([path, path])
    assert dataset.lengths.tolist() == [len(row["input_ids"]) for row in dataset] == [3, 1, 5, 3, 1, 5]


def test_rows_are_cut_with_their_positions_as_worked_out_by_hand(path: Path) -> None:
    dataset = LogitsDataset(path, max_length=3)
    assert dataset.lengths.tolist() == [len(row["input_ids"]) for row in dataset] == [3, 1, 3]
    row = dataset[2]
    assert row["input_ids"].tolist() == [5, 6, 7]
    assert row["positions"].tolist() == [1]  # the position 3 predicts a token that is gone
    assert row["kept_ids"].tolist() == [[7, 0]]
    assert row["target_logprob"].tolist() == [-0.5]
    assert_equal(dataset[0], LogitsDataset(path)[0])
    shorter = LogitsDataset(path, max_length=2)[2]
    assert (shorter["input_ids"].tolist(), shorter["kept_logprobs"].shape) == ([5, 6], (0, 2))


def test_a_cut_row_is_that_of_a_capture_of_shorter_rows(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path
) -> None:
    options = {"teacher": teacher, "dataset": ragged, "top_k": 4}
    cut = LogitsDataset(capture(**options, output=tmp_path / "whole.h5"), max_length=20)
    short = LogitsDataset(capture(**options, max_length=20, overflow="truncate", output=tmp_path / "short.h5"))
    assert len(cut) == len(short)
    for left, right in zip(cut, short, strict=True):
        for name in ("input_ids", "positions"):
            assert torch.equal(left[name], right[name])
        torch.testing.assert_close(left["kept_logprobs"], right["kept_logprobs"], atol=1e-2, rtol=0)


def test_no_row_can_be_cut_to_nothing(path: Path) -> None:
    with pytest.raises(UsageError, match=r"max_length must be at least 1, got 0\. None leaves"):
        LogitsDataset(path, max_length=0)


def first_tokens(dataset: LogitsDataset) -> list[int]:
    return [int(row["input_ids"][0]) for row in dataset]


def test_slices_and_selections_are_datasets_of_their_own(path: Path) -> None:
    dataset = LogitsDataset([path, path], max_length=4)
    assert first_tokens(dataset) == [1, 4, 5, 1, 4, 5]
    assert first_tokens(dataset[1:3]) == [4, 5]
    assert first_tokens(dataset[::-2]) == [5, 1, 4]
    chosen = dataset.select([5, 0, -2])
    assert first_tokens(chosen) == [5, 1, 4]
    assert chosen.lengths.tolist() == [4, 3, 1]
    assert first_tokens(chosen[1:].select([1])) == [4]
    assert chosen.attributes == dataset.attributes
    assert len(dataset) == 6
    long = dataset.select(np.flatnonzero(dataset.lengths >= 3))
    assert first_tokens(long) == [1, 5, 1, 5]
    copy = pickle.loads(pickle.dumps(long))
    assert (first_tokens(copy), copy.max_length) == ([1, 5, 1, 5], 4)
    assert collate(dataset[0:3])["input_ids"].shape == (3, 4)
    for outside in (3, -4):
        with pytest.raises(IndexError, match=f"Row must be between 0 and 2, got {outside}"):
            chosen.select([0, outside])
        with pytest.raises(IndexError, match=f"Row must be between 0 and 2, got {outside}"):
            chosen[outside]


def test_a_split_divides_the_rows_by_its_seed_alone(path: Path) -> None:
    dataset = LogitsDataset([path] * 7)
    first, second = dataset.split(0.9, seed=1)
    assert (len(first), len(second)) == (19, 2)
    assert np.sort([*first._rows, *second._rows]).tolist() == list(range(21))
    assert np.diff(first._rows).min() > 0
    assert first._rows.tolist() == dataset.split(0.9, seed=1)[0]._rows.tolist()
    assert first._rows.tolist() != dataset.split(0.9, seed=2)[0]._rows.tolist()
    with pytest.raises(UsageError, match=r"share must be between 0 and 1, got 90\."):
        dataset.split(90)


def test_the_loss_takes_subsets_and_concatenations_of_torch(path: Path, tmp_path: Path) -> None:
    dataset = LogitsDataset(path)
    logits, batch = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(0)), collate(list(dataset))
    expected = DistillationLoss(dataset)(logits, batch)
    for made in (Subset(dataset, [0]), ConcatDataset([Subset(dataset[:2], [1]), dataset]), Subset(dataset[1:], [0])):
        assert DistillationLoss(made)(logits, batch).item() == expected.item()
    other = LogitsDataset(write_file(tmp_path / "other.h5", teacher_fingerprint="f" * 64))
    with pytest.raises(FormatError, match=r"other\.h5 must have the teacher_fingerprint of .*out\.h5"):
        DistillationLoss(ConcatDataset([dataset, other]))


def test_rows_whose_positions_were_all_cut_leave_the_mean_alone(path: Path) -> None:
    whole, rows = LogitsDataset(path), list(LogitsDataset(path, max_length=2))
    assert [row["positions"].tolist() for row in rows] == [[0], [], []]
    logits = torch.randn(3, 2, 10, generator=torch.Generator().manual_seed(0))
    alone = {name: values[:1] for name, values in whole[0].items() if name not in ("input_ids", "positions")}
    alone |= {"input_ids": torch.tensor([1, 2]), "positions": torch.tensor([0])}
    loss = DistillationLoss(whole)
    assert loss(logits, collate(rows)).item() == pytest.approx(loss(logits[:1], collate([alone])).item())
    assert loss(logits[1:, :2], collate(rows[1:])).item() == 0


def test_an_empty_batch_is_refused(path: Path) -> None:
    for rows in ([], LogitsDataset(path)[:0]):
        with pytest.raises(UsageError, match=r"A batch needs at least one row, got none\. Leave"):
            collate(rows)


def test_rows_cut_by_hand_in_one_place_are_refused(path: Path) -> None:
    row = LogitsDataset(path)[2]
    with pytest.raises(UsageError, match=r"A row of 4 tokens must have positions below 3, got 3\. Cut rows with"):
        collate([row | {"input_ids": row["input_ids"][:4]}])
    with pytest.raises(UsageError, match=r"A row of 1 positions must have as many logsumexp, got 2\. Cut rows with"):
        collate([row | {"positions": row["positions"][:1]}])


def test_a_batch_of_nothing_but_a_row_without_positions_captures_nothing(path: Path) -> None:
    batch = collate([LogitsDataset(path)[1]])
    assert batch["input_ids"].tolist() == [[4]]
    assert batch["labels"].tolist() == [[-100]]
    assert not batch["captured"].any()
    assert batch["kept_ids"].shape == (1, 1, 2)


def test_padding_is_token_0_unless_told(path: Path) -> None:
    batch = collate([LogitsDataset(path)[1], LogitsDataset(path)[0]])
    assert batch["input_ids"].tolist() == [[4, 0, 0], [1, 2, 3]]


def test_a_batch_is_aligned_with_a_students_logits(capture: Capture, teacher: Path, ragged: Path) -> None:
    dataset = LogitsDataset(capture(teacher=teacher, dataset=ragged, top_k=4))
    batch = collate([dataset[row] for row in (3, 20, 1, 9)])
    student = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        output = student(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    captured = batch["captured"]
    assert output.loss.item() == pytest.approx(-batch["target_logprob"][captured].mean().item(), rel=1e-4)
    logprobs = output.logits.log_softmax(-1).gather(-1, batch["kept_ids"])[captured]
    torch.testing.assert_close(logprobs, batch["kept_logprobs"][captured], atol=1e-3, rtol=2**-11)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_worker_processes_give_the_same_batches(
    capture: Capture, teacher: Path, ragged: Path, start_method: str
) -> None:
    dataset = LogitsDataset(capture(teacher=teacher, dataset=ragged, top_k=3))
    alone = list(DataLoader(dataset, batch_size=8, collate_fn=collate))
    workers = {"num_workers": 2, "multiprocessing_context": start_method}
    together = list(DataLoader(dataset, batch_size=8, collate_fn=collate, **workers))
    assert len(alone) == len(together) == 7
    for left, right in zip(alone, together, strict=True):
        assert_equal(left, right)


def test_a_pickled_dataset_is_its_path(path: Path) -> None:
    dataset = LogitsDataset(path)
    pickled = pickle.dumps(dataset)
    copy = pickle.loads(pickled)
    assert len(pickled) < 1000
    assert copy.attributes == dataset.attributes
    for left, right in zip(copy, dataset, strict=True):
        assert_equal(left, right)


def test_a_pickled_dataset_opens_in_another_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    dataset = LogitsDataset(path.name)
    monkeypatch.chdir("/")
    assert len(pickle.loads(pickle.dumps(dataset))) == 3


def test_several_files_are_read_as_one(capture: Capture, teacher: Path, ragged: Path, tmp_path: Path) -> None:
    options = {"teacher": teacher, "dataset": ragged, "top_k": 8}
    whole = LogitsDataset(capture(**options, output=tmp_path / "whole.h5"))
    parts = [
        capture(**options, split=f"train[{start}:{end}]", output=tmp_path / f"{start}.h5")
        for start, end in ((0, 20), (20, 21), (21, 53))
    ]
    joined = LogitsDataset(parts)
    assert len(joined) == len(whole)
    for number in (*range(len(whole)), -1, -len(whole)):
        for name, values in whole[number].items():
            tolerance = 0 if name in ("input_ids", "positions", "kept_ids") else 1e-2
            torch.testing.assert_close(joined[number][name], values, rtol=0, atol=tolerance)
    copy = pickle.loads(pickle.dumps(joined))
    assert [row["input_ids"].tolist() for row in copy] == [row["input_ids"].tolist() for row in whole]
    for outside in (len(whole), -len(whole) - 1):
        with pytest.raises(IndexError, match=f"between 0 and {len(whole) - 1}, got {outside}"):
            joined[outside]


@pytest.mark.parametrize("name", ["teacher_fingerprint", "tokenizer_fingerprint"])
def test_files_of_another_teacher_are_not_joined(path: Path, tmp_path: Path, name: str) -> None:
    other = write_file(tmp_path / "other.h5", **{name: "f" * 64})
    with pytest.raises(FormatError, match=rf"other\.h5 must have the {name} of .*out\.h5: expected .*, got f{{64}}\."):
        LogitsDataset([path, other])


@pytest.mark.parametrize(("name", "value"), [("teacher_dtype", "float16"), ("quantization", '{"bits": 4}')])
def test_files_of_a_teacher_that_computed_otherwise_are_not_joined(
    path: Path, tmp_path: Path, name: str, value: str
) -> None:
    other = write_file(tmp_path / "other.h5", **{name: value})
    with pytest.raises(FormatError, match=rf"other\.h5 must have the {name} of .*, got {re.escape(value)}\."):
        LogitsDataset([path, other])


def test_files_of_a_teacher_with_another_configuration_are_not_joined(path: Path, tmp_path: Path) -> None:
    other = write_file(tmp_path / "other.h5", teacher_config={"model_type": "llama", "rms_norm_eps": 1e-5})
    with pytest.raises(
        FormatError, match=r"the rms_norm_eps \(teacher_config\) of .*out\.h5: expected 1e-06, got 1e-05\."
    ):
        LogitsDataset([path, other])


def test_files_that_keep_something_else_are_not_joined(path: Path, tmp_path: Path) -> None:
    other = write_file(tmp_path / "other.h5", FULL, capture="full", top_k=0)
    with pytest.raises(FormatError, match=r"must have the capture of .*out\.h5: expected topk, got full\."):
        LogitsDataset([path, other])


def test_only_the_teachers_tokenizer_is_accepted(capture: Capture, teacher: Path, ragged: Path) -> None:
    path = capture(teacher=teacher, dataset=ragged)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    dataset = LogitsDataset([path, path], tokenizer=tokenizer)
    assert pickle.loads(pickle.dumps(dataset))[:1].attributes == dataset.attributes
    assert tokenizer.pad_token is None
    tokenizer.pad_token = tokenizer.eos_token  # as most training scripts do
    assert tokenizer(["a", "a b c"], padding=True)["attention_mask"][0] != [1]
    assert LogitsDataset(path, tokenizer=tokenizer).attributes == dataset.attributes
    vocab = {token: number for number, token in enumerate(reversed(tokenizer.get_vocab()))}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [])), name_or_path="some/student")
    assert len(other) == len(tokenizer)
    with pytest.raises(
        UsageError,
        match=rf"that of the teacher {teacher}, fingerprint \w{{8}}, got some/student, fingerprint \w{{8}}\. T",
    ):
        LogitsDataset(path, tokenizer=other)


def test_no_tokenizer_is_compared_with_a_file_captured_without(tmp_path: Path) -> None:
    path = write_file(tmp_path / "out.h5", tokenizer_fingerprint="")
    with pytest.raises(UsageError, match=r"out\.h5 was captured without a tokenizer to compare with\. Leave"):
        LogitsDataset(path, tokenizer=make_tokenizer())


def test_no_file_at_all_is_refused() -> None:
    with pytest.raises(FormatError, match="at least one file, got none"):
        LogitsDataset([])


def test_training_from_a_file_needs_no_transformers(path: Path) -> None:
    code = "import sys; from logitgen import LogitsDataset, collate; collate(list(LogitsDataset(sys.argv[1])))"
    imported = imported_by(code, path)
    assert {"torch", "h5py"} <= imported
    assert imported.isdisjoint({"transformers", "accelerate", "datasets", "tokenizers", "rich"})


def test_looking_into_a_file_needs_no_torch(path: Path) -> None:
    imported = imported_by("import sys; from logitgen import LogitsFile; LogitsFile(sys.argv[1]).row(0)", path)
    assert "h5py" in imported
    assert imported.isdisjoint({"torch", "transformers", "accelerate", "datasets"})


def test_the_package_hands_out_what_it_names() -> None:
    from logitgen import errors
    from logitgen.file import reader
    from logitgen.student import batches, collate, dataset, distil, losses, measure

    origins = {
        "DistillationLoss": losses,
        "LogitsDataset": dataset,
        "collate": collate,
        "distil": distil,
        "measures": measure,
        "LogitsFile": reader,
        "Measured": measure,
        "TokenBatches": batches,
    }
    for name in logitgen.__all__:
        assert getattr(logitgen, name) is getattr(origins.get(name, errors), name)
    with pytest.raises(AttributeError, match="module 'logitgen' has no attribute 'nonsense'"):
        logitgen.nonsense  # noqa: B018


def test_tokens_that_a_student_does_not_know_are_refused(capture: Capture, teacher: Path, tmp_path: Path) -> None:
    """Where they are in rows that it is trained on, and not cut off."""
    rows = [[5, 6, 7], [5, 300, 6], [5, 6, 350, 4], [], [7, 8]]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in rows])
    dataset = LogitsDataset(capture(teacher=teacher, dataset=data))
    assert dataset.largest_id() == 350
    message = r"The rows must have tokens below the student's 320, got 350\. Enlarge the student's embeddings"
    for part in (dataset, dataset[2:3], ConcatDataset([dataset[:1], dataset]), Subset(dataset, [0, 2])):
        with pytest.raises(UsageError, match=message):
            check_ids(part, 320)
    check_ids(dataset, 351)
    check_ids(dataset[:2], 320)
    check_ids(Subset(dataset, [0, 1, 3]), 320)
    check_ids(ConcatDataset([dataset[:2], dataset[3:]]), 320)
    check_ids(LogitsDataset(tmp_path / "out.h5", max_length=2), 320)


def test_no_token_is_read_where_the_student_knows_all(
    capture: Capture, teacher: Path, ragged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = LogitsDataset(capture(teacher=teacher, dataset=ragged, limit=5))
    monkeypatch.setattr(LogitsDataset, "largest_id", None)
    check_ids(dataset, 384)


def test_a_student_that_lacks_tokens_is_refused_before_it_trains(
    capture: Capture, teacher: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": [5, 6, 370, 7]}])
    dataset = LogitsDataset(capture(teacher=teacher, dataset=data))
    with pytest.raises(UsageError, match=r"tokens below the student's 360, got 370"):
        distil(make_llama(360), dataset)
