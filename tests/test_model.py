"""The scans, the block and the model at their edges: extremes, memory, what a call that does not
fit gets, a GPU. The larger claims are in test_mamba.py, whose judges are used here.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.profiler import profile

import generate
import mamba
from mamba import MambaBlock, MambaConfig, selective_scan
from test_mamba import (
    SCANS,
    assert_all_close,
    assert_close,
    assert_same_results,
    by_hand,
    error_of,
    gradients_of,
    logspace_bound,
    packed_documents,
    random_ids,
    random_model,
    random_state,
    rules_of,
    scan_inputs,
    selective_inputs,
    values_and_gradients,
)

IDS = torch.arange(6).view(2, 3)


def test_importing_mamba_loads_torch_and_einops_alone_and_prints_nothing():
    code = (
        "import sys, torch, einops; before = set(sys.modules); import mamba;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "new -= {'mamba', 'torch', 'einops', *sys.stdlib_module_names}; assert not new, new;"
        "mamba.MambaBlock(mamba.MambaConfig(8))(torch.ones(1, 2, 8));"  # on a CPU
        "assert 'triton_scan' not in sys.modules"
    )
    folder = Path(mamba.__file__).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


## Extremes, and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("scan", SCANS)
def test_every_scan_stays_exact_for_extreme_step_sizes_and_decays_and_under_autocast(scan):
    """Decays reach e^-5000 in one step. Gradients, times their inputs, are judged as one vector:
    that of Δ is exactly zero where exp(ΔA) is, and no rounding is small relative to that. In log
    space an error in Σ ΔA counts |ΔA| times in the gradients of Δ and A: not judged there."""
    names = ("x", "B", "C", "h0", *(() if scan == "logspace" else ("delta", "A")))
    chunk = {} if scan == "sequential" else {"chunk": 12}
    sizes = ((1e-8, 1e-7), (20.0, 50.0), (1e-8, 50.0)), ((1e-4, 2e-4), (50.0, 100.0), (1e-4, 100.0))
    for rule, delta, minus_A in itertools.product(rules_of(scan), *sizes):
        inputs = scan_inputs(16, delta, minus_A)
        where = f"rule {rule}, Δ in {delta}, -A in {minus_A}: "
        tolerance = max(1e-5, 2 * logspace_bound(inputs, 12) if scan == "logspace" else 0)
        values, gradients = values_and_gradients(by_hand, inputs, rule=rule)
        with torch.autocast("cpu", torch.bfloat16):
            found, slopes = values_and_gradients(SCANS[scan], inputs, rule=rule, **chunk)
        assert_all_close(found, values, tolerance, where)
        expected, actual = (
            torch.cat([(inputs[n] * each[f"gradient of {n}"]).flatten() for n in names])
            for each in (gradients, slopes)
        )
        assert_close(f"{where}gradients", actual, expected, 10 * tolerance)


def test_chunks_are_as_long_as_the_text_states(monkeypatch):
    """Recomputed: 8 to 64, about 1 MB of states. All at once: sqrt(l / 2). In log space: 64."""
    monkeypatch.setattr(mamba, "check_chunk", told := Mock())
    with torch.device("meta"):
        for d_inner in (1, 2**11, 2**14):
            x, A, B = torch.ones(2, 128, d_inner), torch.ones(d_inner, 4), torch.ones(2, 128, 4)
            mamba.scan_recompute(x, x, A, B, B)
        mamba.scan_chunked(x, x, A, B, B), mamba.scan_logspace(x, x, A, B, B)
    assert [call.args[0] for call in told.call_args_list] == [64, 16, 8, 8, 64]


@pytest.mark.parametrize("scan", SCANS)
def test_memory_traffic_of_training_grows_linearly_with_length(scan):
    """The gradient of x[:, t] is a tensor as long as x, so l of them are quadratic."""
    taken = []
    for seqlen in (32, 64):
        with profile(profile_memory=True) as operators:
            values_and_gradients(SCANS[scan], scan_inputs(seqlen))
        taken.append(sum(max(0, each.self_cpu_memory_usage) for each in operators.events()))
    assert 0 < taken[1] <= 2.1 * taken[0]


def test_the_norm_of_zeros_has_a_finite_gradient_and_that_of_large_float16_numbers_is_exact():
    norm, zeros = mamba.RMSNorm(16), torch.zeros(2, 3, 16, requires_grad=True)
    norm(zeros).sum().backward()
    assert_close("gradient", zeros.grad, torch.full((2, 3, 16), 1e-5**-0.5), 1e-6)
    large = 1000 * torch.randn(3, 16).half()  # their squares are infinite in float16
    exact = large.double() / (large.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close("norm", norm.half()(large), exact, 1.02 * error_of(exact.half(), exact))


## Calls that do not fit ---------------------------------------------------------------------------

INPUTS = selective_inputs()
configure = functools.partial(MambaConfig, d_model=8)
run = functools.partial(selective_scan, **INPUTS)
alone = {name: functools.partial(scan, **scan_inputs(3)) for name, scan in SCANS.items()}
BLOCK = MambaBlock(configure())
ZERO = BLOCK.init_state(2)


def read(method="forward", stranger=None, rows=2, layers=slice(None), ids=IDS, **options):
    """stranger: by what the model differs whose state is given."""
    state = random_model(**stranger or {}).init_state(rows)[layers]
    return getattr(random_model(), method)(ids, state, **options)


def convolve(**changes):
    conv1d = nn.Conv1d(16, 16, **{"kernel_size": 4, "groups": 16} | changes)
    return mamba.causal_conv(torch.ones(2, 9, 16), conv1d, torch.ones(2, 16, 3))


WRONG_CALLS = [
    (configure, {"d_model": 8.5}, "d_model must be a positive integer, got 8.5"),
    (configure, {"n_layer": 0}, "n_layer must be a positive integer, got 0"),
    (configure, {"d_conv": "auto"}, "d_conv must be a positive integer, got 'auto'"),
    (configure, {"vocab_size": True}, "vocab_size must be a positive integer, got True"),
    (configure, {"tie_embeddings": "false"}, "tie_embeddings must be True or False, got 'false'"),
    (configure, {"norm_eps": "1e-5"}, "norm_eps must be a positive number, got '1e-5'"),
    (configure, {"norm_eps": float("inf")}, "norm_eps must be a positive number, got inf"),
    (configure, {"dt_min": 0}, "dt_min must be a positive number, got 0"),
    (configure, {"dt_min": 0.2}, "need dt_min <= dt_max, got 0.2, 0.1"),
    (configure, {"expand": 0.1}, "expand must give at least one channel, got 0.1"),
    (configure, {"dt_init": "zeros"}, "dt_init must be one of ('random', 'constant'), got 'zeros'"),
    (configure, {"rule": "euler"}, f"rule must be one of {mamba.RULES}, got 'euler'"),
    (configure, {"scan": "fast"}, f"scan must be one of {(*mamba.SCANS, 'triton')}, got 'fast'"),
    (run, {"rule": "euler"}, f"rule must be one of {mamba.RULES}, got 'euler'"),
    (run, {"scan": "fast"}, f"scan must be one of {(*mamba.SCANS, 'triton')}, got 'fast'"),
    *((run, {n: torch.cat([INPUTS[n]] * 2)}, f"{n} must have shape (") for n in [*INPUTS][1:]),
    (run, {"reset": torch.ones(2, 8) > 0}, "reset must have shape (2, 7), got (2, 8)"),
    (run, {"reset": torch.ones(2, 7)}, "reset must be bool, got torch.float32"),
    (run, {"A": torch.ones(3, 4).cfloat()}, "A must be real"),
    (run, {"x": torch.ones(7)}, "x must be real (batch, seqlen, d_inner), got torch.float32 (7,)"),
    (run, {"x": torch.ones(2, 0, 3)}, "x must be real (batch, seqlen, d_inner), got"),
    (run, {"x": torch.ones(2, 7, 3).int()}, "x must be real (batch, seqlen, d_inner), got"),
    (run, {"x": torch.ones(2, 3), "h0": None}, "x (2, 3) is one token (batch, d_inner): it needs"),
    (alone["logspace"], {"rule": "bilinear"}, "cannot do rule='bilinear'"),
    *((alone[s], {"chunk": 0}, "chunk must be at least 1, got 0") for s in [*SCANS][1:]),
    (read, {"ids": IDS.float()}, "expected int64 ids (batch, seqlen), got torch.float32 (2, 3)"),
    (read, {"ids": IDS[0]}, "expected int64 ids (batch, seqlen), got torch.int64 (3,)"),
    (read, {"ids": IDS[:, :0]}, "expected int64 ids (batch, seqlen), got torch.int64 (2, 0)"),
    *((read, {"ids": torch.tensor([[5, n]] * 2)}, "ids must be in [0, 32), got") for n in (-1, 32)),
    (read, {"ids": torch.tensor([5, 32]), "method": "step"}, "ids must be in [0, 32), got 5 ..."),
    (read, {"method": "step"}, "expected int64 ids (batch,), got torch.int64 (2, 3)"),
    (read, {"stranger": {"d_state": 5}}, "state.h must have shape (2, 32, 4), got (2, 32, 5)"),
    (read, {"stranger": {"d_conv": 5}}, "state.conv must have shape (2, 32, 3), got (2, 32, 4)"),
    *((read, {"stranger": {"n_layer": n}}, "the state of a model of 2 layers") for n in (1, 3)),
    (read, {"layers": 0}, "the state of a model of 2 layers"),
    (read, {"rows": 3}, "state.conv must have shape (2, 32, 3), got (3, 32, 3)"),
    (read, {"reset": torch.ones(1, 3) > 0}, "reset must be bool (2, 3), got torch.bool (1, 3)"),
    (read, {"reset": torch.ones(2, 3)}, "reset must be bool (2, 3), got torch.float32 (2, 3)"),
    *(
        (BLOCK, {"u": torch.zeros(shape)}, f"(batch, seqlen, d_model), d_model = 8, got {shape}")
        for shape in ((2, 3, 9), (2, 8), (0, 3, 8))
    ),
    (BLOCK, {"u": torch.zeros(2, 9), "state": ZERO}, "d_model = 8, got (2, 9)"),
    (BLOCK.step, {"u": torch.zeros(2, 3, 8), "state": ZERO}, "d_model = 8, got (2, 3, 8)"),
    (convolve, {"kernel_size": 8}, "a filter per channel as long as its past"),
    (convolve, {"groups": 1}, "a filter per channel as long as its past"),
    (convolve, {"dilation": 2}, "a filter per channel as long as its past"),
]


@pytest.mark.parametrize(("call", "arguments", "words"), WRONG_CALLS)
def test_a_call_that_does_not_fit_is_told_what_was_given_or_expected(call, arguments, words):
    with pytest.raises((ValueError, IndexError), match=re.escape(words)):
        call(**arguments)


def test_numbers_of_other_types_are_the_numbers_that_they_are():
    config = MambaConfig(d_model=np.int64(16), n_layer=2.0, dt_min=np.float32(0.5), dt_max=1)
    assert repr(config) == repr(MambaConfig(d_model=16, n_layer=2, dt_min=0.5, dt_max=1))
    assert MambaConfig(d_model=1, expand=1).d_inner == 1


def test_a_gpu_takes_the_kernel_where_it_can_and_all_others_when_it_is_asked_for(monkeypatch):
    kernels = SimpleNamespace(takes=lambda *tensors, rule: rule == "mamba")
    monkeypatch.setitem(sys.modules, "triton_scan", kernels)
    for x in (gpu := SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)):
        for scan, rule in itertools.product(("auto", "chunked", "triton"), ("mamba", "zoh")):
            taken = scan == "triton" or (scan == "auto" and x is gpu and rule == "mamba")
            assert mamba.companion(scan, x, rule=rule) is (kernels if taken else None)
    monkeypatch.setitem(sys.modules, "triton_scan", None)
    assert mamba.companion("auto", gpu, rule="mamba") is None
    with pytest.raises(RuntimeError, match=r"triton_scan\.py.*pip install triton.*chunked"):
        run(scan="triton")  # and no silent fallback


@pytest.mark.gpu
def test_the_kernels_are_given_what_the_scans_are(monkeypatch):
    pytest.importorskip("triton_scan", exc_type=ImportError)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(d_model=4, n_layer=1, d_conv=3, scan="triton").to(device)
    monkeypatch.setattr(mamba, "companion", companion := Mock(wraps=mamba.companion))
    monkeypatch.setattr(mamba, "kernels_for", Mock(return_value=None))  # of a block as a whole
    inputs = random_ids(1, 4).to(device), random_state(model, 1)
    reset = torch.tensor([[False, False, True, False]], device=device)
    actual = model(*inputs, reset=reset)
    needs = [call.kwargs for call in companion.call_args_list]
    assert needs == [{"d_conv": 3}, {"rule": "mamba", "d_state": 4}]
    model.config.scan = "chunked"
    assert_same_results(actual, model(*inputs, reset=reset))


## A model as it was made, and others --------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "method", "arguments"),
    [
        *(("dt_proj", f"register_{way}_hook", [print]) for way in ("forward", "forward_pre")),
        *(("conv1d", f"register_full_{way}_hook", [print]) for way in ("backward", "backward_pre")),
        *(("", "__setattr__", [name, print]) for name in ("forward", "step", "select", "embed")),
        ("", "__setattr__", ["D", nn.UninitializedParameter()]),
        ("out_proj", "__setattr__", ["__class__", NonDynamicallyQuantizableLinear]),
    ],
)
def test_a_model_with_a_hook_an_adapter_or_another_forward_is_not_our_own(part, method, arguments):
    """Nor is one under autocast: whoever computes a model without its modules asks for all this."""
    model = random_model()
    assert mamba.is_our_own(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not mamba.is_our_own(model)
    getattr(model.backbone.layers[1].mixer.get_submodule(part), method)(*arguments)
    assert not mamba.is_our_own(model)


@pytest.mark.gpu(needed=True)
@pytest.mark.parametrize("scan", SCANS)
def test_a_gpu_gives_the_numbers_of_the_cpu(scan):
    model, (ids, reset) = random_model(scan=scan).double(), packed_documents((5, 35, 1, 29))
    numbers = {}
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        logits, state = there(ids.to(device), there.init_state(3), reset=reset.to(device))
        prompt = ids[:, :9].to(device)
        tokens = torch.stack([*generate.stream(there, prompt, max_new_tokens=9, temperature=0)])
        next_logits, state = there.step(ids[:, -1].to(device), state)
        values = {"logits": logits, "next logits": next_logits, **vars(state), "tokens": tokens}
        values |= gradients_of(logits.square().mean(), there)
        numbers[device] = {name: tensor.cpu() for name, tensor in values.items()}
    assert_all_close(numbers["cuda"], numbers["cpu"], 1e-10)
