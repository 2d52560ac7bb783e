"""Associative recall: how many pairs of key and value does a state of fixed size hold?

    python examples/recall.py --small   # two minutes on a CPU: a table, a picture
    python examples/recall.py           # the vocabulary of Zoology, for a GPU

The task of Zoology (arXiv 2312.04927), multi-query associative recall. First come pairs, then all
keys again in another order, and at each the model is to say the value that came with it:

    c 4  a 7  f 4  b 1   a c b f  ->  7 4 1 4

Attention keeps every pair, and looks for the key among them. A recurrent model has written them one
over the other into the same d_inner x d_state numbers. So one Mamba block is trained for each of
several states, and beside them one layer of attention (`Attention`) for a stream of the same width,
behind the same short convolution, through which a value knows the key before it. All are trained on
all numbers of pairs at once. (Zoology puts other tokens between the keys that are asked, and trains
two layers; a second layer would hide how large the state is that does the work.)

What could a state of S numbers hold? Let each pair add a pattern of its own, S random signs. To ask
which of V values belongs to a key, compare the state with the V patterns that they would make with
it. The right one gives S, and each wrong one, after P pairs, about sqrt(S P) times a normal number,
of which the largest of V is about sqrt(2 ln V). So the right one stands out up to about

    P = S / (2 ln V) pairs:    16.6 numbers a pair for V = 4096.

This is no bound, as patterns can be chosen better than at random. But it is where a sum of all
pairs begins to fail, and the picture draws it as a line. Mamba's patterns are more alike than
random ones: B_t and C_t, its keys, are shared by all channels of a state, and computed from these
channels. Of two states of 8192 numbers, with the wide one, 512 x 16, half of 380 to 391 pairs are
answered, 77 to 79 % of what the line says, with the other, 128 x 64, half of 89 to 160 (three
seeds; 512 pairs are asked, but never in training).
"""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from induction_heads import accuracy, command_line, run_each, train

from mamba import Mamba, MambaConfig, MambaState, causal_conv

Shape = tuple[int, int] | None  # of a state: d_inner, d_state; None: attention
SIZES = {  # keys, and as many values; numbers of pairs, in training and in the exam; questions for
    # each in a step of training
    "zoology": {"words": 4096, "pairs": [2**k for k in range(2, 9)],
                "asked": [2**k for k in range(2, 10)], "questions": 2048, "d_model": 64,
                "states": [(128, 4), (128, 16), (128, 64), (512, 16)],
                "steps": 20_000, "lr": 3e-3, "fade": 0.2, "clip": 1.0},
    "small": {"words": 32, "pairs": [2**k for k in range(1, 6)],
              "asked": [2**k for k in range(1, 6)], "questions": 64, "d_model": 64,
              "states": [(128, 1), (128, 4), (128, 16)],
              "steps": 640, "lr": 2e-2, "fade": 0.2, "clip": 1.0},
}  # fmt: skip


