"""Selective copying: repeat what was said, and leave out the noise between.

    python examples/selective_copying.py --small   # a minute on a CPU: a table, a picture
    python examples/selective_copying.py           # the paper's task, for a GPU

The task of section 4.1.1 of the paper (arXiv 2312.00752). Data tokens stand at random places among
noise. After them comes a row of markers, one for each data token; at every marker the model is to
say the next of them, in the order in which they came:

    . . 7 . . . 3 . 3 . . . . 9 . . ? ? ? ?  ->  7 3 3 9

If the places were always the same, a fixed filter as long as the sequence would do: take what came
so many steps ago. Here the distance differs from token to token. A model that selects can set Δ to
nearly 0 where it reads noise, so that its state stands still; what is left is a sequence without
noise, and there the distance is the same each time. (That is one way. After --small, of 24 places,
Δ is about as large on noise as on data: what these models write differs by x and B.) Two layers are
trained, and beside them two whose Δ, B and C are the same for every token (`FixedBlock`), as S4's.

The paper's appendix E.1: length 4096, 16 tokens to remember, a vocabulary of 16 with the noise, two
layers of width 64, 400,000 steps of 64 sequences at a constant learning rate of 1e-4. It leaves
open how the answer is asked for, and its data were not published (github.com/state-spaces/mamba,
issue 343). Here it is as in the copying task of S4's authors: 4096 places for noise and data, then
the markers, and of the 16 tokens one is the noise, one the marker and 14 are data. And the training
begins with short sequences: of 4096 places from the start, 8,000 steps at 1e-3 taught neither model
anything. 6,000 steps each of 32, 128, 512 and 4096 places do. The learning rate falls to 0 over the
last two fifths of the steps of each length. (With β₂ = 0.999, PyTorch's, and gradients as they
come, one seed in three lost at 4096 places what it could do before. With 0.95 and gradients of norm
1 at most, none did.)
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import induction_heads
from induction_heads import COLORS, LABELS, TOKENS, accuracy, command_line, run_each, train

from mamba import Mamba

NOISE, MARKER = 0, TOKENS - 1  # between them are the data
# Accuracy in the paper's table 1: Mamba, and S4 in the place of its selective SSM (S6).
PAPER = {"selective": 0.998, "fixed": 0.564}
SIZES = {  # places for noise and data, one after the other; data tokens; rows in training; steps
    # of each length; learning rate, how it ends, and the largest norm of a gradient
    "paper": {"d_model": 64, "lengths": [32, 128, 512, 4096], "data": 16, "batch": 64,
              "steps": 6_000, "lr": 1e-3, "fade": 0.4, "clip": 1.0},
    "small": {"d_model": 16, "lengths": [24], "data": 3, "batch": 32,
              "steps": 400, "lr": 1e-2, "fade": 0.2, "clip": 1.0},
}  # fmt: skip


class ProductEmbedding(nn.Embedding):
    """The lookup as a product. On a GPU the gradient of a lookup adds what equal tokens give it one
    after the other, and here nearly all 263,168 tokens of a step are equal: noise."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.one_hot(ids, self.num_embeddings).to(self.weight.dtype) @ self.weight


def make_model(kind: str, d_model: int) -> Mamba:
    """Two layers. kind: "selective" or "fixed"."""
    model = induction_heads.make_model(kind, d_model)
    weight = model.backbone.embedding.weight.detach()
    model.backbone["embedding"] = ProductEmbedding.from_pretrained(weight, freeze=False)
    model.tie_weights()
    return model


