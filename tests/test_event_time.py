"""Event time: how much is forgotten depends on the time that has passed, and on nothing else.

The judge is the block written out here from its parameters, with a loop over time in float64.
"""

import copy
import sys

import event_time
import pytest
import torch
import torch.nn.functional as F
from event_time import EventBlock
from look_inside import watch
from torch import Tensor, nn

import mamba
from mamba import Mamba, MambaBlock, MambaConfig, MambaState, ResidualBlock
from test_mamba import assert_all_close, assert_close, error_of

SCANS = ("auto", "sequential", "logspace", "chunked", "recompute")
SIZES = {"d_model": 6, "d_state": 3, "dt_rank": 2}


def randomised(module: nn.Module) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
        if name.endswith("dt_A_bias"):
            parameter.data.uniform_(-3, 0)
    return module


def random_block(**changes) -> EventBlock:
    return randomised(EventBlock(MambaConfig(**{**SIZES, **changes})))


class Stack(nn.Module):
    """Two layers, as the example's docstring says: the times go to every layer."""

    def __init__(self) -> None:
        super().__init__()
        config = MambaConfig(**SIZES, n_layer=2)
        self.layers = nn.ModuleList(ResidualBlock(config, EventBlock(config)) for _ in range(2))

    def init_states(self, batch: int) -> list[MambaState]:
        return [layer.mixer.init_state(batch) for layer in self.layers]

    def forward(self, stream: Tensor, states: list[MambaState], **options):
        states = list(states)
        for i, layer in enumerate(self.layers):
            stream, states[i] = layer(stream, states[i], **options)
        return stream, states

    def step(self, stream: Tensor, states: list[MambaState], **options):
        states = list(states)
        for i, layer in enumerate(self.layers):
            stream, states[i] = layer(stream, states[i], **options)
        return stream, states


def assert_same(actual, expected, tolerance: float = 1e-5, where: str = "") -> None:
    """Both are what Stack returns."""
    (stream, states), (expected_stream, expected_states) = actual, expected
    assert_close(f"{where}stream", stream, expected_stream, tolerance)
    for i, (state, right) in enumerate(zip(states, expected_states, strict=True)):
        assert_all_close(vars(state), vars(right), tolerance, f"{where}layer {i}: ")


def some_times(*shape: int) -> Tensor:
    """From next to nothing to long, some of them zero."""
    times = torch.empty(shape).uniform_(-4, 2).exp()
    return times.masked_fill(torch.rand(shape) < 0.2, 0.0)


