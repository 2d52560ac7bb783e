"""The kernels of triton_scan.py, against the recurrence written out in float64.

Without a GPU they run in Triton's interpreter (see conftest.py), where tensors, chunks and slices
are small, so that a few steps cross every border; on a GPU the same cases run at real sizes.

An error is norm(actual - expected) / norm(expected). Whatever a kernel is to fill is full of NaN
before, and so is the memory around the tensors that it reads where they are parts of larger ones.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import os
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import mamba
from mamba import Mamba, MambaConfig
from test_mamba import assert_close, by_hand, error_of

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.gpu(needed=True)

try:
    import triton_scan
    from triton_scan import causal_conv_triton, exp2_shared, selective_scan_triton, tl, triton

    assert GPU or triton_scan.INTERPRETED, "triton was imported before TRITON_INTERPRET was 1"
except (ImportError, AssertionError) as error:
    if os.environ.get("CI"):
        raise
    pytest.skip(f'{error}: pip install -e ".[test]"', allow_module_level=True)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TOLERANCES = {"value": 1e-5, "gradient": 1e-4 if GPU else 2e-5}  # of float32


def sized(small, large):
    """For the interpreter, and for a GPU."""
    return large if GPU else small


@pytest.fixture(autouse=True, scope="module")
def whole_slices():
    """The interpreter scans and reduces one number at a time. Here a slice at a time, minutes
    faster: the same function combines the same numbers in the same order."""
    from triton.runtime import interpreter

    def totals(self, inputs):
        count, axis = inputs[0].handle.data.shape[self.axis], self.axis
        slices = ([self.to_tensor(v.handle.data.take(i, axis), v.dtype) for v in inputs]
                  for i in range(count))  # fmt: skip
        return [*itertools.accumulate(slices, lambda a, b: self.combine_fn.fn(*a, *b))]

    def scan(self, inputs):
        parts = ([part.handle.data for part in p] for p in zip(*totals(self, inputs), strict=True))
        whole = (np.stack(arrays, self.axis) for arrays in parts)
        return [self.to_tensor(a, v.dtype) for a, v in zip(whole, inputs, strict=True)]

    with (
        mock.patch.object(interpreter.ScanOps, "generic_scan", scan),
        mock.patch.object(interpreter.ReduceOps, "generic_reduce", lambda *of: totals(*of)[-1]),
    ):
        yield


def recurrence(x, dt, A, B, C, D=None, z=None, h0=None, dt_bias=None, dt_softplus=True, **options):
    """The judge: one step after the other, in float64."""
    delta = dt if dt_bias is None else dt + dt_bias
    if dt_softplus:
        delta = torch.logaddexp(delta, torch.zeros_like(delta))
    y, h = by_hand(x, delta, A, B, C, h0, **options)
    y = y if D is None else y + D * x
    return y if z is None else y * z / (1 + torch.exp(-z)), h


def scan_inputs(batch, seqlen, d_inner, d_state, *, without="", dtype=F32, **dtypes):
    """Every tensor of a scan by its name; dtypes: those of some of them."""
    b, seqlen, d, n, generator = batch, seqlen, d_inner, d_state, torch.Generator().manual_seed(0)
    shapes = {
        "x": (b, seqlen, d), "dt": (b, seqlen, d), "A": (d, n), "B": (b, seqlen, n),
        "C": (b, seqlen, n), "D": (d,), "z": (b, seqlen, d), "h0": (b, d, n), "dt_bias": (d,),
    }  # fmt: skip
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs["dt"] -= 1
    # From states that remember a thousand steps to those that forget in one.
    inputs["A"].uniform_(math.log(0.01), 1.0, generator=generator).exp_().neg_()
    for name in without.split():
        del inputs[name]
    return {name: t.to(DEVICE, dtypes.get(name, dtype)) for name, t in inputs.items()}


def some_resets(batch: int, seqlen: int) -> Tensor:
    """At the first step, at the last, three in one tile of 4, and at a multiple of 8 alone."""
    reset = torch.zeros(batch, seqlen, dtype=torch.bool)
    reset[0, [step for step in (0, 9, 10, 11) if step < seqlen]] = True
    reset[-1, [min(8, seqlen - 1), seqlen - 1]] = True
    return reset.to(DEVICE)


ORDERS = {"x": (2, 0, 1), "dt": (0, 2, 1), "A": (1, 0), "B": (1, 2, 0), "C": (2, 1, 0),
          "h0": (1, 2, 0), "dy": (1, 2, 0), "dh_last": (2, 1, 0), "past": (2, 0, 1)}  # fmt: skip


def stored(name: str, tensor: Tensor) -> Tensor:
    """The same numbers, with another order of axes in memory: along each every second number of a
    larger tensor that is NaN everywhere else."""
    axes = ORDERS.get(name, range(tensor.ndim))
    around = tensor.new_full([9 + 2 * tensor.shape[axis] for axis in axes], math.nan)
    part = around[tuple(slice(4, 4 + 2 * tensor.shape[axis], 2) for axis in axes)]
    return part.permute([axes.index(axis) for axis in range(tensor.ndim)]).copy_(tensor)


def loss_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What arrives at y and at h_last from a loss."""
    x, generator = inputs["x"], torch.Generator().manual_seed(1)
    dh_last = torch.randn(len(x), *inputs["A"].shape, generator=generator).to(DEVICE)
    return {"y": torch.randn(x.shape, generator=generator).to(x), "h_last": dh_last}


