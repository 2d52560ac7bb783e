"""Train a Mamba with the Trainer of transformers: its logs, callbacks, mixed precision, resuming.

    python examples/trainer.py text.txt other.txt --out checkpoints/mine --steps 1000

trains a byte-level model and leaves in --out a folder that generate.py and from_pretrained load, as
each checkpoint-... in it is. The same command goes on after the last of these. It needs accelerate,
as every Trainer does (pip install accelerate).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

if __name__ == "__main__":  # from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mamba import Mamba, MambaConfig

## The Trainer calls the model with the columns of its data and wants a loss back. Left to itself it
## would decay A_log and D, for it looks for the names of norms and biases, and could not save a
## matrix that is both embedding and lm_head. Each method below says one thing that it cannot know.


class TrainerMamba(Mamba):
    _keys_to_ignore_on_save = ["lm_head.weight"]  # noqa: RUF012  not missed where it is tied

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """(b, l) both; labels are the ids, with -100 where none is to be predicted (padding).
        Accumulated batches count alike, however many labels they have."""
        logits = super().forward(input_ids)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class MambaTrainer(Trainer):
    def __init__(self, model: TrainerMamba, args: TrainingArguments, **options: Any) -> None:
        if args.label_smoothing_factor:  # the Trainer's own, for labels that are shifted already
            raise ValueError("label_smoothing_factor must be 0: the loss is the model's own")
        super().__init__(model, args, **options)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        decayed = {id(p) for p in self.model.param_groups(weight_decay=1.0)[0]["params"]}
        return [name for name, p in self.model.named_parameters() if id(p) in decayed]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None:
            raise RuntimeError("MambaTrainer saves whole models: leave out FSDP and DeepSpeed")
        self.model.save_pretrained(output_dir or self.args.output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_state_dict(Mamba.from_pretrained(checkpoint).state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="+", help="text files")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/mine"), help="a folder")
    parser.add_argument("--steps", type=int, default=1000, help="in all, of 16 x 256 bytes each")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    options = parser.parse_args()
    if options.steps < 1 or options.save_every < 1:
        parser.error("--steps and --save-every must be at least 1")
    try:
        text = b"\n\n".join(path.read_bytes() for path in options.data)
        if len(text) < 256:
            raise ValueError(f"need at least 256 bytes of text, got {len(text)}")
        windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().split(256)
        rows = [{"input_ids": ids, "labels": ids} for ids in windows if len(ids) == 256]
        arguments = TrainingArguments(
            options.out, max_steps=options.steps, save_steps=options.save_every, logging_steps=50,
            per_device_train_batch_size=16, learning_rate=2e-3, weight_decay=0.1, warmup_steps=50,
            lr_scheduler_type="cosine", report_to="none",
        )  # fmt: skip
        model = TrainerMamba(MambaConfig(256, n_layer=6, vocab_size=256, tokenizer="bytes"))
        trainer = MambaTrainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=any(options.out.glob("checkpoint-*")))
        trainer.save_model()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"trainer.py: error: {error}") from error
    print(f"wrote {options.out}: config.json, model.safetensors, and checkpoints to go on from")


if __name__ == "__main__":
    main()
