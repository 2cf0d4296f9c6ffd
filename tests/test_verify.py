"""What `verify` finds in a file: every flipped bit, and, behind a right checksum, every value that cannot be."""

import dataclasses
import math
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import make_llama, make_tokenizer, save_teacher, write_jsonl

from logitgen import CaptureError, FormatError, LogitsFile, generate
from logitgen.__main__ import MAX_PROBLEMS, main
from logitgen.file import layout as schema
from logitgen.file.drawn import DrawnPacking
from logitgen.file.verify import problems

Capture = Callable[..., Path]
Arrays = dict[str, np.ndarray]

ROWS = [[1, 2, 3], [], [5], [9, 8, 7, 6, 5], [2, 4, 6]]
"""With next tokens only rows 0, 3 and 4 have captured positions: 2, 4 and 2 of them."""
EDITED = 3
TOKEN, POSITION = 4, 2
"""Where row 3 begins among the tokens, and among the captured positions; the token after it is 8."""
SEALED = (
    "input_ids",
    "positions",
    "logsumexp",
    "target_logprob",
    "kept",
    "kept_ids",
    "kept_logprobs",
    "hidden_scale",
    "hidden",
    "logits",
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in ROWS])


@pytest.fixture
def topk(capture: Capture, teacher: Path, data: Path) -> Path:
    return capture(teacher=teacher, dataset=data, top_k=3)


@pytest.fixture
def full(capture: Capture, teacher: Path, data: Path) -> Path:
    return capture(teacher=teacher, dataset=data, capture="full", output=data.with_name("full.h5"))


@pytest.fixture
def packed(capture: Capture, teacher: Path, data: Path) -> Path:
    return capture(teacher=teacher, dataset=data, top_k=3, encoding="packed", output=data.with_name("packed.h5"))


@pytest.fixture
def drawn(capture: Capture, teacher: Path, data: Path) -> Path:
    return capture(teacher=teacher, dataset=data, top_k=3, capture="sample", output=data.with_name("drawn.h5"))


@pytest.fixture
def hidden(capture: Capture, data: Path) -> Path:
    teacher = save_teacher(data.parent / "narrow", make_llama(16, hidden_size=4, intermediate_size=4), None)
    return capture(teacher=teacher, dataset=data, capture="hidden", output=data.with_name("hidden.h5"))


def writable(path: Path) -> Arrays:
    """Every dataset of a file, mapped into memory to be changed in place."""
    with h5py.File(path) as file:
        places = {name: (found.dtype, found.id.get_offset(), found.shape) for name, found in file.items()}
    return {name: np.memmap(path, dtype, "r+", place, shape) for name, (dtype, place, shape) in places.items()}


def checksum(arrays: Arrays, row: int) -> int:
    """The CRC-32 of a row as the format defines it, by zlib and by hand."""
    tokens, positions = (slice(*arrays[name][row : row + 2].tolist()) for name in ("offsets", "position_offsets"))
    found = zlib.crc32(struct.pack("<qq", row, arrays["source_row"][row]))
    for name in SEALED:
        if name in arrays:
            found = zlib.crc32(arrays[name][tokens if name == "input_ids" else positions].tobytes(), found)
    return found


def edit(path: Path, change: Callable[[Arrays], None], row: int = EDITED) -> None:
    """Change a row's values and its checksum with them, so that only a look at the values can tell."""
    arrays = writable(path)
    change(arrays)
    arrays["crc32"][row] = checksum(arrays, row)


def found(path: Path) -> list[str]:
    return list(problems(LogitsFile(path, partial=True)))


def refused(path: Path) -> bool:
    """Whether a file is not taken for right, whichever way."""
    try:
        return bool(found(path))
    except FormatError:
        return True


