"""Text files as one row of tokens, and windows of it for a recurrent model, which reads on.

    windows = Windows(read_text(files, tokenizer), batch=64, seqlen=512)
    ids, reset, jumped = windows.next(torch.Generator())

Rows that jumped start from the zero state, the others from the one that they ended in.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor

from generate import ByteTokenizer, Tokenizer

## All documents stand in one long row of tokens. Between two stands what ends a text: the end token
## of the tokenizer, or for bytes an empty line. With --packed the model forgets, when it reads the
## last token of this end (`reset`), all before it. So no token sees another document, nothing is
## padding, and losses and gradients are those of documents that are read one by one.

Text = tuple[Tensor, Tensor]  # ids (l,), and reset (l,) bool: True where the model is to forget


def read_text(paths: list[Path], tokenizer: Tokenizer, separator: str | None = None) -> Text:
    """All documents: a file is one, or has several with a separator between them."""
    is_bytes = isinstance(tokenizer, ByteTokenizer)
    dtype, end = (torch.uint8, b"\n\n") if is_bytes else (torch.int32, tokenizer.eos_token_ids[:1])
    ids, reset = [torch.empty(0, dtype=dtype)], [torch.empty(0, dtype=torch.bool)]
    for path in paths:
        text = path.read_bytes()
        if not text.strip():
            raise ValueError(f"{path} is empty")
        documents = text.split(separator.encode()) if separator else [text]
        for document in filter(bytes.strip, documents):
            try:
                if is_bytes:
                    tokens = torch.frombuffer(bytearray(document + end), dtype=dtype)
                else:
                    tokens = torch.tensor([*tokenizer.encode(document.decode()), *end], dtype=dtype)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8: convert it, or train on bytes") from error
            ids.append(tokens)
            reset.append(torch.arange(len(tokens)) == len(tokens) - 1)
    length = sum(map(len, ids)) - len(end)  # nothing comes after the last document
    return torch.cat(ids)[:length], torch.cat(reset)[:length]


def read_texts(options: argparse.Namespace, tokenizer: Tokenizer) -> tuple[Text, list[Text]]:
    """The text to train on and those to measure on, in the order of their names.

    options as train.py has them: data, out, hold_out, separator, validation_share, packed and
    evaluate_window. What is measured has `reset` as these say, what is trained on wherever a
    document ends.
    """
    # Each file is read once, however it is named: "a/../b" is "b".
    out, *given = (Path(os.path.abspath(path)) for path in (options.out, *options.data))
    files = set()
    for path in given:
        # A folder stands for all files in it, but for what is hidden and what a run has written.
        inside = {p for p in path.rglob("*") if p.is_file() and out not in p.parents}
        seen = {p for p in inside if "/." not in f"/{p.relative_to(path).as_posix()}"}
        files |= seen if path.is_dir() else {path}
    if missing := set(options.hold_out) - {path.name for path in files}:
        raise ValueError(f"--hold-out {' '.join(sorted(missing))}: no file of --data has this name")
    named = (path for path in files if path.name in options.hold_out)
    kept = sorted(named, key=lambda path: (path.name, path))
    if (end := options.separator) is not None:
        if not (end and any(end.encode() in path.read_bytes() for path in files)):
            raise ValueError(f"--separator {end!r}: no file of --data has it, leave it out")
    texts = [read_text([path], tokenizer, options.separator) for path in kept]
    train = read_text(sorted(files.difference(kept)), tokenizer, options.separator)
    if options.validation_share:
        border = int(len(train[0]) * (1 - options.validation_share))
        texts.append(tuple(each[border:] for each in train))
        train = tuple(each[:border] for each in train)
    for ids, reset in texts:
        if len(ids) < 2:
            raise ValueError(f"{len(ids)} tokens are too few to measure a loss: it needs 2")
        reset &= options.packed
        if options.evaluate_window:
            reset[:: options.evaluate_window] = True
    return train, texts


## A recurrent model can have the past for free: each row of the batch reads on where it stopped one
## step ago, starting from the state it had there. The gradient stops at the border (truncated
## back-propagation), the memory does not: trained on windows of 512 bytes, the model learns to use
## a state that is thousands of bytes old.
##
## If rows only ever read on, batches would follow the order of the files, and the model would
## hardly see the zero state that every prompt starts from. So at each step one row in eight jumps
## to a random place and starts from zero. (With --jump 1 all do, as transformers are trained.)


class Windows:
    """Windows of one long text, and which rows jumped since the last ones."""

    def __init__(self, text: Text, batch: int, seqlen: int, jump: float = 1 / 8) -> None:
        (self.ids, self.reset), self.seqlen, self.jump = text, seqlen, jump
        self.position = torch.full((batch,), len(self.ids))  # all rows must jump

    def next(self, dice: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """ids (batch, seqlen + 1) int64, reset (batch, seqlen) bool and jumped (batch,) bool."""
        last, rows = len(self.ids) - self.seqlen - 1, self.position.shape
        jumped = (torch.rand(rows, generator=dice) < self.jump) | (self.position > last)
        places = torch.randint(last + 1, rows, generator=dice)
        self.position = torch.where(jumped, places, self.position)
        indices = self.position.unsqueeze(1) + torch.arange(self.seqlen + 1)
        self.position = self.position + self.seqlen
        return self.ids[indices].long(), self.reset[indices[:, :-1]], jumped
