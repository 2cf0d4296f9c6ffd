"""One of several independent processes: its part of the split goes into a file of its own."""

from pathlib import Path

from flat import append, create
from recipe import batches, keep_top_k, load_teacher, own_device, parse_options, read_tokens, unpad


def main() -> None:
    """Capture this worker's part."""
    options = parse_options(worker_id=int, total_workers=int)
    tokens = read_tokens(options).shard(num_shards=options.total_workers, index=options.worker_id)
    teacher = load_teacher(options, own_device())
    path = Path(options.output) / f"worker_{options.worker_id:03}.h5"
    with create(path, options.top_k, teacher.config.vocab_size) as file:
        for batch in batches(tokens):
            append(file, unpad(keep_top_k(teacher, batch, options.top_k)))


if __name__ == "__main__":
    main()
