"""Train a byte-level Mamba on text files. This script made checkpoints/shakespeare.

    python examples/train.py --data texts/*.txt --hold-out macbeth_gut.txt twelfth_night_gut.txt

It trains on all files but the hold-outs, prints their loss and a sample every --evaluate-every
steps, and leaves in --out a folder that generate.py and from_pretrained load. The same command
continues a run that was interrupted.

    python examples/train.py --data texts/*.txt --hold-out ... --evaluate checkpoints/shakespeare

measures a finished model.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm

if __name__ == "__main__":  # from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generate import ByteTokenizer, stream
from mamba import Mamba, MambaConfig, MambaState

## A language model needs the past, and a recurrent one can have it for free: each row of the batch
## reads on where it stopped one step ago, starting from the state it had there. The gradient stops
## at the border (truncated back-propagation), the memory does not. So the model trains on windows
## of 512 bytes and learns to use a state that is thousands of bytes old.
##
## Two things would go wrong if rows only ever read on. The batches would follow the order of the
## files, and the model would hardly ever see the zero state that every prompt starts from. So at
## each step one row in eight jumps to a random place and starts from zero.


class Windows:
    """Windows (batch, seqlen + 1) of one long text, and which rows jumped since the last one."""

    def __init__(self, text: Tensor, batch: int, seqlen: int, jump: float = 1 / 8) -> None:
        self.text, self.seqlen, self.jump = text, seqlen, jump
        self.position = torch.full((batch,), len(text), device=text.device)  # all rows must jump

    def next(self) -> tuple[Tensor, Tensor]:
        """ids (batch, seqlen + 1) int64 and jumped (batch,) bool."""
        last = len(self.text) - self.seqlen - 1
        dice = torch.rand(self.position.shape, device=self.text.device)
        jumped = (dice < self.jump) | (self.position > last)
        self.position = torch.where(jumped, torch.randint_like(self.position, last), self.position)
        offsets = torch.arange(self.seqlen + 1, device=self.text.device)
        ids = self.text[self.position.unsqueeze(1) + offsets].long()
        self.position = self.position + self.seqlen
        return ids, jumped


def add_dropout(model: Mamba, p: float) -> None:
    """Dropout on all that enters the residual stream: the embedding's output and every block's.

    Forward hooks, so that the model stays what it is: nothing of this is saved or left behind.
    """

    def drop(module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return F.dropout(output, p, module.training)

    for layer in model.backbone.layers:
        layer.mixer.out_proj.register_forward_hook(drop)
    model.backbone.embedding.register_forward_hook(drop)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """The factor on --lr: a linear warm-up, then half a cosine down to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


## The loss is where a language model needs most memory at once. Logits are tokens x vocabulary: 8
## rows of 2048 tokens and 50280 words make 824 million numbers, 3.3 GB in float32, and the loss and
## its gradient hold two or three tensors of that size. None of them is needed as a whole. A token's
## loss is log Σ_j exp(logit_j) - logit_target, so the gradient of its logits is
##
##     softmax(logits) - onehot(target)
##
## which asks for the logits of this token alone. It needs nothing that comes later, either: what
## arrives in the backward pass is one number, and multiplies everything. So the forward pass takes
## a chunk of tokens, computes its logits, their gradient, and from these at once the gradients of
## what made the logits, u and the weight; then it forgets them. (For 256 bytes this saves little.
## It is here because the next vocabulary may be 200 times larger.)


