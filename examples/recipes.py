"""Recipes around mamba.py, each complete and short enough to copy.

    1. BidirectionalBlock   a layer that reads a sequence from both sides
    2. SequenceClassifier   one answer for a whole sequence, in batches of unequal lengths
    3. train_in_windows     a long sequence in windows, with the state carried over the borders
    4. pack, packed_loss    several documents in one row, none of which sees another
    5. resize_token_embeddings, save_for_official, save_for_transformers
                            more tokens, and folders that other libraries read

`python examples/recipes.py` tries the first four on toy tasks, in half a minute on one core, and
prints what was learnt. Shapes: b rows, l positions. None needs another; 1 and 4 share `starts`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mamba import (
    EMBEDDING,
    HF_EMBEDDING,
    HF_FIELDS,
    Mamba,
    MambaBlock,
    MambaConfig,
    RMSNorm,
    read_config,
)

## Whatever stands to the left in a row flows into what follows. `reset` cuts this, wherever the
## number of the document changes. A padding mask is such a numbering, with numbers False and True.


def starts(documents: Tensor) -> Tensor:
    """(b, l) numbers of documents, or a padding mask -> (b, l) bool, True where a document starts.

    The first position is a start: a state that is carried into the row would be forgotten.
    """
    first = torch.ones_like(documents[:, :1], dtype=torch.bool)
    return torch.cat([first, documents[:, 1:] != documents[:, :-1]], dim=1)


## 1. Both directions ------------------------------------------------------------------------------
##
## A Mamba block sees what is to the left. Where the whole sequence is there from the start (DNA,
## audio, a sentence to tag), a second block may read it from the right: flip, run, flip back.
##
## The flip brings padding from the right to the left, where a block reads it before the sequence.
## `reset`, where padding ends and the sequence starts, fits both, whichever side is padded.


class BidirectionalBlock(nn.Module):
    """u (b, l, d_model) -> (b, l, d_model), each position from the whole of its sequence.

    documents: (b, l) bool, False on padding wherever it is, or the numbers that `pack` returns: no
    position sees those of another number. What comes out on padding has no meaning.
    Cost: parameters, time and memory of two blocks. It has no `step`: the end must be known.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.rightward, self.leftward = MambaBlock(config), MambaBlock(config)

    def forward(self, u: Tensor, documents: Tensor | None = None) -> Tensor:
        if documents is None:
            return self.rightward(u) + self.leftward(u.flip(1)).flip(1)
        ## Read from the right, a document starts where it ends: flip the numbers, not the starts.
        y = self.leftward(u.flip(1), reset=starts(documents.flip(1)))
        return self.rightward(u, reset=starts(documents)) + y.flip(1)


## 2. A classifier ---------------------------------------------------------------------------------
##
## Padding on the right needs no mask: at the last valid position a causal model has not seen it
## yet. One only has to take the answer from there, and not from the end of the row. That one
## position must remember all that counts; the mean over the valid positions asks less of memory.
## (Of many tasks that fit neither, know parity: no decay in (0, 1) flips a state, and a Mamba does
## not learn whether the ones in a long row are odd or even. arXiv 2411.12537 has the proof.)


class SequenceClassifier(nn.Module):
    """Ids (b, l), or numbers (b, l, features) if features is given -> logits (b, classes).

    lengths (b,) int: row i is valid up to lengths[i]; then comes padding, any id or finite number.
    None: all is valid. pool: from the "last" valid position, or from the "mean" over all of them.
    Cost: linear in l, padding included: put rows of similar lengths into one batch.
    Raises ValueError for a length that is not in 1 ... l and for an unknown pool.
    """

    def __init__(
        self, config: MambaConfig, classes: int, features: int | None = None, pool: str = "last"
    ) -> None:
        super().__init__()
        if pool not in ("last", "mean"):
            raise ValueError(f"pool must be 'last' or 'mean', got {pool!r}")
        d, self.pool = config.d_model, pool
        self.embed = nn.Linear(features, d) if features else nn.Embedding(config.vocab_size, d)
        self.norms = nn.ModuleList(RMSNorm(d, config.norm_eps) for _ in range(config.n_layer))
        self.blocks = nn.ModuleList(MambaBlock(config) for _ in range(config.n_layer))
        self.norm_f, self.head = RMSNorm(d, config.norm_eps), nn.Linear(d, classes)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        batch, seqlen = inputs.shape[:2]
        if lengths is None:
            lengths = torch.full((batch,), seqlen, device=inputs.device)
        if lengths.shape != (batch,) or lengths.min() < 1 or lengths.max() > seqlen:
            raise ValueError(f"need {batch} lengths in 1 ... {seqlen}, got {lengths.tolist()}")
        stream = self.embed(inputs)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            stream = stream + block(norm(stream))
        stream, device = self.norm_f(stream), stream.device
        if self.pool == "last":
            return self.head(stream[torch.arange(batch, device=device), lengths - 1])
        valid = torch.arange(seqlen, device=device) < lengths.unsqueeze(1)
        return self.head((stream * valid.unsqueeze(-1)).sum(1) / lengths.unsqueeze(1))


