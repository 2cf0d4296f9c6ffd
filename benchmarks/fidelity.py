"""What is lost per byte: every kind of capture, and what others keep, against the teacher's whole distribution.

    python -m benchmarks.fidelity --teacher FOLDER --dataset ROWS.jsonl

What we keep is written and read back by the project's own functions. The student is the teacher without two of its
layers, or with noise on its weights. Angles are between the gradient of a method's own loss and that of the exact KL
divergence: by the logits of each position; and by the weights of the student's output head, as training takes it, of a
batch's mean and of that of all batches. What is drawn at random averages out over positions; what is wrong with every
one does not.

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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.harness import ROOT, plot_style, write_report
from benchmarks.methods import LARGE_VOCAB, Batch, Method, others, ours, whole_methods
from benchmarks.targets import Target, Whole, angle, divergence, gradient, squared_error, top_ids
from logitgen.head import Head

LONGEST_ROW = 512
NOISE = 0.1
"""Of the standard deviation of each weight matrix."""

FAMILIES = {
    "topk, packed": ("#1f5fa8", "o"),
    "topk, plain": ("#80b0e0", "o"),
    "sample, packed": ("#2f8050", "s"),
    "sample, plain": ("#90c8a0", "s"),
    "hidden": ("#204020", "D"),
    "full": ("#808080", "D"),
    "RS-KD": ("#c03030", "v"),
    "renormalised top k": ("#e0a030", "^"),
    "top-p, then top 100": ("#805090", "<"),
    "top-p, then top 256": ("#b090c0", "<"),
    "DistillKit, tail": ("#a06030", ">"),
}
"""What is drawn, in which colour and with which mark."""

Found = dict[str, float]


def shallower(teacher: PreTrainedModel) -> PreTrainedModel:
    """Take two layers out, at a half and at two thirds of the depth."""
    student = copy.deepcopy(teacher)
    layers = student.get_decoder().layers
    left_out = {len(layers) // 2, 2 * len(layers) // 3}
    student.get_decoder().layers = nn.ModuleList(layer for at, layer in enumerate(layers) if at not in left_out)
    return student


@torch.no_grad()
def noisy(teacher: PreTrainedModel) -> PreTrainedModel:
    """Add noise to every weight matrix."""
    student, generator = copy.deepcopy(teacher), torch.Generator().manual_seed(0)
    for weights in student.parameters():
        if weights.dim() > 1:
            weights += torch.randn(weights.shape, generator=generator) * weights.std() * NOISE
    return student


STUDENTS = {"shallower": shallower, "noisy": noisy}


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
    student = STUDENTS[options.student](teacher)
    texts = [json.loads(line)["text"] for line in options.dataset.read_text(encoding="utf-8").splitlines()]
    wanted, found = options.batches * options.positions, 0
    parts: list[list[Tensor]] = []
    for row in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist():
        ids_T = torch.tensor(tokenizer(texts[row])["input_ids"][:LONGEST_ROW])
        if found < wanted and len(ids_T) > 1:
            hidden = [model.get_decoder()(input_ids=ids_T[None]).last_hidden_state[0] for model in (teacher, student)]
            positions_T = torch.arange(len(ids_T) - 1)
            rows_T = torch.full_like(positions_T, row)
            parts.append([*(states[:-1] for states in hidden), ids_T[1:], rows_T, positions_T])
            found += len(positions_T)
    if found < wanted:
        raise SystemExit(f"error: {wanted} positions are needed, {options.dataset} has {found}. Lower --batches.")
    columns = (torch.cat(column)[:wanted].split(options.positions) for column in zip(*parts, strict=True))
    heads = head_of(teacher), head_of(student)
    return [batch_of(*heads, *columns_of_batch) for columns_of_batch in zip(*columns, strict=True)]


def batch_of(
    head: Head,
    student_head: Head,
    hidden_PD: Tensor,
    student_hidden_PD: Tensor,
    target_P: Tensor,
    row_P: Tensor,
    position_P: Tensor,
) -> Batch:
    """Put a batch together from the last hidden states at its positions."""
    return Batch(
        logits=head(hidden_PD),
        hidden=hidden_PD,
        head=head,
        target=target_P,
        row=row_P,
        position=position_P,
        student=student_head(student_hidden_PD).softmax(-1),
        student_hidden=student_hidden_PD,
    )


def measured(method: Method, batches: Sequence[Batch], num_seeds: int) -> Found:
    """Measure a method: errors of what is drawn over so many seeds, all else of the first."""
    of_head_VD: Tensor | float = 0.0
    parts = []
    for batch in batches:
        target = method.target(batch, 0)
        found_PV = gradient(target, batch.student)
        part_VD = batch.of_head(found_PV)
        of_head_VD += part_VD
        square, bias_square = errors(method, batch, num_seeds)
        parts.append(
            losses(method, target, batch)
            | {
                "angle_of_position": angle(found_PV, batch.exact).mean().item(),
                "angle_of_batch": between(part_VD, batch.exact_of_head),
                "square": square,
                "bias_square": bias_square,
            }
        )
    exact_VD = sum(batch.exact_of_head for batch in batches)
    means = {name: fmean(part[name] for part in parts) for name in parts[0]}
    return means | {"angle_of_all": between(of_head_VD, exact_VD)}


def losses(method: Method, target: Target, batch: Batch) -> Found:
    """What a target lacks of the teacher's distribution; a divergence is no measure of what is drawn."""
    as_one_P, evenly_P = divergence(target, batch.truth)
    is_whole = isinstance(target, Whole)
    return {
        "num_kept": batch.vocab_size if is_whole else target.is_kept.sum(-1).double().mean().item(),
        "tail_mass": 0.0 if is_whole else (1 - batch.truth.at(target).sum(-1)).mean().item(),
        "kl_tail_as_one": math.nan if method.is_random else as_one_P.mean().item(),
        "kl_tail_evenly": math.nan if method.is_random else evenly_P.mean().item(),
        "top_1_agreement": (top_ids(target) == batch.truth.probs.argmax(-1)).double().mean().item(),
    }


