"""The step as a file that runs without this project, and a text that it completes.

    python examples/export.py --out step.pt2                 # torch.export: needs torch alone
    python examples/export.py --out step.onnx                # ONNX: needs onnxscript, onnxruntime

A step has fixed shapes, and a loop around it reads texts of any length and writes on for ever. So
it is the step that is exported, and not `forward`, whose program would be for one length.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

if __name__ == "__main__":  # from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generate import load_tokenizer
from mamba import Mamba, MambaState

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints" / "shakespeare"
StepFunction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Step(nn.Module):
    """token ids (b,), conv, h -> logits, conv, h: `model.step` with nothing but tensors around it,
    so that who runs the file needs to know of no MambaState."""

    def __init__(self, model: Mamba) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, conv: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, state = self.model.step(token_ids, MambaState(conv, h))
        return logits, state.conv, state.h


def export_step(model: Mamba, path: Path, batch: int = 1) -> None:
    """Write the step for this batch to a .pt2 or an .onnx file. Raises ValueError for others."""
    state = model.init_state(batch)
    inputs = torch.zeros(batch, dtype=torch.int64), state.conv, state.h
    if path.suffix == ".pt2":
        torch.export.save(torch.export.export(Step(model), inputs), path)
    elif path.suffix == ".onnx":
        names = {"input_names": ["token_ids", "conv", "h"]}
        names["output_names"] = ["logits", "next_conv", "next_h"]
        torch.onnx.export(Step(model), inputs, path, external_data=False, verbose=False, **names)
    else:
        raise ValueError(f"the file must end in .pt2 or .onnx, got {path.name!r}")


def load_step(path: Path) -> StepFunction:
    """What `export_step` has written, as a function."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path)

    def step(token_ids: Tensor, conv: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = {"token_ids": token_ids, "conv": conv, "h": h}
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return tuple(map(torch.from_numpy, outputs))

    return step


def complete(step: StepFunction, state: MambaState, ids: list[int], tokens: int) -> list[int]:
    """Feed the prompt, then each most probable token, one by one."""
    conv, h, written = state.conv, state.h, []
    for i in range(len(ids) + tokens - 1):
        token_id = ids[i] if i < len(ids) else written[-1]
        logits, conv, h = step(torch.tensor([token_id]), conv, h)
        if i >= len(ids) - 1:
            written.append(logits[0].argmax().item())
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", default="To be, or not to be", help="a text")
    parser.add_argument("--model", default=str(SHIPPED), help="a folder, or on the Hub")
    parser.add_argument("--out", type=Path, default=Path("step.pt2"), help="a .pt2 or .onnx file")
    parser.add_argument("--tokens", type=int, default=60, help="how many to write with it")
    options = parser.parse_args()
    if not options.prompt or options.tokens < 1:
        parser.error("need a prompt, and at least one token to write")

    try:
        model = Mamba.from_pretrained(options.model).eval().requires_grad_(False)
        tokenizer = load_tokenizer(model.config, options.model)
        export_step(model, options.out)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise SystemExit(f"export.py: error: {error}") from error
    print(f"wrote {options.out}: {options.out.stat().st_size / 1e6:.1f} MB")
    ids, state = tokenizer.encode(options.prompt), model.init_state(1)
    written = complete(load_step(options.out), state, ids, options.tokens)
    print(options.prompt + tokenizer.decode(written))
    same = written == complete(Step(model), state, ids, options.tokens)
    print("the model itself writes", "the same" if same else "something else")


if __name__ == "__main__":
    main()