def results(function, inputs: dict, upstream: dict, **options) -> dict[str, Tensor]:
    """The outputs, and the gradients of all inputs for a loss: upstream has those of outputs."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = function(**leaves, **options)
    values = dict(zip(("y", "h_last"), outputs if isinstance(outputs, tuple) else [outputs]))  # noqa: B905
    outs, tensors = [values[name] for name in upstream], list(leaves.values())
    arriving = [gradient.to(values[name].dtype) for name, gradient in upstream.items()]
    gradients = torch.autograd.grad(outs, tensors, arriving, materialize_grads=True)
    return values | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}


@contextlib.contextmanager
def poisoned():
    """A tensor that is made without values holds NaN, and not what memory happens to hold."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills them
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_rounded(name: str, actual: Tensor, exact: Tensor, tolerance: float) -> None:
    """Short floats are the exact result, rounded once. Where that is a close call either will do,
    which makes a small share of numbers differ in their last digit. The interpreter cuts off where
    PyTorch and a GPU round to bfloat16."""
    ways = [exact.to(actual.dtype)] if actual.dtype in (F16, BF16) else [exact]
    if actual.dtype == BF16 and not GPU:
        ways.append((exact.float().view(torch.int32) & -(2**16)).view(F32))
    if actual.dtype in (F16, BF16):
        tolerance += torch.finfo(actual.dtype).eps / 4
    assert_close(name, actual, min(ways, key=functools.partial(error_of, actual)), tolerance)


def assert_results(actual: dict, expected: dict, tolerances=TOLERANCES) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        kind = "gradient" if name.startswith("gradient") else "value"
        assert_rounded(name, actual[name], expected[name], tolerances[kind])


def check(function, judge, inputs: dict, upstream: dict, tolerances=TOLERANCES, **options) -> None:
    """Values and gradients are the judge's on the same numbers in float64."""
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    with poisoned():
        actual = results(function, inputs, upstream, **options)
    promised = {"y": inputs["x"].dtype, "h_last": F32}
    promised |= {f"gradient of {name}": tensor.dtype for name, tensor in inputs.items()}
    assert all(tensor.dtype == promised[name] for name, tensor in actual.items())
    assert_results(actual, results(judge, doubles, upstream, **options), tolerances)


def assert_equal(actual: dict, expected: dict) -> None:
    for name in actual:
        difference = (actual[name] - expected[name]).abs().max()
        assert torch.equal(actual[name], expected[name]), f"{name}: differs by up to {difference}"


def between(low: float, high: float, sign: int = 1):
    """From a tensor to one like it, of numbers of all sizes in between."""
    logs = math.log(low), math.log(high)
    return lambda t: sign * torch.empty(t.shape).uniform_(*logs).exp().to(DEVICE)


def sometimes(value: float):
    return lambda t: t.index_fill(1, torch.tensor([2, 9, 20], device=DEVICE), value)


SHORT = {"dtype": BF16, "A": F32, "D": F32, "h0": F32}  # as in a model
MIXED = {"x": F16, "dt": BF16, "A": F16, "C": F16, "D": BF16, "z": F16, "h0": BF16, "dt_bias": F16}
EXTREME = {
    "small": (1, 24, 17, 1), "large": (1, 1030, 48, 4), "without": "dt_bias", "dt_softplus": False,
    "tolerances": {"value": 1e-5, "gradient": 1e-4}, "cut": (3, 3),
}  # fmt: skip

# cut: segments of the forward kernel and of each slice of the backward kernel, where a chunk is 8
# steps. patch: what makes the slices small. For every 32 channels there is one program with one
# state, and two with more. On a GPU to compile takes the time: few cases cut time there.
CASES = {
    "tiles that need no filling, impulses, as little as can be": {
        "small": (2, 40, 32, 1), "large": (2, 1000, 96, 16), "strided": True, "rule": "dirac",
        "without": "D z h0 dt_bias", "edit": {"dt": torch.abs}, "dt_softplus": False, "cut": (5, 3),
        # Two tiles in a piece; the first segment is shorter than the others.
        "patch": sized({"backward_segment": lambda programs, chunks: 2}, {}),
    },
    "tiles that need no filling, where the last chunk ends early": {
        "small": (1, 40, 32, 1), "large": (1, 1000, 96, 16), "without": "D z", "cut": (3, 3),
        "patch": sized({"K": 16, "PIECES": 2, "backward_segment": lambda programs, chunks: 1}, {}),
    },
    "two lanes forward, tiles that need no filling": {
        "small": (1, 16, 32, 3), "large": (8, 128, 1024, 16), "cut": (1, 2),
        "patch": sized({"FORWARD_FULL": 1}, {}),
    },
    "one of each": {"small": (1, 1, 1, 1), "large": (2, 63, 16, 1)},
    "the states of mamba": {
        "small": (1, 9, 33, 16), "large": (2, 2048, 1000, 16), "reset": True, "rule": "dirac",
        "without": "z", "cut": (2, 2),
    },
    "16 lanes for a channel": {"small": (1, 3, 2, 200), "large": (1, 61, 16, 256), "without": "D"},
    "programs enough without cutting time": {
        "small": (2, 11, 3, 3), "large": (17, 129, 1536, 16), "reset": True,
        "patch": sized(
            {"FORWARD_FULL": 2, "backward_segment": lambda programs, chunks: chunks}, {}
        ),
    },
    # Three tiles in a chunk; 8 lanes for a channel, more than a tile has steps, and halves swapped.
    "a loss of y": {
        "small": (1, 9, 3, 65), "large": (2, 63, 16, 1), "outputs": ["y"],
        "patch": sized({"K": 16}, {}),
    },
    "segments that end inside of a chunk": {
        "small": (1, 37, 3, 1), "large": (1, 2000, 1536, 16), "cut": (2, 3),
        "patch": sized({"K": 16, "forward_shape": lambda *_: ((1, 1, 32), 24)}, {}),
    },
    "a loss of h_last": {"small": (1, 5, 3, 2), "large": (2, 63, 16, 1), "outputs": ["h_last"]},
    "slices of one segment": {
        "small": (1, 21, 3, 1), "large": (300, 65, 48, 17), "cut": (3, 1, 1, 1),
        "patch": sized({"room_for_sums": lambda x: 64}, {}),
    },
    "slices, and a loss of y": {
        "small": (1, 21, 3, 1), "large": (300, 65, 48, 17), "cut": (3, 1, 1, 1),
        "patch": sized({"room_for_sums": lambda x: 64}, {}), "outputs": ["y"],
    },
    "bfloat16": {"small": (2, 7, 11, 1), "large": (2, 1025, 200, 16), "dtypes": SHORT},
    "all dtypes": {"small": (2, 7, 11, 1), "large": (2, 61, 200, 16), "dtypes": MIXED},
    "all at once": {
        "small": (2, 37, 20, 3), "large": (2, 1041, 200, 16),
        "edit": {"A": lambda A: (A + 0.1).clamp(max=0)},  # some states forget only at resets
        "strided": True, "reset": True, "cut": (5, 2, 3), "patch": {  # slices of 2 and 3
            "backward_segment": lambda programs, chunks: sized(1, 2), "PIECES": sized(1, 4),
            "room_for_sums": lambda x: sized(24 * 4 * 2 * 4 * 4, 384 * 28 * 2 * 16 * 4),
        },
    },
    "steps, decays and gates of all sizes": {**EXTREME, "edit": {
        "dt": between(1e-30, 1e4), "A": between(1e-6, 1e6, -1), "z": lambda z: 100 * z,
    }},
    # A step of 1000 forgets everything; sums of steps in which it takes part forget the others'
    # last digits, which must not be taken for the time that has passed since.
    "large steps between small ones": {**EXTREME, "edit": {
        "dt": lambda dt: sometimes(1000.0)(between(1e-3, 1e-1)(dt)), "A": between(1, 100, -1),
        "x": sometimes(1e-3),
    }},
}  # fmt: skip


