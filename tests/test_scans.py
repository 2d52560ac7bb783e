"""The scans at their edges: extremes, memory, and what a call that does not fit gets.

That they are the recurrence is the business of test_mamba.py, whose judges are used here too.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mamba
from mamba import MambaConfig, selective_scan
from test_mamba import (
    SCANS,
    assert_all_close,
    assert_close,
    by_hand,
    judge_scan,
    logspace_bound,
    rules_of,
    scan_inputs,
    selective_inputs,
    values_and_gradients,
)

## ================================================================================================
## Extremes
## ================================================================================================


@pytest.mark.parametrize("scan", SCANS)
def test_every_scan_stays_exact_for_extreme_step_sizes_and_decays(scan):
    """In each corner by itself, where no larger number hides a smaller one, and all mixed.

    Gradients, times their inputs, are judged as one vector: that of Δ is exactly zero where exp(ΔA)
    is, and no rounding is small relative to that. In log space an error in Σ ΔA counts |ΔA| times
    in the gradients of Δ and A: not judged there.
    """
    names = ("x", "B", "C", "h0", *(() if scan == "logspace" else ("delta", "A")))
    chunk = {} if scan == "sequential" else {"chunk": 4}
    for rule in rules_of(scan):
        for delta in ((1e-8, 1e-7), (20.0, 50.0), (1e-8, 50.0)):
            for minus_A in ((1e-4, 2e-4), (50.0, 100.0), (1e-4, 100.0)):
                inputs = scan_inputs(16, delta, minus_A)
                values, gradients = values_and_gradients(by_hand, inputs, rule=rule)
                found, slopes = values_and_gradients(SCANS[scan], inputs, rule=rule, **chunk)
                where = f"rule {rule}, Δ in {delta}, -A in {minus_A}: "
                bound = 2 * logspace_bound(inputs, 4) if scan == "logspace" else 0
                tolerance = max(1e-5, bound)
                assert_all_close(found, values, tolerance, where)
                expected, actual = (
                    torch.cat([(inputs[n] * each[f"gradient of {n}"]).flatten() for n in names])
                    for each in (gradients, slopes)
                )
                assert_close(f"{where}gradients", actual, expected, 10 * tolerance)


@pytest.mark.parametrize("scan", SCANS)
def test_every_scan_keeps_the_digits_of_tiny_inputs(scan):
    inputs = scan_inputs(20)
    for name in ("x", "h0"):
        inputs[name] = (1e-20 * inputs[name]).detach().requires_grad_()
    judge_scan(scan, inputs, chunk=8)


@pytest.mark.parametrize("scan", SCANS)
def test_gradients_of_every_scan_equal_finite_differences(scan):
    inputs = {name: tensor.detach().double() for name, tensor in scan_inputs(5).items()}
    inputs = {
        **{name: inputs[name][:1, :, :2] for name in ("x", "delta", "B", "C")},
        **{"A": inputs["A"][:2, :2], "h0": inputs["h0"][:1, :2, :2]},
    }
    leaves = [inputs[name].clone().requires_grad_() for name in ("x", "delta", "A", "B", "C", "h0")]
    chunk = {} if scan == "sequential" else {"chunk": 2}
    for rule in rules_of(scan):

        def run(*tensors, rule=rule):
            return SCANS[scan](*tensors, rule=rule, **chunk)

        assert gradcheck(run, leaves, atol=1e-7), rule


@pytest.mark.parametrize("scan", SCANS)
def test_autocast_changes_nothing_inside_a_scan(scan):
    inputs = scan_inputs(50)
    expected, expected_gradients = values_and_gradients(SCANS[scan], inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual, gradients = values_and_gradients(SCANS[scan], inputs)
    assert_all_close(actual, expected, 0)
    assert_all_close(gradients, expected_gradients, 0)


## ================================================================================================
## Memory
## ================================================================================================


class BytesWritten(TorchDispatchMode):
    """Counts the bytes of every tensor that any operation returns, in forward and backward."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.total += sum(t.nbytes for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


@pytest.mark.parametrize("scan", SCANS)
def test_memory_and_memory_traffic_of_training_grow_linearly_with_length(scan):
    """Traffic too: the gradient of x[:, t] is a tensor as long as x, so l of them are quadratic."""

    def cost(seqlen: int) -> tuple[int, int]:
        saved, written = [], BytesWritten()

        def note(tensor):
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), written:
            values_and_gradients(SCANS[scan], scan_inputs(seqlen))
        return sum(saved), written.total

    for name, short, long in zip(("saved", "written"), cost(128), cost(256), strict=True):
        assert long <= 2.1 * short, f"bytes {name}: {short} for 128 tokens, {long} for 256"


