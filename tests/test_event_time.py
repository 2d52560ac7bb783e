"""Event time: how much is forgotten depends on the time that has passed, and on nothing else.

The judge is the block written out here from its parameters, with a loop over time in float64.
"""

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import generate
import mamba
from mamba import Mamba, MambaBlock, MambaConfig, MambaState

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import event_time

SCANS = ("auto", "sequential", "logspace", "chunked", "recompute")
SIZES = {"d_model": 6, "d_state": 3, "dt_rank": 2, "event_time": True}


@pytest.fixture(autouse=True)
def same_random_numbers_in_every_run():
    torch.manual_seed(0)


def random_block(**changes) -> MambaBlock:
    block = MambaBlock(MambaConfig(**{**SIZES, **changes}))
    for parameter in block.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    block.dt_A_bias.data.uniform_(-3, 0)
    return block


def random_model(**changes) -> Mamba:
    model = Mamba(MambaConfig(**{**SIZES, "n_layer": 2, "vocab_size": 11, **changes}))
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def some_times(*shape: int) -> Tensor:
    """From next to nothing to long, some of them zero."""
    times = torch.empty(shape).uniform_(-4, 2).exp()
    return times.masked_fill(torch.rand(shape) < 0.2, 0.0)


def written_out(block: MambaBlock, u: Tensor, time_steps: Tensor) -> tuple[Tensor, Tensor]:
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


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


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
    exact = MambaBlock(block.config).double()
    exact.load_state_dict(block.state_dict())
    block = block.to(device)
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


def test_forward_step_and_any_split_agree():
    model, ids, times = random_model(), torch.randint(11, (2, 9)), some_times(2, 9)
    logits, last = model(ids, model.init_state(2), time_steps=times)
    state, stepped = model.init_state(2), []
    for t in range(9):
        one, state = model.step(ids[:, t], state, time_steps=times[:, t])
        stepped.append(one)
    assert_close("stepped", torch.stack(stepped, 1), logits, 1e-5)
    assert_close("state after steps", state.h, last.h, 1e-5)
    for cut in (1, 4, 8):
        first, state = model(ids[:, :cut], model.init_state(2), time_steps=times[:, :cut])
        second, state = model(ids[:, cut:], state, time_steps=times[:, cut:])
        assert_close(f"cut at {cut}", torch.cat([first, second], 1), logits, 1e-5)
        assert_close(f"state, cut at {cut}", state.h, last.h, 1e-5)


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
    model, ids = random_model(), torch.randint(11, (1, 4))
    times = torch.tensor([[0, 1, 2, 4]])
    expected, _ = model(ids, model.init_state(1), time_steps=times.float())
    logits, state = model(ids, model.init_state(1), time_steps=times.to(dtype))
    assert state.h.dtype == logits.dtype == torch.float32
    assert torch.equal(logits, expected)


def test_two_events_at_one_time_add_up():
    """In an empty interval the state is a sum, whatever the order of what is added."""
    block = random_block(d_conv=1)
    u, zero = torch.randn(1, 2, 6), torch.zeros(1, 2)
    _, state = block(u, block.init_state(1), time_steps=zero)
    _, swapped = block(u.flip(1), block.init_state(1), time_steps=zero)
    assert torch.allclose(state.h, swapped.h, atol=1e-6)


def test_left_padding_and_packed_documents_change_nothing():
    model, times = random_model(), some_times(1, 5)
    ids, other = torch.randint(11, (1, 5)), torch.randint(11, (1, 4))
    alone = model(ids, time_steps=times)
    padded_ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    padded_times = torch.cat([torch.full((1, 3), 7.0), times], 1)
    mask = torch.arange(8)[None] >= 3
    padded = model(padded_ids, time_steps=padded_times, mask=mask)[:, 3:]
    assert_close("padded", padded, alone, 1e-5)
    packed_ids, packed_times = torch.cat([other, ids], 1), torch.cat([some_times(1, 4), times], 1)
    reset = torch.arange(9)[None] == 4
    packed = model(packed_ids, time_steps=packed_times, reset=reset)[:, 4:]
    assert_close("packed", packed, alone, 1e-5)


def test_the_internals_give_the_state_under_the_rule_dirac():
    block, internals, times = random_block(), [], some_times(2, 7)
    _, state = block(
        torch.randn(2, 7, 6), block.init_state(2), time_steps=times, internals=internals
    )
    inputs = [internals[0][name] for name in ("x", "delta", "A", "B", "C")]
    _, h = mamba.scan_sequential(*inputs, rule="dirac")
    assert_close("h", h, state.h, 1e-6)


