"""Event time: how much is forgotten depends on the time that has passed, and on nothing else.

The judge is the block written out here from its parameters, an event at a time in float64.
"""

import copy
import functools
import math
import re

import event_time
import pytest
import torch
import torch.nn.functional as F
from event_time import EventBlock
from torch import Tensor

import mamba
from mamba import Mamba, MambaBlock, MambaConfig, MambaState, ResidualBlock
from test_mamba import assert_all_close, assert_close, gradients_of, randomise

SIZES = {"d_model": 6, "d_state": 3, "dt_rank": 2}


def random_block(**changes) -> EventBlock:
    return randomise(EventBlock(MambaConfig(**SIZES | {"bias": True} | changes)))


def random_state(batch: int) -> MambaState:
    return random_block().init_state(batch).map(torch.randn_like)


def some_times(*shape: int) -> Tensor:
    """From next to nothing to long, some of them zero."""
    times = torch.empty(shape).uniform_(-4, 2).exp()
    return times.masked_fill(torch.rand(shape) < 0.2, 0.0)


def written_out(block: EventBlock, u: Tensor, state: MambaState, times: Tensor, reset: Tensor):
    """y (b, l, d_model) and the state after the last event."""
    n, rank = block.config.d_state, block.config.dt_rank
    rate, A = torch.log1p(torch.exp(block.dt_A_bias)), -torch.exp(block.A_log)
    conv, h, ys = state.conv, state.h, []
    for t in range(u.shape[1]):
        kept = ~reset[:, t, None, None]
        x, z = block.in_proj(u[:, t]).chunk(2, dim=-1)
        window = torch.cat([conv * kept, x.unsqueeze(-1)], dim=-1)
        conv = window[..., 1:]
        x = F.silu((window * block.conv1d.weight.squeeze(1)).sum(-1) + block.conv1d.bias)
        low_rank, B, C = (x @ block.x_proj.weight.T).split([rank, n, n], dim=-1)
        delta = torch.log1p(torch.exp(low_rank @ block.dt_proj.weight.T + block.dt_proj.bias))
        decay = torch.exp((times[:, t, None] * rate).unsqueeze(-1) * A)
        h = kept * decay * h + (delta * x).unsqueeze(-1) * B.unsqueeze(1)
        y = (h * C.unsqueeze(1)).sum(-1) + block.D * x
        ys.append(block.out_proj(y * F.silu(z)))
    return torch.stack(ys, dim=1), MambaState(conv, h)