def check_case(
    monkeypatch, small, large, without="", dtypes=(), edit=(), strided=False, reset=False,
    outputs=("y", "h_last"), cut=(1, 1), patch=(), **options,
):  # fmt: skip
    for name, value in {"K": sized(8, 64), **dict(patch)}.items():
        monkeypatch.setattr(triton_scan, name, value)
    shape = sized(small, large)
    inputs = scan_inputs(*shape, without=without, **dict(dtypes))
    inputs |= {name: change(inputs[name]) for name, change in dict(edit).items()}
    loss = {name: gradient for name, gradient in loss_of(inputs).items() if name in outputs}
    if strided:
        inputs = {name: stored(name, tensor) for name, tensor in inputs.items()}
        loss = {name: stored(f"d{name}", gradient) for name, gradient in loss.items()}
    if reset:
        options["reset"] = some_resets(*shape[:2]).T.contiguous().T
    with mock.patch.object(triton_scan, "launch", wraps=triton_scan.launch) as launch:
        check(selective_scan_triton, recurrence, inputs, loss, **options)
    kernels = (triton_scan.forward_kernel, triton_scan.backward_kernel)
    grids = [call.args[1] for call in launch.call_args_list if call.args[0] in kernels]
    assert GPU or tuple(segments for _, segments, _ in grids) == cut


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_recurrence(case, monkeypatch):
    check_case(monkeypatch, **CASES[case])


@pytest.mark.parametrize("dtype", [F32, F16])
def test_delta_has_float32_digits_at_every_size_also_of_short_floats(dtype):
    """softplus(dt) is e^dt far on the left, where 1 + e^dt forgets it, and dt far on the right. No
    two terms cancel here, so that every number by itself can be judged."""
    inputs = scan_inputs(1, 4, 16, 1, without="D z h0 dt_bias", dt=dtype)
    inputs |= {name: inputs[name].abs() + 0.1 for name in ("x", "B", "C")}
    centers = [-14, -12, -7, -2, -1.5, -1.4, -1.38, -1.3, 0, 4, 19.9, 20.1, 40, 88, 89, 200]
    centers = torch.tensor(centers, device=DEVICE)
    inputs["dt"] = (centers + torch.linspace(0, 0.05, 4, device=DEVICE)[:, None]).to(dtype)[None]
    inputs["A"] = -0.1 / (1 + centers.clamp(min=0))[:, None]
    upstream = {"y": torch.ones_like(inputs["x"]), "h_last": inputs["A"][None] * 0 + 1}
    expected = results(recurrence, {k: v.double() for k, v in inputs.items()}, upstream)
    actual = results(selective_scan_triton, inputs, upstream)
    for name in ("y", "h_last", "gradient of dt")[: 2 if dtype == F16 else 3]:
        assert (actual[name] / expected[name] - 1).abs().max() < 2e-5, name