def flipped(good: bytes, bad: Path, bits: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for place, bit in bits:
        content = bytearray(good)
        content[place] ^= 1 << bit
        bad.write_bytes(content)
        yield place, bit


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 7},
        {"top_k": 384},
        {"capture": "full"},
        {"capture": "hidden"},
        {"capture": "hidden", "dtype": "bfloat16"},
        {"capture": "hidden", "encoding": "packed"},
        {"capture": "hidden", "dtype": "bfloat16", "encoding": "packed"},
        {"encoding": "packed", "top_k": 1},
        {"capture": "sample", "top_k": 12},
        {"capture": "sample", "top_k": 12, "encoding": "packed"},
        {"capture": "sample", "top_k": 100, "encoding": "packed16"},
        {"encoding": "packed", "top_k": 50},
        {"encoding": "packed16", "top_k": 384},
        {"packing": True, "max_length": 32, "top_k": 9},
        {"overflow": "split", "max_length": 11},
        {"dtype": "bfloat16", "top_k": 384},
    ],
    ids=lambda options: " ".join(f"{name} {value}" for name, value in options.items()),
)
def test_a_captured_file_is_proved_right(
    options: dict[str, Any], capture: Capture, teacher: Path, ragged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=ragged, **options)
    capsys.readouterr()
    num_rows = len(LogitsFile(path))
    assert found(path) == []
    assert main(["verify", str(path)]) == 0
    out = printed(capsys)
    assert f"{num_rows} expected, {num_rows} present" in out
    assert "verified: every row is present once, with the right checksum and values" in out


def test_a_file_of_completions_is_proved_right(capture: Capture, teacher: Path, tmp_path: Path) -> None:
    rows = [
        {"input_ids": [3, 1, 4, 1, 5, 9], "completion_mask": [0, 0, 1, 0, 1, 1]},
        {"input_ids": [], "completion_mask": []},
        {"input_ids": [2, 6, 5], "completion_mask": [1, 0, 0]},  # nothing predicts the first token
    ]
    path = capture(teacher=teacher, dataset=write_jsonl(tmp_path / "d.jsonl", rows), completion_only=True)
    assert LogitsFile(path).row(0)["positions"].tolist() == [1, 3, 4]
    assert found(path) == []
    assert main(["verify", str(path)]) == 0


def test_the_checksum_is_the_one_the_format_defines(
    topk: Path, full: Path, packed: Path, drawn: Path, hidden: Path
) -> None:
    for path in (topk, full, packed, drawn, hidden):
        arrays = writable(path)
        assert [checksum(arrays, row) for row in range(len(ROWS))] == arrays["crc32"].tolist()