@pytest.mark.parametrize("scan", mamba.SCANS)
def test_every_scan_gives_the_block_written_out_in_values_and_gradients(scan):
    """From a state, across resets, with times of zero among the others."""
    block = random_block(scan=scan)
    shapes = (2, 13, 6), (2, 12, 3), (2, 12, 3)
    inputs, weights = ([*map(torch.randn, shapes)] for _ in range(2))
    inputs.append(some_times(2, 13))
    reset = torch.zeros(2, 13, dtype=torch.bool)
    reset[0, 6] = True
    found = []
    for each, dtype in ((block, torch.float32), (copy.deepcopy(block).double(), torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        u, state, times = leaves[0], MambaState(*leaves[1:3]), leaves[3]
        if dtype == torch.float32:
            y, state = each(u, state, time_steps=times, reset=reset)
        else:
            y, state = written_out(each, u, state, times, reset)
        results = {"y": y, **vars(state)}
        loss = sum((a * b).sum() for a, b in zip(results.values(), weights, strict=True))
        of_inputs = torch.autograd.grad(loss, leaves, retain_graph=True)
        of_inputs = {f"gradient of input {i}": gradient for i, gradient in enumerate(of_inputs)}
        found.append(results | of_inputs | gradients_of(loss, each))
    assert_all_close(*found, 1e-4 if scan == "logspace" else 1e-5)


def test_forward_and_step_of_a_stack_agree_when_each_layer_is_told_the_times():
    config = MambaConfig(**SIZES)
    layers = [randomise(ResidualBlock(config, EventBlock(config))) for _ in range(2)]
    u, times = torch.randn(2, 5, 6), some_times(2, 5)
    start = [random_state(2), random_state(2)]
    whole, ends, states, stepped = u, [], list(start), []
    for layer, state in zip(layers, start, strict=True):
        whole, end = layer(whole, state, time_steps=times)
        ends.append(end)
    for t in range(5):
        stream = u[:, t]
        for i, layer in enumerate(layers):
            stream, states[i] = layer(stream, states[i], time_steps=times[:, t])
        stepped.append(stream)
    assert_close("stream", torch.stack(stepped, 1), whole, 1e-5)
    for state, end in zip(states, ends, strict=True):
        assert_all_close(vars(state), vars(end), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
def test_times_of_any_dtype_leave_the_state_float32(dtype):
    block, u, start = random_block(), torch.randn(1, 4, 6), random_state(1)
    times = torch.tensor([[0, 1, 2, 4]])
    expected, last = block(u, start, time_steps=times.float())
    y, state = block(u, start, time_steps=times.to(dtype))
    assert state.h.dtype == y.dtype == torch.float32
    assert torch.equal(y, expected) and torch.equal(state.h, last.h)


def test_times_keep_their_float32_digits_in_a_bfloat16_block():
    """1.0035 is 1 in bfloat16: three hundred such gaps would be one gap longer than they are."""
    block, u, past = random_block().bfloat16(), torch.randn(1, 300, 6), torch.randn(1, 12, 3)
    block.dt_A_bias.data.fill_(-4)

    def left_of_the_past(block, gap, dtype) -> Tensor:
        times, zero = torch.full((1, 300), gap, dtype=dtype), block.init_state(1)
        start = MambaState(zero.conv, past.to(zero.h))
        after = [block(u.to(zero.conv), state, time_steps=times)[1].h for state in (start, zero)]
        return after[0] - after[1]

    exact = copy.deepcopy(block).double()
    expected = left_of_the_past(exact, 1.0035, torch.float64)
    assert_close("h", left_of_the_past(block, 1.0035, torch.float32), expected, 1e-3)


def test_an_event_block_runs_under_vmap_and_is_compiled_whole():
    block, u, times = random_block(scan="chunked"), torch.randn(3, 2, 4, 6), some_times(3, 2, 4)
    expected = torch.stack([block(u[i], time_steps=times[i]) for i in range(3)])
    mapped = torch.func.vmap(lambda u, times: block(u, time_steps=times))(u, times)
    assert_close("under vmap", mapped, expected, 1e-6)
    torch.compiler.reset()
    whole = torch.compile(block, backend="eager", fullgraph=True)
    assert_close("compiled", whole(u[0], time_steps=times[0]), expected[0], 1e-6)


def test_it_adds_one_number_a_channel_which_starts_as_delta_does_and_is_not_decayed():
    """Also where it was built on meta; and whoever computes a model without its modules, and would
    pass the times by, is told that this one is not ours."""
    model = Mamba(MambaConfig(**SIZES, vocab_size=11))
    plain, decayed = set(model.state_dict()), len(model.param_groups(0.1)[0]["params"])
    assert mamba.is_our_own(model)
    block = model.backbone.layers[0].mixer = EventBlock(model.config)
    assert not mamba.is_our_own(model)
    assert set(model.state_dict()) - plain == {"backbone.layers.0.mixer.dt_A_bias"}
    assert len(model.param_groups(0.1)[0]["params"]) == decayed
    with pytest.raises(RuntimeError, match="dt_A_bias"):
        EventBlock(model.config).load_state_dict(MambaBlock(model.config).state_dict())
    with torch.device("meta"):
        other = EventBlock(model.config)
    other = other.to_empty(device="cpu")
    other.reset_parameters()
    for each in (block, other):
        assert torch.equal(each.dt_A_bias.sort().values, each.dt_proj.bias.sort().values)
        assert not torch.equal(each.dt_A_bias, each.dt_proj.bias)


BLOCK = EventBlock(MambaConfig(**SIZES))
PLAIN = ResidualBlock(BLOCK.config)
U, TIMES, ZERO = torch.ones(2, 4, 6), torch.ones(2, 4), BLOCK.init_state(2)
NARROW = MambaState(ZERO.conv, ZERO.h[..., :2])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: BLOCK(U, time_steps=torch.ones(2, 5)), r"real numbers \(2, 4\).*got .*\(2, 5\)"),
        (lambda: BLOCK(U, time_steps=TIMES.bool()), "real numbers.*bool"),
        (lambda: BLOCK(U, time_steps=TIMES.cfloat()), "real numbers.*complex"),
        (lambda: BLOCK(U, time_steps=TIMES.cumsum(1) - 1.1), "negative"),
        (lambda: BLOCK.step(U[:, 0], ZERO, time_steps=-TIMES[:, 0]), "negative"),
        (lambda: BLOCK(U, time_steps=TIMES * math.nan), "finite"),
        (lambda: BLOCK(U, time_steps=TIMES * math.inf), "finite"),
        (lambda: BLOCK(U), "'time_steps'"),
        (lambda: BLOCK.step(U[:, 0], ZERO), "'time_steps'"),
        (lambda: PLAIN(U, BLOCK.init_state(2), time_steps=TIMES), "'time_steps'"),
        (lambda: BLOCK(U[..., :5], time_steps=TIMES), "d_model = 6"),
        (lambda: BLOCK.step(U, ZERO, time_steps=TIMES), r"\(batch, d_model\)"),
        (lambda: BLOCK(U, BLOCK.init_state(3), time_steps=TIMES), r"state\.conv"),
        (lambda: BLOCK.step(U[:, 0], NARROW, time_steps=TIMES[:, 0]), r"state\.h"),
        (lambda: BLOCK(U, time_steps=TIMES, reset=TIMES), "reset must be bool"),
        (lambda: EventBlock(MambaConfig(d_model=4, rule="zoh")), "brings its own rule.*'zoh'"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


## The example -------------------------------------------------------------------------------------


def test_the_level_of_the_example_is_the_sum_that_it_says():
    numbers, gaps, level = event_time.make_events(200, 6, torch.Generator().manual_seed(0))
    assert sorted(set(numbers.flatten().tolist())) == [-1, 1] and abs(numbers.mean()) < 0.1
    assert 0.05 <= gaps.min() < 0.06 and 4.5 < gaps.max() <= 5
    assert gaps.log().mean().item() == pytest.approx(math.log(0.5), abs=0.1)
    times = gaps.cumsum(1)
    for t in range(6):
        weights = torch.exp(-(times[:, t : t + 1] - times[:, : t + 1]) / 3)
        assert torch.allclose(level[:, t], (numbers[:, : t + 1] * weights).sum(1), atol=1e-5)


def test_the_example_shows_that_ignoring_the_times_costs(monkeypatch, capsys):
    """Three short trainings; at full length the ratio is above 50."""
    short = functools.partial(event_time.train, seqlen=10, batch=32)
    monkeypatch.setattr(event_time, "train", short)
    monkeypatch.setattr("sys.argv", ["event_time.py", "--steps", "120"])
    event_time.main()
    rows = re.findall(r"^  (\w+ \w+.*?) +(\d\.\d{4})   \(\d+ s\)$", capsys.readouterr().out, re.M)
    errors = {kind: float(error) for kind, error in rows}
    assert errors["event time"] < 0.5 * errors["no times"] < 0.1, errors
    assert errors["gaps as input"] < 0.5 * errors["no times"], errors
    monkeypatch.setattr("sys.argv", ["event_time.py", "--steps", "0"])
    with pytest.raises(SystemExit):
        event_time.main()
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
