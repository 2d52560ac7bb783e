"""The kernels of triton_scan.py, against the recurrence written out in float64.

On a machine without a GPU they run in Triton's interpreter, which follows every program number by
number: conftest.py switches it on, the tensors are small, and the chunk and the slice, which cut
time into pieces, are made small too, so that a few steps cross every border. On a GPU the same
small tensors go through the compiled kernels, and then real sizes do.

An error is norm(actual - expected) / norm(expected). Whatever a kernel is to fill is full of NaN
before, and so is the memory around the tensors that it reads where they are parts of larger ones.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import mamba
from mamba import Mamba, MambaConfig

try:
    import triton_scan
    from triton_scan import selective_scan_triton
except ImportError as error:
    triton_scan, missing = None, error

ROOT = Path(mamba.__file__).parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
operators = torch.ops.mamba_annotated  # what torch.compile sees of the functions that launch
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

# Relative errors of values and of gradients. bfloat16: what rounding makes, 1.7e-3 on average; the
# interpreter does not round but cuts off, which makes up to 5e-3.
TOLERANCES = {
    torch.float32: (1e-5, 1e-4 if GPU else 2e-5),
    torch.float16: (4e-4, 5e-4),
    torch.bfloat16: (3e-3, 4e-3) if GPU else (6e-3, 7e-3),
}


@pytest.fixture(autouse=True, scope="module")
def kernels_can_run():
    message = None
    if triton_scan is None:
        message = f'{missing}: pip install -e ".[test]"'
    elif not GPU and not triton_scan.INTERPRETED:
        message = "no GPU, and TRITON_INTERPRET is not 1, or triton was imported before it was"
    if message is not None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(message)


## ================================================================================================
## Judges and helpers
## ================================================================================================


def recurrence(
    x, dt, A, B, C, D=None, z=None, h0=None, *,
    dt_bias=None, dt_softplus=True, rule="mamba", reset=None,
):  # fmt: skip
    """The judge: one step after the other, in the precision of its inputs."""
    delta = dt if dt_bias is None else dt + dt_bias
    if dt_softplus:
        delta = torch.logaddexp(delta, torch.zeros_like(delta))
    h = x.new_zeros(x.shape[0], *A.shape) if h0 is None else h0
    ys = []
    # unbind, not x[:, t], whose gradients would take a time quadratic in the length
    for t, (x_t, delta_t, B_t, C_t) in enumerate(zip(*(v.unbind(1) for v in (x, delta, B, C)))):  # noqa: B905
        decay = torch.exp(delta_t[:, :, None] * A)
        if reset is not None:
            decay = torch.where(reset[:, t, None, None], 0.0, decay)
        v = x_t if rule == "dirac" else delta_t * x_t
        h = decay * h + v[:, :, None] * B_t[:, None, :]
        ys.append((h * C_t[:, None, :]).sum(-1))
    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * z / (1 + torch.exp(-z))
    return y, h


def scan_inputs(batch, seqlen, d_inner, d_state, *, without=(), dtype=torch.float32, **dtypes):
    """Every tensor of a scan by its name; dtypes: those of some of them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    # From states that remember a thousand steps to those that forget in one.
    minus_A = torch.empty(d_inner, d_state).uniform_(math.log(0.01), 1.0, generator=generator).exp()
    inputs = {
        "x": normal(batch, seqlen, d_inner),
        "dt": normal(batch, seqlen, d_inner) - 1,
        "A": -minus_A,
        "B": normal(batch, seqlen, d_state),
        "C": normal(batch, seqlen, d_state),
        "D": normal(d_inner),
        "z": normal(batch, seqlen, d_inner),
        "h0": normal(batch, d_inner, d_state),
        "dt_bias": normal(d_inner),
    }
    return {
        name: tensor.to(DEVICE, dtypes.get(name, dtype))
        for name, tensor in inputs.items()
        if name not in without
    }


def some_resets(batch: int, seqlen: int) -> Tensor:
    """At the first step, at the last, three in one tile of 4, and at a multiple of 8 alone."""
    reset = torch.zeros(batch, seqlen, dtype=torch.bool)
    reset[0, [0, 9, 10, 11]] = True
    reset[-1, [8, seqlen - 1]] = True
    return reset.to(DEVICE)