def make_sequences(
    batch: int, length: int, data: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """ids (b, length + data) and the data tokens (b, data), from the device's global generator."""
    said = torch.randint(NOISE + 1, MARKER, (batch, data), device=device)
    places = torch.rand(batch, length, device=device).topk(data).indices.sort().values
    ids = torch.full((batch, length + data), NOISE, device=device)
    ids[:, length:] = MARKER
    return ids.scatter_(1, places, said), said


def ask(model: Mamba, rows: int, length: int, data: int) -> tuple[Tensor, Tensor]:
    """The logits at the markers of new sequences (rows, data, TOKENS), and the data tokens."""
    ids, said = make_sequences(rows, length, data, model.lm_head.weight.device)
    return model(ids, head=lambda hidden: model.lm_head(hidden[:, -data:])), said


def table(shares: dict[tuple[str, int], float], is_paper: bool) -> str:
    """Lines of markdown: a row for each model, a column for each seed."""
    seeds = sorted({seed for _, seed in shares})
    titles = ["", "paper", *(f"seed {seed}" for seed in seeds)]
    lines = [titles, ["---", *(["---:"] * (len(titles) - 1))]]
    for kind, label in LABELS.items():
        found = (f"{100 * shares[kind, seed]:.1f} %" for seed in seeds)
        lines.append([label, f"{100 * PAPER[kind]:.1f} %" if is_paper else "", *found])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def points_of(curve: Tensor) -> list[list[float]]:
    """Numbers of each step (k, steps) -> at most 100 means along the steps, and where they end."""
    parts = curve.split(-(-curve.shape[1] // 100), dim=1)
    ends = torch.tensor([part.shape[1] for part in parts]).cumsum(0)
    return [ends.tolist(), *torch.stack([part.mean(1) for part in parts], dim=1).tolist()]


def draw(
    curves: dict[tuple[str, int], list], lengths: list[int], is_paper: bool, file: Path
) -> None:
    """curves: of each model and seed, steps, losses and shares copied."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = dict(LABELS)  # one line of the legend for all seeds
    for (kind, _), (steps, losses, shares) in curves.items():
        left.plot(steps, losses, color=COLORS[kind], label=labels.pop(kind, None))
        right.plot(steps, shares, color=COLORS[kind])
    guess = 1 / (TOKENS - 2)
    left.axhline(-torch.tensor(guess).log(), color="gray", linestyle="--", label="guessing")
    right.axhline(guess, color="gray", linestyle="--")
    if is_paper:
        for kind, share in PAPER.items():
            label = f"the paper's: {100 * share:.1f} %"
            right.axhline(share, color=COLORS[kind], linestyle=":", label=label)
    left.set_yscale("log")
    left.set_ylabel("cross-entropy, nats a token")
    right.set_ylim(0, 1.03)
    right.set_ylabel("share of tokens copied")
    each = steps[-1] / len(lengths)
    for axes in (left, right):
        axes.set_xlabel("steps of training")
        for i, length in enumerate(lengths if len(lengths) > 1 else ()):
            axes.axvline(i * each, color="lightgray", linewidth=0.8, zorder=0)
            top = {"transform": axes.get_xaxis_transform(), "ha": "center", "size": 8}
            axes.text((i + 0.5) * each, 1.01, f"{length:,} places", **top)
    figure.suptitle("Selective copying, on sequences not seen before: each line a seed")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file)


def main() -> None:
    options = command_line(__doc__.split("\n")[0], "selective_copying.png", (0, 1, 2))
    sizes = SIZES["small" if options.small else "paper"]
    steps, how = options.steps or sizes["steps"], {x: sizes[x] for x in ("lr", "fade", "clip")}

    def run(kind: str, seed: int) -> tuple[list, float]:
        model, curves = make_model(kind, sizes["d_model"]).to(options.device), []
        for length in sizes["lengths"]:
            learn = functools.partial(ask, rows=sizes["batch"], length=length, data=sizes["data"])
            say = f"{kind}, seed {seed}, length {length}"
            curves.append(train(model, learn, steps, **how, say=say))
        return points_of(torch.cat(curves, dim=1)), accuracy(model, learn, times=20)

    results = run_each(run, LABELS, sizes | {"steps": steps}, options)
    print(table({which: share for which, (_, share) in results.items()}, not options.small))
    curves = {which: curve for which, (curve, _) in results.items()}
    draw(curves, sizes["lengths"], not options.small, options.out)
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
