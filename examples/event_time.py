"""Events that come when they come: what it costs to ignore the time between them.

    python examples/event_time.py            # trains three small models, a minute on a CPU

Each sequence has 40 events at irregular times; the gaps are from 0.05 to 5, log-uniform. An event
carries a number, +1 or -1. To predict, after every event, is what a leaky bucket holds then:

    level(t) = Σ number_i exp(-(t - t_i) / 3)     over all events so far

How much of an old event is left depends on the time that has passed, not on how many events came
between. So a model that does not see the times cannot know, however long it trains. Three models
of the same size: one is given the gaps as event time (`MambaConfig(event_time=True)`), where they
say how much the state forgets; one reads them as a second input; one sees the numbers alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mamba import MambaBlock, MambaConfig, RMSNorm

MEMORY = 3.0  # the time in which the bucket loses all but 1/e
KINDS = ("event time", "gaps as input", "no times")


def make_events(batch: int, seqlen: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """numbers (b, l), gaps (b, l): the time since the event before, level (b, l)."""
    numbers = torch.randint(2, (batch, seqlen), generator=generator) * 2.0 - 1
    low, high = torch.tensor([0.05, 5.0]).log().tolist()
    gaps = torch.empty(batch, seqlen).uniform_(low, high, generator=generator).exp()
    level, levels = torch.zeros(batch), []
    for number, gap in zip(numbers.unbind(1), gaps.unbind(1), strict=True):
        level = level * torch.exp(-gap / MEMORY) + number
        levels.append(level)
    return numbers, gaps, torch.stack(levels, dim=1)


class EventModel(nn.Module):
    """(b, l) numbers and gaps -> (b, l) predictions: one Mamba layer between two Linears."""

    def __init__(self, kind: str, d_model: int = 16) -> None:
        super().__init__()
        self.kind = kind
        self.read = nn.Linear(2 if kind == "gaps as input" else 1, d_model)
        self.norm = RMSNorm(d_model)
        self.block = MambaBlock(MambaConfig(d_model, event_time=kind == "event time"))
        self.write = nn.Linear(d_model, 1)

    def forward(self, numbers: Tensor, gaps: Tensor) -> Tensor:
        features = [numbers, gaps.log()] if self.kind == "gaps as input" else [numbers]
        u = self.read(torch.stack(features, dim=-1))
        time_steps = gaps if self.kind == "event time" else None
        u = u + self.block(self.norm(u), time_steps=time_steps)
        return self.write(u).squeeze(-1)


def train(kind: str, steps: int, seqlen: int = 40, batch: int = 64, seed: int = 0) -> float:
    """The mean squared error on 1000 new sequences, as a share of the variance of the level."""
    torch.manual_seed(seed)
    model = EventModel(kind)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        numbers, gaps, level = make_events(batch, seqlen, generator)
        loss = F.mse_loss(model(numbers, gaps), level)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    numbers, gaps, level = make_events(1000, seqlen, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return (F.mse_loss(model(numbers, gaps), level) / level.var()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    torch.set_num_threads(1)  # tensors as small as these do not gain from more
    print("share of the variance that is not explained, on new sequences:")
    for kind in KINDS:
        begun = time.perf_counter()
        error = train(kind, options.steps, seed=options.seed)
        print(f"  {kind:14} {error:8.4f}   ({time.perf_counter() - begun:.0f} s)")


if __name__ == "__main__":
    main()
