"""Files of logitgen made by hand, byte by byte, without the writer."""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa

SCALARS = {
    "logsumexp": np.array([3.5, 4.5, 5.5, 6.5], "<f4"),
    "target_logprob": np.array([-1, -2, -0.5, -0.5], "<f4"),  # the mean is -1
}


TOP_2 = {
    "kept_ids": np.array([[2, 7], [9, 3], [7, 0], [9, 1]], "<u2"),
    "kept_logprobs": np.array([[-1, -1.25], [-0.25, -2], [-0.5, -3], [-0.5, -1.25]], "<f2"),
}


ROWS = {
    "done": np.ones(3, "u1"),
    "crc32": np.zeros(3, "<u4"),
    "source_row": np.array([0, 1, 5], "<i8"),
    "offsets": np.array([0, 3, 4, 9], "<i8"),
    "position_offsets": np.array([0, 2, 2, 4], "<i8"),
    "input_ids": np.array([1, 2, 3, 4, 5, 6, 7, 8, 9], "<u2"),
    "positions": np.array([0, 1, 1, 3], "<i4"),
}


def with_checksums(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checksum every row over its number, its source, its tokens and all that is known of its positions."""
    crc32 = []
    for row in range(3):
        tokens, positions = (slice(*arrays[name][row : row + 2]) for name in ("offsets", "position_offsets"))
        of_positions = [arrays[name][positions] for name in list(arrays)[list(arrays).index("positions") :]]
        parts = [np.array([row, arrays["source_row"][row]], "<i8"), arrays["input_ids"][tokens], *of_positions]
        crc32.append(zlib.crc32(b"".join(part.tobytes() for part in parts)))
    return arrays | {"crc32": np.array(crc32, "<u4")}


ARRAYS = with_checksums(ROWS | SCALARS | TOP_2)
"""A row of three tokens, one without a position, and one of which only the tokens at 2 and 4 were predicted."""


FULL = with_checksums(ROWS | SCALARS | {"logits": np.arange(40, dtype="<f2").reshape(4, 10)})


ATTRIBUTES: dict[str, Any] = {
    "format": "logitgen",
    "version": 1,
    "capture": "topk",
    "encoding": "plain",
    "top_k": 2,
    "vocab_size": 10,
    "tokenizer_size": 10,
    "teacher": "some/teacher",
    "teacher_dtype": "bfloat16",
    "teacher_config": {"model_type": "llama", "rms_norm_eps": 1e-6},
    "computation": {"attention": "sdpa"},
    "quantization": "",
    "commit": "c0ffee",
    "teacher_fingerprint": "a" * 64,
    "tokenizer_fingerprint": "b" * 64,
    "chat_template_fingerprint": "e" * 64,
    "chat_template_date": "2026-01-31",
    "dataset_fingerprint": "c" * 64,
    "settings": {
        "teacher": "some/teacher",
        "revision": None,
        "teacher_gguf": None,
        "attn_implementation": None,
        "dataset": "some/text",
        "dataset_config": None,
        "split": "train",
        "seed": 0,
    },
    "packages": {"torch": "2.13.0"},
}


def plain_attributes(**changes: Any) -> dict[str, Any]:
    """The attributes as a run hands them over: dictionaries as JSON."""
    values = ATTRIBUTES | changes
    return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in values.items()}


def stored_attributes(**changes: Any) -> dict[str, Any]:
    """The attributes as they are stored: text in UTF-8 of a fixed length."""
    values = plain_attributes(**changes)
    return {name: np.bytes_(value.encode()) if isinstance(value, str) else value for name, value in values.items()}


def seal(path: Path, head_bytes: int | None = None, version: int | str = 1) -> Path:
    """Write the text a file begins with, true of what follows it: the head ends where the first dataset starts."""
    if head_bytes is None:
        with h5py.File(path, "r", locking=False) as file:
            found = [file[name] for name in file if isinstance(file.get(name, getlink=True), h5py.HardLink)]
            places = [item.id.get_offset() for item in found if isinstance(item, h5py.Dataset)]
        # With text before it, HDF5 gives the place of what has none as None or as the byte before its own first.
        head_bytes = min((place for place in places if place and place > 512), default=path.stat().st_size)
    with path.open("r+b") as plain:
        head = plain.read(max(head_bytes, 512))[512:]
        text = f"logitgen file, format version {version}\nHDF5 from byte 512 on\n"
        text += f"head_bytes {head_bytes}\nhead_sha256 {hashlib.sha256(head).hexdigest()}\n"
        plain.seek(0)
        plain.write(text.encode().ljust(512, b"\0"))
    return path


def write_file(path: Path, arrays: dict[str, np.ndarray] = ARRAYS, **changes: Any) -> Path:
    with h5py.File(path, "w", userblock_size=512, meta_block_size=2**14) as file:
        file.attrs.update(stored_attributes(**changes))
        for name, values in arrays.items():
            file[name] = values
    return seal(path)


@contextmanager
def changing(path: Path) -> Iterator[h5py.File]:
    """Let h5py change a file, and make its text true again."""
    with h5py.File(path, "r+") as file:
        yield file
    seal(path)


def of_record_batches(tokens: Path) -> bytes:
    """The same Arrow stream, cut after its first record batch."""
    with pa.memory_map(str(tokens)) as source:
        stream = pa.ipc.open_stream(source)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, stream.schema) as short:
            short.write_batch(stream.read_next_batch())
    return sink.getvalue().to_pybytes()


DAMAGES: dict[str, Callable[[Path], bytes]] = {
    "cut at a record batch": of_record_batches,
    "cut inside a batch": lambda path: path.read_bytes()[: path.stat().st_size // 2],
    "a tail of zeros": lambda path: path.read_bytes()[:-4096] + bytes(4096),
    "one flipped bit": lambda path: (content := path.read_bytes())[:9000] + bytes([content[9000] ^ 4]) + content[9001:],
    "all zeros": lambda path: bytes(path.stat().st_size),
    "empty": lambda path: b"",
}