# The grids (blocks of channels, segments, batch) of the forward kernel and of each slice of the
# backward kernel. They follow from the sizes alone, on every device.
GRIDS = {
    (1, 66, 3, 1): [(1, 2, 1), (1, 2, 1)],
    (1, 65536, 2048, 16): [(64, 33, 1), (128, 8, 1), (128, 8, 1)],
    (1, 2**20, 2048, 16): [(64, 33, 1), (128, 33, 1), (128, 33, 1)],
    (1, 65536, 256, 16): [(8, 131, 1), (16, 64, 1)],
    (1, 65536, 4096, 16): [(128, 33, 1), (256, 4, 1), (256, 4, 1)],
    (1, 2048, 1536, 16): [(48, 22, 1), (96, 11, 1)],
    (1, 1024, 2048, 16): [(64, 16, 1), (128, 8, 1)],
    (1, 2048, 5120, 16): [(160, 13, 1), (320, 3, 1)],
    (3, 2048, 1536, 16): [(48, 11, 3), (96, 11, 3)],
    (6, 2048, 1536, 16): [(96, 1, 6), (96, 7, 6)],
    (8, 2048, 1536, 16): [(96, 1, 8), (96, 4, 8)],
    (12, 4096, 1536, 16): [(96, 1, 12), (96, 4, 12), (96, 4, 12)],
    (16, 2048, 1536, 16): [(96, 1, 16), (96, 2, 16), (96, 2, 16)],
    (512, 16, 2048, 16): [(64, 1, 512), (128, 1, 512)],
    (4, 128, 1776, 16): [(56, 2, 4), (112, 2, 4)],
    (4, 128, 1777, 16): [(112, 1, 4), (112, 2, 4)],
    (64, 64, 1024, 16): [(32, 1, 64), (64, 1, 64)],
    (63, 64, 1024, 16): [(64, 1, 63), (64, 1, 63)],
    (4, 64, 896, 32): [(56, 1, 4), (56, 1, 4)],
}


@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_time_is_cut_until_there_are_programs_enough_and_room_for_their_sums(size):
    batch, seqlen, d_inner, d_state = size
    x = torch.empty(batch, seqlen, d_inner, device="meta")
    A, B = x.new_empty(d_inner, d_state), x.new_empty(batch, seqlen, d_state)
    scan = (x, x, A, B, B, None, None, None, None, None)
    with mock.patch.object(triton_scan, "launch") as launch:
        y, h_last, *kept = triton_scan.scan_forward(*scan, True, "mamba", True)
        triton_scan.scan_backward(y, h_last, *scan, *kept, True, "mamba")
    kernels = (triton_scan.forward_kernel, triton_scan.backward_kernel)
    grids = [call.args[1] for call in launch.call_args_list if call.args[0] in kernels]
    assert grids == GRIDS[size]
    # The sums of dB and dC of all programs: those of a chunk, or as many as there is room for.
    parts = launch.call_args_list[-2].args[2][0]
    steps, a_step = parts.shape[2], 4 * parts[:, :, 0].numel()
    assert steps <= seqlen and steps * a_step <= max(triton_scan.room_for_sums(x), 64 * a_step)


def test_the_sums_of_more_programs_than_are_added_up_at_once_are_complete():
    totals, sums = torch.randn(35, 1, 3, 32, device=DEVICE), torch.zeros(3, 20, device=DEVICE)
    dA, dD, dbias = sums
    constants = {"M": 1, "J": 1, "CHANNELS": 32, "LOG": False, "HAS_D": True, "HAS_BIAS": True}
    triton_scan.launch(
        triton_scan.sum_totals_kernel, (2, 1, 1), (totals, dA, dA, dD, dbias), (35, 1), (20, 1),
        **constants, ROWS=16, SIZE=64, num_warps=4,
    )  # fmt: skip
    expected = totals.double().sum(0)[0, :, :20]
    assert_close("dA, dD and dbias", sums, expected, 1e-5)


def test_strides_beyond_32_bits_cost_a_copy_and_others_none():
    """Inside a tile the kernels count in 32 bits: steps 2**24 numbers apart are too far."""
    for strides in ((2**26, 2**24, 1), (2**26, 1, 2**24)):
        far = torch.empty_strided((1, 2, 2), strides, device="meta")
        assert triton_scan.within_reach(far).stride() == (4, 2, 1)
    near = torch.empty_strided((1, 2, 2), (2**26, 2**24 - 1, 1), device="meta")
    assert triton_scan.within_reach(near) is near


@triton.jit
def exponentials(v, out, SHARE: tl.constexpr, FAST: tl.constexpr):
    """Of a tile of 2 steps, 8 states, 2 lanes a channel and 16 channels."""
    o = tl.arange(0, 512)
    result = exp2_shared(tl.reshape(tl.load(v + o), [2, 8, 2, 16]), SHARE, FAST)
    tl.store(out + o, tl.reshape(result, [512]))


def test_exponentials_shared_with_a_polynomial_are_as_close_as_others():
    whole, tiny = torch.arange(-126, 128), torch.tensor([-126.5, -150.0, -1e6, -float("inf")])
    short = torch.linspace(1e-3, 0.1, 64)
    tail = torch.linspace(-125.9, 127.9, 512 - 2 * 64 - len(whole) - 4)
    v = torch.cat([whole, tail, tiny, short, -short])
    for share in (1, 2, 4, 8):
        # Each number is once in the first of the states of a lane, where the polynomial is.
        for given in torch.stack([v.roll(32 * i) for i in range(8)]).to(DEVICE):
            with poisoned():
                out = torch.empty_like(given)
                exponentials[(1,)](given, out, share, triton_scan.FAST)
            exact, small = torch.exp2(given.double()), given < -126
            error = ((out.double() - exact) / exact).abs()
            assert (out[small] >= 0).all() and (out[small] <= 2**-126).all()
            assert error[~small].max() < 3e-7
            if share == 1:  # the polynomial alone: it ends at 2^-126, and near 0 only rounds
                assert (out[small] == 2**-126).all()
                assert error[given.abs() <= 0.1].max() < 1.2e-7
                assert error[~small & (given == given.round())].max() == 0


