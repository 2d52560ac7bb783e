"""The scans, the block and the model at their edges: extremes, memory, what a call that does not
fit gets, a GPU, a folder. The larger claims are in test_mamba.py, whose judges are used here.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from look_inside import watch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
import mamba
from mamba import Mamba, MambaBlock, MambaConfig, MambaState, selective_scan
from test_mamba import (
    ALONG_TIME,
    SCANS,
    assert_all_close,
    assert_close,
    by_hand,
    error_of,
    gradients_of,
    judge_scan,
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

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_importing_mamba_loads_torch_and_einops_alone_and_prints_nothing():
    """And a CPU never imports Triton, which takes a second."""
    code = (
        "import sys, torch, einops; before = set(sys.modules); import mamba;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "new -= {'mamba', 'torch', 'einops', *sys.stdlib_module_names}; assert not new, new;"
        "mamba.MambaBlock(mamba.MambaConfig(8))(torch.ones(1, 2, 8));"
        "assert 'triton_scan' not in sys.modules"
    )
    folder = Path(mamba.__file__).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


## Extremes, and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("scan", SCANS)
def test_every_scan_stays_exact_for_extreme_step_sizes_and_decays_and_under_autocast(scan):
    """In each corner by itself, where no larger number hides a smaller one, and all mixed: decays
    reach e^-5000 in one step, where dividing by running products of them would turn to NaN.

    Gradients, times their inputs, are judged as one vector: that of Δ is exactly zero where exp(ΔA)
    is, and no rounding is small relative to that. In log space an error in Σ ΔA counts |ΔA| times
    in the gradients of Δ and A: not judged there.
    """
    names = ("x", "B", "C", "h0", *(() if scan == "logspace" else ("delta", "A")))
    chunk = {} if scan == "sequential" else {"chunk": 12}
    for rule in rules_of(scan):
        for delta in ((1e-8, 1e-7), (20.0, 50.0), (1e-8, 50.0)):
            for minus_A in ((1e-4, 2e-4), (50.0, 100.0), (1e-4, 100.0)):
                inputs = scan_inputs(16, delta, minus_A)
                values, gradients = values_and_gradients(by_hand, inputs, rule=rule)
                with torch.autocast("cpu", torch.bfloat16):
                    found, slopes = values_and_gradients(SCANS[scan], inputs, rule=rule, **chunk)
                where = f"rule {rule}, Δ in {delta}, -A in {minus_A}: "
                bound = 2 * logspace_bound(inputs, 12) if scan == "logspace" else 0
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


def test_the_norm_of_zeros_has_a_finite_gradient_and_that_of_large_float16_numbers_is_exact():
    """1000 squared is infinite in float16."""
    norm, zeros = mamba.RMSNorm(16), torch.zeros(2, 3, 16, requires_grad=True)
    norm(zeros).sum().backward()
    assert_close("gradient", zeros.grad, torch.full((2, 3, 16), 1e-5**-0.5), 1e-6)
    large = 1000 * torch.randn(3, 16).half()
    exact = large.double() / (large.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close("norm", norm.half()(large), exact, 1.02 * error_of(exact.half(), exact))


## Calls that do not fit ---------------------------------------------------------------------------


def configure(**changes):
    return MambaConfig(**{"d_model": 8} | changes)


def run(**changes):
    return selective_scan(**selective_inputs() | changes)


def run_alone(scan, **options):
    return SCANS[scan](**scan_inputs(3), **options)


def read(ids=None, method="forward", stranger=None, rows=2, reset=None):
    """stranger: by what the model differs whose state is given."""
    model = random_model()
    state = random_model(**stranger or {}).init_state(rows)
    ids = random_ids(2, 3) if ids is None else ids
    return model.step(ids, state) if method == "step" else model(ids, state, reset=reset)


def feed(shape, method="forward", state=None):
    block = MambaBlock(MambaConfig(d_model=8))
    return getattr(block, method)(torch.zeros(shape), block.init_state(2) if state else None)


def convolve(raw, **changes):
    conv1d = nn.Conv1d(16, 16, **{"kernel_size": 4, "groups": 16} | changes)
    return mamba.causal_conv(raw, conv1d, torch.ones(2, 16, 3))


ONE_TOKEN = {n: t[:, 0] for n, t in selective_inputs(1).items() if n in ALONG_TIME}
IDS, STEP = "expected integer ids (batch, seqlen), got ", "expected integer ids (batch,), got "
BLOCK = "expected (batch, seqlen, d_model), d_model = 8, got "
TOKEN = "expected (batch, d_model), d_model = 8, got "
LONGER = {n: torch.cat([t, t]) for n, t in selective_inputs().items() if n != "x"}
STATES = [
    *(({"n_layer": n}, "expected the state of a model of 2 layers") for n in (1, 3)),
    ({"d_state": 5}, "state.h must have shape (2, 32, 4), got (2, 32, 5)"),
    *(({"d_conv": n}, "state.conv must have shape (2, 32, 3), got (2, 32, ") for n in (1, 5)),
]
WRONG_CALLS = [
    (configure, {"d_model": 8.5}, "d_model must be a positive integer, got 8.5"),
    (configure, {"n_layer": 0}, "n_layer must be a positive integer, got 0"),
    (configure, {"d_conv": "auto"}, "d_conv must be a positive integer, got 'auto'"),
    (configure, {"dt_rank": "half"}, "dt_rank must be a positive integer, got 'half'"),
    (configure, {"vocab_size": True}, "vocab_size must be a positive integer, got True"),
    (configure, {"d_state": float("inf")}, "d_state must be a positive integer, got inf"),
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
    *((run, {name: t}, f"{name} must have shape (") for name, t in LONGER.items()),
    (run, {"reset": torch.ones(2, 8) > 0}, "reset must have shape (2, 7), got (2, 8)"),
    (run, {"reset": torch.ones(2, 7)}, "reset must be bool, got torch.float32"),
    (run, {"A": torch.ones(3, 4).cfloat()}, "A must be real"),
    (run, {"x": torch.ones(7)}, "x must be real (batch, seqlen, d_inner), got torch.float32 (7,)"),
    (run, {"x": torch.ones(2, 0, 3)}, "x must be real (batch, seqlen, d_inner), got"),
    (run, {"x": torch.ones(2, 7, 3).int()}, "x must be real (batch, seqlen, d_inner), got"),
    (run, ONE_TOKEN | {"h0": None}, "x (2, 3) is one token (batch, d_inner): it needs h0"),
    (run_alone, {"scan": "logspace", "rule": "bilinear"}, "cannot do rule='bilinear'"),
    (run_alone, {"scan": "logspace", "chunk": 0}, "chunk must be at least 1, got 0"),
    (run_alone, {"scan": "chunked", "chunk": 0}, "chunk must be at least 1, got 0"),
    (run_alone, {"scan": "recompute", "chunk": 0}, "chunk must be at least 1, got 0"),
    (read, {"ids": torch.rand(2, 5)}, f"{IDS}torch.float32 (2, 5)"),
    (read, {"ids": torch.ones(2, 5) > 0}, f"{IDS}torch.bool (2, 5)"),
    (read, {"ids": torch.ones(2, dtype=int)}, f"{IDS}torch.int64 (2,)"),
    (read, {"ids": torch.ones(2, 0, dtype=int)}, f"{IDS}torch.int64 (2, 0)"),
    (read, {"ids": random_ids(2, 1), "method": "step"}, f"{STEP}torch.int64 (2, 1)"),
    *((read, {"stranger": changes}, words) for changes, words in STATES),
    *(
        (read, {"stranger": changes, "method": "step", "ids": random_ids(1, 2)[0]}, words)
        for changes, words in STATES
    ),
    (read, {"rows": 3}, "state.conv must have shape (2, 32, 3), got (3, 32, 3)"),
    (read, {"reset": torch.ones(1, 3) > 0}, "reset must be bool (2, 3), got torch.bool (1, 3)"),
    (read, {"reset": torch.ones(2, 3)}, "reset must be bool (2, 3), got torch.float32 (2, 3)"),
    (feed, {"shape": (2, 3, 9)}, f"{BLOCK}(2, 3, 9)"),
    (feed, {"shape": (2, 8)}, f"{BLOCK}(2, 8)"),
    (feed, {"shape": (0, 3, 8)}, f"{BLOCK}(0, 3, 8)"),
    (feed, {"shape": (2, 9), "state": True}, f"{TOKEN}(2, 9)"),
    (feed, {"shape": (2, 3, 8), "state": True, "method": "step"}, f"{TOKEN}(2, 3, 8)"),
    (convolve, {"raw": torch.ones(2, 9, 16), "kernel_size": 8}, "a filter per channel as long as"),
    (convolve, {"raw": torch.ones(2, 9, 16), "groups": 1}, "a filter per channel as long as"),
    (convolve, {"raw": torch.ones(2, 16), "dilation": 2}, "a filter per channel as long as"),
]


@pytest.mark.parametrize(("call", "arguments", "words"), WRONG_CALLS)
def test_a_call_that_does_not_fit_is_told_what_was_given_and_what_was_expected(
    call, arguments, words
):
    with pytest.raises(ValueError, match=re.escape(words)):
        call(**arguments)


@pytest.mark.parametrize("bad", [-1, 32, 1000])
def test_a_token_id_without_a_row_is_named(bad):
    model, ids = random_model(), random_ids(2, 5)
    ids[1, 3] = bad
    for call in (lambda: model(ids), lambda: model.step(ids[:, 3], model.init_state(2))):
        with pytest.raises(IndexError, match=rf"must be in \[0, 32\), got .*{bad}"):
            call()


def test_an_explicit_triton_that_cannot_run_is_an_error_and_no_silent_fallback(monkeypatch):
    triton_scan = pytest.importorskip("triton_scan", exc_type=ImportError)
    monkeypatch.setattr(triton_scan, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="on a GPU, got tensors on cpu"):
        run(scan="triton")
    monkeypatch.setitem(sys.modules, "triton_scan", None)
    with pytest.raises(RuntimeError, match=r"triton_scan\.py.*pip install triton.*chunked"):
        run(scan="triton")


## A model as it was made, and others --------------------------------------------------------------


def test_a_model_with_a_hook_an_adapter_or_another_forward_is_not_our_own():
    """Nor is one under autocast: whoever computes a model without its modules asks for all this."""

    class Subclass(Mamba):
        pass

    class Adapter(nn.Linear):
        pass

    class Quantised(Tensor):
        pass

    def quantised(model):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Quantised))

    def hooked(register):
        return lambda model: getattr(mixer(model).dt_proj, register)(lambda *arguments: None)

    def replaced(find, name):
        return lambda model: setattr(find(model), name, lambda *arguments: None)

    def mixer(model):
        return model.backbone.layers[1].mixer

    assert mamba.is_our_own(random_model())
    for change in (
        hooked("register_forward_hook"),
        hooked("register_forward_pre_hook"),
        hooked("register_full_backward_hook"),
        hooked("register_full_backward_pre_hook"),
        *(replaced(mixer, name) for name in ("forward", "step", "select")),
        replaced(lambda model: model, "embed"),
        lambda model: setattr(mixer(model).in_proj, "__class__", Adapter),
        lambda model: setattr(model, "__class__", Subclass),
        quantised,
    ):
        model = random_model()
        change(model)
        assert not mamba.is_our_own(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not mamba.is_our_own(random_model())


@needs_gpu
@pytest.mark.parametrize("scan", SCANS)
def test_a_gpu_gives_the_numbers_of_the_cpu(scan):
    model, (ids, reset) = random_model(scan=scan), packed_documents((5, 35, 1, 29))
    numbers = {}
    with watch(model) as layers:
        model(ids, reset=reset)
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        start = there.init_state(len(ids))
        logits, state = there(ids.to(device), start, reset=reset.to(device))
        gradients = gradients_of(logits.square().mean(), there)
        next_logits, state = there.step(ids[:, -1].to(device), state)
        prompt = ids[:, :9].to(device)
        tokens = torch.stack([*generate.stream(there, prompt, max_new_tokens=9, temperature=0)])
        outputs = {"logits": logits, "next logits": next_logits, "h": state.h, "tokens": tokens}
        numbers[device] = [
            {name: t.cpu() for name, t in each.items()} for each in (outputs, gradients)
        ]
    # As in judge_scan: log space within what it states about itself, the others within 1e-5.
    bound = max(logspace_bound(layer, 64, reset) for layer in layers)
    tolerance = max(1e-5, 2 * bound) if scan == "logspace" else 1e-5
    assert_all_close(numbers["cuda"][0], numbers["cpu"][0], tolerance)
    assert_all_close(numbers["cuda"][1], numbers["cpu"][1], 10 * tolerance)


## In a folder -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_bit_by_bit_with_its_whole_configuration(tied, tmp_path):
    """Also from the folder that it came from. Numbers of other types are what they are, and float32
    is what is asked for, whatever the file holds."""
    config = MambaConfig(
        d_model=np.int64(16), n_layer=2.0, vocab_size=np.float32(30), expand=1.3, d_conv=3,
        dt_rank=5, norm_eps=1e-3, rule="zoh", tokenizer="bytes", tie_embeddings=tied,
    )  # fmt: skip
    assert type(config.d_model) is type(config.n_layer) is type(config.vocab_size) is int
    Mamba(config).save_pretrained(tmp_path / "new" / "folder")
    model = Mamba.from_pretrained(tmp_path / "new" / "folder", dtype=torch.bfloat16)
    assert model.config == config
    with torch.no_grad():
        model.backbone.norm_f.weight += 1
    model.save_pretrained(tmp_path / "new" / "folder")
    for dtype, expected in ((torch.bfloat16, model), (None, copy.deepcopy(model).float())):
        loaded = Mamba.from_pretrained(tmp_path / "new" / "folder", dtype=dtype, scan="chunked")
        assert loaded.config.scan == "chunked"
        assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == tied
        assert loaded.state_dict().keys() == expected.state_dict().keys()
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == expected.state_dict()[name].dtype, name
            assert torch.equal(tensor, expected.state_dict()[name]), name
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"config.json", "model.safetensors"}


def test_a_state_survives_a_file_that_may_hold_tensors_only(tmp_path):
    state = random_state(random_model(), 2)
    torch.save(vars(state), tmp_path / "state.pt")
    loaded = MambaState(**torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(loaded.conv, state.conv) and torch.equal(loaded.h, state.h)