@pytest.mark.parametrize("kind", ["topk", "packed", "hidden"])
def test_a_flipped_bit_in_any_byte_of_the_data_is_found(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(kind)
    good = path.read_bytes()
    with h5py.File(path) as file:
        start = min(dataset.id.get_offset() for dataset in file.values())
    assert not refused(path)
    draw = random.Random(0)
    bits = ((place, bit) for place in range(start, len(good)) for bit in draw.sample(range(8), 1))
    bad = tmp_path / "bad.h5"
    assert [at for at in flipped(good, bad, bits) if not refused(bad)] == []


def test_every_flipped_bit_before_hdf5s_structures_is_found(topk: Path, tmp_path: Path) -> None:
    good, bad = topk.read_bytes(), tmp_path / "bad.h5"
    bits = ((place, bit) for place in range(512) for bit in (range(8) if good[place] else [place % 8]))
    assert [at for at in flipped(good, bad, bits) if not refused(bad)] == []


def test_flipped_bits_anywhere_give_a_status_that_is_not_0(full: Path, tmp_path: Path) -> None:
    good, bad = full.read_bytes(), tmp_path / "bad.h5"
    draw = random.Random(0)
    bits = ((draw.randrange(len(good)), draw.randrange(8)) for _ in range(400))
    statuses = [(at, main(["verify", str(bad)])) for at in flipped(good, bad, bits)]
    assert [at for at, status in statuses if status not in (1, 2)] == []


def test_a_file_that_ends_too_early_is_found(topk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = topk.read_bytes(), tmp_path / "bad.h5"
    for size in (*range(0, len(good) - 100, 1009), *range(len(good) - 100, len(good))):
        bad.write_bytes(good[:size])
        with pytest.raises(FormatError, match=r"is truncated|is not a logitgen file"):
            LogitsFile(bad, partial=True)
    capsys.readouterr()
    assert main(["verify", str(bad)]) == 2
    assert f"error: {bad} is truncated. Copy it again." in printed(capsys)


@pytest.mark.parametrize("also", [[], ["source_row"]], ids=["", "with the rows they come from"])
def test_two_rows_that_changed_places_are_found(topk: Path, also: list[str]) -> None:
    arrays = writable(topk)
    swaps = {"crc32": ([0], [4]), "input_ids": (slice(0, 3), slice(9, 12))} | {name: ([0], [4]) for name in also}
    swaps |= {name: (slice(0, 2), slice(6, 8)) for name in SEALED[1:] if name in arrays}
    for name, (left, right) in swaps.items():
        arrays[name][left], arrays[name][right] = arrays[name][right].copy(), arrays[name][left].copy()
    assert [line.partition(" has checksum ")[0] for line in found(topk)] == ["row 0", "row 4"]


def test_a_row_that_is_said_to_come_from_elsewhere_is_found(topk: Path) -> None:
    writable(topk)["source_row"][1] = 7
    (line,) = found(topk)
    assert line.startswith("row 1 has checksum ")
    assert line.endswith(f", expected {writable(topk)['crc32'][1]:08x}")


def test_offsets_that_run_backwards_are_found(topk: Path) -> None:
    writable(topk)["offsets"][2] = 9
    writable(topk)["position_offsets"][4] = 0
    assert found(topk) == ["offsets is not ascending", "position_offsets is not ascending"]


def test_a_done_flag_that_is_neither_0_nor_1_is_found(topk: Path) -> None:
    writable(topk)["done"][2] = 3
    assert found(topk) == ["row 2 has a done flag of 3"]


def test_every_attribute_is_protected(topk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.h5"
    attributes = dict(h5py.File(topk).attrs)
    for name, value in attributes.items():
        bad.write_bytes(topk.read_bytes())
        with h5py.File(bad, "r+") as file:
            file.attrs.modify(name, np.bytes_(value[:-1] + b"~") if isinstance(value, bytes) else value + 1)
        with pytest.raises(FormatError, match=r"is damaged: its head does not match its checksum\. Copy"):
            LogitsFile(bad, partial=True)
        assert main(["verify", str(bad)]) == 2
    assert set(attributes) == set(schema.ATTRIBUTES)


def test_an_attribute_that_was_added_is_found(topk: Path) -> None:
    with h5py.File(topk, "r+") as file:
        file.attrs["note"] = "mine"
    with pytest.raises(FormatError, match="is damaged: its head does not match its checksum"):
        LogitsFile(topk, partial=True)


def test_bytes_after_the_end_are_found(topk: Path) -> None:
    with topk.open("ab") as file:
        file.write(b"more")
    assert refused(topk)


def test_a_file_written_by_hdf5_alone_is_no_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file.attrs["format"] = "logitgen"
    assert main(["verify", str(tmp_path / "foreign.h5")]) == 2
    assert "is not a logitgen file: it has another signature" in printed(capsys)


def put(name: str, place: Any, value: Any) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name][place] = value

    return change


def put_all(*changes: Callable[[Arrays], None]) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        for one in changes:
            one(arrays)

    return change


def exchange_kept(arrays: Arrays) -> None:
    for name in ("kept_ids", "kept_logprobs"):
        arrays[name][POSITION] = arrays[name][POSITION][::-1].copy()


ROW = slice(POSITION, POSITION + 4)
KEPT_RANGE = "has kept_logprobs that are not finite, above 0 or not descending"
TOO_MUCH_MASS = "has a position whose probabilities sum to more than 1"
KEPT_IDS = "has kept_ids that repeat or exceed 383"
POSITIONS = "has positions that are not ascending between 0 and 3"
TARGET = "has a target_logprob that is not finite or above 0"
NOT_ITS_TARGET = "has a target_logprob that differs from kept_logprobs"
OTHERS = put("kept_ids", POSITION, [100, 101, 102])
"""What is kept at row 3's first position, the target 8 not among it."""


def with_target(kept: float, target: float) -> Callable[[Arrays], None]:
    return put_all(
        put("kept_ids", POSITION, [100, 8, 102]),
        put("kept_logprobs", POSITION, [-0.5, kept, -9.0]),
        put("target_logprob", POSITION, target),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("input_ids", TOKEN, 384), "has token 384, expected at most 383"),
        (put("input_ids", TOKEN, 65535), "has token 65535, expected at most 383"),
        (put("positions", ROW, [0, 2, 1, 3]), POSITIONS),
        (put("positions", ROW, [0, 1, 1, 3]), POSITIONS),
        (put("positions", ROW, [-1, 1, 2, 3]), POSITIONS),
        (put("positions", ROW, [0, 1, 2, 4]), POSITIONS),
        (put("positions", ROW, [0, 1, 2, 2**31 - 1]), POSITIONS),
        (put("logsumexp", POSITION, np.nan), "has a logsumexp that is not finite"),
        (put("logsumexp", POSITION, np.inf), "has a logsumexp that is not finite"),
        (put("target_logprob", POSITION, 0.25), TARGET),
        (put("target_logprob", POSITION, np.nan), TARGET),
        (put("target_logprob", POSITION, -np.inf), TARGET),
        (put("kept_ids", (POSITION, 2), 384), KEPT_IDS),
        (lambda arrays: put("kept_ids", (POSITION, 2), arrays["kept_ids"][POSITION, 0])(arrays), KEPT_IDS),
        (put("kept_logprobs", (POSITION, 0), 2.0**-10), KEPT_RANGE),
        (put("kept_logprobs", (POSITION, 0), np.nan), KEPT_RANGE),
        (put("kept_logprobs", (POSITION, 2), np.nan), KEPT_RANGE),
        (put("kept_logprobs", (POSITION, 2), -np.inf), KEPT_RANGE),
        (exchange_kept, KEPT_RANGE),
        (put_all(OTHERS, put("kept_logprobs", POSITION, -0.5)), TOO_MUCH_MASS),
        (put_all(OTHERS, put("kept_logprobs", POSITION, np.log(0.335))), TOO_MUCH_MASS),
        (with_target(kept=-1.0, target=-1.5), NOT_ITS_TARGET),
        (with_target(kept=-1.0, target=-0.99), NOT_ITS_TARGET),
    ],
)
def test_a_value_that_cannot_be_is_found_behind_a_right_checksum(
    change: Callable[[Arrays], None], message: str, topk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(topk, change)
    assert f"row {EDITED} {message}" in found(topk)
    assert all(line.startswith(f"row {EDITED} ") for line in found(topk))
    capsys.readouterr()
    assert main(["verify", str(topk)]) == 1
    out = printed(capsys)
    assert f"row {EDITED} {message}" in out
    assert "NOT verified, " in out
    assert "verified: " not in out


@pytest.mark.parametrize(
    "change",
    [
        put_all(OTHERS, put("kept_logprobs", POSITION, np.log(1 / 3)), put("target_logprob", POSITION, -60000)),
        put_all(OTHERS, put("kept_logprobs", POSITION, [0, -65504, -65504]), put("target_logprob", POSITION, -65504)),
        with_target(kept=-1.0, target=-1.0004),  # half a step of float16
        with_target(kept=-8.0, target=-8.003),
        put("positions", ROW, [0, 1, 2, 3]),
    ],
)
def test_a_value_at_the_edge_of_what_can_be_is_no_problem(change: Callable[[Arrays], None], topk: Path) -> None:
    edit(topk, change)
    assert found(topk) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: put("logsumexp", POSITION, arrays["logsumexp"][POSITION] + 0.1)(arrays), "logsumexp"),
        (lambda arrays: put("logsumexp", POSITION, arrays["logsumexp"][POSITION] - 0.1)(arrays), "logsumexp"),
        (lambda arrays: put("logits", (POSITION, 0), arrays["logsumexp"][POSITION] + 1)(arrays), "logsumexp"),
        (put("logits", (POSITION, 17), np.nan), "logits that are not finite"),
        (put("logits", (POSITION, 17), -np.inf), "logits that are not finite"),
        (put("logsumexp", POSITION, -np.inf), "logsumexp that is not finite"),
        (put("target_logprob", POSITION, 1.0), TARGET),
        (
            lambda arrays: put("target_logprob", POSITION, arrays["target_logprob"][POSITION] - 1)(arrays),
            "target_logprob",
        ),
    ],
)
def test_logits_that_contradict_their_scalars_fail_despite_a_right_checksum(
    change: Callable[[Arrays], None], message: str, full: Path
) -> None:
    edit(full, change)
    lines = found(full)
    assert lines
    assert all(line.startswith(f"row {EDITED} has ") for line in lines)
    assert any(message in line for line in lines)