def written_out(block: EventBlock, u: Tensor, time_steps: Tensor) -> tuple[Tensor, Tensor]:
    """y (b, l, d_model) and the last h, from the zero state."""
    n, rank = block.config.d_state, block.config.dt_rank
    x, z = block.in_proj(u).chunk(2, dim=-1)
    weight, bias = block.conv1d.weight, block.conv1d.bias
    x = F.conv1d(F.pad(x.mT, (weight.shape[-1] - 1, 0)), weight, bias, groups=len(weight)).mT
    x = x * torch.sigmoid(x)
    low_rank, B, C = (x @ block.x_proj.weight.T).split([rank, n, n], dim=-1)
    delta = torch.log1p(torch.exp(low_rank @ block.dt_proj.weight.T + block.dt_proj.bias))
    rate, A = torch.log1p(torch.exp(block.dt_A_bias)), -torch.exp(block.A_log)
    h, ys = torch.zeros(len(u), *A.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        decay = torch.exp((time_steps[:, t, None] * rate).unsqueeze(-1) * A)
        h = decay * h + (delta[:, t] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(1)
        ys.append((h * C[:, t].unsqueeze(1)).sum(-1))
    y = (torch.stack(ys, 1) + block.D * x) * z * torch.sigmoid(z)
    return block.out_proj(y), h


@pytest.mark.parametrize("scan", [*SCANS, "triton"])
def test_every_scan_gives_the_block_written_out_in_values_and_gradients(scan):
    seqlen = 5 if scan == "triton" else 23
    if scan == "triton":
        pytest.importorskip("triton")
        if not torch.cuda.is_available() and not sys.modules["triton"].knobs.runtime.interpret:
            pytest.skip("needs a GPU, or Triton's interpreter")
    device = "cuda" if scan == "triton" and torch.cuda.is_available() else "cpu"
    block = random_block(scan=scan, d_state=2)
    u, times = torch.randn(2, seqlen, 6), some_times(2, seqlen)
    of_y, of_h = torch.randn(2, seqlen, 6), torch.randn(2, 12, 2)
    exact, block = copy.deepcopy(block).double(), block.to(device)
    found = []
    for each, move in ((block, {"device": device}), (exact, {"dtype": torch.float64})):
        inputs = [tensor.to(**move).requires_grad_() for tensor in (u.clone(), times.clone())]
        if each is exact:
            y, h = written_out(each, *inputs)
        else:
            y, state = each(inputs[0], each.init_state(2), time_steps=inputs[1])
            h = state.h
        loss = (y * of_y.to(y)).sum() + (h * of_h.to(h)).sum()
        names, parameters = zip(*each.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, [*inputs, *parameters])
        names = ("y", "h", *(f"gradient of {name}" for name in ("u", "time_steps", *names)))
        found.append(dict(zip(names, (y, h, *gradients), strict=True)))
    for name, expected in found[1].items():
        tolerance = 1e-4 if name.startswith("gradient") else 1e-5
        assert_close(name, found[0][name].detach().cpu(), expected.detach(), tolerance)


def test_forward_step_and_any_split_of_a_stack_agree():
    model, u, times = randomised(Stack()), torch.randn(2, 9, 6), some_times(2, 9)
    start = [state.map(torch.randn_like) for state in model.init_states(2)]
    whole = model(u, start, time_steps=times)
    states, stepped = start, []
    for t in range(9):
        one, states = model.step(u[:, t], states, time_steps=times[:, t])
        stepped.append(one)
    assert_same((torch.stack(stepped, 1), states), whole, where="steps: ")
    for cut in (1, 4, 8):
        first, states = model(u[:, :cut], start, time_steps=times[:, :cut])
        second, states = model(u[:, cut:], states, time_steps=times[:, cut:])
        assert_same((torch.cat([first, second], 1), states), whole, where=f"cut at {cut}: ")


def test_no_time_forgets_nothing_and_a_long_time_everything():
    block = random_block()
    u, past = torch.randn(1, 1, 6), torch.randn(1, 12, 3)
    after = {}
    for interval in (0.0, 1e6):
        start = MambaState(torch.zeros(1, 12, 3), past)
        _, kept = block(u, start, time_steps=torch.full((1, 1), interval))
        _, added = block(u, block.init_state(1), time_steps=torch.full((1, 1), interval))
        after[interval] = kept.h - added.h
    assert torch.allclose(after[0.0], past, atol=1e-6)
    assert after[1e6].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
def test_times_of_any_dtype_leave_the_state_float32(dtype):
    block, u = random_block(), torch.randn(1, 4, 6)
    times = torch.tensor([[0, 1, 2, 4]])
    expected, last = block(u, block.init_state(1), time_steps=times.float())
    y, state = block(u, block.init_state(1), time_steps=times.to(dtype))
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
    assert error_of(left_of_the_past(exact, 1.0, torch.float64), expected) > 1e-2


def test_two_events_at_one_time_add_up():
    """In an empty interval the state is a sum, whatever the order of what is added."""
    block = random_block(d_conv=1)
    u, zero = torch.randn(1, 2, 6), torch.zeros(1, 2)
    _, state = block(u, block.init_state(1), time_steps=zero)
    _, swapped = block(u.flip(1), block.init_state(1), time_steps=zero)
    assert torch.allclose(state.h, swapped.h, atol=1e-6)


def test_left_padding_and_packed_documents_change_nothing():
    model, times, u = randomised(Stack()), some_times(1, 5), torch.randn(1, 5, 6)
    alone = model(u, model.init_states(1), time_steps=times)
    for name, before, gaps in (
        ("padded", torch.full((1, 3, 6), 7.0), torch.full((1, 3), 7.0)),
        ("packed", torch.randn(1, 4, 6), some_times(1, 4)),
    ):
        length = before.shape[1]
        stream, states = model(
            torch.cat([before, u], 1), model.init_states(1),
            time_steps=torch.cat([gaps, times], 1), reset=torch.arange(length + 5)[None] == length,
        )  # fmt: skip
        assert_same((stream[:, length:], states), alone, where=f"{name}: ")


def test_watch_refuses_a_block_whose_state_it_could_not_tell():
    with pytest.raises(ValueError, match="found EventBlock"), watch(random_block()):
        pass


def test_initialising_again_sets_the_rates_too_also_after_meta():
    with torch.device("meta"):
        block = EventBlock(MambaConfig(d_model=6))
    block = block.to_empty(device="cpu")
    block.dt_A_bias.data.fill_(torch.nan)
    block.reset_parameters()
    assert torch.equal(block.dt_A_bias.sort().values, block.dt_proj.bias.sort().values)
    assert not torch.equal(block.dt_A_bias, block.dt_proj.bias)


def test_an_event_block_runs_under_vmap():
    config = MambaConfig(d_model=6, scan="chunked")
    block, u, gaps = EventBlock(config), torch.randn(3, 2, 5, 6), torch.rand(3, 2, 5)
    found = torch.func.vmap(lambda u, gaps: block(u, time_steps=gaps))(u, gaps)
    expected = torch.stack(
        [block(*one[:1], time_steps=one[1]) for one in zip(u, gaps, strict=True)]
    )
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("time_steps", "words"),
    [
        (torch.ones(2, 5), r"\(2, 4\).*got.*\(2, 5\)"),
        (torch.ones(2, 4, dtype=torch.bool), "real numbers.*bool"),
        (torch.ones(2, 4, dtype=torch.complex64), "real numbers.*complex"),
        (torch.tensor([[1.0, 2, -3, 4]] * 2), "negative"),
        (torch.full((2, 4), torch.nan), "finite"),
        (torch.full((2, 4), torch.inf), "finite"),
    ],
    ids=["shape", "bool", "complex", "negative", "NaN", "infinity"],
)
def test_time_steps_that_do_not_fit_are_refused(time_steps, words):
    block, u = EventBlock(MambaConfig(**SIZES)), torch.randn(2, 4, 6)
    with pytest.raises(ValueError, match=words):
        block(u, time_steps=time_steps)
    if words in ("negative", "finite"):
        with pytest.raises(ValueError, match=words):
            block.step(u[:, 2], block.init_state(2), time_steps=time_steps[:, 2])


def test_nothing_runs_without_times_and_no_other_block_takes_them():
    block, plain = EventBlock(MambaConfig(**SIZES)), MambaBlock(MambaConfig(**SIZES))
    u, times = torch.randn(2, 4, 6), torch.ones(2, 4)
    for call in (
        lambda: block(u),
        lambda: block.step(u[:, 0], block.init_state(2)),
        lambda: plain(u, time_steps=times),
        lambda: ResidualBlock(plain.config)(u, plain.init_state(2), time_steps=times),
    ):
        with pytest.raises(TypeError, match="time_steps"):
            call()


def test_an_input_a_state_or_a_reset_that_does_not_fit_is_refused_as_in_a_mamba_block():
    block, times = EventBlock(MambaConfig(**SIZES)), torch.ones(2, 4)
    u = torch.randn(2, 4, 6)
    with pytest.raises(ValueError, match="d_model = 6"):
        block(u[..., :5], time_steps=times)
    with pytest.raises(ValueError, match=r"state\.conv"):
        block(u, block.init_state(3), time_steps=times)
    with pytest.raises(ValueError, match="reset must be bool"):
        block(u, time_steps=times, reset=times)
    with pytest.raises(ValueError, match=r"state\.h"):
        state = block.init_state(2)
        block.step(u[:, 0], MambaState(state.conv, state.h[..., :2]), time_steps=times[:, 0])


def test_event_time_has_a_rule_of_its_own():
    with pytest.raises(ValueError, match=r"brings its own rule.*'zoh'"):
        EventBlock(MambaConfig(d_model=4, rule="zoh"))


def test_a_model_of_event_blocks_is_not_taken_for_one_of_our_own():
    """Whoever computes a model without its modules would pass the times by."""
    model = Mamba(MambaConfig(**SIZES, vocab_size=11))
    assert mamba.is_our_own(model)
    model.backbone.layers[0].mixer = EventBlock(model.config)
    assert not mamba.is_our_own(model)


def test_it_adds_one_number_a_channel_which_starts_as_delta_does_and_is_not_decayed():
    model = Mamba(MambaConfig(**SIZES, vocab_size=11))
    plain = set(model.state_dict())
    block = model.backbone.layers[0].mixer = EventBlock(model.config)
    assert set(model.state_dict()) - plain == {"backbone.layers.0.mixer.dt_A_bias"}
    rates = F.softplus(block.dt_A_bias)
    assert ((rates > 0.0009) & (rates < 0.11)).all()
    assert not torch.equal(block.dt_A_bias, block.dt_proj.bias)
    assert torch.equal(block.dt_A_bias.sort().values, block.dt_proj.bias.sort().values)
    decayed = {id(p) for p in model.param_groups(0.1)[0]["params"]}
    assert id(block.dt_A_bias) not in decayed


def test_its_weights_load_into_another_and_are_missed_where_they_are_not():
    block, other, plain = random_block(), random_block(), MambaBlock(MambaConfig(**SIZES))
    other.load_state_dict(block.state_dict())
    u, times = torch.randn(1, 5, 6), some_times(1, 5)
    assert torch.equal(other(u, time_steps=times), block(u, time_steps=times))
    with pytest.raises(RuntimeError, match="dt_A_bias"):
        other.load_state_dict(plain.state_dict())


def test_it_is_compiled_whole():
    block, u, times = random_block(), torch.randn(2, 3, 6), some_times(2, 3)
    torch.compiler.reset()
    whole = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert_close("y", whole(u, time_steps=times), block(u, time_steps=times), 1e-5)


def test_the_example_shows_that_ignoring_the_times_costs():
    """Two short trainings; at full length the ratio is above 50."""
    kinds = ("event time", "no times")
    errors = {kind: event_time.train(kind, steps=170, seqlen=16, batch=32) for kind in kinds}
    assert errors["event time"] < 0.3 * errors["no times"], errors


def test_the_level_of_the_example_is_the_sum_that_it_says():
    numbers, gaps, level = event_time.make_events(2, 6, torch.Generator().manual_seed(0))
    times = gaps.cumsum(1)
    for t in range(6):
        weights = torch.exp(-(times[:, t : t + 1] - times[:, : t + 1]) / event_time.MEMORY)
        assert torch.allclose(level[:, t], (numbers[:, : t + 1] * weights).sum(1), atol=1e-5)
