"""What is lost per byte: every kind of capture, and what others keep, against the teacher's whole distribution.

    python -m benchmarks.fidelity --teacher FOLDER --dataset ROWS.jsonl

What we keep is written and read back by the project's own functions. The student is the teacher without two of its
layers, or with `--layers 3` far from it: three of them. `--noise 0.1` adds normal noise to each of its weights, a tenth
of the standard deviation of its matrix. Angles are between the gradient of a method's own loss and that of the exact KL
divergence: by the logits of each position; and by the weights of the student's output head, as training takes it, of a
batch's mean and of that of all batches. What is drawn at random averages out over positions; what is wrong with every
one does not.

`--positions` is of a batch, `--seeds` of what is drawn at random, at least 2. `--only` is a regular expression of the
methods' names.

Shape letters: P positions of a batch, V vocabulary, D hidden size.
"""

import argparse
import copy
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.harness import BLUE, Row, drawing, parse, write_report
from benchmarks.methods import LARGE_VOCAB, Batch, Method, others, ours
from benchmarks.targets import angle, dense, divergence, events, gradient, top_ids
from logitgen.head import Head

LONGEST_ROW = 512

FAMILIES = {
    "topk, packed": (BLUE, "o", "-"),
    "topk, plain": ("#80b0e0", "o", "-"),
    "sample, packed": ("#2f8050", "s", "-"),
    "sample, plain": ("#90c8a0", "s", "-"),
    "sample, ghost": ("#a0a030", "P", "--"),
    "hidden": ("#204020", "D", "-"),
    "full": ("#808080", "D", "-"),
    "RS-KD": ("#c03030", "v", ":"),
    "renormalised top k": ("#e0a030", "^", ":"),
    "top-p, then top 100": ("#805090", "<", ":"),
    "top-p, then top 256": ("#b090c0", "<", ":"),
    "DistillKit, tail": ("#a06030", ">", ":"),
}
"""What is drawn, in which colour, with which mark and line."""

FORMS = {"tail mass": ".3f", "top 1": ".1%", "angle, position": ".1f", "angle, batch": ".2f", "angle, all": ".2f"}
FORMS |= dict.fromkeys(("KL, tail as one", "RMSE of p", "bias of p"), ".2g")
FORMS |= dict.fromkeys(("record B", "total B", f"at V={LARGE_VOCAB:,}"), ",.1f")


def shallower(teacher: PreTrainedModel, num_layers: int = 0) -> PreTrainedModel:
    """Make a student of so many evenly spread layers; or take two out, at a half and at two thirds of the depth."""
    student = copy.deepcopy(teacher)
    layers = student.get_decoder().layers
    kept = set(range(len(layers))) - {len(layers) // 2, 2 * len(layers) // 3}
    if num_layers:
        kept = {round(number * (len(layers) - 1) / max(1, num_layers - 1)) for number in range(num_layers)}
    student.get_decoder().layers = nn.ModuleList(layer for at, layer in enumerate(layers) if at in kept)
    return student


@torch.no_grad()
def with_noise(student: PreTrainedModel, share: float) -> PreTrainedModel:
    """Add normal noise to every weight, in place: a share of the standard deviation of its matrix."""
    generator = torch.Generator().manual_seed(0)
    for weight in student.parameters():
        weight += share * weight.std() * torch.randn(weight.shape, generator=generator)
    return student


def head_of(model: PreTrainedModel) -> Head:
    """The output head; a teacher that changes its logits behind it is not what this is for."""
    linear = model.get_output_embeddings()
    bias = None if linear.bias is None else linear.bias.detach()
    return Head(weight_VD=linear.weight.detach(), bias_V=bias, scale=1.0, soft_cap=0.0)


@torch.inference_mode()
def load(options: argparse.Namespace) -> list[Batch]:
    """Run teacher and student over rows from all over the file, until there are enough positions."""
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).eval()
    models = teacher, with_noise(shallower(teacher, options.layers), options.noise)
    texts = [json.loads(line)["text"] for line in options.dataset.read_text(encoding="utf-8").splitlines()]
    wanted, found = options.batches * options.positions, 0
    parts: list[list[Tensor]] = []
    for row in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist():
        ids_T = torch.tensor(tokenizer(texts[row])["input_ids"][:LONGEST_ROW])
        if found < wanted and len(ids_T) > 1:
            hidden = [model.get_decoder()(input_ids=ids_T[None]).last_hidden_state[0, :-1] for model in models]
            positions_P = torch.arange(len(ids_T) - 1)
            parts.append([*hidden, ids_T[1:], torch.full_like(positions_P, row), positions_P])
            found += len(positions_P)
    if found < wanted:
        raise SystemExit(f"error: {wanted} positions are needed, {options.dataset} has {found}. Lower --batches.")
    columns = (torch.cat(column)[:wanted].split(options.positions) for column in zip(*parts, strict=True))
    return [Batch(*map(head_of, models), *of_batch) for of_batch in zip(*columns, strict=True)]


