"""Event time: how much is forgotten depends on the time that has passed, and on nothing else.

The judge is the block written out here from its parameters, around the recurrence in float64.
"""

import copy
import functools
import math
import re
from unittest.mock import Mock

import event_time
import pytest
import torch
import torch.nn.functional as F
from event_time import EventBlock, make_events
from torch import Tensor

import mamba
from mamba import Mamba, MambaConfig, MambaState, ResidualBlock
from test_mamba import assert_all_close, assert_close, by_hand, randomise, values_and_gradients


def random_layer(scan: str = "auto") -> ResidualBlock:
    config = MambaConfig(d_model=6, d_state=3, dt_rank=2, bias=True, scan=scan)
    return randomise(ResidualBlock(config, EventBlock(config)))


def written_out(layer: ResidualBlock, stream: Tensor, state: MambaState, time_steps, reset):
    """The stream (b, l, d_model) after the layer, and the state after the last event."""
    block, window, windows = layer.mixer, state.conv, []
    x, z = block.in_proj(layer.norm(stream)).chunk(2, dim=-1)
    for x_t, cut in zip(x.unbind(1), reset.unbind(1), strict=True):
        past = window[..., -3:].masked_fill(cut[:, None, None], 0)
        windows.append(window := torch.cat([past, x_t.unsqueeze(-1)], dim=-1))
    x = (torch.stack(windows, 1) * block.conv1d.weight.squeeze(1)).sum(-1)
    x = F.silu(x + block.conv1d.bias)
    low_rank, B, C = (x @ block.x_proj.weight.T).split([2, 3, 3], dim=-1)
    dt = low_rank @ block.dt_proj.weight.T + block.dt_proj.bias
    impulse, rate = torch.log1p(torch.exp(dt)) * x, torch.log1p(torch.exp(block.dt_A_bias))
    forgotten, A = time_steps.unsqueeze(-1) * rate, -torch.exp(block.A_log)
    y, h = by_hand(impulse, forgotten, A, B, C, state.h, rule="dirac", reset=reset)
    out = block.out_proj((y + block.D * x) * F.silu(z))
    return stream + out, MambaState(window[..., 1:], h)


@pytest.mark.parametrize("scan", mamba.SCANS)
def test_every_scan_gives_the_layer_written_out_in_values_and_gradients(scan):
    """From a state, across resets, with times of zero among the others; and so do single steps."""
    layer, reset, found = random_layer(scan), torch.zeros(2, 13, dtype=torch.bool), []
    reset[0, 6] = True
    inputs = {"u": torch.randn(2, 13, 6), "times": torch.empty(2, 13).uniform_(-4, 2).exp()}
    inputs["times"][torch.rand(2, 13) < 0.2] = 0
    inputs |= {name: torch.randn(2, 12, 3) for name in ("conv", "h")}
    exact = copy.deepcopy(layer).double()
    for each, function in ((layer, layer), (exact, functools.partial(written_out, exact))):
        leaves = {k: t.to(each.mixer.D.dtype).requires_grad_() for k, t in inputs.items()}

        def run(u, times, conv, h, function=function, **_):
            y, last = function(u, MambaState(conv, h), time_steps=times, reset=reset)
            return y, torch.cat([last.conv, last.h], dim=-1)

        values, gradients = values_and_gradients(run, leaves | dict(each.named_parameters()))
        found.append(values | gradients)
    assert_all_close(*found, 1e-4 if scan == "logspace" else 1e-5)
    state = MambaState(inputs["conv"], inputs["h"])
    for t in range(6):
        y, state = layer(inputs["u"][:, t], state, time_steps=inputs["times"][:, t])
        assert_close(f"step {t}", y, found[1]["y"][:, t], 1e-5)


def test_times_keep_their_float32_digits_in_a_bfloat16_block():
    """1.0035 is 1 in bfloat16: three hundred such gaps would be one gap longer than they are."""
    block, u, past = random_layer().mixer.bfloat16(), torch.randn(1, 300, 6), torch.randn(1, 12, 3)
    block.dt_A_bias.data.fill_(-4)
    exact, left = copy.deepcopy(block).double(), []
    for each, dtype in ((exact, torch.float64), (block, torch.float32), (block, torch.float64)):
        times, zero = torch.full((1, 300), 1.0035, dtype=dtype), each.init_state(1)
        start = MambaState(zero.conv, past.to(zero.h))
        after = [each(u.to(zero.conv), state, time_steps=times)[1].h for state in (start, zero)]
        assert after[0].dtype == zero.h.dtype
        left.append(after[0] - after[1])
    assert_close("what is left of the past", left[1], left[0], 1e-3)
    assert torch.equal(left[2], left[1])