def test_a_record_that_is_none_is_found_behind_a_right_checksum(packed: Path) -> None:
    edit(packed, put("kept", (POSITION, slice(0, 4)), 0))
    assert found(packed) == [f"row {EDITED} has packed records that cannot be unpacked"]
    with pytest.raises(
        FormatError, match=r"packed\.h5 is damaged: a packed record does not hold 3 ids in row 3\. Copy"
    ):
        LogitsFile(packed).row(EDITED)


@pytest.mark.parametrize(("off", "right"), [(-0.1, False), (-0.005, True), (0.005, True), (0.1, False)])
def test_packed_log_probs_are_off_by_no_more_than_8_bits_explain(off: float, right: bool, packed: Path) -> None:
    """A step of the scale is 0.02 nats at a probability of 0.37."""
    packing = LogitsFile(packed).layout.packing
    assert packing
    record = packing.pack(torch.tensor([[100, 8, 102]]), torch.tensor([[-1.5, -1.0, -9.0]]))[0].numpy()
    edit(packed, put_all(put("kept", POSITION, record), put("target_logprob", POSITION, -1.0 + off)))
    assert LogitsFile(packed).row(EDITED)["kept_ids"][0].tolist() == [8, 100, 102]
    assert found(packed) == ([] if right else [f"row {EDITED} {NOT_ITS_TARGET}"])


