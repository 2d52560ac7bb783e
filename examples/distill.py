"""Train a model on what several others expect: distillation (arXiv 1503.02531).

    python examples/distill.py --teachers checkpoints/teacher-? --data texts \\
        --hold-out hamlet_gut.txt --out checkpoints/pupil

A text says which byte came. Models that were trained on it say how likely each byte was, and the
mean of several is mostly nearer to the truth than the best of them, as each is wrong in its own
way. A model that learns this mean learns more from every byte, and less of the text by heart. It
matters where text is short. (Four models of 4.4 M, trained on 8.8 MB of plays and Bible, predict
another play with 1.266 to 1.282 nats per byte; their mean 1.229, and a pupil of their size 1.244.)

The teachers read the text once, before the training. What they expect is kept, a float16 for each
byte of the text and each of 256 that may follow: 0.5 GB for a million, in each process. The
training is train.py's, with all its options. Its training losses are those to the teachers, and
cannot be compared with the hold-out's.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":  # from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train

from mamba import Mamba, file_finder, read_config

ROWS = 64  # parts of a text that are read side by side, for speed, each from the zero state


@torch.no_grad()
def expect(
    ids: Tensor, reset: Tensor, device: torch.device, *, teachers: list[str], text_share: float,
    window: int = 512,
) -> Tensor:  # fmt: skip
    """For each byte of a text, ids and reset (l,), the probabilities of the next (l, 256), float16.

    text_share of them is on the byte that comes, the rest is the mean of what the teachers say.
    (After the last byte none comes, and no window of the training asks.) Raises ValueError if a
    teacher says what is not finite.
    """
    length, columns = len(ids), -(-len(ids) // ROWS)
    found = torch.zeros(ROWS, columns, 256, dtype=torch.float16)
    padded = [F.pad(x, (0, ROWS * columns - length)).view(ROWS, columns) for x in (ids, reset)]
    for name in teachers:
        print(f"{name} reads the text")
        model = Mamba.from_pretrained(name, device=device)
        state = model.init_state(ROWS)
        for i in range(0, columns, window):
            part, forget = (x[:, i : i + window].to(device) for x in padded)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits, state = model(part.long(), state, reset=forget if forget.any() else None)
            said = logits.float().softmax(-1) * ((1 - text_share) / len(teachers))
            found[:, i : i + window] += said.half().cpu()
        if not found.isfinite().all():
            raise ValueError(f"{name}: not all that it says is finite")
    found = found.flatten(0, 1)[:length]
    found[torch.arange(length - 1), ids[1:].long()] += text_share
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--teachers", nargs="+", required=True, metavar="NAME", help="folders, or of the Hub")
    add("--text-share", type=float, default=0.1, help="of what is learned: that of the next byte")
    options = train.parse_arguments(parser)
    if not 0 <= options.text_share <= 1:
        parser.error(f"text_share must be from 0 to 1, got {options.text_share}")
    if options.tokenizer != "bytes":
        parser.error("it trains models of bytes, without --tokenizer")
    if options.evaluate:
        parser.error("it does not measure: train.py --evaluate does")
    with train.in_a_sentence("distill.py"):
        for name in (*options.teachers, *filter(None, [options.init_from])):
            if Path(name).resolve() == options.out.resolve():
                raise ValueError(
                    f"--out {options.out} would be written over: it is a model to read"
                )
            config = read_config(file_finder(name)("config.json"))
            if config.tokenizer != "bytes" or config.padded_vocab_size != 256:
                raise ValueError(f"{name} is no model of the 256 bytes")
        teach = partial(expect, teachers=options.teachers, text_share=options.text_share)
        train.train(options, teach=teach)


if __name__ == "__main__":
    main()