def test_an_event_block_runs_under_vmap():
    block, u, times = random_layer("chunked").mixer, torch.randn(3, 2, 4, 6), torch.rand(3, 2, 4)
    mapped = torch.func.vmap(lambda u, times: block(u, time_steps=times))(u, times)
    assert_close("y", mapped[1], block(u[1], time_steps=times[1]), 1e-6)


def test_it_adds_one_number_a_channel_which_starts_as_delta_does_and_is_not_decayed():
    """Also where it was built on meta. A model with such blocks is not our own: whoever computed it
    without its modules would pass the times by."""
    model = Mamba(MambaConfig(6, vocab_size=11))
    names, decayed = set(model.state_dict()), len(model.param_groups(0.1)[0]["params"])
    with torch.device("meta"):
        other = EventBlock(model.config).to_empty(device="cpu")
    other.reset_parameters()
    block = model.backbone.layers[0].mixer = EventBlock(model.config)
    assert not mamba.is_our_own(model)
    assert set(model.state_dict()) - names == {"backbone.layers.0.mixer.dt_A_bias"}
    assert len(model.param_groups(0.1)[0]["params"]) == decayed
    for each in (block, other):
        assert torch.equal(each.dt_A_bias.sort().values, each.dt_proj.bias.sort().values)
        assert not torch.equal(each.dt_A_bias, each.dt_proj.bias)


def test_what_does_not_fit_is_refused():
    block, u, times = random_layer().mixer, torch.ones(2, 4, 6), torch.ones(2, 4)
    for words, wrong in (
        (r"real numbers \(2, 4\).*got .*\(2, 5\)", torch.ones(2, 5)),
        ("real numbers.*bool", times.bool()),
        ("negative", times.cumsum(1) - 1.1),
        ("finite", times * math.inf),
    ):
        with pytest.raises(ValueError, match=words):
            block(u, time_steps=wrong)
    for call, given in ((block, u[..., :5]), (block.step, u)):
        with pytest.raises(ValueError, match="d_model = 6, got"):
            call(given, block.init_state(2), time_steps=times)
    with pytest.raises(ValueError, match="brings its own rule: leave rule out, got 'zoh'"):
        EventBlock(MambaConfig(d_model=4, rule="zoh"))


def test_the_level_of_the_example_is_the_sum_that_it_says():
    numbers, gaps, level = make_events(200, 6, torch.Generator().manual_seed(0))
    assert numbers.unique().tolist() == [-1, 1] and abs(numbers.mean()) < 0.1
    assert 0.05 <= gaps.min() < 0.06 and 4.5 < gaps.max() <= 5
    assert abs(gaps.log().mean() - math.log(0.5)) < 0.1
    ages = gaps.cumsum(1).unsqueeze(2) - gaps.cumsum(1).unsqueeze(1)  # (b, now, then)
    weights = torch.exp(-ages / 3).tril()
    assert_close("level", level, (weights @ numbers.unsqueeze(2)).squeeze(2), 1e-5)


def test_the_example_shows_that_ignoring_the_times_costs(monkeypatch, capsys):
    """Three short trainings; at full length the ratio is above 50."""
    made, short = Mock(wraps=make_events), functools.partial(event_time.train, seqlen=10, batch=32)
    monkeypatch.setattr(event_time, "train", short)
    monkeypatch.setattr(event_time, "make_events", made)

    def run(*options: str) -> dict[str, float]:
        monkeypatch.setattr("sys.argv", ["event_time.py", "--steps", *options])
        event_time.main()
        rows = re.findall(r"^  (\w.*?) +(\d\.\d{4})   \(\d+ s\)$", capsys.readouterr().out, re.M)
        return {kind: float(error) for kind, error in rows}

    errors = run("120")
    made_of = [(call.args[0], call.args[2].initial_seed()) for call in made.call_args_list]
    assert made_of == [*[(32, 0)] * 120, (1000, 1)] * 3, "judged on new sequences"
    assert errors["event time"] < 0.5 * errors["no times"] < 0.1, errors
    assert errors["gaps as input"] < 0.5 * errors["no times"], errors
    assert run("1", "--seed", "3") == run("1", "--seed", "3") != run("1", "--seed", "4")
    with pytest.raises(SystemExit):
        run("0")
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