def test_the_first_kernel_is_the_recurrence_too_and_has_no_gradient():
    for without in ("", "h0"):
        shape = sized((2, 21, 40, 5), (2, 1000, 200, 16))
        inputs = scan_inputs(*shape, without=f"D z dt_bias {without}")
        inputs["dt"] = inputs["dt"].abs()
        expected = recurrence(**inputs, dt_softplus=False)
        inputs["delta"] = inputs.pop("dt")
        with poisoned():
            actual = triton_scan.first_scan(**inputs, chunk=8)
        for name, *pair in zip(("y", "h_last"), actual, expected, strict=True):
            assert_close(name, *pair, 1e-5)
    inputs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient: use selective_scan_triton"):
        triton_scan.first_scan(**inputs)


def convolution(x, weight, past, bias=None, reset=None, *, silu=False) -> Tensor:
    """The judge: every term of the sum by itself. The past belongs to document 0."""
    seqlen, reach, whole = x.shape[1], past.shape[-1], torch.cat([past.mT, x], dim=1)
    document = torch.zeros(x.shape[:2], device=DEVICE) if reset is None else reset.cumsum(1)
    document = torch.nn.functional.pad(document, (reach, 0))
    out = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for k in range(reach + 1):
        same = document[:, k : k + seqlen] == document[:, reach:]
        out = out + weight[:, 0, k] * whole[:, k : k + seqlen] * same.unsqueeze(-1)
    return out / (1 + torch.exp(-out)) if silu else out


def convolution_inputs(batch, seqlen, d_inner, W, **dtypes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (batch, seqlen, d_inner), "weight": (d_inner, 1, W), "bias": (d_inner,)}
    shapes["past"] = (batch, d_inner, W - 1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor.to(DEVICE, dtypes.get(name, F32)) for name, tensor in tensors.items()}


CONVOLUTIONS = [
    (sized((3, 10, 3, 4), (3, 700, 200, 4)), {}, "", True),
    (sized((3, 10, 130, 3), (3, 700, 130, 3)), {"x": BF16}, "bias", False),
    ((1, 2, 3, 2), {"weight": F16, "past": BF16}, "reset", True),
    ((3, 10, 3, 1), {"bias": BF16}, "", True),
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_convolution_sees_its_last_inputs_and_no_other_document(case, monkeypatch):
    """Documents start before, at and after the border of two strips."""
    monkeypatch.setattr(triton_scan, "CONV_STEPS", sized(4, 64))
    shape, dtypes, without, silu = case
    inputs, options = convolution_inputs(*shape, **dtypes), {"silu": silu}
    dy = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1))
    inputs |= {name: stored(name, inputs[name]) for name in ("x", "past")}
    if without == "bias":
        del inputs["bias"]
        options["bias"] = None
    if without != "reset":
        options["reset"] = torch.zeros(shape[:2], dtype=torch.bool, device=DEVICE)
        for row, step in ((0, 0), (0, 3), (0, 6), (1, 4), (1, 7), (2, 5), (2, 9)):
            options["reset"][row, (step + sized(0, 60)) % shape[1]] = True
    dy = stored("dy", dy.to(inputs["x"]))
    check(causal_conv_triton, convolution, inputs, {"y": dy}, **options)


def test_the_script_checks_every_gradient_and_ends_where_one_is_wrong(monkeypatch, capsys):
    triton_scan.main()
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["y", "dx", "ddt", "dA", "dB", "dC", "dD", "dz", "ddt_bias"]
    reference = triton_scan.reference
    monkeypatch.setattr(triton_scan, "reference", lambda *tensors: 1.001 * reference(*tensors))
    with pytest.raises(SystemExit, match="y is wrong"):
        triton_scan.main()


def scan(of=(2, 5, 3, 2), **changes):
    """A call that is right but for the changes: of a tensor by its name, or of an option."""
    inputs = {**scan_inputs(*of), "reset": some_resets(*of[:2])}
    for name, change in changes.items():
        inputs[name] = change(inputs[name]) if callable(change) else change
    return selective_scan_triton(**inputs)


def convolve(**changes):
    inputs = convolution_inputs(2, 5, 3, 4)
    return causal_conv_triton(**inputs | {name: f(inputs[name]) for name, f in changes.items()})


twice = functools.partial(torch.repeat_interleave, repeats=2, dim=0)
FLOATS = ("x", "dt", "A", "B", "C", "D", "z", "h0", "dt_bias")
DTYPE = "must be float32 or bfloat16 or float16, got torch.float64: use mamba.py's scan='chunked'"
NOT_EMPTY = "need x (b, l, d), not empty"
WRONG = [
    *((lambda name=name: scan(**{name: twice}), f"{name} must be (") for name in FLOATS[1:]),
    *((lambda name=name: scan(**{name: Tensor.double}), f"{name} {DTYPE}") for name in FLOATS),
    *((lambda name=name: convolve(**{name: twice}), f"{name} must be (")
      for name in ("weight", "bias", "past")),
    (lambda: scan(reset=twice), "reset must be (2, 5), got (4, 5)"),
    (lambda: scan(reset=Tensor.byte), "reset must be torch.bool, got torch.uint8"),
    (lambda: scan(x=lambda t: t[:, :0]), NOT_EMPTY),
    (lambda: scan(C=lambda t: t.to("meta")), "C is on meta, x on"),
    (lambda: scan(rule="zoh"), "the rules ('mamba', 'dirac'), got 'zoh': use mamba.py's scan="),
    (lambda: scan((1, 1, 1, 0)), "d_state must be from 1 to 256, got 0"),
    (lambda: scan((1, 1, 1, 257)), "d_state must be from 1 to 256, got 257"),
    (lambda: scan((65536, 1, 1, 1)), "the batch must be at most 65535, got 65536"),
    (lambda: convolve(weight=lambda t: t.repeat(1, 1, 2)), "is from 1 to 4 wide here, got 8"),
    (lambda: convolve(x=lambda t: t[:0]), NOT_EMPTY),
]  # fmt: skip