@pytest.mark.parametrize(
    ("target", "certain", "problem"),
    [(-0.7, 1, None), (-1.0, 1, NOT_ITS_TARGET), (-1.0, 0, None)],
    ids=["its own", "not its own", "drawn: only a mean is known"],
)
def test_the_target_of_packed_draws_is_compared_where_it_was_certain(
    target: float, certain: int, problem: str | None, capture: Capture, teacher: Path, data: Path
) -> None:
    path = capture(teacher=teacher, dataset=data, capture="sample", top_k=3, encoding="packed")
    packing = LogitsFile(path).layout.packing
    assert isinstance(packing, DrawnPacking)
    ids = torch.zeros((1, packing.num_columns), dtype=torch.int64)
    ids[0, :3] = torch.tensor([8, 100, 102])
    logprobs = torch.full(ids.shape, -torch.inf)
    logprobs[0, :3] = torch.tensor([-0.7, -2.0, -3.0])
    rest = torch.tensor([1 - certain * math.exp(-0.7)]).log()
    record = packing.pack(ids, logprobs, torch.tensor([certain]), rest)[0].numpy()
    edit(path, put_all(put("kept", POSITION, record), put("target_logprob", POSITION, target)))
    assert LogitsFile(path).row(EDITED)["kept_ids"][0, :3].tolist() == [8, 100, 102]
    assert found(path) == ([] if problem is None else [f"row {EDITED} {problem}"])
    edit(path, put("kept", POSITION, 0))
    assert found(path) == [f"row {EDITED} has packed records that cannot be unpacked"]


def test_a_target_in_half_precision_may_be_off_by_half_a_step_more(capture: Capture, teacher: Path, data: Path) -> None:
    """Of all log-probs, the one whose record and float16 are farthest apart, beyond the record's own rounding."""
    path = capture(teacher=teacher, dataset=data, top_k=3, encoding="packed")
    packing = LogitsFile(path).layout.packing
    assert packing
    logprobs_P = torch.linspace(-7.9, -5, 10_000)
    records_PR = packing.pack(
        torch.tensor([[100, 8, 102]]).expand(10_000, -1),
        torch.stack([torch.full_like(logprobs_P, -2.0), logprobs_P, torch.full_like(logprobs_P, -9.0)], dim=1),
    ).numpy()
    stored_PK = packing.unpack(records_PR)[1]
    beyond_P = np.abs(stored_PK[:, 1] - logprobs_P.half().float().numpy()) - packing.rounding(stored_PK)[:, 1]
    worst = int(beyond_P.argmax())
    assert beyond_P[worst] > 1e-3  # what verify allows for other reasons
    edit(path, put_all(put("kept", POSITION, records_PR[worst]), put("target_logprob", POSITION, logprobs_P[worst])))
    assert found(path) == []
    edit(path, put("target_logprob", POSITION, logprobs_P[worst] + 0.2))
    assert found(path) == [f"row {EDITED} {NOT_ITS_TARGET}"]


@pytest.mark.parametrize("target", [np.nan, -np.inf, 0.25])
def test_a_target_of_a_packed_file_that_cannot_be_is_found(target: float, packed: Path) -> None:
    edit(packed, put("target_logprob", POSITION, target))
    assert f"row {EDITED} {TARGET}" in found(packed)


def test_a_drawn_token_no_tokenizer_has_is_found(drawn: Path) -> None:
    assert found(drawn) == []
    edit(drawn, put("kept_ids", POSITION, [100, 101, 383]))
    assert found(drawn) == []
    file = LogitsFile(drawn)
    file.layout = dataclasses.replace(file.layout, tokenizer_size=383)
    assert f"row {EDITED} has kept_ids that repeat or exceed 382" in list(problems(file))


def test_a_changed_weight_of_the_head_is_found(hidden: Path) -> None:
    writable(hidden)["head_weight"][15, 3] += 1
    (line,) = found(hidden)
    assert re.fullmatch(r"the head has checksum [0-9a-f]{8}, expected [0-9a-f]{8}", line)


