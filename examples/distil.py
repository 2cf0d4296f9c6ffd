"""Distil a small student from one file, and compare it with cross-entropy alone and with the teacher in memory.

    python -m examples.distil --teacher FOLDER --dataset ROWS.jsonl

captures what is kept of the teacher's logits through the real command, once for every kind of capture, and then trains
the same student (a few of the teacher's layers, its embeddings and head frozen) for equally many steps over the same
batches: on the tokens alone, on each file, and on the teacher's own logits, computed at every step. It prints what each
student makes of rows that nobody trained on, and draws the curves.

Shape letters: B rows of a batch, T tokens, V vocabulary, P positions of the held-out rows.
"""

import argparse
import copy
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, get_linear_schedule_with_warmup

from benchmarks.harness import ROOT, Spread, drawing, launch, write_report
from logitgen import LogitsDataset, collate, distil
from logitgen.student.dataset import IGNORED_LABEL

KINDS = {
    "topk 12": ["--capture=topk", "--top_k=12"],
    "sample 12": ["--capture=sample", "--top_k=12"],
    "topk 64, packed": ["--capture=topk", "--top_k=64", "--encoding=packed"],
    "hidden": ["--capture=hidden"],
    "sample 64, packed": ["--capture=sample", "--top_k=64", "--encoding=packed"],
}
"""What to capture, by name: options of generate.py. The first four are compared if none is named."""

LOSSES: dict[str, dict[str, Any]] = {
    "forward KL": {},
    "reverse KL": {"divergence": "reverse_kl"},
    "JSD": {"divergence": "jsd"},
    "ghost token": {"tail": "ghost"},
    "half cross-entropy": {"cross_entropy_weight": 0.5},
}
"""What to train on of a file, by name: options of the loss."""

TOKENS_ALONE, ONLINE = "cross-entropy", "teacher in memory"
NUM_RANKS = 2
BATCH_ROWS = 4
HELD_OUT_ROWS = 24
MAX_LENGTH = 64
WARM_UP_SHARE = 0.1

Batch = dict[str, Tensor]
Loss = Callable[[PreTrainedModel, Batch], Tensor]


@dataclass(frozen=True)
class HeldOut:
    """Rows that no student is trained on, with the teacher's log-probs teacher_PV; targets int64[P] came next."""

    batch: Batch
    captured_BT: Tensor
    teacher_PV: Tensor
    targets: Tensor


@dataclass
class Curve:
    """How a student did: a list of values by measure, at `step` and after `seconds` of training."""

    points: dict[str, list[float]] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)

    def add(self, **values: float) -> None:
        """Append a value to each measure."""
        for name, value in values.items():
            self.points.setdefault(name, []).append(value)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "", allow_abbrev=False)
    parser.add_argument("--teacher", type=Path, required=True, help="Folder of a Llama-like causal language model.")
    parser.add_argument("--dataset", type=Path, required=True, help="A .jsonl file with a column `text`.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3, help="Each has its own order of the rows.")
    parser.add_argument("--layers", type=int, default=3, help="Of the student; they are taken from the teacher.")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--kinds", nargs="*", default=[*KINDS][:4], choices=list(KINDS))
    parser.add_argument("--losses", nargs="*", default=["forward KL"], choices=list(LOSSES))
    parser.add_argument("--only", default="", help="Regular expression of the ways to train, as the table names them.")
    parser.add_argument("--evaluations", type=int, default=5, help="Looks at the held-out rows, evenly over the steps.")
    parser.add_argument("--output", type=Path, default=ROOT / ".bench" / "distil")
    return parser.parse_args()


def main() -> None:
    options = parse()
    num_rows = options.steps * BATCH_ROWS
    started = time.monotonic()

    files = {name: capture(options, name, num_rows) for name in options.kinds}
    datasets = {name: LogitsDataset(path) for name, (path, _) in files.items()}
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).eval()
    held_out = hold_out(options, teacher, num_rows)
    print(f"The student starts {evaluate(cut_down(teacher, options.layers), held_out)['divergence']:.2f} nats away.")

    ways: dict[str, Loss] = {TOKENS_ALONE: tokens_alone, ONLINE: online(teacher)}
    ways |= {f"file, {kind}, {loss}": of_file for kind in datasets for loss in options.losses}
    ways = {name: loss for name, loss in ways.items() if re.search(options.only, name)}
    curves: dict[str, list[Curve]] = {name: [] for name in ways}
    for seed in range(options.seeds):
        for name, loss in ways.items():
            kind, _, said = name.removeprefix("file, ").rpartition(", ")
            dataset = datasets.get(kind, next(iter(datasets.values())))
            student = cut_down(teacher, options.layers)
            student = distil(student, dataset, **LOSSES[said]) if loss is of_file else student
            curve = train(student, loss, batches(dataset, seed), options, held_out)
            curves[name].append(curve)
            print(f"seed {seed}, {name}: divergence {curve.points['divergence'][-1]:.4f} nats", flush=True)

    report(options.output, curves, files)
    print(f"The whole took {(time.monotonic() - started) / 60:.1f} minutes.")