class Attention(nn.Module):
    """One head of causal attention that stands in the place of a MambaBlock. It needs no positions:
    order enters through the convolution, as there."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        d = 3 * config.d_model  # queries, keys and values
        self.in_proj = nn.Linear(config.d_model, d, bias=False)
        self.conv1d = nn.Conv1d(d, d, config.d_conv, groups=d)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, u: Tensor, state: MambaState, **_options) -> tuple[Tensor, MambaState]:
        """u (b, l, d_model), all of a sequence -> (b, l, d_model), and the state as it is."""
        x, _ = causal_conv(self.in_proj(u), self.conv1d, state.conv)
        query, key, value = x.chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(y), state

    def init_state(self, batch: int) -> MambaState:
        """What stands before a sequence: zeros for the convolution, and nothing else."""
        d, d_conv = self.conv1d.weight.shape[::2]
        return MambaState(self.in_proj.weight.new_zeros(batch, d, d_conv - 1), torch.empty(0))


def make_model(shape: Shape, d_model: int, words: int) -> Mamba:
    """One layer: a Mamba block with a state of d_inner x d_state numbers, or attention."""
    d_inner, n = shape or (2 * d_model, 1)
    config = MambaConfig(d_model, vocab_size=2 * words, d_state=n, expand=d_inner / d_model)
    model = Mamba(config)
    if shape is None:
        model.backbone.layers[0].mixer = Attention(model.config)
    else:
        ## A_n = -n at the start of training: the 64th state forgets 64 times as fast as the first,
        ## which is of no use where nothing is to be forgotten. Here all of them start at -1.
        nn.init.zeros_(model.backbone.layers[0].mixer.A_log)
    return model


def make_sequences(
    rows: int, pairs: int, words: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """ids (rows, 3 pairs) and the values asked for (rows, pairs), from the device's generator.

    Keys are below `words`, each once in a row; values are from there on, and may be the same.
    """
    keys = torch.rand(rows, words, device=device).topk(pairs).indices
    values = torch.randint(words, 2 * words, (rows, pairs), device=device)
    order = torch.rand(rows, pairs, device=device).argsort()
    said = torch.stack([keys, values], dim=-1).flatten(1)
    return torch.cat([said, keys.gather(1, order)], dim=1), values.gather(1, order)


def ask(model: Mamba, questions: int, pairs: int, words: int) -> tuple[Tensor, Tensor]:
    """So many questions (or a few less) about new sequences: logits (rows, pairs, vocabulary) and
    the values that are right (rows, pairs)."""
    rows = questions // pairs
    ids, values = make_sequences(rows, pairs, words, model.lm_head.weight.device)
    return model(ids, head=lambda hidden: model.lm_head(hidden[:, -pairs:])), values


def ask_all(model: Mamba, questions: int, pairs: list[int], words: int) -> tuple[Tensor, Tensor]:
    """As many questions for each number of pairs: logits (q, vocabulary), right values (q,)."""
    asked = [ask(model, questions, count, words) for count in pairs]
    logits, values = zip(*asked, strict=True)
    return torch.cat([x.flatten(0, 1) for x in logits]), torch.cat([x.flatten() for x in values])


def held_by_random_patterns(numbers: float, words: int) -> float:
    """Pairs that so many numbers hold, if each pair adds a random pattern to them."""
    return numbers / (2 * math.log(words))


def half(shares: list[float], pairs: list[int]) -> tuple[float, str]:
    """The number of pairs at which half of the questions are answered, between those tried, and
    "". If it is none of these, the first with "<" or the last with ">"."""
    if shares[0] < 0.5:
        return pairs[0], "<"
    for i in range(1, len(pairs)):
        if shares[i] < 0.5:
            part = (shares[i - 1] - 0.5) / (shares[i - 1] - shares[i])
            return pairs[i - 1] * (pairs[i] / pairs[i - 1]) ** part, ""
    return pairs[-1], ">"


def name(shape: Shape) -> str:
    """Of a model, in the table and the picture."""
    return "attention" if shape is None else "Mamba, {} x {} numbers".format(*shape)


def table(results: dict[tuple[Shape, int], list[float]], sizes: dict) -> str:
    """Lines of markdown: a row for each number of pairs, a column for each model and seed."""
    titles = ["pairs", *(f"{name(shape)}, seed {seed}" for shape, seed in results)]
    lines = [titles, ["---:"] * len(titles)]
    for i, count in enumerate(sizes["asked"]):
        lines.append([str(count), *(f"{100 * shares[i]:.0f} %" for shares in results.values())])
    halves = (half(shares, sizes["asked"]) for shares in results.values())
    lines.append(["half answered", *(f"{sign}{count:.0f}" for count, sign in halves)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results: dict[tuple[Shape, int], list[float]], sizes: dict, file: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    pairs, words, states = sizes["asked"], sizes["words"], sizes["states"]
    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = colormaps["viridis_r"]([(i + 1) / (len(states) + 1) for i in range(len(states))])
    colors = dict(zip(states, shades, strict=True)) | {None: "black"}
    labels = {shape: name(shape) for shape in colors}  # one line of the legend for all seeds
    above = False
    for (shape, _), shares in results.items():
        left.plot(pairs, shares, "o-", color=colors[shape], label=labels.pop(shape, None))
        if shape is not None:
            count, sign = half(shares, pairs)
            mark = {"<": "v", "": "o", ">": "^"}[sign]
            right.plot(math.prod(shape), count, mark, color=colors[shape])
            above = above or sign == ">"
    numbers = [min(map(math.prod, states)) / 2, max(map(math.prod, states)) * 2]
    line = [held_by_random_patterns(n, words) for n in numbers]
    formula = f"random patterns: numbers / (2 ln {words})"
    right.plot(numbers, line, color="gray", linestyle="--", label=formula)
    if above:
        right.plot([], [], "^", color="gray", label="more than all that were tried")
    left.axhline(1 / words, color="gray", linestyle=":", label="guessing")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    left.set_ylim(0, 1.03)
    left.set_xlabel("pairs in the sequence")
    left.set_ylabel("share of questions answered")
    right.set_xlabel("numbers in the state, d_inner x d_state")
    right.set_ylabel("pairs at which half is answered")
    figure.suptitle("Associative recall: what a state of fixed size holds")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file)


def main() -> None:
    options = command_line(__doc__.split("\n")[0], "recall.png", (0,))
    sizes = SIZES["small" if options.small else "zoology"]
    words, steps = sizes["words"], options.steps or sizes["steps"]
    how = {x: sizes[x] for x in ("lr", "fade", "clip")}
    learn = functools.partial(
        ask_all, questions=sizes["questions"], pairs=sizes["pairs"], words=words
    )

    def run(shape: Shape, seed: int) -> list[float]:
        model = make_model(shape, sizes["d_model"], words).to(options.device)
        train(model, learn, steps, **how, say=f"{name(shape)}, seed {seed}")
        exam = functools.partial(ask, questions=2048, words=words)
        return [accuracy(model, functools.partial(exam, pairs=count)) for count in sizes["asked"]]

    results = run_each(run, (None, *sizes["states"]), sizes | {"steps": steps}, options)
    print(table(results, sizes))
    draw(results, sizes, options.out)
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