## 3. Windows of a long sequence -------------------------------------------------------------------
##
## Back-propagation keeps what every position has computed. Truncated, it keeps one window: the
## state crosses the border, the gradient does not. So the model can use a past far older than a
## window, but nothing teaches it to store what helps only beyond the window's end. Of the rhythm
## 0000100002, in windows of 5, it often learns when a beat is due and not which: a loss of 0.14.
## And the state comes from weights that are some steps old: keep the learning rate small.


def train_in_windows(
    model: Mamba, ids: Tensor, window: int, optimizer: torch.optim.Optimizer
) -> Iterator[float]:
    """Read ids (b, l) once, from left to right; one step of the optimizer and one loss a window.

    Every position but the last predicts the next; the last window may be shorter.
    Cost: the memory of one window, whatever l is; time linear in l.
    """
    state = model.init_state(len(ids))
    for i in range(0, ids.shape[1] - 1, window):
        targets = ids[:, i + 1 : i + 1 + window]
        logits, state = model(ids[:, i : i + targets.shape[1]], state)
        state = state.detach()  # or the next backward would enter a graph that is freed
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


## 4. Packed documents -----------------------------------------------------------------------------
##
## Documents of unequal lengths waste their padding; packed, they fill rows of one length. Two
## things must not leak: the state, which `reset` cuts, and the loss, for the last token of a
## document is not to predict the first of the next one.


def pack(documents: Iterable[Tensor], seqlen: int) -> tuple[Tensor, Tensor]:
    """Documents (l_i,) -> ids (b, seqlen) and numbers (b, seqlen): 1, 2, ... and 0 for padding.

    Each document goes into the first row that has room for it: time linear in documents x rows.
    Raises ValueError for a document longer than seqlen: cut it, or carry a state as in 3.
    """
    rows: list[Tensor] = []  # ids above numbers, (2, what is used)
    for number, ids in enumerate(documents, start=1):
        if len(ids) > seqlen:
            raise ValueError(f"document {number} has {len(ids)} tokens, a row only {seqlen}")
        part = torch.stack([ids, torch.full_like(ids, number)])
        fits = (i for i, row in enumerate(rows) if row.shape[1] + len(ids) <= seqlen)
        i = next(fits, len(rows))
        rows[i : i + 1] = [torch.cat([*rows[i : i + 1], part], dim=1)]
    padded = [F.pad(row, (0, seqlen - row.shape[1])) for row in rows]
    return torch.stack(padded, dim=1).unbind()