def gradients_of_outputs(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What arrives at y and at h_last from a loss."""
    x, generator = inputs["x"], torch.Generator().manual_seed(1)
    dh_last = torch.randn(len(x), *inputs["A"].shape, generator=generator)
    return torch.randn(x.shape, generator=generator).to(x), dh_last.to(x.device)


def results(scan, inputs, outputs=("y", "h_last"), upstream=None, **options) -> dict[str, Tensor]:
    """y, h_last, and the gradients of all inputs for a loss that depends on these outputs."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    values = dict(zip(("y", "h_last"), scan(**leaves, **options), strict=True))
    upstream = gradients_of_outputs(inputs) if upstream is None else upstream
    upstream = dict(zip(("y", "h_last"), upstream, strict=True))
    gradients = torch.autograd.grad(
        [values[name] for name in outputs],
        list(leaves.values()),
        [upstream[name].to(values[name].dtype) for name in outputs],
        materialize_grads=True,
    )
    names = [f"gradient of {name}" for name in leaves]
    return {**values, **dict(zip(names, gradients, strict=True))}


def expected_results(inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    upstream = options.pop("upstream", None) or gradients_of_outputs(inputs)
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    return results(recurrence, doubles, upstream=upstream, **options)


@contextlib.contextmanager
def poisoned():
    """A tensor that is made without values holds NaN, and not what memory happens to hold."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return made

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-300)
    assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.1e}"


def assert_results(actual: dict, expected: dict, tolerances=None) -> None:
    """tolerances: of values and of gradients; None takes those of each tensor's dtype."""
    assert actual.keys() == expected.keys()
    for name in expected:
        of_values, of_gradients = tolerances or TOLERANCES[actual[name].dtype]
        tolerance = of_gradients if name.startswith("gradient") else of_values
        assert_close(name, actual[name], expected[name], tolerance)


def check(inputs: dict[str, Tensor], tolerances=None, **options) -> None:
    """Values and gradients are those of the recurrence on the same numbers in float64."""
    expected = expected_results(inputs, **options)
    with poisoned():
        actual = results(selective_scan_triton, inputs, **options)
    dtypes = {name.removeprefix("gradient of "): tensor.dtype for name, tensor in actual.items()}
    assert dtypes.pop("y") == inputs["x"].dtype
    assert dtypes.pop("h_last") == torch.float32
    assert dtypes == {name: tensor.dtype for name, tensor in inputs.items()}
    assert_results(actual, expected, tolerances)


def assert_equal(actual: dict, expected: dict) -> None:
    """To the bit."""
    for name in expected:
        difference = (actual[name] - expected[name]).abs().max()
        assert torch.equal(actual[name], expected[name]), f"{name}: differs by up to {difference}"


@pytest.fixture
def launches(monkeypatch) -> dict[str, list[tuple]]:
    """The grids of all launches, by the kernel's name."""
    names = ("forward_summary", "forward", "backward_summary", "backward")
    kernels = {name: getattr(triton_scan, f"{name}_kernel") for name in names}
    grids, launch = {name: [] for name in names}, triton_scan.launch

    def note(kernel, grid, *args, **kwargs):
        for name in names:
            if kernels[name] is kernel:
                grids[name].append(tuple(grid))
        launch(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(triton_scan, "launch", note)
    return grids


## ================================================================================================
## The recurrence
## ================================================================================================
##
## On every machine. In the interpreter a tile of 4 steps of one program of the backward pass costs
## 0.15 s with one or two states, and 1.5 s with 16 or more. For every 32 channels there is one
## program with one state, and two with more. Hence sizes that are as small as they can be.


@pytest.mark.parametrize(
    ("batch", "seqlen", "d_inner", "d_state"),
    [
        (1, 1, 1, 1),
        (2, 3, 3, 4),  # steps, channels and lanes that only fill up the tile
        (2, 9, 17, 1),
        (1, 8, 32, 2),  # nothing to fill up
        (1, 3, 48, 2),  # of the last 32 channels only 16
        (1, 2, 40, 1),
        (1, 5, 2, 3),
        (1, 2, 20, 5),
        (1, 3, 2, 16),
        (1, 2, 2, 20),
        (1, 2, 2, 200),  # 16 lanes share a channel
    ],
)
def test_values_and_gradients_are_those_of_the_recurrence(batch, seqlen, d_inner, d_state):
    check(scan_inputs(batch, seqlen, d_inner, d_state))


@pytest.mark.parametrize("left_out", ["D", "z", "h0", "dt_bias", "D z h0 dt_bias"])
def test_every_tensor_that_may_be_left_out_may_be_left_out(left_out):
    check(scan_inputs(1, 5, 3, 1, without=left_out.split()))


def test_without_softplus_dt_is_delta():
    inputs = scan_inputs(1, 5, 3, 1)
    inputs["dt"], inputs["dt_bias"] = inputs["dt"].abs(), inputs["dt_bias"].abs()
    check(inputs, dt_softplus=False)


@pytest.mark.parametrize("shape", [(1, 5, 3, 1), (1, 8, 32, 1)])
def test_under_dirac_x_is_an_impulse(shape):
    check(scan_inputs(*shape), rule="dirac")


@pytest.mark.parametrize("rule", ["mamba", "dirac"])
def test_a_reset_forgets_all_that_was_before(rule):
    check(scan_inputs(2, 12, 3, 1), reset=some_resets(2, 12), rule=rule)


def test_a_reset_at_every_step_leaves_the_inputs_of_that_step():
    everywhere = torch.ones(1, 5, dtype=torch.bool, device=DEVICE)
    check(scan_inputs(1, 5, 3, 1), reset=everywhere)


@pytest.mark.parametrize("outputs", [("y",), ("h_last",)])
def test_a_loss_may_depend_on_one_of_the_outputs(outputs):
    check(scan_inputs(1, 5, 3, 1), outputs=outputs)


def test_a_tensor_that_needs_no_gradient_changes_no_gradient():
    inputs = scan_inputs(1, 2, 3, 1)
    expected = results(selective_scan_triton, inputs)
    for name in ("x", "A", "h0"):
        rest = {other: tensor for other, tensor in inputs.items() if other != name}
        scan = functools.partial(selective_scan_triton, **{name: inputs[name]})
        actual = results(scan, rest, upstream=gradients_of_outputs(inputs))
        assert_equal(actual, {key: expected[key] for key in actual})


def test_without_gradients_the_values_are_the_same_and_nothing_is_kept():
    inputs, reset = scan_inputs(2, 13, 3, 2), some_resets(2, 13)
    y, h_last = selective_scan_triton(**inputs, reset=reset)
    assert not y.requires_grad and not h_last.requires_grad
    inputs["A"].requires_grad_()
    expected = selective_scan_triton(**inputs, reset=reset)
    assert all(tensor.requires_grad for tensor in expected)
    assert_equal({"y": y, "h_last": h_last}, dict(zip(("y", "h_last"), expected, strict=True)))


## ================================================================================================
## Cutting time
## ================================================================================================


def test_segments_of_time_are_chained_at_the_sizes_that_the_kernels_choose(launches):
    check(scan_inputs(1, 66, 3, 1))
    for name in ("forward", "backward"):
        assert launches[name][0][1] == 2, f"{name}: not cut into two segments"


SEGMENTS = {
    "three of them, the last one short": {},
    "impulses": {"rule": "dirac", "shape": (1, 12, 3, 1)},
    "documents": {"reset": True, "shape": (2, 20, 3, 1)},
    "Δ as it is, nothing else": {
        "dt_softplus": False, "without": ("D", "z", "h0", "dt_bias"), "shape": (1, 12, 3, 1),
    },
    "channels and steps that need no filling": {"shape": (1, 16, 32, 1)},
    "more states": {"shape": (1, 11, 17, 4)},
    "a longer chunk": {"shape": (1, 19, 3, 1), "chunk": 16},
}  # fmt: skip


@pytest.mark.parametrize("case", SEGMENTS)
def test_segments_of_time_are_chained(case, monkeypatch, launches):
    options = dict(SEGMENTS[case])
    batch, seqlen, d_inner, d_state = options.pop("shape", (1, 20, 3, 1))
    monkeypatch.setattr(triton_scan, "K", options.pop("chunk", 8))
    inputs = scan_inputs(batch, seqlen, d_inner, d_state, without=options.pop("without", ()))
    if not options.get("dt_softplus", True):
        inputs["dt"] = inputs["dt"].abs()
    if options.pop("reset", False):
        options["reset"] = some_resets(batch, seqlen)
        inputs["A"][0] = 0.0  # a state that forgets at the start of a document and never else
    check(inputs, **options)
    segments = -(-seqlen // triton_scan.K)
    for name in ("forward", "backward"):
        assert launches[name][0][1] == segments, f"{name}: not cut into {segments} segments"
        assert launches[f"{name}_summary"][0][1] == segments - 1


@pytest.mark.parametrize(("seqlen", "steps", "slices", "segments"), [(21, 8, 3, 1), (28, 16, 2, 2)])
def test_slices_of_the_backward_pass_add_up(seqlen, steps, slices, segments, monkeypatch, launches):
    """dB and dC are summed over channels one slice of time after the other, the last one first."""
    of_a_step = 2 * torch.float32.itemsize  # dB and dC of one program with one state

    monkeypatch.setattr(triton_scan, "K", 8)
    monkeypatch.setattr(triton_scan, "BACKWARD_WANTED", segments)  # programs
    monkeypatch.setattr(triton_scan, "room_for_sums", lambda x: steps * of_a_step)
    check(scan_inputs(1, seqlen, 3, 1), reset=some_resets(1, seqlen))
    grids = launches["backward"]
    assert (len(grids), grids[-1][1]) == (slices, segments), f"not cut like that: {grids}"


def test_time_is_not_cut_where_channels_are_enough(monkeypatch, launches):
    monkeypatch.setattr(triton_scan, "K", 8)
    monkeypatch.setattr(triton_scan, "FORWARD_FULL", 2)
    monkeypatch.setattr(triton_scan, "BACKWARD_FULL", 2)
    check(scan_inputs(2, 11, 3, 1), reset=some_resets(2, 12)[:, :11])
    assert launches["forward"] == launches["backward"] == [(1, 1, 2)]
    assert launches["forward_summary"] == launches["backward_summary"] == []


## ================================================================================================
## Memory
## ================================================================================================


def inside_nan(tensor: Tensor) -> Tensor:
    """The same numbers as a part of a larger tensor that is NaN everywhere else."""
    around = tensor.new_full([size + 9 for size in tensor.shape], math.nan)
    part = around[tuple(slice(4, 4 + size) for size in tensor.shape)]
    return part.copy_(tensor)


def in_order(tensor: Tensor, *axes: int) -> Tensor:
    """The same numbers, stored with these axes from the outermost to the innermost."""
    stored = tensor.permute(axes).contiguous()
    return stored.permute([axes.index(axis) for axis in range(tensor.ndim)])


def strided(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """x and z two halves of one tensor, channels before time, the same B and C at every step."""
    d_inner = len(inputs["D"])
    both = inside_nan(torch.cat([inputs["x"], inputs["z"]], dim=-1))
    halves = {"x": both[..., :d_inner], "z": both[..., d_inner:]}
    everywhere = {name: inputs[name][:, :1].expand_as(inputs[name]) for name in ("B", "C")}
    return {
        **inputs,
        **halves,
        **everywhere,
        "dt": in_order(inputs["dt"], 0, 2, 1),
        "A": in_order(inputs["A"], 1, 0),
        "D": torch.stack([inputs["D"], inputs["D"] * math.nan], dim=-1)[:, 0],
        "h0": in_order(inputs["h0"], 1, 2, 0),
        "dt_bias": inputs["dt_bias"][:1].expand(d_inner),
    }


@pytest.mark.parametrize(
    ("shape", "chunk"), [((2, 3, 3, 2), 64), ((1, 10, 33, 1), 8)], ids=["whole", "in segments"]
)
def test_inputs_may_have_any_strides(shape, chunk, monkeypatch):
    monkeypatch.setattr(triton_scan, "K", chunk)
    inputs = strided(scan_inputs(*shape))
    if chunk == 8:  # in which no two channels are neighbours
        inputs |= {name: in_order(inputs[name], 0, 2, 1) for name in ("x", "z")}
    assert not any(inputs[name].is_contiguous() for name in inputs.keys() - {"A", "h0"})
    dy, dh_last = gradients_of_outputs(inputs)
    check(inputs, upstream=(in_order(dy, 2, 0, 1), in_order(dh_last, 2, 1, 0)))


def test_strides_beyond_32_bits_cost_a_copy_and_others_none():
    """Inside a tile the kernels count in 32 bits: steps 2**25 numbers apart are too far."""
    far = torch.empty_strided((1, 2, 2), (2**26, 2**25, 1), device="meta")
    near = torch.empty_strided((1, 2, 2), (2**26, 6, 1), device="meta")
    assert triton_scan.within_reach(far).stride() == (4, 2, 1)
    assert triton_scan.within_reach(near) is near
    assert triton_scan.within_reach(None) is None


def test_the_gradient_that_arrives_at_y_may_be_one_number_for_all():
    """As after y.sum()."""
    inputs = scan_inputs(2, 3, 3, 1)
    dy, dh_last = (g.new_ones(()).expand(g.shape) for g in gradients_of_outputs(inputs))
    check(inputs, upstream=(dy, dh_last))


@pytest.mark.parametrize("shape", [(2, 5, 3, 1), (1, 8, 32, 1)])
def test_nothing_is_read_beside_the_tensors(shape):
    inputs = {name: inside_nan(tensor) for name, tensor in scan_inputs(*shape).items()}
    check(inputs, upstream=[inside_nan(g) for g in gradients_of_outputs(inputs)])


def test_a_reset_may_have_any_strides_too():
    reset = in_order(some_resets(2, 13), 1, 0)
    inputs = scan_inputs(2, 13, 3, 1)
    expected = recurrence(**{name: v.double() for name, v in inputs.items()}, reset=reset)
    for name, actual, right in zip(
        ("y", "h_last"), selective_scan_triton(**inputs, reset=reset), expected, strict=True
    ):
        assert_close(name, actual, right, 1e-5)


def test_inputs_are_left_as_they_are():
    inputs, reset = scan_inputs(1, 5, 3, 1), some_resets(1, 12)[:, :5]
    before = copy.deepcopy({**inputs, "reset": reset})
    results(selective_scan_triton, inputs, reset=reset)
    assert torch.equal(reset, before.pop("reset"))
    assert_equal(inputs, before)


## ================================================================================================
## Precision
## ================================================================================================

MIXTURES = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "x and z bfloat16": {"x": torch.bfloat16, "z": torch.bfloat16},
    "B and C bfloat16": {"B": torch.bfloat16, "C": torch.bfloat16},
    "as in a model": {"dtype": torch.bfloat16, **dict.fromkeys(("A", "D", "h0"), torch.float32)},
    "each its own": {
        "dt": torch.bfloat16, "A": torch.float16, "C": torch.float16, "D": torch.bfloat16,
        "z": torch.float16, "h0": torch.bfloat16, "dt_bias": torch.float16,
    },
}  # fmt: skip


@pytest.mark.parametrize("mixture", MIXTURES)
def test_short_floats_are_rounded_once_at_the_end(mixture):
    check(scan_inputs(1, 7, 11, 1, **MIXTURES[mixture]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_has_float32_digits_whatever_goes_in(dtype):
    """Slow decays, between 0.9961 and 1, are all the same to bfloat16: h would never forget."""
    inputs = scan_inputs(1, 64, 3, 1, dtype=dtype)
    inputs["A"].fill_(-0.01)
    _, expected = recurrence(**{name: tensor.double() for name, tensor in inputs.items()})
    assert_close("h_last", selective_scan_triton(**inputs)[1], expected, 1e-5)


@pytest.mark.parametrize("bias", [-20.0, -7.0, -1.4, 0.0, 19.9, 20.1, 60.0, 200.0])
def test_delta_has_float32_digits_at_every_size(bias):
    """softplus(dt) is e^dt far on the left, where 1 + e^dt forgets it, and dt far on the right."""
    inputs = scan_inputs(1, 4, 16, 1, without=("dt_bias",))
    inputs["dt"] = bias + torch.linspace(-0.05, 0.05, 64, device=DEVICE).view(1, 4, 16)
    inputs["A"] = inputs["A"] / (1 + max(bias, 0))
    check(inputs)


def test_gates_may_be_large_on_both_sides():
    inputs = scan_inputs(1, 4, 16, 1)
    inputs["z"] = torch.linspace(-200, 200, 64, device=DEVICE).view(1, 4, 16)
    check(inputs)


def log_uniform(low: float, high: float, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    logarithms = torch.empty(shape).uniform_(math.log(low), math.log(high), generator=generator)
    return logarithms.exp().to(DEVICE)


EXTREMES = {
    "tiny steps": ((1e-30, 1e-20), (1e-6, 1e6)),
    "huge steps": ((1e3, 1e4), (1e-6, 1e6)),
    "steps of all sizes, decays as in a model": ((1e-30, 1e4), (0.1, 100)),
    "steps of all sizes, decays of all sizes": ((1e-30, 1e4), (1e-6, 1e6)),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_steps_and_decays_are_finite_and_right(case, monkeypatch, launches):
    """In two segments."""
    delta, minus_A = EXTREMES[case]
    monkeypatch.setattr(triton_scan, "K", 8)
    inputs = scan_inputs(1, 16, 17, 1, without=("dt_bias",))
    inputs["dt"], inputs["A"] = log_uniform(*delta, 1, 16, 17), -log_uniform(*minus_A, 17, 1)
    check(inputs, (1e-5, 1e-4), dt_softplus=False)
    assert launches["forward"][0][1] == 2


@pytest.mark.parametrize("rule", ["mamba", "dirac"])
def test_a_large_step_does_not_blur_those_after_it(rule, monkeypatch):
    """A step of 1000 forgets everything; sums of steps in which it takes part forget the others'
    last digits, which must not be taken for the time that has passed since."""
    monkeypatch.setattr(triton_scan, "K", 8)
    inputs = scan_inputs(1, 24, 17, 1, without=("dt_bias",))
    inputs["A"] = -log_uniform(1, 100, 17, 1)
    inputs["dt"] = log_uniform(1e-3, 1e-1, 1, 24, 17)
    inputs["dt"][:, [2, 9, 20]] = 1000.0
    inputs["x"][:, [2, 9, 20]] *= 1e-3
    check(inputs, dt_softplus=False, rule=rule)


## ================================================================================================
## Errors
## ================================================================================================


def wrong(name: str, change) -> dict:
    inputs = {**scan_inputs(2, 5, 3, 2), "reset": some_resets(2, 12)[:, :5]}
    return {**inputs, name: change(inputs[name])}


NAMES = ("dt", "B", "C", "D", "z", "h0", "dt_bias", "reset")


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_the_wrong_shape_is_named(name):
    for change in (lambda t: t[..., :1], lambda t: torch.cat([t, t]), lambda t: t[None]):
        with pytest.raises(ValueError, match=rf"^{name} must be \("):
            selective_scan_triton(**wrong(name, change))


def test_x_and_A_of_the_wrong_shape_are_named():
    for name, change in (("x", lambda t: t[0]), ("x", lambda t: t[:, :0]), ("A", lambda t: t[0])):
        with pytest.raises(ValueError, match=r"need x \(b, l, d\), not empty, and A \(d, n\)"):
            selective_scan_triton(**wrong(name, change))
    with pytest.raises(ValueError, match=r"^A must be \(3, 2\)"):
        selective_scan_triton(**wrong("A", lambda t: torch.cat([t, t])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64])
@pytest.mark.parametrize("name", ["x", "A", *NAMES[:-1]])
def test_a_tensor_of_a_dtype_that_the_kernels_do_not_have_is_named(name, dtype):
    with pytest.raises(ValueError, match=rf"^{name} must be float32.*{dtype}.*chunked"):
        selective_scan_triton(**wrong(name, lambda t: t.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_a_reset_that_is_not_bool_is_refused(dtype):
    with pytest.raises(ValueError, match=rf"^reset must be torch\.bool, got {dtype}"):
        selective_scan_triton(**wrong("reset", lambda t: t.to(dtype)))


@pytest.mark.parametrize("rule", ["zoh", "bilinear", "euler"])
def test_a_rule_that_the_kernels_do_not_have_is_named(rule):
    with pytest.raises(ValueError, match=rf"mamba.*dirac.*'{rule}'.*chunked"):
        selective_scan_triton(**scan_inputs(1, 2, 3, 1), rule=rule)


@pytest.mark.parametrize("d_state", [0, 257])
def test_a_state_of_no_or_more_than_256_numbers_is_refused(d_state):
    with pytest.raises(ValueError, match=f"1 to 256, got {d_state}"):
        selective_scan_triton(**scan_inputs(1, 2, 3, d_state))


def test_a_tensor_on_another_device_is_named():
    with pytest.raises(ValueError, match=r"^C is on meta"):
        selective_scan_triton(**wrong("C", lambda t: t.to("meta")))


def on_a_gpu(*shape: int, dtype=torch.float32, device="cuda") -> Tensor:
    """To be made inside of FakeTensorMode: a tensor that is nowhere, and has no numbers.

    `takes` looks at none. So what it says on a GPU is known without one.
    """
    return torch.empty(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"rule": "dirac"}, {"d_state": 256}, {"rule": "mamba", "d_state": 1}, {"d_conv": 4}],
    ids=str,
)
def test_what_the_kernels_have_they_take(dtype, sizes):
    with FakeTensorMode():
        x, A = on_a_gpu(65535, 1, 1, dtype=dtype), on_a_gpu(1, 16)
        assert triton_scan.takes(x, None, A, x, None, **sizes) is True


REFUSED = {
    "x on the CPU": {"device": "cpu"},
    "x in float64": {"dtype": torch.float64},
    "another tensor in float64": {"other": {"dtype": torch.float64}},
    "integers": {"dtype": torch.int32},
    "zoh": {"rule": "zoh"},
    "bilinear": {"rule": "bilinear"},
    "no state": {"d_state": 0},
    "257 states": {"d_state": 257},
    "no filter": {"d_conv": 0},
    "a filter of 5": {"d_conv": 5},
    "65536 rows": {"batch": 65536},
    "one token": {"ndim": 2},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernels_have_not_they_do_not_take(reason):
    options = dict(REFUSED[reason])
    batch, other = options.pop("batch", 2), options.pop("other", {})
    shape = (batch, 1, 1)[: options.pop("ndim", 3)]
    made = {name: options.pop(name) for name in ("dtype", "device") if name in options}
    with FakeTensorMode():
        x, y = on_a_gpu(*shape, **made), on_a_gpu(1, 16, **other)
        assert triton_scan.takes(x, None, y, **options) is False


@pytest.fixture
def as_on_a_gpu():
    """What every tensor says."""
    with mock.patch.object(Tensor, "is_cuda", True):
        yield


def test_what_is_not_taken_is_what_raises_when_it_is_called(as_on_a_gpu, monkeypatch):
    inputs = scan_inputs(1, 2, 3, 1)
    double = {name: tensor.double() for name, tensor in inputs.items()}
    calls = [
        *((inputs, {"rule": rule}) for rule in ("mamba", "dirac", "zoh", "bilinear", "")),
        *((scan_inputs(1, 1, 1, n), {"rule": "mamba"}) for n in (0, 1, 256, 257)),
        *((inputs | {name: double[name]}, {"rule": "mamba"}) for name in inputs),
    ]
    monkeypatch.setattr(triton_scan, "scan_forward", lambda *args: args)
    monkeypatch.setattr(triton_scan, "conv_forward", lambda *args: args)
    answers = set()

    def check_call(taken: bool, call) -> None:
        answers.add(taken)
        with contextlib.nullcontext() if taken else pytest.raises(ValueError):
            call()

    for tensors, options in calls:
        taken = triton_scan.takes(*tensors.values(), **options, d_state=tensors["A"].shape[1])
        check_call(taken, functools.partial(selective_scan_triton, **tensors, **options))
    for width in (1, 4, 5):
        tensors = convolution_inputs(1, 2, 3, width)
        taken = triton_scan.takes(*tensors.values(), d_conv=width)
        check_call(taken, functools.partial(triton_scan.causal_conv_triton, **tensors))
    assert answers == {True, False}


def test_on_a_cpu_nothing_is_taken_though_the_interpreter_could(monkeypatch):
    monkeypatch.setattr(triton_scan, "INTERPRETED", True)
    assert triton_scan.takes(torch.ones(1, 2, 3)) is False


def test_transformations_and_tracers_get_no_kernel(as_on_a_gpu):
    taken = []

    def function(x: Tensor) -> Tensor:
        taken.append(triton_scan.takes(x))
        return x.sum()

    x = torch.ones(2, 3, 4)
    function(x)
    torch.func.grad(function)(x)
    torch.func.vmap(function)(x.unsqueeze(0))
    torch.func.jacrev(function)(x)
    torch.jit.trace(function, x, check_trace=False)
    function(x)
    assert taken == [True, False, False, False, False, True]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_asks_and_is_told_as_an_eager_one(backend):
    """In one graph, also inside of a transformation."""

    def scan(x: Tensor) -> Tensor:
        if triton_scan.takes(x, None, x, rule="dirac", d_state=x.shape[-1]):
            return x + 1
        return torch.stack([x, x])

    def compiled(function):
        torch.compiler.reset()
        return torch.compile(function, backend=backend, fullgraph=True)

    with FakeTensorMode():
        x, double = on_a_gpu(2, 3, 4), on_a_gpu(2, 3, 4, dtype=torch.float64)
        assert compiled(scan)(x).shape == (2, 3, 4)
        assert compiled(scan)(double).shape == (2, 2, 3, 4)
        of_one = compiled(lambda x: torch.func.vmap(scan)(x.unsqueeze(0)))(x)
        assert of_one.shape == (1, 2, 2, 3, 4)
    assert compiled(scan)(torch.ones(2, 3, 4)).shape == (2, 2, 3, 4)


ON_THE_CPU = """
import torch, mamba, triton_scan
x, A, B = torch.ones(1, 2, 3), -torch.ones(3, 4), torch.ones(1, 2, 4)
for call in (
    lambda: triton_scan.selective_scan_triton(x, x, A, B, B),
    lambda: triton_scan.first_scan(x, x, A, B, B),
    lambda: mamba.selective_scan(x, x, A, B, B, scan="triton"),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
assert mamba.selective_scan(x, x, A, B, B)[0].shape == x.shape  # "auto" finds another
"""


def test_tensors_on_the_cpu_are_told_to_use_a_gpu_or_another_scan():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ON_THE_CPU]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout
    for line in lines:
        assert all(word in line for word in ("GPU", "cpu", "chunked", "TRITON_INTERPRET")), line


## ================================================================================================
## Autograd and torch.compile
## ================================================================================================


@pytest.mark.parametrize("loss", [Tensor.sum, Tensor.norm], ids=["sum", "norm"])
def test_second_derivatives_are_an_error_and_not_silently_zero(loss):
    """Also after y.sum(), whose gradient with respect to y is constant and has no graph."""
    inputs = {name: tensor.requires_grad_() for name, tensor in scan_inputs(1, 2, 3, 1).items()}
    y, _ = selective_scan_triton(**inputs)
    with pytest.raises(RuntimeError, match="second derivatives"):
        (g,) = torch.autograd.grad(loss(y), inputs["x"], create_graph=True)
        (inputs["x"].sum() + g.square().sum()).backward()


def test_checkpointing_gives_the_same_gradients():
    inputs = scan_inputs(1, 3, 3, 1)
    scan = functools.partial(checkpoint, selective_scan_triton, use_reentrant=False)
    assert_equal(results(scan, inputs), results(selective_scan_triton, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing_inside_the_scan(dtype):
    inputs = scan_inputs(1, 3, 3, 1, dtype=dtype)
    expected = results(selective_scan_triton, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_equal(results(selective_scan_triton, inputs), expected)


def test_two_runs_agree_to_the_bit():
    shape = (3, 1100, 1000, 16) if GPU else (1, 5, 3, 1)
    inputs = scan_inputs(*shape)
    expected = results(selective_scan_triton, inputs)
    for _ in range(3 if GPU else 1):
        assert_equal(results(selective_scan_triton, inputs), expected)


def around_the_scan(x, dt, A, B, C, D, z, h0, dt_bias, **options):
    """A function that has something to compile before and after."""
    tensors = (2 * x, dt - 1, -torch.exp(A), B, C, D, z + 1, h0)
    y, h_last = selective_scan_triton(*tensors, dt_bias=dt_bias, **options)
    return torch.tanh(y) + x, h_last * 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_gpu)])
@pytest.mark.parametrize("mixture", ["B and C bfloat16", pytest.param("bfloat16", marks=needs_gpu)])
def test_a_compiled_function_that_scans_gives_the_same_values_and_gradients(mixture, backend):
    shape = (2, 513, 48, 16) if GPU else (1, 5, 3, 1)
    inputs = scan_inputs(*shape, **MIXTURES[mixture])
    reset = some_resets(1, 999)[:, : shape[1]].expand(shape[:2])
    options = {"rule": "dirac", "reset": reset} if "B" in mixture else {}
    torch.compiler.reset()
    compiled = torch.compile(around_the_scan, backend=backend, fullgraph=True)
    expected = results(around_the_scan, inputs, **options)
    actual = results(compiled, inputs, **options)
    loose = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 1e-2)}
    for name in expected:
        dtype = expected[name].dtype
        assert actual[name].dtype == dtype, f"{name}: {actual[name].dtype}, expected {dtype}"
        # Inductor leaves out roundings to bfloat16 around the scan.
        tolerances = loose[dtype] if backend == "inductor" else (1e-6, 1e-5)
        assert_results({name: actual[name]}, {name: expected[name]}, tolerances)
    with torch.no_grad():
        values = dict(zip(("y", "h_last"), compiled(**inputs, **options), strict=True))
    assert_equal(values, {name: actual[name] for name in values})


@pytest.mark.parametrize("without", [(), ("D", "z", "h0", "dt_bias")], ids=["all", "least"])
def test_the_operators_return_what_they_promise_to_the_compiler(without):
    """Shapes, strides and dtypes, no output a view of an input or of another; with and without
    borders, and one gradient for each input."""
    inputs = scan_inputs(2, 2, 3, 1, without=without, B=torch.bfloat16, A=torch.float16)
    inputs = strided(inputs) if not without else inputs
    names = ("x", "dt", "A", "B", "C", "D", "z", "h0", "dt_bias", "reset")
    tensors = [inputs.get(name) for name in names]
    tests = ("test_schema", "test_faketensor")
    for save in (False, True):
        arguments = (*tensors, True, "mamba", save)
        torch.library.opcheck(operators.scan_forward, arguments, test_utils=tests)
    dy, dh_last = gradients_of_outputs(inputs)
    _, _, borders, wide = operators.scan_forward(*arguments)
    for after in (dh_last, None):
        arguments = (dy, after, *tensors, borders, wide, True, "mamba")
        torch.library.opcheck(operators.scan_backward, arguments, test_utils=tests)


def test_so_do_those_of_the_convolution():
    inputs = convolution_inputs(2, 1, 3, 2, without=("bias",), x=torch.bfloat16)
    inputs["x"] = in_order(inputs["x"], 2, 0, 1)
    tensors = [inputs.get(name) for name in ("x", "weight", "bias", "past")] + [None]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.conv_forward, (*tensors, True), test_utils=tests)
    arguments = (torch.ones_like(inputs["x"]), *tensors, True)
    torch.library.opcheck(operators.conv_backward, arguments, test_utils=tests)


## ================================================================================================
## In mamba.py
## ================================================================================================


def small_model(**changes) -> Mamba:
    torch.manual_seed(0)
    model = Mamba(MambaConfig(**{"d_model": 8, "n_layer": 1, "vocab_size": 16, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.to(DEVICE)


def test_a_model_has_the_logits_and_gradients_of_the_chunked_scan():
    """With a state in and out, packed documents, and one step more."""
    model = small_model(n_layer=2, d_state=1)
    ids = torch.randint(16, (2, 8), device=DEVICE)
    reset, numbers = some_resets(2, 12)[:, -7:], {}
    for scan in ("chunked", "triton"):
        model.config.scan = scan
        model.zero_grad()
        logits, state = model(ids[:, :7], model.init_state(2), reset=reset)
        (logits.square().mean() + state.h.sum()).backward()
        next_logits, state = model.step(ids[:, 7], state)
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        values = {"logits": logits, "next logits": next_logits, "h": state.h}
        numbers[scan] = {**values, **gradients}
    assert_results(numbers["triton"], numbers["chunked"], (1e-5, 1e-4))


def test_auto_takes_the_kernel_on_a_gpu_and_never_elsewhere(monkeypatch):
    taken = []

    def note(*tensors, **options):
        taken.append(options)
        return tensors[0], None

    monkeypatch.setattr(triton_scan, "selective_scan_triton", note)
    inputs = scan_inputs(1, 2, 3, 1)
    mamba.selective_scan(**inputs)
    expected = {"dt_bias": inputs["dt_bias"], "dt_softplus": True, "rule": "mamba", "reset": None}
    assert taken == ([expected] if GPU else [])
    taken.clear()
    mamba.selective_scan(**inputs, rule="dirac", dt_softplus=False, reset=some_resets(1, 12)[:, :2])
    assert [options["rule"] for options in taken] == (["dirac"] if GPU else [])
    taken.clear()
    mamba.selective_scan(**inputs, rule="zoh")
    mamba.selective_scan(**{name: tensor.double() for name, tensor in inputs.items()})
    mamba.selective_scan(**{**inputs, "h0": inputs["h0"].double()})
    mamba.selective_scan(**scan_inputs(1, 2, 3, 257))
    mamba.selective_scan(**{name: tensor.cpu() for name, tensor in inputs.items()})
    assert taken == []


def test_auto_does_without_a_kernel_that_is_not_there_and_triton_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton_scan", None)
    inputs = scan_inputs(1, 2, 3, 1)
    y, _ = mamba.selective_scan(**inputs)
    with pytest.raises(RuntimeError, match=r"triton_scan\.py.*pip install triton.*chunked"):
        mamba.selective_scan(**inputs, scan="triton")
    assert_close("y", y, recurrence(**inputs)[0], 1e-5)


## ================================================================================================
## The first kernel
## ================================================================================================


def test_the_first_kernel_says_what_it_has_not():
    x = torch.ones(1, 2, 3, device=DEVICE)
    inputs = [x, x, -torch.ones(3, 1, device=DEVICE), x[..., :1], x[..., :1]]
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        triton_scan.first_scan(*inputs, chunk=0)
    with pytest.raises(RuntimeError, match="no gradient"):
        triton_scan.first_scan(x.clone().requires_grad_(), *inputs[1:])


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((1, 1, 1, 1), 64), ((2, 20, 5, 3), 8), ((1, 9, 40, 5), 4), ((2, 8, 3, 16), 8)],
)
@pytest.mark.parametrize("with_h0", [False, True])
def test_the_first_kernel_is_the_recurrence_too(shape, chunk, with_h0):
    inputs = scan_inputs(*shape, without=("D", "z", "dt_bias", *(() if with_h0 else ("h0",))))
    inputs["dt"] = inputs["dt"].abs()
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    inputs["delta"] = inputs.pop("dt")
    with poisoned():
        y, h_last = triton_scan.first_scan(**inputs, chunk=chunk)
    expected_y, expected_h = recurrence(**doubles, dt_softplus=False)
    assert_close("y", y, expected_y, 1e-5)
    assert_close("h_last", h_last, expected_h, 1e-5)


## ================================================================================================
## The convolution
## ================================================================================================


def convolution(x, weight, bias, past, reset=None, *, silu=False) -> Tensor:
    """The judge: every term of the sum by itself."""
    W, whole = weight.shape[-1], torch.cat([past.transpose(1, 2), x], dim=1)
    outs = []
    for t in range(x.shape[1]):
        out = x.new_zeros(x.shape[0], x.shape[2]) if bias is None else bias.expand_as(x[:, 0])
        for back in range(W):
            term = weight[:, 0, W - 1 - back] * whole[:, t + W - 1 - back]
            if reset is not None:  # a document has started since
                term = term * ~reset[:, max(0, t - back + 1) : t + 1].any(1, keepdim=True)
            out = out + term
        outs.append(out / (1 + torch.exp(-out)) if silu else out)
    return torch.stack(outs, dim=1)


def convolution_inputs(batch, seqlen, d_inner, W, without=(), **dtypes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (batch, seqlen, d_inner),
        "weight": (d_inner, 1, W),
        "bias": (d_inner,),
        "past": (batch, d_inner, W - 1),
    }
    return {
        name: torch.randn(shape, generator=generator).to(DEVICE, dtypes.get(name, torch.float32))
        for name, shape in shapes.items()
        if name not in without
    }


def check_convolution(inputs: dict[str, Tensor], **options) -> None:
    numbers = []
    dout = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1))
    dout = in_order(dout.to(inputs["x"]), 2, 0, 1)
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    for function, given in (
        (convolution, doubles),
        (triton_scan.causal_conv_triton, inputs),
    ):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
        with poisoned() if given is inputs else contextlib.nullcontext():
            out = function(**{"bias": None, **leaves}, **options)
            gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
        names = [f"gradient of {name}" for name in leaves]
        numbers.append({"y": out, **dict(zip(names, gradients, strict=True))})
    assert {name: tensor.dtype for name, tensor in inputs.items()} == {
        name.removeprefix("gradient of "): tensor.dtype
        for name, tensor in numbers[1].items()
        if name != "y"
    }
    assert_results(numbers[1], numbers[0])


@pytest.mark.parametrize(
    ("batch", "seqlen", "d_inner", "W", "silu"),
    [
        (1, 1, 1, 4, True),
        (2, 5, 3, 4, False),
        (1, 2, 130, 3, True),
        (1, 5, 3, 2, True),
        pytest.param(2, 700, 200, 4, True, marks=needs_gpu),
    ],
)
def test_the_convolution_sees_its_last_inputs_and_nothing_else(
    batch, seqlen, d_inner, W, silu, monkeypatch
):
    monkeypatch.setattr(triton_scan, "STRIP", 64 if seqlen > 64 else 4)
    inputs = convolution_inputs(batch, seqlen, d_inner, W)
    inputs["x"] = inside_nan(inputs["x"])
    check_convolution(inputs, silu=silu)


@pytest.mark.parametrize("W", [1, 4])
def test_no_term_of_the_convolution_reaches_back_over_the_start_of_a_document(W, monkeypatch):
    """Before, at and after the border of two strips."""
    monkeypatch.setattr(triton_scan, "STRIP", 4)
    reset = torch.zeros(3, 10, dtype=torch.bool, device=DEVICE)
    for row, step in ((0, 0), (0, 3), (0, 6), (1, 4), (1, 7), (2, 5), (2, 9)):
        reset[row, step] = True
    check_convolution(convolution_inputs(3, 10, 3, W), reset=reset, silu=True)


def test_the_convolution_takes_any_strides_and_short_floats_and_may_have_no_bias():
    inputs = convolution_inputs(2, 4, 5, 4, without=("bias",), x=torch.bfloat16)
    inputs["x"], inputs["past"] = in_order(inputs["x"], 0, 2, 1), in_order(inputs["past"], 2, 0, 1)
    check_convolution(inputs, silu=True)
    with pytest.raises(ValueError, match="4 wide here, got 5"):
        triton_scan.causal_conv_triton(**convolution_inputs(1, 3, 3, 5))


## ================================================================================================
## On a GPU: real sizes
## ================================================================================================


@needs_gpu
@pytest.mark.parametrize(
    ("batch", "seqlen", "d_inner", "d_state"),
    [
        (2, 1, 16, 16),
        (1, 63, 48, 16),
        (2, 64, 1000, 4),
        (1, 65, 16, 1),
        (2, 513, 48, 17),
        (1, 2048, 1000, 16),
        (1, 4097, 48, 64),
        (1, 513, 16, 256),
        (300, 65, 48, 16),
        (8, 513, 1536, 16),  # enough programs without cutting time
        (1, 4096, 1536, 16),
    ],
)
def test_real_sizes_are_those_of_the_recurrence(batch, seqlen, d_inner, d_state):
    check(scan_inputs(batch, seqlen, d_inner, d_state))


@needs_gpu
@pytest.mark.parametrize("rule", ["mamba", "dirac"])
def test_documents_at_real_sizes_are_those_of_the_recurrence(rule):
    reset = torch.rand(2, 1025, generator=torch.Generator().manual_seed(3)) < 0.01
    reset |= some_resets(2, 1025).cpu()
    check(scan_inputs(2, 1025, 200, 16), reset=reset.to(DEVICE), rule=rule)


@needs_gpu
@pytest.mark.parametrize("mixture", MIXTURES)
def test_short_floats_at_real_sizes_are_rounded_once_at_the_end(mixture):
    check(scan_inputs(2, 1025, 200, 16, **MIXTURES[mixture]))


@needs_gpu
def test_strides_at_real_sizes_change_nothing():
    """To the bit, but for one case: dt with channels before time is loaded by other instructions,
    and the sum for its gradient is rounded elsewhere, in the eighth digit."""
    inputs = strided(scan_inputs(2, 520, 96, 16))
    dense = {name: tensor.contiguous() for name, tensor in inputs.items()}
    expected = results(selective_scan_triton, dense)
    assert_equal(results(selective_scan_triton, inputs | {"dt": dense["dt"]}), expected)
    actual = results(selective_scan_triton, inputs)
    for name in ("gradient of dt", "gradient of dt_bias"):
        assert_close(name, actual.pop(name), expected.pop(name), 1e-7)
    assert_equal(actual, expected)


@needs_gpu
@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_steps_and_decays_over_many_steps_are_finite_and_right(case):
    delta, minus_A = EXTREMES[case]
    inputs = scan_inputs(1, 1030, 48, 4, without=("dt_bias",))
    inputs["dt"], inputs["A"] = log_uniform(*delta, 1, 1030, 48), -log_uniform(*minus_A, 48, 4)
    check(inputs, dt_softplus=False)


@needs_gpu
def test_tensors_of_more_than_2_to_the_31_numbers_are_right_at_both_ends():
    """States forget in a few hundred steps here, so that the judge need not start at the first."""
    if torch.cuda.mem_get_info()[0] < 45e9:
        pytest.skip("needs 45 GB on the GPU")
    seqlen, d_inner, d_state, seen, near = 2**20 + 64, 2048, 4, 100, 700
    assert seqlen * d_inner > 2**31
    generator = torch.Generator(DEVICE).manual_seed(0)
    options = {"device": DEVICE, "dtype": torch.bfloat16}

    def normal(*shape):
        return torch.empty(shape, **options).normal_(generator=generator)

    leaves = {
        "x": normal(1, seqlen, d_inner),
        "dt": normal(1, seqlen, d_inner),
        "A": -torch.linspace(0.2, 4, d_inner * d_state, device=DEVICE).view(d_inner, d_state),
        "B": normal(1, seqlen, d_state),
        "C": normal(1, seqlen, d_state),
    }
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    y, h_last = selective_scan_triton(**leaves)
    gradients = torch.autograd.grad(
        (y, h_last), list(leaves.values()), (torch.ones_like(y), torch.zeros_like(h_last))
    )
    gradients = dict(zip(leaves, gradients, strict=True))

    ends = {
        "the first": (slice(0, near), slice(0, seen)),
        "the last": (slice(-near, None), slice(-seen, None)),
    }
    for end, (context, judged) in ends.items():
        part = {
            name: (tensor if name == "A" else tensor[:, context]).detach().double().requires_grad_()
            for name, tensor in leaves.items()
        }
        expected_y, expected_h = recurrence(**part)
        expected = torch.autograd.grad(expected_y.sum(), [part[name] for name in ("x", "dt")])
        assert_close(f"{end} y", y[:, judged], expected_y[:, judged], 3e-3)
        for name, gradient in zip(("x", "dt"), expected, strict=True):
            what = f"{end} steps of the gradient of {name}"
            assert_close(what, gradients[name][:, judged], gradient[:, judged], 4e-3)
        if end == "the last":
            assert_close("h_last", h_last, expected_h, 1e-5)


@needs_gpu
@pytest.mark.parametrize("left_out", [(), ("h0",)])
def test_a_cuda_graph_replays_values_and_gradients(left_out):
    shape = (2, 700, 100, 16)
    first, second = scan_inputs(*shape, without=left_out), scan_inputs(*shape, without=left_out)
    second = {name: 0.5 * tensor for name, tensor in second.items()}
    expected = results(selective_scan_triton, second)
    static = {name: tensor.clone().requires_grad_() for name, tensor in first.items()}
    upstream = gradients_of_outputs(first)

    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            values = selective_scan_triton(**static)
        outputs = selective_scan_triton(**static)
        gradients = torch.autograd.grad(outputs, list(static.values()), upstream)
        names = [f"gradient of {name}" for name in static]
        without = dict(zip(("y alone", "h_last alone"), values, strict=True))
        both = dict(zip(("y", "h_last", *names), (*outputs, *gradients), strict=True))
        return {**without, **both}

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for name, tensor in static.items():
            tensor.copy_(second[name])
    graph.replay()
    torch.cuda.synchronize()
    expected |= {"y alone": expected["y"], "h_last alone": expected["h_last"]}
    assert_equal(captured, expected)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_the_current_one_are_scanned_there():
    inputs = scan_inputs(2, 130, 48, 16)
    there = {name: tensor.to("cuda:1") for name, tensor in inputs.items()}
    expected = results(selective_scan_triton, inputs)
    upstream = [g.to("cuda:1") for g in gradients_of_outputs(inputs)]
    actual = results(selective_scan_triton, there, upstream=upstream)
    assert_equal({name: tensor.to("cuda:0") for name, tensor in actual.items()}, expected)


@needs_gpu
def test_the_first_kernel_agrees_with_the_recurrence_at_real_sizes():
    inputs = scan_inputs(2, 1000, 200, 16, without=("D", "z", "dt_bias"))
    inputs["delta"] = inputs.pop("dt").abs()
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    doubles["dt"] = doubles.pop("delta")
    for chunk in (64, 100, 2000):
        actual = triton_scan.first_scan(**inputs, chunk=chunk)
        expected = recurrence(**doubles, dt_softplus=False)
        for name, *pair in zip(("y", "h_last"), actual, expected, strict=True):
            assert_close(f"{name}, chunk {chunk}", *pair, 1e-5)


@needs_gpu
def test_a_model_under_autocast_is_no_further_from_float32_than_with_the_chunked_scan():
    """In its logits and in the gradient of every parameter."""
    model = small_model(d_model=64, n_layer=2)
    ids = torch.randint(16, (2, 300), device=DEVICE)

    def numbers(scan: str, autocast: bool) -> dict[str, Tensor]:
        model.config.scan = scan
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            logits = model(ids)
        logits.float().square().mean().backward()
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        return {name: v.detach().double() for name, v in {"logits": logits, **gradients}.items()}

    exact = numbers("chunked", False)
    chunked, triton = numbers("chunked", True), numbers("triton", True)
    for name, value in exact.items():
        allowed = 1.1 * (chunked[name] - value).norm()
        error = (triton[name] - value).norm()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def losses_of_training(scan: str, steps: int = 100) -> Tensor:
    """A small model that learns to continue sequences in which each token follows from the last."""
    batch, seqlen, vocabulary = (8, 128, 64) if GPU else (2, 6, 16)
    model = small_model(d_model=64 if GPU else 8, n_layer=2, vocab_size=vocabulary, scan=scan)
    optimizer = torch.optim.AdamW(model.param_groups(weight_decay=0.1), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        start = torch.randint(vocabulary, (batch, 1), generator=generator)
        stride = torch.randint(1, 8, (batch, 1), generator=generator)
        ids = ((start + stride * torch.arange(seqlen + 1)) % vocabulary).to(DEVICE)
        logits = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@needs_gpu
def test_training_drifts_no_further_than_another_chunk_size_makes_it_drift(monkeypatch):
    expected = losses_of_training("chunked")
    assert expected[-10:].mean() < 0.7 * expected[:10].mean(), "it learns nothing"
    drift = 0.0
    for chunk in (3, 16, 50, 128):
        scan = functools.partial(mamba.scan_chunked, chunk=chunk)
        monkeypatch.setitem(mamba.SCANS, "chunked", scan)
        drift = max(drift, (losses_of_training("chunked") - expected).abs().max().item())
    assert drift > 0
    actual = (losses_of_training("triton") - expected).abs().max().item()
    assert actual <= 3 * drift, f"losses differ by {actual:.1e}, with another chunk by {drift:.1e}"