def capture(options: argparse.Namespace, kind: str, num_rows: int) -> tuple[Path, float]:
    """Capture a kind over the first rows, as anyone does; return the file and how many seconds that took."""
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind.replace(' ', '_')}.h5"
    words = [f"--teacher={options.teacher}", f"--dataset={options.dataset}", f"--split=train[:{num_rows}]"]
    words += [f"--max_length={MAX_LENGTH}", f"--output={path}", f"--log_dir={folder / 'logs'}", "--overwrite"]
    start = time.monotonic()
    subprocess.run([*launch(NUM_RANKS), "generate.py", *words, *KINDS[kind]], cwd=ROOT, check=True)
    return path, time.monotonic() - start


def hold_out(options: argparse.Namespace, teacher: PreTrainedModel, num_rows: int) -> HeldOut:
    """Read the rows after those that were captured, and run the teacher over them."""
    split = f"train[{num_rows}:{num_rows + HELD_OUT_ROWS}]"
    texts = load_dataset("json", data_files=str(options.dataset), split=split)["text"]
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    tokenizer.pad_token = tokenizer.eos_token
    batch = dict(tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"))
    captured_BT = batch["attention_mask"].bool()
    captured_BT = torch.cat([captured_BT[:, 1:], torch.zeros_like(captured_BT[:, :1])], dim=1)
    targets = batch["input_ids"].roll(-1, 1)[captured_BT]
    with torch.inference_mode():
        teacher_PV = logits_of(teacher, batch)[captured_BT].log_softmax(-1)
    return HeldOut(batch, captured_BT, teacher_PV, targets)


def cut_down(teacher: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Make a student of evenly spread layers of the teacher; what it shares with it, embeddings and head, is frozen."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = num_layers
    student: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    student.load_state_dict(teacher.state_dict(), strict=False)
    bodies: Any = (teacher.base_model, student.base_model)
    of, to = (body.layers for body in bodies)
    for number, layer in enumerate(to):
        layer.load_state_dict(of[round(number * (len(of) - 1) / max(1, num_layers - 1))].state_dict())
    for frozen in (student.get_input_embeddings(), student.get_output_embeddings()):
        frozen.requires_grad_(False)
    return student


def batches(dataset: LogitsDataset, seed: int) -> Iterator[Batch]:
    """Yield shuffled batches without end, the same for every dataset of the same rows."""
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(dataset, BATCH_ROWS, shuffle=True, collate_fn=collate, generator=order)
    return chain.from_iterable(repeat(loader))


def train(
    student: PreTrainedModel, loss: Loss, source: Iterator[Batch], options: argparse.Namespace, held_out: HeldOut
) -> Curve:
    """Train for so many steps, and look at the held-out rows now and then; that is not counted as training."""
    weights, steps = (weight for weight in student.parameters() if weight.requires_grad), options.steps
    optimizer = torch.optim.AdamW(weights, options.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARM_UP_SHARE * steps), steps)
    curve = Curve()
    curve.add(step=0, seconds=0, **evaluate(student, held_out))
    for step in range(1, steps + 1):
        start = time.perf_counter()
        batch = next(source)
        loss(student, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        curve.step_seconds.append(time.perf_counter() - start)
        if step * options.evaluations % steps < options.evaluations:
            curve.add(step=step, seconds=sum(curve.step_seconds), **evaluate(student, held_out))
    return curve


@torch.inference_mode()
def evaluate(student: PreTrainedModel, held_out: HeldOut) -> dict[str, float]:
    """Compare a student with the teacher, and with the tokens that came; nats per position, and a share."""
    student_PV = logits_of(student, held_out.batch)[held_out.captured_BT].log_softmax(-1)
    return {
        "divergence": kl_div(student_PV, held_out.teacher_PV, reduction="batchmean", log_target=True).item(),
        "loss": cross_entropy(student_PV, held_out.targets).item(),
        "agreement": (student_PV.argmax(-1) == held_out.teacher_PV.argmax(-1)).double().mean().item(),
    }


def logits_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Run a model, [B, T, V]."""
    output: Any = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits: Tensor = output.logits
    return logits


def of_file(student: PreTrainedModel, batch: Batch) -> Tensor:
    """The loss of a distilled student: it asks no teacher."""
    loss: Tensor = student(**batch, use_cache=False).loss
    return loss


def tokens_alone(student: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy with the tokens that came."""
    logits_BTV, labels_BT = logits_of(student, batch), batch["labels"][:, 1:]
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED_LABEL)


def online(teacher: PreTrainedModel) -> Loss:
    """Knowledge distillation as it is without a file: the teacher computes its logits at every step."""

    def loss(student: PreTrainedModel, batch: Batch) -> Tensor:
        with torch.inference_mode():
            teacher_PV = logits_of(teacher, batch)[batch["captured"]].log_softmax(-1)
        student_PV = logits_of(student, batch)[batch["captured"]].log_softmax(-1)
        return kl_div(student_PV, teacher_PV.clone(), reduction="batchmean", log_target=True)

    return loss


def report(folder: Path, curves: dict[str, list[Curve]], files: dict[str, tuple[Path, float]]) -> None:
    """Print what each way led to, with its spread over the seeds, and how it differs from the teacher in memory."""
    table = []
    for name, runs in curves.items():
        last = {measure: ends(runs, measure) for measure in ("divergence", "loss", "agreement")}
        online_ends = ends(curves.get(ONLINE, runs), "divergence")
        against = [of - at for of, at in zip(last["divergence"], online_ends, strict=True)]
        path, capture_seconds = files.get(name.removeprefix("file, ").rpartition(", ")[0], (None, 0.0))
        row = {
            "trained on": name,
            "KL to teacher": spread(last["divergence"], ".3f"),
            "less KL in memory": "" if name == ONLINE or ONLINE not in curves else spread(against, "+.3f"),
            "held-out loss": spread(last["loss"], ".3f"),
            "top-1 agreement": spread(last["agreement"], ".1%"),
            "steps/s": f"{1 / mean(value for run in runs for value in run.step_seconds):.2f}",
            "capture, s": f"{capture_seconds:.0f}" if path else "",
            "file, MB": f"{path.stat().st_size / 1e6:.1f}" if path else "",
        }
        table.append(row)
    write_report(folder, "distil", table, data={name: [vars(run) for run in runs] for name, runs in curves.items()})
    plot(curves, folder / "distil.png")


def ends(runs: Sequence[Curve], measure: str) -> list[float]:
    return [run.points[measure][-1] for run in runs]


def spread(values: Sequence[float], pattern: str) -> str:
    """Write the median of the seeds, and from where to where they go."""
    found = Spread.of(values)
    return f"{found.median:{pattern}} ({found.least:{pattern}} to {found.most:{pattern}})"


def plot(curves: dict[str, list[Curve]], path: Path) -> None:
    """Draw the divergence over steps and over seconds, and the agreement: the mean of the seeds and their range."""
    drawn = [("step", "divergence"), ("seconds", "divergence"), ("step", "agreement")]
    with drawing(path, 1, 3, figsize=(11, 3.4)) as (_, (panels,)):
        for panel, (across, measure) in zip(panels, drawn, strict=True):
            for name, runs in curves.items():
                at = [mean(values) for values in zip(*(run.points[across] for run in runs), strict=True)]
                values = list(zip(*(run.points[measure] for run in runs), strict=True))
                (line,) = panel.plot(at, [mean(point) for point in values], marker="o", markersize=3, label=name)
                least, most = ([pick(point) for point in values] for pick in (min, max))
                panel.fill_between(at, least, most, alpha=0.2, color=line.get_color())
            panel.set_xlabel({"step": "steps", "seconds": "seconds of training"}[across])
            panel.set_title({"divergence": "KL to the teacher, nats", "agreement": "Top-1 agreement"}[measure])
            if measure == "divergence":
                panel.set_yscale("log")
        panels[0].legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