## ================================================================================================
## Calls that do not fit
## ================================================================================================


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "z", "h0", "dt_bias", "reset"])
def test_a_tensor_of_the_wrong_shape_is_named(name):
    inputs = selective_inputs() | {"reset": torch.zeros(2, 7, dtype=torch.bool)}
    inputs[name] = torch.cat([inputs[name]] * 2, dim=0)
    with pytest.raises(ValueError, match=rf"^{name} must have shape"):
        selective_scan(**inputs)


@pytest.mark.parametrize("x", [torch.ones(7), torch.ones(2, 0, 3), torch.ones(2, 7, 3).int()])
def test_an_x_that_is_no_sequence_of_real_numbers_is_refused(x):
    with pytest.raises(ValueError, match=r"^x must be real \(batch, seqlen, d_inner\)"):
        selective_scan(**selective_inputs() | {"x": x})


def test_one_token_without_the_state_before_it_is_refused():
    inputs = selective_inputs(1)
    token = {n: t.squeeze(1) if n in ("x", "dt", "B", "C", "z") else t for n, t in inputs.items()}
    with pytest.raises(ValueError, match=r"x \(2, 3\) is one token .*: it needs h0"):
        selective_scan(**token | {"h0": None})


def test_a_reset_that_is_not_bool_is_refused():
    with pytest.raises(ValueError, match=r"^reset must be bool, got torch\.float32"):
        selective_scan(**selective_inputs(), reset=torch.zeros(2, 7))


def test_complex_parameters_are_refused_and_not_cut_down_to_their_real_part():
    inputs = selective_inputs()
    with pytest.raises(ValueError, match=r"^A must be real"):
        selective_scan(**inputs | {"A": inputs["A"].cfloat()})


def test_names_of_unknown_scans_and_rules_are_refused_with_the_known_ones():
    for wrong, words in (({"scan": "parallel"}, "sequential"), ({"rule": "euler"}, "bilinear")):
        for call in (
            lambda wrong=wrong: selective_scan(**selective_inputs(), **wrong),
            lambda wrong=wrong: MambaConfig(d_model=8, **wrong),
        ):
            with pytest.raises(ValueError, match=rf"{words}.*{next(iter(wrong.values()))!r}"):
                call()


def test_log_space_refuses_the_bilinear_rule_whose_decays_may_be_negative():
    with pytest.raises(ValueError, match="bilinear"):
        mamba.scan_logspace(**scan_inputs(3), rule="bilinear")


@pytest.mark.parametrize("scan", ["logspace", "chunked", "recompute"])
def test_a_chunk_of_no_steps_is_refused(scan):
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        SCANS[scan](**scan_inputs(3), chunk=0)


def test_an_explicit_triton_on_a_cpu_is_an_error_and_no_silent_fallback(monkeypatch):
    triton_scan = pytest.importorskip("triton_scan", exc_type=ImportError)
    monkeypatch.setattr(triton_scan, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="on a GPU, got tensors on cpu"):
        selective_scan(**selective_inputs(), scan="triton")


def test_an_explicit_triton_that_is_not_there_is_an_error_and_no_silent_fallback(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton_scan", None)
    with pytest.raises(RuntimeError, match=r"triton_scan\.py.*pip install triton.*chunked"):
        selective_scan(**selective_inputs(), scan="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", mamba.RULES)
def test_one_token_of_short_floats_leaves_the_state_of_a_sequence_of_one(rule, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 1, 3), (2, 1, 3), (3, 4), (2, 1, 4), (2, 1, 4))
    x, dt, A, B, C = (torch.randn(shape, generator=generator) for shape in shapes)
    x, dt, B, C, A = x.to(dtype), dt.to(dtype), B.to(dtype), C.to(dtype), -A.exp()
    h0 = torch.randn(2, 3, 4, generator=generator)
    y, h = mamba.selective_scan(x, dt, A, B, C, h0=h0, rule=rule, scan="sequential")
    token = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
    y_of_one, h_of_one = mamba.selective_scan(*token, h0=h0, rule=rule)
    assert torch.allclose(h_of_one, h, rtol=1e-6, atol=1e-7)
    assert torch.equal(y_of_one, y[:, 0])