def between(found_VD: Tensor, exact_VD: Tensor) -> float:
    """Angle between two gradients of the head's weights, in degrees."""
    return angle(found_VD.flatten()[None], exact_VD.flatten()[None]).item()


def errors(method: Method, batch: Batch, num_seeds: int) -> tuple[float, float]:
    """Mean squared error of the probabilities, and the part of it that stays however often one draws.

    The second is estimated without bias, from the products of different draws' errors; so it can come out negative.
    """
    if not method.is_random:
        square = squared_error(method.target(batch, 0), batch.truth).mean().item()
        return square, square
    sum_PV, square = torch.zeros_like(batch.truth.probs), 0.0
    for seed in range(num_seeds):
        target = method.target(batch, seed)
        sum_PV.scatter_add_(-1, target.ids, target.weights.float())
        square += squared_error(target, batch.truth).mean().item()
    of_sum = (sum_PV - num_seeds * batch.truth.probs).square().sum(-1).double().mean().item()
    return square / num_seeds, (of_sum - square) / (num_seeds * (num_seeds - 1))


def summed_up(method: Method, found: Found, vocab_size: int) -> dict[str, Any]:
    """Add to what was measured what it costs."""
    total, total_large = (method.total_bytes(found["num_kept"], number) for number in (vocab_size, LARGE_VOCAB))
    return {
        "method": method.name,
        "family": method.family,
        "is_ours": method.is_ours,
        "is_random": method.is_random,
        "record_bytes": total - method.scalar_bytes,
        "scalar_bytes": method.scalar_bytes,
        "total_bytes": total,
        "total_bytes_large": total_large,
        "rmse": math.sqrt(found["square"]),
        "bias": math.sqrt(max(found["bias_square"], 0)),
        **found,
    }


def cells(line: dict[str, Any]) -> dict[str, str]:
    """Turn a measurement into a row of the table."""
    return {
        "method": f"**{line['method']}**" if line["is_ours"] else line["method"],
        "ids": size(line["num_kept"]),
        "record B": size(line["record_bytes"]),
        "scalars B": str(line["scalar_bytes"]),
        "total B": size(line["total_bytes"]),
        f"at V={LARGE_VOCAB:,}": size(line["total_bytes_large"]),
        "tail mass": f"{line['tail_mass']:.3f}",
        "KL, tail as one": short(line["kl_tail_as_one"]),
        "KL, tail evenly": short(line["kl_tail_evenly"]),
        "top 1": f"{line['top_1_agreement']:.1%}",
        "angle, position": f"{line['angle_of_position']:.1f}",
        "angle, batch": f"{line['angle_of_batch']:.2f}",
        "angle, all": f"{line['angle_of_all']:.2f}",
        "RMSE of p": short(line["rmse"]),
        "bias of p": short(line["bias"]),
    }


def size(value: float) -> str:
    """Write a size or count, with a decimal where it is a mean."""
    return f"{value:,.1f}".removesuffix(".0")


def short(value: float) -> str:
    """Write a number of any size in two figures."""
    return "-" if math.isnan(value) else f"{value:.2g}"


def plot(lines: Sequence[dict[str, Any]], options: argparse.Namespace, path: Path) -> None:
    """Draw what is lost of the gradient over bytes, for one batch and for all positions together."""
    plot_style()
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True)
    for panel, name, count in zip(panels, ("angle_of_batch", "angle_of_all"), (1, options.batches), strict=True):
        for family, (color, marker) in FAMILIES.items():
            found = sorted((line for line in lines if line["family"] == family), key=lambda line: line["total_bytes"])
            is_ours = any(line["is_ours"] for line in found)
            style = {"linestyle": "-", "linewidth": 2} if is_ours else {"linestyle": ":", "markerfacecolor": "white"}
            sizes, angles = ([line[key] for line in found] for key in ("total_bytes", name))
            panel.loglog(sizes, angles, label=family, color=color, marker=marker, **style)
        panel.set_title(f"Gradient of {count * options.positions:,} positions")
        panel.set_xlabel("bytes per position")
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("angle to full distillation, degrees")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Measure all methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True, help="A .jsonl file with a column `text`.")
    parser.add_argument("--student", choices=STUDENTS, default="shallower")
    parser.add_argument("--only", default="", help="Regular expression of the methods' names.")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--positions", type=int, default=512, help="Of a batch.")
    parser.add_argument("--seeds", type=int, default=4, help="Of what is drawn at random, at least 2.")
    parser.add_argument("--output", type=Path, default=ROOT / ".bench")
    options = parser.parse_args()
    batches = load(options)
    student_divergence = fmean(batch.student_divergence() for batch in batches)
    print(f"The {options.student} student: {student_divergence:.2f} nats from the teacher.", flush=True)
    lines = []
    methods = [*ours(), *whole_methods(batches[0].hidden.shape[-1]), *others()]
    for method in [method for method in methods if re.search(options.only, method.name)]:
        print(f"  {method.name}", flush=True)
        lines.append(summed_up(method, measured(method, batches, options.seeds), batches[0].vocab_size))
    data = {"student": options.student, "student_divergence": student_divergence, "methods": lines}
    write_report(options.output, "fidelity", data, [cells(line) for line in lines])
    plot(lines, options, options.output / "fidelity.png")


if __name__ == "__main__":
    main()