@pytest.mark.parametrize(
    ("changes", "time_steps", "words"),
    [
        ({}, None, "takes time_steps"),
        ({"event_time": False}, torch.ones(2, 4), "takes no time_steps"),
        ({}, torch.ones(2, 5), r"\(2, 4\).*got.*\(2, 5\)"),
        ({}, torch.ones(2, 4, dtype=torch.bool), "real numbers.*bool"),
        ({}, torch.tensor([[1.0, 2, -3, 4]] * 2), "negative"),
        ({}, torch.full((2, 4), torch.nan), "finite"),
        ({}, torch.full((2, 4), torch.inf), "finite"),
    ],
    ids=["missing", "unwanted", "shape", "bool", "negative", "NaN", "infinity"],
)
def test_time_steps_that_do_not_fit_are_refused(changes, time_steps, words):
    model = Mamba(MambaConfig(**{**SIZES, "vocab_size": 11, **changes}))
    ids = torch.randint(11, (2, 4))
    with pytest.raises(ValueError, match=words):
        model(ids, time_steps=time_steps)
    of_step = None if time_steps is None else time_steps.mT.flatten()[-2:]
    if words.startswith("takes") or words == "finite":
        with pytest.raises(ValueError, match=words):
            model.step(ids[:, 0], model.init_state(2), time_steps=of_step)


def test_generation_without_times_is_refused_and_never_fused():
    model = random_model()
    assert not generate.can_fuse(model)
    with pytest.raises(ValueError, match=r"model\.step"):
        next(generate.stream(model, torch.zeros(1, 2, dtype=torch.long)))


def test_event_time_has_a_rule_of_its_own():
    with pytest.raises(ValueError, match="brings its own rule"):
        MambaConfig(d_model=4, event_time=True, rule="zoh")


def test_it_adds_one_number_a_channel_which_checkpoints_hold(tmp_path):
    plain, timed = (
        Mamba(MambaConfig(**{**SIZES, "vocab_size": 11, "event_time": flag}))
        for flag in (False, True)
    )
    extra = timed.state_dict().keys() - plain.state_dict().keys()
    assert extra == {"backbone.layers.0.mixer.dt_A_bias"}
    rates = F.softplus(timed.backbone.layers[0].mixer.dt_A_bias)
    assert ((rates > 0.0009) & (rates < 0.11)).all()
    decayed = {id(p) for p in timed.param_groups(0.1)[0]["params"]}
    assert id(timed.backbone.layers[0].mixer.dt_A_bias) not in decayed
    timed.save_pretrained(tmp_path / "timed")
    plain.save_pretrained(tmp_path / "plain")
    assert "event_time" not in (tmp_path / "plain" / "config.json").read_text()
    loaded = Mamba.from_pretrained(tmp_path / "timed")
    ids, times = torch.randint(11, (1, 6)), some_times(1, 6)
    assert torch.equal(loaded(ids, time_steps=times), timed(ids, time_steps=times))
    (tmp_path / "timed" / "config.json").write_text(
        (tmp_path / "plain" / "config.json").read_text()
    )
    with pytest.raises(RuntimeError, match="dt_A_bias"):
        Mamba.from_pretrained(tmp_path / "timed")


def test_it_is_compiled_whole():
    model, ids, times = random_model(), torch.randint(11, (2, 5)), some_times(2, 5)
    whole = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    torch.compiler.reset()
    assert_close("logits", whole(model)(ids, time_steps=times), model(ids, time_steps=times), 1e-5)


def test_the_example_shows_that_ignoring_the_times_costs():
    """Two short trainings; at full length the ratio is above 50."""
    kinds = ("event time", "no times")
    errors = {kind: event_time.train(kind, steps=150, seqlen=20, batch=32) for kind in kinds}
    assert errors["event time"] < 0.3 * errors["no times"], errors


def test_the_level_of_the_example_is_the_sum_that_it_says():
    numbers, gaps, level = event_time.make_events(2, 6, torch.Generator().manual_seed(0))
    times = gaps.cumsum(1)
    for t in range(6):
        weights = torch.exp(-(times[:, t : t + 1] - times[:, : t + 1]) / event_time.MEMORY)
        assert torch.allclose(level[:, t], (numbers[:, : t + 1] * weights).sum(1), atol=1e-5)
