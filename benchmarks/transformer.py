"""What the shipped model is worth: nats per byte of texts that it has not seen, beside others.

    python benchmarks/transformer.py --data texts/plays texts/held-out \\
        --hold-out macbeth_gut.txt twelfth_night_gut.txt --out checkpoints/transformer --graph

A row of the table for each of --rows; all learn from --data without the hold-outs:

    xz, bzip2    lzma and bz2 of Python at their highest levels. A hold-out costs what it adds to
                 the training text: 8 ln 2 (size of both - size of the training text) / its bytes.
                 The dictionary of xz holds all of it; bzip2 looks back at most 900 kB
    5-gram       over bytes, interpolated, by Kneser and Ney: four bytes predict the next
    mamba        --mamba, each hold-out read once from its first byte to its last
    transformer  as many parameters, trained here by examples/train.py: its loop, its options, their
                 defaults. Its rows always jump, since it has no state to carry. Measured in windows
                 of --seqlen bytes, each half a window after the last one: but for the first window,
                 each byte is predicted from half a window of the past at least

The same number of steps is the same number of bytes. For the same time, give as many --steps as the
transformer takes in it. --lr, --dropout and the step (--keep-best) are to be chosen on a text that
is not a hold-out: without these in --data, and with another play as --hold-out. --init-from FOLDER
trains the transformer of this folder further; --evaluate FOLDER measures it and trains nothing.
With --plays the two models have two tables more, of the names of who speaks (`speeches`): nats per
byte of these and of all else; and nats of a whole name that speaks nowhere in the training text, by
how often it has spoken in its play. On a CPU they take minutes for a play.
"""

from __future__ import annotations

import argparse
import bz2
import lzma
import math
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import train

from generate import DEFAULT_MODEL, ByteTokenizer, Tokenizer, load_tokenizer
from mamba import Mamba, MambaConfig, MambaState, ResidualBlock, read_file

ROWS = ("xz", "bzip2", "5-gram", "mamba", "transformer")

## Compression and prediction are one thing: a byte of probability p takes -log2 p bits, and an
## arithmetic coder comes as near to that as one likes. So the sizes of files compare with losses.


def compressed(name: str, text: bytes) -> int:
    """The size in bytes."""
    if name == "bzip2":
        return len(bz2.compress(text, 9))
    size = max(2**26, len(text))  # what xz -9 looks back, or all of the text
    method = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}
    return len(lzma.compress(text, filters=[method]))