def test_a_call_that_cannot_be_right_says_what_is_wrong():
    for call, words in WRONG:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


def test_tensors_on_the_cpu_are_told_to_use_a_gpu_or_another_scan(monkeypatch):
    monkeypatch.setattr(triton_scan, "INTERPRETED", False)
    monkeypatch.setitem(globals(), "DEVICE", "cpu")
    inputs = scan_inputs(1, 2, 3, 1)
    for call in (
        lambda: mamba.selective_scan(**inputs, scan="triton"),
        lambda: triton_scan.first_scan(*(inputs[name] for name in FLOATS[:5])),
        convolve,
    ):
        with pytest.raises(RuntimeError, match=r"GPU.*on cpu.*scan='chunked'.*TRITON_INTERPRET=1"):
            call()


TAKEN = [
    *({"dtype": dtype} for dtype in (F32, BF16, F16)),
    {"other": F16, "rule": "dirac", "d_state": 256, "d_conv": 4},
    {"shape": (65535, 1, 1), "rule": "mamba", "d_state": 1, "d_conv": 1},
]
NOT_TAKEN = [
    *({"shape": shape} for shape in ((65536, 1, 1), (1, 1))),
    *({"d_state": n} for n in (0, 257)),
    *({"d_conv": n} for n in (0, 5)),
    *({"device": "cpu"}, {"dtype": F64}, {"other": F64}, {"rule": "zoh"}),
]


def test_the_kernels_take_what_they_have_and_nothing_else():
    """Asked without a GPU: of tensors that have no numbers and say that they are on one."""

    def takes(shape=(2, 3, 4), dtype=F32, device="cuda", other=F32, **sizes) -> bool:
        other = torch.empty(1, dtype=other, device="cuda")
        return triton_scan.takes(torch.empty(shape, dtype=dtype, device=device), other, **sizes)

    with FakeTensorMode():
        for given in TAKEN + NOT_TAKEN:
            assert takes(**given) is (given in TAKEN), given


def test_transformations_and_tracers_get_no_kernel():
    taken = []

    def function(x: Tensor) -> Tensor:
        taken.append(triton_scan.takes(x))
        return x.sum()

    x = torch.ones(2, 3, 4)
    with mock.patch.object(Tensor, "is_cuda", True):
        torch.func.grad(function)(x)
        torch.func.vmap(function)(x.unsqueeze(0))
        torch.jit.trace(function, x, check_trace=False)
        function(x)
    assert taken == [False, False, False, True]