def measured(method: Method, batches: Sequence[Batch], num_seeds: int) -> Row:
    """Measure a method: errors of what is drawn over so many seeds, all else of the first."""
    of_head_VD: Tensor | float = 0.0
    parts = []
    for batch in batches:
        target = method.target(batch, 0)
        found_PV = gradient(target, batch.student)
        part_VD = batch.of_head(found_PV)
        of_head_VD += part_VD
        is_whole = isinstance(target, Tensor)
        square, bias_square = errors(method, batch, num_seeds)
        parts.append(
            {
                "num_kept": batch.probs.shape[-1] if is_whole else target.is_kept.sum(-1).double().mean().item(),
                "tail mass": 0.0 if is_whole else events(target, batch.probs)[0][:, -1].mean().item(),
                # A divergence is no measure of what is drawn.
                "KL": math.nan if method.is_random else divergence(target, batch.probs).mean().item(),
                "top 1": (top_ids(target) == batch.probs.argmax(-1)).double().mean().item(),
                "position": angle(found_PV, batch.exact).mean().item(),
                "batch": between(part_VD, batch.exact_of_head),
                "square": square,
                "bias square": bias_square,
            }
        )
    means = {name: fmean(part[name] for part in parts) for name in parts[0]}
    return means | {"all": between(of_head_VD, sum(batch.exact_of_head for batch in batches))}


def between(found_VD: Tensor, exact_VD: Tensor) -> float:
    """Angle between two gradients of the head's weights, in degrees."""
    return angle(found_VD.flatten()[None], exact_VD.flatten()[None]).item()


def errors(method: Method, batch: Batch, num_seeds: int) -> tuple[float, float]:
    """Mean squared error of the probabilities, the tail spread evenly, and the part of it that no drawing averages out.

    The second is estimated without bias, from the products of different draws' errors; so it can come out negative.
    """
    seeds = range(num_seeds if method.is_random else 1)
    sum_PV, square = torch.zeros_like(batch.probs), 0.0
    for seed in seeds:
        error_PV = dense(method.target(batch, seed), batch.probs.shape[-1]) - batch.probs
        square += error_PV.square().sum(-1).double().mean().item()
        sum_PV += error_PV
    if not method.is_random:
        return square, square
    of_sum = sum_PV.square().sum(-1).double().mean().item()
    return square / num_seeds, (of_sum - square) / (num_seeds * (num_seeds - 1))


def summed_up(method: Method, found: Row, vocab_size: int) -> Row:
    """Turn what was measured, and what it costs, into a row of the table."""
    total, total_large = (method.total_bytes(found["num_kept"], number) for number in (vocab_size, LARGE_VOCAB))
    return {
        "method": f"**{method.name}**" if method.is_ours else method.name,
        "record B": total - method.scalar_bytes,
        "total B": total,
        f"at V={LARGE_VOCAB:,}": total_large,
        "tail mass": found["tail mass"],
        "KL, tail as one": found["KL"],
        "top 1": found["top 1"],
        "angle, position": found["position"],
        "angle, batch": found["batch"],
        "angle, all": found["all"],
        "RMSE of p": math.sqrt(found["square"]),
        "bias of p": math.sqrt(max(found["bias square"], 0)),
    }


def plot(families: dict[str, list[Row]], options: argparse.Namespace, path: Path) -> None:
    """Draw what is lost of the gradient over bytes, for one batch and for all positions together."""
    with drawing(path, 1, 2, figsize=(11, 5), sharex=True, sharey=True) as (figure, (panels,)):
        for panel, name, count in zip(panels, ("angle, batch", "angle, all"), (1, options.batches), strict=True):
            for family, (color, marker, line) in FAMILIES.items():
                found = sorted(families.get(family, ()), key=lambda row: row["total B"])
                sizes, angles = ([row[key] for row in found] for key in ("total B", name))
                style = {"color": color, "marker": marker, "linestyle": line, "linewidth": 2}
                panel.loglog(sizes, angles, label=family, **style)
            panel.set_title(f"Gradient of {count * options.positions:,} positions")
            panel.set_xlabel("bytes per position")
            panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.yaxis.set_major_formatter("{x:g}")
        panels[0].set_ylabel("angle to full distillation, degrees")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)


def main() -> None:
    """Measure all methods."""
    sizes: dict[str, float] = {"batches": 4, "positions": 512, "seeds": 4, "layers": 0, "noise": 0.0}
    options = parse(__doc__, teacher=Path, dataset=Path, only="", **sizes)
    batches = load(options)
    student_divergence = fmean(divergence(batch.student, batch.probs).mean().item() for batch in batches)
    print(f"The student: {student_divergence:.2f} nats from the teacher.", flush=True)
    families: dict[str, list[Row]] = {}
    for method in (*ours(batches[0].hidden.shape[-1]), *others()):
        if re.search(options.only, method.name):
            print(f"  {method.name}", flush=True)
            row = summed_up(method, measured(method, batches, options.seeds), batches[0].probs.shape[-1])
            families.setdefault(method.family, []).append(row)
    table = [row for rows in families.values() for row in rows]
    write_report(options.output, "fidelity", table, FORMS)
    plot(families, options, options.output / "fidelity.png")


if __name__ == "__main__":
    main()