def test_a_hidden_state_that_is_not_finite_is_found(hidden: Path) -> None:
    edit(hidden, put("hidden", (POSITION, 2), np.nan))
    assert found(hidden) == [f"row {EDITED} has hidden states that are not finite"]


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0], ids=["infinity", "minus infinity", "NaN"])
def test_a_scale_of_packed_hidden_states_that_is_not_finite_is_found(
    bits: int, capture: Capture, teacher: Path, data: Path
) -> None:
    path = capture(teacher=teacher, dataset=data, capture="hidden", encoding="packed")
    assert found(path) == []
    edit(path, put("hidden_scale", (POSITION, 0), bits))
    assert found(path) == [f"row {EDITED} has hidden states that are not finite"]


def test_every_damaged_row_is_listed(topk: Path) -> None:
    arrays = writable(topk)
    arrays["input_ids"][0] ^= 1
    arrays["logsumexp"][-1] += 1
    assert [line.split(" has ")[0] for line in found(topk)] == ["row 0", "row 4"]


@pytest.fixture
def partial(capture: Capture, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a run has left that failed at its second batch: the longest row is there, and those without positions."""
    compute = generate.capture_batch
    numbers = iter(range(99))

    def fail_second(*arguments: Any) -> torch.Tensor:
        if next(numbers):
            raise CaptureError("The power is gone.")
        return compute(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(generate, "capture_batch", fail_second)
        with pytest.raises(CaptureError, match="The power is gone"):
            capture(teacher=teacher, dataset=data, top_k=3, batch_tokens=4)
    (path,) = data.parent.glob("*.partial")
    return path


def test_the_missing_rows_of_an_unfinished_file_are_listed(partial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(partial) == ["row 0 is missing", "row 4 is missing"]
    capsys.readouterr()
    assert main(["verify", str(partial)]) == 1
    out = printed(capsys)
    assert "5 expected, 3 present" in out
    assert "row 0 is missing row 4 is missing" in out


def test_a_row_marked_done_that_was_not_written_is_found(partial: Path) -> None:
    writable(partial)["done"][4] = 1
    missing, unwritten = found(partial)
    assert missing == "row 0 is missing"
    assert unwritten.startswith("row 4 has checksum ")


def test_a_row_that_was_written_but_not_marked_done_is_missing(topk: Path) -> None:
    writable(topk)["done"][1] = 0
    assert found(topk) == ["row 1 is missing"]


def test_no_more_than_so_many_problems_are_listed(
    capture: Capture, teacher: Path, ragged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=ragged, top_k=1)
    writable(path)["done"][:] = 0
    capsys.readouterr()
    assert main(["verify", str(path)]) == 1
    out = printed(capsys)
    assert out.count("is missing") == MAX_PROBLEMS == 20
    assert "53 expected, 0 present" in out


def test_a_teacher_with_other_weights_is_found(
    topk: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight += 0.001  # little enough for the numbers to agree
    other = save_teacher(tmp_path / "other", model, tokenizer)
    capsys.readouterr()
    assert main(["verify", str(topk), "--teacher", str(other)]) == 1
    out = printed(capsys)
    assert "the teacher's weights differ from the file's" in out
    assert "tokenizer" not in out


def test_a_teacher_with_another_tokenizer_is_found(
    topk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_teacher(tmp_path / "other", make_llama(), make_tokenizer(bos_token="<|user|>"))
    capsys.readouterr()
    assert main(["verify", str(topk), "--teacher", str(other)]) == 1
    out = printed(capsys)
    assert "the teacher's tokenizer differs from the file's" in out
    assert "weights" not in out


def test_the_teacher_is_not_loaded_for_a_file_that_is_damaged(
    topk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writable(topk)["input_ids"][0] ^= 1
    capsys.readouterr()
    assert main(["verify", str(topk), "--teacher", str(tmp_path / "nowhere")]) == 1
    assert "row 0 has checksum" in printed(capsys)


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "none.h5")]) == 2
    assert f"error: {tmp_path / 'none.h5'} is not a file." in printed(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "3"], "--rows and --trust_remote_code need --teacher. Add it."),
        (["--trust_remote_code"], "--rows and --trust_remote_code need --teacher. Add it."),
        (["--teacher", "--rows", "0"], "--rows must be at least 1, got 0."),
        (["--teacher", "--rows", "few"], "Argument --rows: invalid int value: 'few'. See --help."),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path / "none.h5"), *options]) == 2
    assert f"error: {message}" in printed(capsys)