def small_model(dtype=F32, **changes) -> Mamba:
    """No parameter has the value that it starts training with, or one that could be left out."""
    sizes = {"d_model": 8, "vocab_size": 16, "d_state": 4, "dt_rank": 2, "tie_embeddings": False}
    model = Mamba(MambaConfig(**{**sizes, **changes}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or name.endswith(".D"):
            values = 1 + values / 3
        elif "embedding" not in name and "A_log" not in name and parameter.ndim >= 2:
            values *= 0.7 / math.sqrt(parameter[0].numel())
        parameter.data.copy_(values)
    return model.to(DEVICE, dtype)


def numbers_of(model: Mamba, scan: str, ids: Tensor, reset=None) -> dict[str, Tensor]:
    """With a state in and out, and one step more."""
    model.config.scan = scan
    model.zero_grad()
    logits, state = model(ids[:, :-1], model.init_state(2), reset=reset)
    (logits.float().square().mean() + state.h.sum()).backward()
    next_logits, state = model.step(ids[:, -1], state)
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters()}
    return {"logits": logits, "next logits": next_logits, "h": state.h, **gradients}


def test_a_model_has_the_logits_and_gradients_of_the_chunked_scan():
    model, ids = small_model(d_state=1), torch.randint(16, (2, 6), device=DEVICE)
    chunked, triton = (numbers_of(model, s, ids, some_resets(2, 5)) for s in ("chunked", "triton"))
    assert_results(triton, chunked, {"value": 1e-5, "gradient": 1e-4})


def test_auto_takes_the_kernel_on_a_gpu_and_never_elsewhere(monkeypatch):
    inputs = scan_inputs(1, 2, 3, 1)
    kernel = mock.Mock(return_value=(inputs["x"], None))
    monkeypatch.setattr(triton_scan, "selective_scan_triton", kernel)
    options = {"rule": "dirac", "dt_softplus": False, "reset": some_resets(1, 2)}
    mamba.selective_scan(**inputs, **options)
    calls = [call.kwargs for call in kernel.call_args_list]
    assert calls == ([{"dt_bias": inputs["dt_bias"], **options}] if GPU else [])
    kernel.reset_mock()
    not_taken = {"rule": "zoh"}, {"h0": inputs["h0"].double()}
    for given in (*not_taken, {name: tensor.cpu() for name, tensor in inputs.items()}):
        mamba.selective_scan(**{**inputs, **given})
    assert not kernel.called


def test_auto_does_without_a_kernel_that_is_not_there_and_triton_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton_scan", None)
    inputs = scan_inputs(1, 2, 3, 1)
    assert_close("y", mamba.selective_scan(**inputs)[0], recurrence(**inputs)[0], 1e-5)
    with pytest.raises(RuntimeError, match=r"triton_scan\.py.*pip install triton.*chunked"):
        mamba.selective_scan(**inputs, scan="triton")


def test_the_numbers_are_the_same_to_the_bit_however_they_are_asked_for():
    """Again, under autocast, under checkpointing, without some of the gradients or without any; and
    the inputs stay as they are."""
    inputs = scan_inputs(*sized((2, 5, 3, 1), (3, 1100, 1008, 16)))
    reset, before = some_resets(*inputs["x"].shape[:2]), copy.deepcopy(inputs)
    upstream = loss_of(inputs) | {"y": torch.ones_like(inputs["x"])}
    scan = functools.partial(selective_scan_triton, reset=reset)
    expected = results(scan, inputs, upstream)
    assert torch.equal(reset, some_resets(*reset.shape))
    assert_equal(inputs, before)
    expanded = upstream | {"y": upstream["y"][:1, :1, :1].expand_as(inputs["x"])}  # of y.sum()
    assert_results(results(scan, inputs, expanded), expected)
    for ask in (scan, functools.partial(checkpoint, scan, use_reentrant=False)):
        with torch.autocast(DEVICE, BF16):
            assert_equal(results(ask, inputs, upstream), expected)
    held = {name: inputs[name] for name in ("x", "A", "h0")}
    rest = {name: tensor for name, tensor in inputs.items() if name not in held}
    assert_equal(results(functools.partial(scan, **held), rest, upstream), expected)
    assert_equal(dict(zip(("y", "h_last"), scan(**inputs), strict=True)), expected)


def test_second_derivatives_are_an_error_and_not_silently_zero():
    """Also after y.sum(), whose gradient with respect to y is constant and has no graph."""
    scanned, convolved = scan_inputs(1, 2, 16, 1), convolution_inputs(1, 2, 16, 2)
    scanned["x"] = convolved["x"] = x = scanned["x"].requires_grad_()
    outs = selective_scan_triton(**scanned)[0], causal_conv_triton(**convolved)
    for out, loss in itertools.product(outs, (Tensor.sum, Tensor.norm)):
        with pytest.raises(RuntimeError, match="second derivatives"):
            (g,) = torch.autograd.grad(loss(out), x, create_graph=True)
            (x.sum() + g.square().sum()).backward()


def around_the_scan(x, dt, A, B, C, D, z, h0, dt_bias, **options):
    """A function that has something to compile before and after."""
    tensors = (2 * x, dt - 1, -torch.exp(A), B, C, D, z + 1, h0)
    y, h_last = selective_scan_triton(*tensors, dt_bias=dt_bias, **options)
    return torch.tanh(y) + x, h_last * 2


def test_a_compiled_function_that_scans_gives_the_same_values_and_gradients():
    inputs = scan_inputs(*sized((1, 5, 3, 1), (2, 513, 48, 16)), B=BF16, C=BF16)
    upstream = loss_of(inputs)
    options = {"rule": "dirac", "reset": some_resets(*inputs["x"].shape[:2])}
    torch.compiler.reset()
    compiled = torch.compile(around_the_scan, backend="aot_eager", fullgraph=True)
    expected = results(around_the_scan, inputs, upstream, **options)
    actual = results(compiled, inputs, upstream, **options)
    assert [tensor.dtype for tensor in actual.values()] == [t.dtype for t in expected.values()]
    assert_results(actual, expected)


def test_the_table_in_the_file_says_how_the_launchers_cut_these_shapes(monkeypatch):
    three, product = r"\((\d+), (\d+), (\d+)\) +", r" +(\d+) x (\d+) x (\d+)"
    row = three + r"(\w+)" + product + product + r" = (\d+) +(\d+)$"
    rows = re.findall(row, Path(triton_scan.__file__).read_text(), re.MULTILINE)
    assert len(rows) == 4 and {row[3] for row in rows} == {"forward", "backward"}
    launched: list = []

    def record(kernel, grid, *_, **constants):
        launched.append((kernel, grid, constants))

    monkeypatch.setattr(triton_scan, "launch", record)
    for *sizes, which, M, J, C, blocks, segments, batch, programs, launches in rows:
        launched.clear()
        b, seqlen, d = map(int, sizes)
        shapes = (b, seqlen, d), (b, seqlen, d), (d, 16), (b, seqlen, 16), (b, seqlen, 16)
        inputs = [torch.empty(shape, dtype=BF16, device="meta") for shape in shapes] + [None] * 5
        *_, borders, wide = triton_scan.scan_forward(*inputs, True, "mamba", True)
        triton_scan.scan_backward(inputs[0], None, *inputs, borders, wide, True, "mamba")
        kernel = getattr(triton_scan, f"{which}_kernel")
        found = [(c["M"], c["J"], c["CHANNELS"], *grid) for k, grid, c in launched if k is kernel]
        assert found == [tuple(map(int, (M, J, C, blocks, segments, batch)))] * int(launches)
        assert int(programs) == math.prod(found[0][3:])


@pytest.mark.skipif(GPU, reason="it is the same on every device, and much to compile there")
@pytest.mark.parametrize("most", [True, False])
def test_the_operators_return_what_they_promise_to_the_compiler(most):
    """Shapes, strides and dtypes, no output a view of an input or of another; with and without
    borders, and one gradient for each input."""
    tests, operators = ("test_schema", "test_faketensor"), torch.ops.mamba_annotated
    opcheck = functools.partial(torch.library.opcheck, test_utils=tests)
    inputs = scan_inputs(2, 2, 3, 1, B=BF16, A=F16)
    dy, dh_last = loss_of(inputs).values()
    most_tensors = [*(stored(name, inputs[name]) for name in FLOATS), some_resets(2, 2)]
    tensors = most_tensors if most else [*most_tensors[:5], *[None] * 5]
    opcheck(operators.scan_forward, (*tensors, True, "mamba", most))
    *_, borders, wide = operators.scan_forward(*tensors, True, "mamba", True)
    arguments = (dy, dh_last if most else None, *tensors, borders, wide, True, "mamba")
    opcheck(operators.scan_backward, arguments)
    inputs = convolution_inputs(2, 1, 3, 2, x=BF16)
    tensors = (stored("x", inputs["x"]), inputs["weight"], inputs["bias"] if most else None)
    tensors += (inputs["past"], some_resets(2, 1) if most else None, most)
    opcheck(operators.conv_forward, tensors)
    opcheck(operators.conv_backward, (torch.ones_like(inputs["x"]), *tensors))


def test_a_compiled_variant_is_used_again_only_where_it_fits(monkeypatch):
    """Not for another dtype, address, constant or kernel, nor where a fixed number is 1, a multiple
    of 16 or beyond 32 bits and was not: Triton compiles these into it."""
    monkeypatch.setattr(triton_scan, "INTERPRETED", False)
    monkeypatch.setattr(triton_scan, "variants", {})
    numbers = torch.zeros(32)
    first = {"tensors": (numbers, numbers), "free": (7,), "fixed": (3, 5), "T": 8, "EVEN": True}
    others = [{"fixed": (3, n)} for n in (0, 1, 16, 2**31 + 1)] + [{"T": 4}, {"EVEN": False}]
    pairs = (numbers[2:], numbers), (numbers, numbers[2:]), (numbers[2:], numbers[2:])
    pairs += (numbers.half(), numbers), (numbers, numbers.half())
    others += [{"tensors": pair} for pair in (*pairs, (torch.zeros(32, device="meta"),) * 2)]
    kernel = mock.MagicMock(arg_names=["x", "y", "free", "d", "n", "EVEN", "T"])
    for count, changes in enumerate([{}, *others], start=1):
        later = tuple(tensor[8:] for tensor in changes.get("tensors", first["tensors"]))
        for again in ({}, {"free": (16,)}, {"tensors": later}):
            triton_scan.launch(kernel, (count,), **(first | changes | again))
        assert kernel.__getitem__.return_value.call_count == count, changes
    triton_scan.launch(kernel, (0,), **(first | {"fixed": (3, 8)}))  # as little a multiple as 5
    assert kernel.__getitem__.return_value.call_count == count
    other = mock.MagicMock(arg_names=kernel.arg_names)
    for _ in range(2):
        triton_scan.launch(other, (0,), **first)
    assert other.__getitem__.return_value.call_count == 1
    variant = kernel.__getitem__.return_value.return_value
    grids = [call.args[0] for call in variant.__getitem__.call_args_list]
    assert grids == [*((i,) for i in range(1, count + 1) for _ in range(2)), (0,)]
    call = variant.__getitem__.return_value.call_args_list[0]
    assert call.args == (numbers.data_ptr(), numbers.data_ptr(), 16, 3, 5, True, 8)


@needs_gpu
def test_tensors_of_more_than_2_to_the_31_numbers_are_right_at_both_ends():
    """States forget in a few hundred steps here, so that the judge need not start at the first."""
    if torch.cuda.mem_get_info()[0] < 45e9:
        pytest.skip("needs 45 GB on the GPU")
    seqlen, d_inner, d_state, seen, near = 2**20 + 64, 2048, 4, 100, 700
    generator = torch.Generator(DEVICE).manual_seed(0)
    leaves = {
        name: torch.empty(1, seqlen, size, device=DEVICE, dtype=BF16).normal_(generator=generator)
        for name, size in (("x", d_inner), ("dt", d_inner), ("B", d_state), ("C", d_state))
    }
    leaves["A"] = -torch.linspace(0.2, 4, d_inner * d_state, device=DEVICE).view(d_inner, d_state)
    ones = {"y": torch.ones(1, 1, 1, device=DEVICE).expand(1, seqlen, d_inner)}
    actual = results(selective_scan_triton, leaves, ones)
    assert actual["y"].numel() > 2**31
    for context, judged in ((slice(near), slice(seen)), (slice(-near, None), slice(-seen, None))):
        part = {name: t[:, context].double() for name, t in leaves.items() if name != "A"}
        part["A"] = leaves["A"].double()
        expected = results(recurrence, part, {"y": torch.ones_like(part["x"])})
        for name in ("y", "gradient of x", "gradient of dt"):
            ours, theirs = actual[name][:, judged], expected[name][:, judged]
            assert_rounded(f"{name} at {judged}", ours, theirs, 1e-4)
    assert_close("h_last", actual["h_last"], expected["h_last"], 1e-5)


@needs_gpu
def test_a_cuda_graph_replays_values_and_gradients():
    static = scan_inputs(2, 130, 16, 1)
    other = {name: 0.5 * tensor for name, tensor in static.items()}
    upstream = loss_of(static)
    expected = results(selective_scan_triton, other, upstream)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(selective_scan_triton, static, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = results(selective_scan_triton, static, upstream)
    for name, tensor in static.items():
        tensor.copy_(other[name])
    graph.replay()
    assert_equal(captured, expected)


@needs_gpu
def test_a_model_under_autocast_is_no_further_from_float32_than_with_the_chunked_scan(monkeypatch):
    """In its logits and in the gradient of every parameter, where all but the scan is the same."""
    monkeypatch.setattr(mamba, "kernels_for", lambda *_: None)
    model = small_model(d_model=64, n_layer=2, d_state=16)
    ids = torch.randint(16, (2, 300), device=DEVICE)
    exact = numbers_of(model, "chunked", ids)
    with torch.autocast(DEVICE, BF16):
        chunked, triton = (numbers_of(model, scan, ids) for scan in ("chunked", "triton"))
    for name in exact.keys() - {"next logits", "h"}:
        assert_close(name, triton[name], exact[name], 1.1 * error_of(chunked[name], exact[name]))
