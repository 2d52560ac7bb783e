"""Events that come when they come: what it costs to ignore the time between them.

    python examples/event_time.py            # trains three small models, a minute on a CPU

Each sequence has 40 events at irregular times; the gaps are from 0.05 to 5, log-uniform. An event
carries a number, +1 or -1. To predict, after every event, is what a leaky bucket holds then:

    level(t) = Σ number_i exp(-(t - t_i) / 3)     over all events so far

How much of an old event is left depends on the time that has passed, not on how many events came
between. So a model that does not see the times cannot know, however long it trains. Three models
of the same size: one is given the gaps as event time (`EventBlock`), where they say how much the
state forgets; one reads them as a second input; one sees the numbers alone.

`EventBlock` is a layer for your own network. In a stack, the times go to every layer:

    layers = [ResidualBlock(config, EventBlock(config)) for _ in range(4)]
    for i, layer in enumerate(layers):
        stream, states[i] = layer(stream, states[i], time_steps=gaps)
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

from mamba import (
    MambaBlock,
    MambaConfig,
    MambaState,
    RMSNorm,
    at_least_float32,
    causal_conv,
    check_block,
    check_token,
    in_functorch,
    selective_scan,
)

## Words come one after the other; heartbeats, purchases and spikes come when they come. There the
## time between two events should say how much is forgotten, and the event how much is written. But
## Mamba's Δ says both. Event time splits it in two (arXiv 2411.12603):
##
##     Ā = exp(Δ_A A)    Δ_A = time_step · softplus(dt_A_bias)     the time that has passed, times a
##                                                                 rate that the channel learns
##     B̄ = Δ_B B         Δ_B = softplus(dt + dt_bias)              as in Mamba, whatever the time
##
## That is rule "dirac" on the impulses Δ_B x, so every scan can do it. Δ_B -> 0 still adds nothing,
## but no longer keeps the past: time alone decides that. An interval of 0 forgets nothing: two
## events at one time. (Their order still shows: the convolution counts events and not time.)


class EventBlock(MambaBlock):
    """A MambaBlock that is told the time between events.

    y = block(u, time_steps=gaps)                    u (b, l, d_model), gaps (b, l)
    y, state = block(u, state, time_steps=gaps)      the same, continuing from a state
    y, state = block.step(u, state, time_steps=gap)  one event: u (b, d_model), gap (b,)

    time_steps: the time since the event before, finite and not negative, in a unit in which a
    typical one is about 1. The first has no effect without a state. reset as in MambaBlock. Raises
    ValueError for times that do not fit (negative ones are not looked for on a GPU, under
    torch.compile or torch.func), and for a config with another rule: this block brings its own.
    """

    def __init__(self, config: MambaConfig) -> None:
        if config.rule != "mamba":
            raise ValueError(f"EventBlock brings its own rule: leave rule out, got {config.rule!r}")
        super().__init__(config)
        self.dt_A_bias = nn.Parameter(torch.empty(config.d_inner))
        if not self.D.is_meta:
            self.reset_rates()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "dt_A_bias"):  # not while MambaBlock is built
            self.reset_rates()

    @torch.no_grad()
    def reset_rates(self) -> None:
        ## The rates start spread as Δ is, but not in step with it.
        self.dt_A_bias.copy_(self.dt_proj.bias[torch.randperm(len(self.dt_A_bias))])

    def forward(
        self, u: Tensor, state: MambaState | None = None, *, time_steps: Tensor,
        reset: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MambaState]:  # fmt: skip
        config, start = self.config, self.init_state(len(u)) if state is None else state
        check_block(config, u, state, reset)
        check_time_steps(time_steps, u)
        raw, z = self.in_proj(u).chunk(2, dim=-1)  # (b, l, d) each
        x, conv = causal_conv(raw, self.conv1d, start.conv, reset, scan=config.scan)
        dt, B, C = self.select(x)
        delta_write = F.softplus(at_least_float32(dt) + self.dt_proj.bias)
        rate = F.softplus(at_least_float32(self.dt_A_bias))
        delta_forget = time_steps.to(rate.dtype).unsqueeze(-1) * rate
        y, h = selective_scan(
            delta_write * x, delta_forget, self.A, B, C, h0=start.h, dt_softplus=False,
            rule="dirac", reset=reset, scan=config.scan,
        )  # fmt: skip
        ## D x and the gate take x itself, not the impulse.
        y = (y + at_least_float32(self.D) * x) * F.silu(at_least_float32(z))
        out = self.out_proj(y.to(x.dtype))
        return out if state is None else (out, MambaState(conv, h))

    def step(
        self, u: Tensor, state: MambaState, *, time_steps: Tensor
    ) -> tuple[Tensor, MambaState]:
        check_token(self.config, u)
        return self(u, state, time_steps=time_steps)


def check_time_steps(time_steps: Tensor, u: Tensor) -> None:
    shape = tuple(u.shape[:-1])
    if time_steps.shape != shape or time_steps.is_complex() or time_steps.dtype == torch.bool:
        raise ValueError(
            f"time_steps must be real numbers {shape}, one for each event, "
            f"got {time_steps.dtype} {tuple(time_steps.shape)}"
        )
    # A look at numbers makes the CPU wait for a GPU, breaks a compiled graph, and fails in vmap.
    plain = torch.compiler.is_compiling() or in_functorch()
    if time_steps.device.type == "cpu" and not plain:
        if not ((time_steps >= 0) & time_steps.isfinite()).all():
            raise ValueError("time_steps must be finite and not negative: one of them is not")


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
        block = EventBlock if kind == "event time" else MambaBlock
        self.block = block(MambaConfig(d_model))
        self.write = nn.Linear(d_model, 1)

    def forward(self, numbers: Tensor, gaps: Tensor) -> Tensor:
        features = [numbers, gaps.log()] if self.kind == "gaps as input" else [numbers]
        stream = self.read(torch.stack(features, dim=-1))
        options = {"time_steps": gaps} if self.kind == "event time" else {}
        stream = stream + self.block(self.norm(stream), **options)
        return self.write(stream).squeeze(-1)


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
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="of training, for each model")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the events")
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