def packed_loss(model: Mamba, ids: Tensor, documents: Tensor) -> Tensor:
    """What `pack` returns -> the mean loss over all tokens but the first of each document.

    A long document counts more. NaN if none has two tokens. Cost: that of b x l tokens.
    """
    first = starts(documents)
    logits = model(ids[:, :-1], reset=first[:, :-1])
    targets = ids.masked_fill(first | (documents == 0), -100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


## 5. Files for others -----------------------------------------------------------------------------
##
## Other tokens need another embedding; other libraries read other files. None of the three needs
## the libraries that it writes for.


def resize_token_embeddings(model: Mamba, vocab_size: int) -> None:
    """Make room for vocab_size tokens, in place: old rows stay, new ones start as in a new model.

    A head of its own is resized as well. The parameters are new: make the optimizer afterwards.
    Raises ValueError for a vocab_size that no configuration can have.
    """
    config = replace(model.config, vocab_size=vocab_size)  # checks it
    kept, modules = min(model.config.vocab_size, config.vocab_size), [model.backbone.embedding]
    if model.lm_head.weight is not model.backbone.embedding.weight:
        modules.append(model.lm_head)
    for module in modules:
        old = module.weight
        new = old.new_empty(config.padded_vocab_size, config.d_model).normal_(std=0.02)
        new[:kept] = old.detach()[:kept]
        module.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    if len(modules) == 1:
        model.lm_head.weight = model.backbone.embedding.weight
    model.backbone.embedding.num_embeddings = model.lm_head.out_features = len(new)
    old_config = model.config  # which another model may share
    for module in model.modules():
        if getattr(module, "config", None) is old_config:
            module.config = config


def save_for_official(model: Mamba, path: str | Path) -> None:
    """A folder for `MambaLMHeadModel.from_pretrained` of mamba_ssm.

    It takes no field of config.json that it does not know (so the tokenizer is not named there),
    pytorch_model.bin alone, and both names of a tied matrix. Raises ValueError for a rule or
    norm_eps that it does not have.
    """
    check_is_standard(model, norm_eps=1e-5, rule="mamba")
    folder = Path(path)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("tokenizer", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Written aside and moved: the model's weights may be mapped from the file of this name.
    torch.save(model.state_dict(), folder / "pytorch_model.bin.partial")
    (folder / "pytorch_model.bin.partial").replace(folder / "pytorch_model.bin")
    for other in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        other.unlink()  # older files too: a loader would prefer them


def save_for_transformers(model: Mamba, path: str | Path) -> None:
    """A folder for `MambaForCausalLM.from_pretrained` of transformers, and for ours.

    Some fields and one weight change their names, and rows that pad count as tokens. Raises
    ValueError for another rule than "mamba" and a fractional expand.
    """
    from safetensors.torch import load_file, save_file

    check_is_standard(model, rule="mamba", expand=int(model.config.expand))
    folder = Path(path)
    model.save_pretrained(folder)
    file, saved = folder / "model.safetensors", read_config(folder / "config.json")
    names = {theirs: ours for theirs, ours in HF_FIELDS.items() if isinstance(ours, str)}
    config = {theirs: getattr(saved, ours) for theirs, ours in names.items()}
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    config |= {"vocab_size": saved.padded_vocab_size, "intermediate_size": saved.d_inner}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Copies: the file that they are read from is written anew.
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    weights[HF_EMBEDDING] = weights.pop(EMBEDDING)
    save_file(weights, file, metadata={"format": "pt"})


def check_is_standard(model: Mamba, **needed: object) -> None:
    for name, value in needed.items():
        if (ours := getattr(model.config, name)) != value:
            raise ValueError(f"{name} = {ours!r} cannot be said there, only {value!r}")


## Toy tasks ---------------------------------------------------------------------------------------


def answer_loss(model: nn.Module, *rows: Tensor) -> Tensor:
    return F.cross_entropy(model(*rows[:-1]).flatten(0, -2), rows[-1].flatten())


def fit(model: nn.Module, loss_of: Callable, make: Callable[[int], tuple], steps: int) -> float:
    """Train with loss_of(model, *make(32)), new in every step -> the loss of 1000 more."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, *make(32)).backward()
        optimizer.step()
    with torch.no_grad():
        return loss_of(model, *make(1000)).item()


def rows_with_an_end(count: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, (count, 16))
    return ids, ids[:, -1:].expand_as(ids)


def rows_with_a_mark(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (count, 32), lengths (count,), and for every row what follows its only 0, one of 7."""
    ids, lengths = torch.randint(1, 8, (count, 32)), torch.randint(8, 33, (count,))
    rows, mark = torch.arange(count), (torch.rand(count) * (lengths - 1)).long()
    ids[rows, mark] = 0
    return ids, lengths, ids[rows, mark + 1] - 1


def repetitions(count: int) -> list[Tensor]:
    lengths = torch.randint(2, 25, (count,)).tolist()
    return [torch.randint(8, (3,)).repeat(8)[:length] for length in lengths]


def main() -> None:
    about = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    argparse.ArgumentParser(**about).parse_args()
    torch.set_num_threads(1)  # tensors as small as these gain nothing from more
    torch.manual_seed(0)
    config = MambaConfig(d_model=32, vocab_size=8)
    print("1. At each of 16 positions, which of 4 ids ends the row? A guess costs 1.386 nats.")
    for block in (MambaBlock(config), BidirectionalBlock(config)):
        model = nn.Sequential(nn.Embedding(4, 32), block, nn.Linear(32, 4))
        loss = fit(model, answer_loss, rows_with_an_end, steps=100)
        print(f"   {type(block).__name__}: {loss:.3f}")
    print("2. In 8 to 32 ids, which of 7 follows the only 0? A guess costs 1.946.")
    model = SequenceClassifier(config, classes=7)
    print(f"   SequenceClassifier: {fit(model, answer_loss, rows_with_a_mark, steps=300):.3f}")
    print("3. 000001 000001 ... in windows of 4: which id comes next?")
    ids = ((torch.arange(1201) + torch.randint(6, (16, 1))) % 6 == 5).long()
    for name, span in (("state carried", 1200), ("zero state in every window", 4)):
        model = Mamba(config)
        optimizer = torch.optim.AdamW(model.param_groups(weight_decay=0.1), lr=1e-2)
        pieces = [ids[:, i : i + span + 1] for i in range(0, 1200, span)]
        losses = [x for piece in pieces for x in train_in_windows(model, piece, 4, optimizer)]
        print(f"   {name}: {losses[0]:.3f} at first, {sum(losses[-50:]) / 50:.3f} at last")
    print("4. Documents of 2 to 24 tokens, three of 8 ids that repeat, in rows of 48")
    model, documents = Mamba(config), repetitions(1000)
    fit(model, packed_loss, lambda count: pack(repetitions(count), 48), steps=150)
    alone = [pack([document], 48) for document in documents]
    for rows in (pack(documents, 48), [torch.cat(parts) for parts in zip(*alone, strict=True)]):
        with torch.no_grad():
            loss = packed_loss(model, *rows).item()
        print(f"   {len(documents)} documents in {len(rows[0])} rows: {loss:.6f}")


if __name__ == "__main__":
    main()
