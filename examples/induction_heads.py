"""Induction heads: what stood after this token, the last time it was there?

    python examples/induction_heads.py --small   # a minute or two on a CPU: a table, a picture
    python examples/induction_heads.py           # the paper's sizes, for a GPU

The task of section 4.1.2 of the paper (arXiv 2312.00752; sizes of its appendix E.1). A sequence of
random tokens holds one special token, somewhere. At the end the special token comes again, and the
model is to say which token followed it the first time:

    7 3 [S] 9 1 4 4 0 2 [S]  ->  9

Attention finds the place by comparing. A recurrent model has to notice [S] when it comes, write the
next token into its state, and keep it from there on, whatever else it reads: it must select. Two
layers are trained on one length and asked at lengths up to thousands of times as long. Beside them
two layers of the same size whose Δ, B and C are the same for every token (`FixedBlock`), as S4's
are: they keep a fading sum of all that came.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mamba import Mamba, MambaBlock, MambaConfig

TOKENS = 16  # the last one is special
PART = 2**15  # tokens of a long sequence that are read at once
# Accuracy that the paper's table 2 gives for Mamba, at every length from 2^6 to 2^20.
PAPER = 1.0
SIZES = {  # d_model, length and rows in training, steps, learning rate, lengths that are asked
    "paper": {"d_model": 64, "length": 256, "batch": 8, "steps": 25 * 8192, "lr": 1e-3,
              "asked": [2**k for k in range(6, 21)]},
    "small": {"d_model": 16, "length": 32, "batch": 32, "steps": 500, "lr": 1e-2,
              "asked": [2**k for k in range(4, 12)]},
}  # fmt: skip


class FixedBlock(MambaBlock):
    """A MambaBlock without selection: Δ, B and C are parameters, and x does not change them."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.B, self.C = (nn.Parameter(torch.randn(config.d_state)) for _ in range(2))

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., d) -> dt (..., d), B and C (..., n). Δ is softplus(dt + bias): dt is 0."""
        B, C = (parameter.expand(*x.shape[:-1], -1) for parameter in (self.B, self.C))
        return torch.zeros_like(x), B, C


def make_model(kind: str, d_model: int) -> Mamba:
    """Two layers. kind: "selective" or "fixed"."""
    model = Mamba(MambaConfig(d_model, n_layer=2, vocab_size=TOKENS, pad_vocab_size_multiple=1))
    if kind == "fixed":
        for layer in model.backbone.layers:
            layer.mixer = FixedBlock(model.config)
    return model


def make_sequences(batch: int, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """ids (b, l) and the token that is asked for (b,), from the device's global generator."""
    ids = torch.randint(TOKENS - 1, (batch, length), device=device)
    place = torch.randint(length - 2, (batch, 1), device=device)
    ids.scatter_(1, place, TOKENS - 1)
    ids[:, -1] = TOKENS - 1
    return ids, ids.gather(1, place + 1).squeeze(1)


def answer(model: Mamba, ids: Tensor) -> Tensor:
    """ids (b, l) -> logits (b, TOKENS) after the last token, reading part after part."""
    state = model.init_state(len(ids))
    for part in ids.split(PART, dim=1):
        logits, state = model(part, state, head=lambda hidden: model.lm_head(hidden[:, -1]))
    return logits


def train(
    model: Mamba, length: int, batch: int, steps: int, lr: float, say: str = ""
) -> list[float]:
    """Cross-entropy of the answer alone, on new sequences at each step. Returns the losses."""
    device = model.lm_head.weight.device
    on_gpu, losses = device.type == "cuda", torch.zeros(steps, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, capturable=on_gpu)
    count = torch.zeros(1, dtype=torch.long, device=device)

    def step() -> None:
        ids, wanted = make_sequences(batch, length, device)
        loss = F.cross_entropy(answer(model, ids), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.scatter_(0, count, loss.detach().unsqueeze(0))
        count.add_(1).remainder_(steps)

    ## On a GPU a step of a model this small is nearly all Python. So it is recorded once as a CUDA
    ## graph, with its random numbers and its optimizer, and replayed.
    run, recorded = step, 3 if on_gpu and steps > 3 else 0
    if recorded:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(recorded):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    begun = time.perf_counter()
    for i in range(recorded, steps):
        run()
        if say and (i + 1) % max(1, steps // 20) == 0:
            loss = losses[max(0, i - 50) : i + 1].mean().item()
            seconds = time.perf_counter() - begun
            line = f"{say}, step {i + 1:,} of {steps:,}: loss {loss:.3f}, {seconds:.0f} s"
            print(f"\r{line:70}", end="", file=sys.stderr, flush=True)
    if say:
        print(file=sys.stderr)
    return losses.tolist()


@torch.no_grad()
def accuracy(model: Mamba, length: int, rows: int = 64) -> float:
    """The share of rows that are answered, of new sequences."""
    ids, wanted = make_sequences(rows, length, model.lm_head.weight.device)
    return (answer(model, ids).argmax(-1) == wanted).float().mean().item()


def table(results: dict[tuple[str, int], list[float]], sizes: dict) -> str:
    """Lines of markdown: a row for each length, a column for each model and seed."""
    titles = ["length", "paper", *(f"{kind}, seed {seed}" for kind, seed in results)]
    lines = [titles, ["---:"] * len(titles)]
    for i, length in enumerate(sizes["asked"]):
        mark = " (trained)" if length == sizes["length"] else ""
        paper = f"{100 * PAPER:.0f} %" if sizes is SIZES["paper"] else ""
        found = (f"{100 * shares[i]:.0f} %" for shares in results.values())
        lines.append([f"{length:,}{mark}", paper, *found])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results: dict[tuple[str, int], list[float]], sizes: dict, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    colors = {"selective": "royalblue", "fixed": "darkorange"}
    labels = {"selective": "Δ, B, C from the token (Mamba)", "fixed": "Δ, B, C fixed (as in S4)"}
    for (kind, _), shares in results.items():
        axes.plot(sizes["asked"], shares, "o-", color=colors[kind], label=labels.pop(kind, None))
    axes.axvline(sizes["length"], color="gray", linestyle=":", label="length in training")
    axes.axhline(1 / (TOKENS - 1), color="gray", linestyle="--", label="guessing")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("tokens in the sequence")
    axes.set_ylabel("share answered")
    axes.set_title("Induction heads: each line a seed")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="all")
    parser.add_argument("--steps", type=int, help="of training, in place of the sizes' own")
    parser.add_argument("--out", type=Path, default=Path("induction_heads.png"), help="picture")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    sizes = SIZES["small" if options.small else "paper"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # matrices as small as these do not gain from more
    results = {}
    for kind in ("selective", "fixed"):
        for seed in options.seeds:
            torch.manual_seed(seed)
            model = make_model(kind, sizes["d_model"]).to(device)
            steps = options.steps or sizes["steps"]
            train(
                model, sizes["length"], sizes["batch"], steps, sizes["lr"], f"{kind}, seed {seed}"
            )
            results[kind, seed] = [accuracy(model, length) for length in sizes["asked"]]
    print(table(results, sizes))
    draw(results, sizes, options.out)
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