class ChunkedCrossEntropy(torch.autograd.Function):
    """See `chunked_cross_entropy`. The gradients are there when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        rounded = weight.to(dtype)
        du = torch.empty_like(u)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=u.device)
        for i in range(0, len(u), chunk):
            part = u[i : i + chunk].to(dtype)  # (c, d_model), c tokens
            target = targets[i : i + chunk].unsqueeze(1)  # (c, 1)
            log_p = F.log_softmax(part @ rounded.T, dim=1, dtype=torch.float32)  # (c, vocabulary)
            total -= log_p.gather(1, target).sum()
            # 1 is subtracted before rounding: the difference from a p near 1 is all digits.
            minus_1 = log_p.new_full(target.shape, -1.0)
            dlogits = log_p.exp_().scatter_add_(1, target, minus_1).to(dtype)
            du[i : i + chunk] = dlogits @ rounded
            dweight += dlogits.T @ part
        ctx.save_for_backward(du, dweight)
        ctx.dtype = weight.dtype
        return total / len(u)

    @staticmethod
    @once_differentiable  # an error for second derivatives, which would be silently zero
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        ## What was kept are gradients of the sum: those of a mean of 16384 tokens would be too
        ## small for float16 before the incoming gradient has scaled them.
        du, dweight = ctx.saved_tensors
        scale = dloss / len(du)
        return (du * scale).to(du.dtype), (dweight * scale).to(ctx.dtype), None, None, None


def chunked_cross_entropy(u: Tensor, weight: Tensor, targets: Tensor, chunk: int = 2048) -> Tensor:
    """The mean of F.cross_entropy(u @ weight.T, targets) without ever holding all logits.

    u (tokens, d_model), weight (vocabulary, d_model), targets (tokens,) int64 -> a float32 number.
    chunk: tokens at a time; it changes the memory and the rounding only. Differentiable in u and
    weight, once. Products in the dtype of u, or of autocast where that is on; the softmax and the
    sum over chunks in float32. Every target counts: there is no index to ignore. It always computes
    the gradients; where none is wanted, F.cross_entropy on a part at a time costs a third.

    Raises ValueError for shapes that do not fit.
    """
    if u.ndim != 2 or weight.ndim != 2 or u.shape[1] != weight.shape[1] or not len(u):
        raise ValueError(
            "need u (tokens, d_model), not empty, and weight (vocabulary, d_model), "
            f"got {tuple(u.shape)}, {tuple(weight.shape)}"
        )
    if targets.shape != u.shape[:1] or chunk < 1:
        raise ValueError(
            f"need targets ({len(u)},) and chunk >= 1, got {tuple(targets.shape)}, {chunk}"
        )
    device, dtype = u.device.type, u.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    # Off inside: the casts are made by hand, the one of the weight once and not for every chunk.
    with torch.autocast(device, enabled=False):
        return ChunkedCrossEntropy.apply(u, weight, targets, chunk, dtype)


def loss_head(model: Mamba, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """For `model(ids, head=...)`: the loss in place of the logits. It goes through the model's own
    `forward`, because DistributedDataParallel averages the gradients of nothing else."""

    def loss(hidden: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten())

    return loss


@torch.no_grad()
def evaluate(model: Mamba, texts: list[Tensor], window: int = 4096) -> float:
    """Mean loss in nats per byte, each text read once from its first byte to its last.

    The state is carried from window to window, so that the window changes the memory needed and
    nothing else. The first byte of a text is given, not predicted.
    """
    nats, count = 0.0, 0
    for text in texts:
        state = model.init_state(1)
        ids = text.long().unsqueeze(0)
        for i in range(0, ids.shape[1] - 1, window):
            targets = ids[0, i + 1 : i + window + 1]
            logits, state = model(ids[:, i : i + len(targets)], state)
            nats += F.cross_entropy(logits[0].float(), targets, reduction="sum").item()
            count += len(targets)
    return nats / count if count else math.nan


@torch.no_grad()
def sample_text(model: Mamba, prompt: str, length: int) -> str:
    tokenizer = ByteTokenizer()
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.lm_head.weight.device)
    tokens = stream(model, ids, max_new_tokens=length, temperature=0.8, seed=0)
    return prompt + tokenizer.decode([token.item() for token in tokens])


def export(model: Mamba, folder: Path) -> None:
    """Save with matrices in float16: half the bytes, eleven bits of each weight.

    A_log, D, biases and norms stay in float32. They are few, and A_log sits in an exponent.
    """
    copy = Mamba(model.config)
    copy.load_state_dict(model.state_dict())
    for group in copy.param_groups(weight_decay=1.0):
        if group["weight_decay"] > 0:  # the matrices: what decays is what may be rounded
            for parameter in group["params"]:
                parameter.data = parameter.data.half()
    copy.save_pretrained(folder)


def read_texts(
    paths: list[Path], hold_out: list[str], seqlen: int, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """The training texts, joined, and the list of the hold-outs; uint8, one byte a token."""
    if missing := set(hold_out) - {path.name for path in paths}:
        raise ValueError(f"--hold-out {' '.join(sorted(missing))}: not among --data")
    read = {path: path.read_bytes() for path in sorted(paths)}
    train = b"\n\n".join(text for path, text in read.items() if path.name not in hold_out)
    held_out = [text for path, text in read.items() if path.name in hold_out]
    if len(train) < seqlen + 2 or not all(held_out):
        raise ValueError(f"{len(train)} bytes to train on are too few for --seqlen {seqlen}")
    train, *held_out = (
        torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
        for text in (train, *held_out)
    )
    return train, held_out


# A run goes on only if these are what they were when it began.
FIXED = "hold_out d_model n_layer batch seqlen steps warmup dropout lr seed".split()


def train(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    train_text, held_out = read_texts(options.data, options.hold_out, options.seqlen, device)
    torch.manual_seed(options.seed)
    config = MambaConfig(
        d_model=options.d_model, n_layer=options.n_layer, vocab_size=256, tokenizer="bytes"
    )
    model = Mamba(config).to(device)
    add_dropout(model, options.dropout)
    optimizer = torch.optim.AdamW(
        model.param_groups(weight_decay=0.1), lr=options.lr, betas=(0.9, 0.95), fused=True
    )
    windows = Windows(train_text, options.batch, options.seqlen)
    state, step, seconds = model.init_state(options.batch), 0, 0.0

    checkpoint = options.out / "training.pt"
    fixed = {name: getattr(options, name) for name in FIXED} | {"bytes": len(train_text)}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        for name, value in saved["fixed"].items():
            if value != fixed[name]:
                raise ValueError(
                    f"{checkpoint} was begun with {name} = {value}, not {fixed[name]}: "
                    "delete it to begin anew, or choose another --out"
                )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        windows.position, step, seconds = saved["position"], saved["step"], saved["seconds"]
        state = MambaState(saved["conv"], saved["h"])
        torch.manual_seed(options.seed + step)
        print(f"{checkpoint}: going on after step {step}")
    if options.compile:
        for layer in model.backbone.layers:
            layer.compile()

    losses, started = [], time.perf_counter() - seconds
    progress = tqdm(total=options.steps, initial=step, unit="step", smoothing=0.05)
    while step < options.steps:
        for group in optimizer.param_groups:
            group["lr"] = options.lr * learning_rate(step, options.steps, options.warmup)
        ids, jumped = windows.next()
        keep = ~jumped[:, None, None]
        state = state.detach().map(lambda tensor, keep=keep: tensor * keep)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, state = model(ids[:, :-1], state, head=loss_head(model, ids[:, 1:]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        step += 1
        progress.update()

        seconds = time.perf_counter() - started
        out_of_time = options.minutes is not None and seconds > 60 * options.minutes
        if step % options.evaluate_every == 0 or step == options.steps or out_of_time:
            train_loss = torch.stack(losses).mean().item()
            losses.clear()
            model.eval()
            # Other shapes than in training: not worth another compilation.
            with torch.compiler.set_stance("force_eager"):
                held_out_loss = evaluate(model, held_out)
                sample = sample_text(model, "KING.\n", 200)
            model.train()
            progress.write(
                f"step {step}  {seconds:.0f} s  train {train_loss:.4f}  "
                f"hold-out {held_out_loss:.4f} nats per byte\n{sample}\n"
            )
            options.out.mkdir(parents=True, exist_ok=True)
            saved = {
                "fixed": fixed,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "position": windows.position,
                "step": step,
                "seconds": seconds,
                **vars(state.detach()),
            }
            # Written aside and moved: an interruption must not cost the only checkpoint.
            torch.save(saved, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
            if out_of_time and step < options.steps:
                message = f"out of time, wrote {checkpoint}"
                progress.write(f"{message}: the same command with a larger --minutes goes on")
                return
    progress.close()
    export(model.cpu(), options.out)
    final = evaluate(Mamba.from_pretrained(options.out, device=device), held_out)
    print(f"{options.out}: hold-out {final:.4f} nats per byte, as saved")
    print(f"wrote {options.out}: config.json, model.safetensors, and training.pt, to go on from")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, help="text files")
    add("--hold-out", nargs="*", default=[], metavar="NAME", help="of --data, not to train on")
    add("--out", type=Path, default=Path("checkpoints/mine"), help="the folder to write")
    add("--evaluate", type=Path, metavar="FOLDER", help="measure this one; train nothing")
    add("--d-model", type=int, default=256, help="width")
    add("--n-layer", type=int, default=10, help="depth")
    add("--batch", type=int, default=64, help="rows of a step")
    add("--seqlen", type=int, default=512, help="bytes of a row")
    add("--steps", type=int, default=1800, help="in all, with those before an interruption")
    add("--warmup", type=int, default=100, help="steps until the learning rate is whole")
    add("--dropout", type=float, default=0.25, help="share of what enters the stream")
    add("--lr", type=float, default=2e-3, help="the highest learning rate")
    add("--evaluate-every", type=int, default=300, help="steps between losses, samples, saves")
    add("--minutes", type=float, help="stop after these; the next run goes on")
    add("--compile", action="store_true", help="torch.compile the blocks")
    add("--seed", type=int, default=0, help="of the weights, the windows and the dropout")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    options = parser.parse_args()
    if options.evaluate is not None and not options.hold_out:
        parser.error("--evaluate needs --hold-out, the texts to measure on")
    try:
        if options.evaluate is None:
            return train(options)
        _, held_out = read_texts(options.data, options.hold_out, 0, torch.device(options.device))
        loss = evaluate(Mamba.from_pretrained(options.evaluate, device=options.device), held_out)
        print(f"{options.evaluate}: hold-out {loss:.4f} nats per byte")
    except (ValueError, OSError) as error:
        raise SystemExit(f"train.py: error: {error}") from error


if __name__ == "__main__":
    main()