class NGram:
    """P(byte | up to order - 1 bytes before it), from the counts of a text.

    Of each count a discount is taken, and what has been taken in a context is given to the bytes
    as a context that is shorter by one byte predicts them; the shortest, to all 256 alike. Kneser
    and Ney: a shorter context counts not how often a byte followed, but after how many different
    bytes before the context. It is asked where the longer one has seen too little, and there the
    variety counts. The discount is n1 / (n1 + 2 n2), of n1 grams counted once and n2 twice.
    """

    def __init__(self, text: bytes, order: int = 5) -> None:
        data = np.frombuffer(text, dtype=np.uint8)
        grams = encoded(np.lib.stride_tricks.sliding_window_view(data, order))
        self.order, self.levels = order, []
        for length in range(order, 0, -1):
            grams, counts = np.unique(grams, return_counts=True)
            once, twice = max(1, np.sum(counts == 1)), np.sum(counts == 2)
            contexts, first = np.unique(grams // 256, return_index=True)
            sums, kinds = np.add.reduceat(counts, first), np.diff(first, append=len(grams))
            discount = once / (once + 2 * twice)
            self.levels.insert(0, (grams, counts, contexts, sums, kinds, discount))
            grams = grams % 256 ** (length - 1)  # without the first byte, once for each

    def __call__(self, grams: np.ndarray) -> np.ndarray:
        """grams (m, order) bytes -> for each, P(its last byte | the others), (m,)."""
        p = np.full(len(grams), 1 / 256)
        for length, (known, counts, contexts, sums, kinds, discount) in enumerate(self.levels, 1):
            gram = encoded(grams[:, -length:])
            count, total = look_up(known, counts, gram), look_up(contexts, sums, gram // 256)
            taken = np.minimum(discount, count), discount * look_up(contexts, kinds, gram // 256)
            p = np.where(total > 0, (count - taken[0] + taken[1] * p) / np.maximum(total, 1), p)
        return p

    def nats(self, text: bytes) -> float:
        """The sum over all bytes that have order - 1 bytes before them."""
        data = np.frombuffer(text, dtype=np.uint8)
        return -np.log(self(np.lib.stride_tricks.sliding_window_view(data, self.order))).sum()


def encoded(grams: np.ndarray) -> np.ndarray:
    """(m, k) bytes -> (m,) integers: the bytes are their digits."""
    return sum(grams[:, -1 - i].astype(np.int64) * 256**i for i in range(grams.shape[1]))


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of sorted keys, 0 where there is no such key."""
    i = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[i] == wanted, values[i], 0)


## The transformer has the frame of Mamba: embedding, norms, residual blocks, tied head. In place of
## the MambaBlocks stand attention and MLP in turn: one layer of it is two residual blocks.
## Rotary positions (arXiv 2104.09864), SwiGLU (arXiv 2002.05202), no biases. Weights start normal,
## as large as PyTorch's would be, and smaller in what adds to the stream. (Tried with width 64 for
## 600 steps, on another play: 1.83 to 1.85 nats per byte in three runs; uniform, as PyTorch's are,
## 1.86 and 1.87, and if nothing is smaller 1.91; with GPT-2's standard deviation of 0.02, 1.88.)


class Attention(nn.Module):
    """Causal attention, heads of 64 (or one)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.heads = max(1, config.d_model // 64)
        self.in_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, u: Tensor, state: MambaState, **_options) -> tuple[Tensor, MambaState]:
        """u (b, l, d_model) -> the same shape, and the state as it is."""
        query, key, value = self.in_proj(u).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key, value = (x.transpose(1, 2) for x in (rotated(query), rotated(key), value))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2)), state

    def init_state(self, batch: int) -> MambaState:
        """Nothing, in the shapes of a state."""
        empty = self.out_proj.weight.new_zeros(batch, 0, 0)
        return MambaState(empty, empty.clone())


class MLP(nn.Module):
    """SwiGLU, d_inner wide."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.d_model, 2 * config.d_inner, bias=False)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def forward(self, u: Tensor, state: MambaState, **_options) -> tuple[Tensor, MambaState]:
        x, gate = self.in_proj(u).chunk(2, dim=-1)
        return self.out_proj(x * F.silu(gate)), state

    init_state = Attention.init_state


def rotated(x: Tensor) -> Tensor:
    """x (b, l, heads, k): pairs of numbers, each turned by an angle that grows with the position.

    A product of a query and a key then knows how far they are apart, and no more of where they are.
    """
    seqlen, half = x.shape[1], x.shape[3] // 2
    speed = 10_000 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.outer(torch.arange(seqlen, device=x.device), speed).unsqueeze(1)  # (l, 1, half)
    a, b = x.float().chunk(2, dim=-1)
    turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return torch.cat(turned, dim=-1).to(x.dtype)


class Transformer(Mamba):
    """config.n_layer / 2 layers of config.d_model, with MLPs of config.d_inner."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        kinds = [Attention, MLP] * (config.n_layer // 2)
        self.backbone["layers"] = nn.ModuleList(ResidualBlock(config, k(config)) for k in kinds)
        for name, weight in self.backbone.layers.named_parameters():
            if name.endswith("proj.weight") and not weight.is_meta:
                blocks = len(kinds) if "out_proj" in name else 1
                nn.init.normal_(weight, std=(3 * config.d_model * blocks) ** -0.5)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def as_large_as(mamba: MambaConfig) -> MambaConfig:
    """A Transformer's: as wide, with 0.6 times as many layers, and the MLPs fill what is left."""
    with torch.device("meta"):
        wanted = parameters(Mamba(mamba))
        layers = max(1, round(0.6 * mamba.n_layer))
        config = MambaConfig(mamba.d_model, 2 * layers, mamba.vocab_size, tokenizer="bytes")
        config.expand = 1.0
        missing = wanted - parameters(Transformer(config))
    columns = missing / (3 * mamba.d_model * layers)  # of each MLP, which has three matrices
    config.expand += max(0, round(columns / 16) * 16) / mamba.d_model  # matrix units like multiples
    return config


def make_transformer(options: argparse.Namespace) -> tuple[Transformer, Tokenizer]:
    torch.manual_seed(options.seed)
    if name := options.init_from:
        model = Transformer.from_pretrained(name)
        return model, load_tokenizer(model.config, name)
    if options.d_model % (2 * max(1, options.d_model // 64)):
        raise ValueError(f"--d-model {options.d_model} does not give heads of an even width")
    mamba = MambaConfig(options.d_model, options.n_layer, 256, tokenizer="bytes")
    return Transformer(as_large_as(mamba)), ByteTokenizer()


@torch.no_grad()
def losses(model: Mamba, ids: Tensor, window: int = 4096, batch: int = 64) -> Tensor:
    """Nats of each byte of ids (l,) but the first, which is given: (l - 1,), float32.

    A Mamba reads on from window to window; the windows of a Transformer overlap by half.
    """
    ids, found = ids.to(model.lm_head.weight.device).long(), []
    if not isinstance(model, Transformer):
        state = model.init_state(1)
        for i in range(0, len(ids) - 1, window):
            part = ids[i : i + window + 1]
            logits, state = model(part[None, :-1], state)
            found.append(F.cross_entropy(logits[0].float(), part[1:], reduction="none"))
        return torch.cat(found)
    half = window // 2
    rows = max(1, math.ceil((len(ids) - 1 - window) / half) + 1)
    ids = F.pad(ids, (0, (rows - 1) * half + window + 1 - len(ids)), value=-100)
    windows = ids.unfold(0, window + 1, half)
    targets = windows[:, 1:].clone()  # -100: after the end, or predicted in an earlier window
    targets[1:, : window - half] = -100
    for part, wanted in zip(windows.split(batch), targets.split(batch), strict=True):
        logits, wanted = model(part[:, :-1].clamp(min=0)).flatten(0, 1), wanted.flatten()
        nats = F.cross_entropy(logits.float(), wanted, reduction="none")
        found.append(nats[wanted != -100])
    return torch.cat(found)


def evaluate(model: Mamba, texts: list[train.Text], window: int, batch: int = 64) -> float:
    """Mean loss in nats per byte."""
    found = [losses(model, ids, window, batch) for ids, _ in texts]
    return torch.cat(found).double().mean().item()


## Where is a model behind? In a play it stands on a line of its own, after an empty one, who speaks
## next: in capitals, or cut short ("Ham."). Most names come back all through one play and are in no
## other. There the first letters tell the rest, to a model that can look up what it has read.

KINDS = ("all else", "who speaks, for the first time", "who speaks, again")
TIMES = ("1st time", "2nd to 20th", "from the 21st on")  # of names new to the training text


def speeches(text: bytes) -> list[tuple[bytes, slice]]:
    """Who speaks, and where: a whole line, with the line break that ends it."""
    found, before, start = [], b"a title", 0
    for line in text.split(b"\n"):
        name, end = line.strip(), start + len(line) + 1
        heading = re.match(rb"(ACT|SCENE|Exit|Exeunt)\b", name)
        if not before.strip() and not heading:
            if re.fullmatch(rb"(\d )?([A-Z][A-Z ]+|[A-Z][a-z]{1,5})\.", name):
                found.append((name, slice(start, end)))
        before, start = line, end
    return found


def times_of(play: bytes, known: set[bytes] = frozenset()) -> Tensor:
    """Of each byte of a name, how often it has spoken, with this time; of all else, and of names
    that are known, 0 (l,)."""
    times, count = torch.zeros(len(play), dtype=torch.long), Counter()
    for name, line in speeches(play):
        count[name] += 1
        times[line] = 0 if name in known else count[name]
    return times


def nats_of(
    name: str, mamba: Path, options: argparse.Namespace, text: bytes, texts: list[train.Text]
) -> list[Tensor]:
    """Of each hold-out the nats of all bytes but the first; of xz, bzip2 and 5-gram the mean of
    all, as often as there are bytes."""
    kept = [ids.numpy().tobytes() for ids, _ in texts]
    if name in ("xz", "bzip2"):
        alone = compressed(name, text)
        added = [compressed(name, text + each) - alone for each in kept]
        means = [8 * math.log(2) * size / len(each) for size, each in zip(added, kept, strict=True)]
    elif name == "5-gram":
        counts = NGram(text)  # the first bytes of a hold-out follow the last ones of the text
        means = [counts.nats(text[1 - counts.order :] + each) / len(each) for each in kept]
    if name not in ("mamba", "transformer"):
        return [torch.full([len(ids)], mean) for mean, (ids, _) in zip(means, texts, strict=True)]
    if name == "mamba":
        model, window = Mamba.from_pretrained(mamba, device=options.device), 4096
    else:
        window, folder = options.seqlen, options.evaluate or options.out
        if options.evaluate is None:
            measure = partial(evaluate, window=window)
            train.train(options, make_model=make_transformer, evaluate=measure)
        model = Transformer.from_pretrained(folder, device=options.device)
        saved = read_file(folder / "training.pt")
        print(f"transformer: {len(saved['losses'])} steps in {saved['seconds']:.0f} s")
    print(f"{name}: {parameters(model):,} parameters")
    return [losses(model, ids, window).double().cpu() for ids, _ in texts]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="of the table")
    parser.add_argument("--mamba", type=Path, default=DEFAULT_MODEL, help="the folder of a model")
    parser.add_argument("--plays", action="store_true", help="also the names of who speaks alone")
    options = train.parse_arguments(parser)
    rows, mamba, plays = (vars(options).pop(name) for name in ("rows", "mamba", "plays"))
    for name in ("packed", "evaluate_window", "validation_share"):
        if getattr(options, name):
            parser.error(f"{train.option_of(name)} is not for this table")
    if options.tokenizer != "bytes" or not options.hold_out or options.seqlen < 2:
        parser.error("it takes bytes, at least one --hold-out, and --seqlen of at least 2")
    options.jump, options.prompt = 1.0, ""  # no state to read on from, or to sample with
    names = sorted({*options.hold_out})
    table = [("nats per byte", *names, "all"), ("---",) * (len(names) + 2)]
    with train.in_a_sentence("transformer.py"):
        text, texts = train.read_texts(options, ByteTokenizer())
        if len(texts) > len(names):
            raise ValueError("--hold-out: two files of --data have the same name")
        if not len(text[0]):
            raise ValueError("--hold-out names all files of --data: none is left to learn from")
        learned, kept = text[0].numpy().tobytes(), [ids.numpy().tobytes() for ids, _ in texts]
        known = {name for name, _ in speeches(learned)} if plays else set()
        times = torch.cat([times_of(each)[1:] for each in kept])
        new = torch.cat([times_of(each, known)[1:] for each in kept])
        kinds = times == 0, times == 1, times > 1
        turns = new == 1, (new > 1) & (new <= 20), new > 20
        stops = torch.cat([ids[1:] for ids, _ in texts]) == ord(".")  # one in the line of a name
        turns = [(each, int(stops[each].sum())) for each in turns]
        shares = (f"{100 * each.double().mean():.1f} %" for each in kinds)
        titles = (f"{name}: {share}" for name, share in zip(KINDS, shares, strict=True))
        second = [("nats per byte", *titles), ("---",) * (len(KINDS) + 1)]
        titles = (f"{name}: {count}" for name, (_, count) in zip(TIMES, turns, strict=True))
        third = [("nats of a new name", *titles), ("---",) * (len(TIMES) + 1)]
        for name in rows:
            nats = nats_of(name, mamba, options, learned, texts)
            every = torch.cat(nats)
            table.append((name, *(f"{each.mean():.4f}" for each in (*nats, every))))
            print(*table[-1], flush=True)
            if name in ("mamba", "transformer"):
                means = (f"{every[each].mean():.4f}" if each.any() else "" for each in kinds)
                second.append((name, *means))
                means = (f"{every[each].sum() / n:.2f}" if n else "" for each, n in turns)
                third.append((name, *means))
    for lines in (table, second, third) if plays and len(second) > 2 else (table,):
        print(*(f"| {' | '.join(cells)} |" for cells in lines), sep="\n")


if __name__ == "__main__":
    main()
