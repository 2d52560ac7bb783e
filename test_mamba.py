"""What mamba.py claims, as sentences that a doubtful reader can run.

    python -m pytest test_mamba.py

No claim is judged by the code that makes it. The judges are the recurrence written out below in
float64 (`by_hand`), transformers' MambaForCausalLM, matrix exponentials and finite differences.
Models are random in every parameter: a fresh one hides errors, because its norms and D are 1 and
its biases 0. An error is norm(actual - expected) / norm(expected). Short floats are judged by what
rounding alone would cost, or by what transformers loses in the same dtype.

The sections follow mamba.py. Edges, and what wrong calls get, are in tests/.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import mamba
from mamba import Mamba, MambaBlock, MambaConfig, MambaState, selective_scan

RULES = ("mamba", "zoh", "bilinear", "dirac")
SCANS = {
    "sequential": mamba.scan_sequential,
    "logspace": mamba.scan_logspace,
    "chunked": mamba.scan_chunked,
    "recompute": mamba.scan_recompute,
}
SOURCE = Path(mamba.__file__).read_text()


def rules_of(scan: str) -> tuple[str, ...]:
    """Log space has no logarithm for the negative decays of the bilinear rule."""
    return tuple(rule for rule in RULES if (scan, rule) != ("logspace", "bilinear"))


## Judges and helpers ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def the_same_numbers_in_every_run():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on tensors as small as these, threads only wait for each other


def error_of(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    error = error_of(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.1e}"


def assert_all_close(actual: dict, expected: dict, tolerance: float, where: str = "") -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(f"{where}{name}", actual[name], expected[name], tolerance)


def assert_same_results(actual, expected, tolerance: float = 1e-5, where: str = "") -> None:
    """Both are (logits, state)."""
    (logits, state), (expected_logits, expected_state) = actual, expected
    assert_close(f"{where}logits", logits, expected_logits, tolerance)
    assert_all_close(vars(state), vars(expected_state), tolerance, where)


def by_hand(x, delta, A, B, C, h0=None, *, rule="mamba", reset=None) -> tuple[Tensor, Tensor]:
    """The judge of all scans: (2a) and (2b) in float64, each rule as its equation is printed."""
    x, delta, A, B, C = (tensor.double() for tensor in (x, delta, A, B, C))
    h = 0 if h0 is None else h0.double()
    ys = []
    # unbind, not x[:, t], whose gradients would take a time quadratic in the length
    steps = zip(*(tensor.unbind(1) for tensor in (x, delta, B, C)), strict=True)
    for t, (x_t, delta_t, B_t, C_t) in enumerate(steps):
        step = delta_t.unsqueeze(-1)
        if rule == "bilinear":
            decay, gain = (1 + step * A / 2) / (1 - step * A / 2), step / (1 - step * A / 2)
        else:
            decay = torch.exp(step * A)
            gain = {"mamba": step, "zoh": torch.expm1(step * A) / A, "dirac": 1}[rule]
        if reset is not None:
            decay = torch.where(reset[:, t, None, None], 0, decay)
        h = decay * h + gain * B_t.unsqueeze(1) * x_t.unsqueeze(-1)
        ys.append(torch.einsum("bdn,bn->bd", h, C_t))
    return torch.stack(ys, dim=1), h


def scan_inputs(seqlen: int, delta=(1e-3, 1.0), minus_A=(0.1, 8.0)) -> dict[str, Tensor]:
    """x, delta, A, B, C and h0 of a scan, delta and -A log-uniform between two bounds."""
    batch, d_inner, d_state = 2, 3, 4
    inputs = {
        "x": torch.randn(batch, seqlen, d_inner),
        "delta": torch.empty(batch, seqlen, d_inner).uniform_(*map(math.log, delta)).exp(),
        "A": -torch.empty(d_inner, d_state).uniform_(*map(math.log, minus_A)).exp(),
        "B": torch.randn(batch, seqlen, d_state),
        "C": torch.randn(batch, seqlen, d_state),
        "h0": torch.randn(batch, d_inner, d_state),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def selective_inputs(seqlen: int = 7) -> dict[str, Tensor]:
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(seqlen).items()}
    dt = 2 * torch.randn_like(inputs.pop("delta"))
    others = {"D": torch.randn(3), "z": torch.randn_like(dt), "dt_bias": torch.randn(3)}
    return {**inputs, "dt": dt, **others}


def values_and_gradients(scan, inputs: dict[str, Tensor], **options) -> tuple[dict, dict]:
    """y and h_last, and the gradients of all inputs for a loss that depends on both of them."""
    y, h_last = scan(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, generator=generator)).sum() for v in (y, h_last))
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    names = [f"gradient of {name}" for name in inputs]
    return {"y": y, "h_last": h_last}, dict(zip(names, gradients, strict=True))


def judge_scan(scan: str, inputs, *, chunk=None, where="", **options) -> None:
    """Values and gradients of a scan equal those of the recurrence."""
    tolerance = 1e-5
    if scan == "logspace":
        tolerance = max(tolerance, 2 * logspace_bound(inputs, chunk or 64, options.get("reset")))
    values, gradients = values_and_gradients(by_hand, inputs, **options)
    if scan != "sequential" and chunk is not None:
        options["chunk"] = chunk
    actual_values, actual_gradients = values_and_gradients(SCANS[scan], inputs, **options)
    assert_all_close(actual_values, values, tolerance, where)
    assert_all_close(actual_gradients, gradients, 10 * tolerance, where)


def logspace_bound(inputs: dict[str, Tensor], chunk: int, reset: Tensor | None = None) -> float:
    """The error that scan_logspace states, with a |log v| of 20: one share in 5e8 still counts."""
    sums = [part.sum(1).max().item() for part in inputs["delta"].split(chunk, dim=1)]
    resets = 0 if reset is None else max(p.sum(1).max().item() for p in reset.split(chunk, dim=1))
    return torch.finfo().eps * (inputs["A"].abs().max().item() * max(sums) + 20 + 104 * resets)


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Give every parameter a random value, of a size at which each of them matters."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, dtype=parameter.dtype)
        if name.endswith("dt_proj.bias"):
            parameter.copy_(noise - 2)  # Δ about 0.05 to 0.3
        elif name.endswith("A_log"):
            parameter.copy_(noise / 2)
        elif name.endswith(("norm.weight", "norm_f.weight", "D")):
            parameter.copy_(1 + noise / 3)
        elif parameter.ndim == 1:
            parameter.copy_(noise / 10)
        elif name.endswith("embedding.weight"):
            parameter.copy_(noise / 50)  # small, so that eps counts and tokens do not repeat
        else:
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
    return module


def random_model(**changes) -> Mamba:
    sizes = {"d_model": 16, "n_layer": 2, "vocab_size": 30, "d_state": 4, "bias": True}
    return randomise(Mamba(MambaConfig(**{**sizes, **changes})))


def random_ids(batch: int, seqlen: int, vocab_size: int = 30) -> Tensor:
    return torch.randint(vocab_size, (batch, seqlen))


def random_state(model: Mamba, batch: int) -> MambaState:
    return model.init_state(batch).map(torch.randn_like)


def gradients_of(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    return {f"gradient of {name}": g for name, g in zip(names, gradients, strict=True)}


def run_pieces(model: Mamba, ids: Tensor, lengths, state: MambaState, reset: Tensor | None = None):
    """Logits of pieces of these lengths, each from the state before it, and the last state."""
    resets = [None] * len(lengths) if reset is None else reset.split(lengths, dim=1)
    logits = []
    for piece, piece_reset in zip(ids.split(lengths, dim=1), resets, strict=True):
        piece_logits, state = model(piece, state, reset=piece_reset)
        logits.append(piece_logits)
    return torch.cat(logits, dim=1), state


def run_steps(model: Mamba, ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
    """Logits of all tokens, one `step` each."""
    logits = []
    for token_ids in ids.unbind(1):
        step_logits, state = model.step(token_ids, state)
        logits.append(step_logits)
    return torch.stack(logits, dim=1), state


def packed_documents(lengths=(5, 1, 7, 2, 1)) -> tuple[Tensor, Tensor]:
    """Two rows of documents back to back, and the reset that marks where each of them starts."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    ids, reset = random_ids(2, sum(lengths)), torch.zeros(2, sum(lengths), dtype=torch.bool)
    reset[0, starts] = True
    reset[1, starts[2:]] = True  # the second row's first document is longer
    return ids, reset


# Three models, by what differs from the defaults of both projects; and transformers' words for it.
SHAPES = {
    "defaults": {},
    "biases": dict(d_state=5, d_conv=3, expand=1, bias=True, conv_bias=False, dt_rank=3),
    "own head": dict(
        d_state=1, d_conv=2, expand=3, norm_eps=1e-2, tie_embeddings=False, residual_in_fp32=False
    ),
}
THEIR_FIELDS = {
    **{"d_state": "state_size", "d_conv": "conv_kernel", "dt_rank": "time_step_rank"},
    **{"bias": "use_bias", "conv_bias": "use_conv_bias", "norm_eps": "layer_norm_epsilon"},
    **{"tie_embeddings": "tie_word_embeddings"},
}


def our_model_and_theirs(shape: str) -> tuple[Mamba, nn.Module]:
    """The same random weights in this project's Mamba and in transformers' MambaForCausalLM."""
    import transformers

    changes = SHAPES[shape]
    ours = random_model(**dict(d_model=24, vocab_size=40, d_state=16, bias=False) | changes)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    sizes |= {THEIR_FIELDS.get(name, name): value for name, value in changes.items()}
    config = transformers.MambaConfig(**sizes, intermediate_size=ours.config.d_inner)
    theirs = transformers.MambaForCausalLM(config).eval()
    theirs.load_state_dict({their_name(k): v for k, v in ours.state_dict().items()}, strict=True)
    return ours, theirs


def their_name(name: str) -> str:
    return name.replace("backbone.embedding.", "backbone.embeddings.")


## The first page ----------------------------------------------------------------------------------


def test_the_three_steps_worked_by_hand_in_the_docstring_are_what_the_code_computes():
    number = r"([\d.]+)"
    row = rf"^    (\d) +{number} +{number} +{number} +{number} · {number} +\+ {number} +· (\d)"
    rows = re.findall(rf"{row} += +{number} ", mamba.__doc__, re.MULTILINE)
    x, delta = (torch.tensor([float(row[i]) for row in rows]).view(1, 3, 1) for i in (0, 1))
    A, one = torch.tensor([[-1.0]]), torch.ones(1, 3, 1)
    A_bar, B_bar = mamba.discretize(delta, A, one)
    y, _ = mamba.scan_sequential(x, delta, A, one, one)
    computed = (x, delta, A_bar, B_bar, A_bar, F.pad(y, (0, 0, 1, -1)), B_bar, x, y)
    for t, row in enumerate(rows):
        for printed, values in zip(row, computed, strict=True):
            digits = len(printed.partition(".")[2])
            assert printed == f"{values.flatten()[t].item():.{digits}f}", f"row {t + 1}"


def test_mamba_130m_has_129_135_360_parameters_and_remembers_2_8_megabytes_a_sequence():
    with torch.device("meta"):
        model = Mamba(MambaConfig(d_model=768, n_layer=24))
        state = model.init_state(1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 129_135_360
    assert sum(tensor.nbytes for tensor in vars(state).values()) == 2_801_664
    assert "24 layers x 1536 x (16 + 3) x 4 bytes = 2.8 MB" in SOURCE


## The language model ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_of_all_parameters_equal_transformers(shape):
    ours, theirs = our_model_and_theirs(shape)
    ids, targets = random_ids(2, 17, 40), random_ids(2, 17, 40)
    our_logits, their_logits = ours(ids), theirs(ids).logits
    assert_close("logits", our_logits, their_logits, 1e-5)
    actual, expected = (
        gradients_of(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), model)
        for logits, model in ((our_logits, ours), (their_logits, theirs))
    )
    assert_all_close({their_name(n): t for n, t in actual.items()}, expected, 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_continuations_equal_transformers_reading_the_whole_text_again(shape):
    ours, theirs = our_model_and_theirs(shape)
    text = prompt = random_ids(6, 5, 40)
    for _ in range(12):
        text = torch.cat([text, theirs(text).logits[:, -1:].argmax(-1)], dim=1)
    logits, state = ours(prompt, ours.init_state(6))
    tokens = [logits[:, -1].argmax(-1)]
    for _ in range(11):
        logits, state = ours.step(tokens[-1], state)
        tokens.append(logits.argmax(-1))
    assert torch.equal(torch.stack(tokens, dim=1), text[:, 5:])
    assert text[:, 5:].unique().numel() > 6, "a continuation that repeats itself proves little"


@pytest.mark.parametrize("scan", SCANS)
def test_a_later_token_changes_nothing_before_it_and_everything_after_it(scan):
    model, ids = random_model(scan=scan), random_ids(1, 21)
    before = model(ids)
    for t in (0, 10, 20):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 30
        differs = (model(changed) != before).any(-1)[0]
        assert torch.equal(differs, torch.arange(21) >= t)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 5), (torch.float64, 13)], ids=str)
def test_step_by_step_equals_forward_under_every_rule_and_without_a_convolution(dtype, digits):
    for changes in (*({"rule": rule} for rule in RULES), {"d_conv": 1, "conv_bias": False}):
        model = random_model(**changes).to(dtype)
        ids, state = random_ids(2, 11), random_state(model, 2)
        logits, last = model(ids, state)
        assert {logits.dtype, last.conv.dtype, last.h.dtype} == {dtype}
        stepped = run_steps(model, ids, state)
        assert_same_results(stepped, (logits, last), 10**-digits, f"{changes}: ")


@pytest.mark.parametrize("scan", SCANS)
def test_feeding_a_sequence_in_any_pieces_equals_feeding_it_whole(scan):
    """Pieces shorter than the convolution's reach, d_conv - 1 = 4, are where it goes wrong."""
    model, ids = random_model(scan=scan, d_conv=5), random_ids(2, 23)
    state = random_state(model, 2)
    whole = model(ids, state)
    for lengths in ((1, 22), (22, 1), (2, 1, 2, 18), (1, 1, 1, 1, 19), (7, 3, 13)):
        pieces = run_pieces(model, ids, lengths, state)
        assert_same_results(pieces, whole, 3e-5 if scan == "logspace" else 1e-5, f"{lengths}: ")


@pytest.mark.parametrize("scan", SCANS)
def test_gradients_through_a_carried_state_equal_those_of_the_whole_sequence(scan):
    model, ids = random_model(scan=scan), random_ids(2, 13)
    state = random_state(model, 2)

    def gradients(lengths) -> dict[str, Tensor]:
        start = state.map(lambda tensor: tensor.clone().requires_grad_())
        logits, last = run_pieces(model, ids, lengths, start)
        loss = logits.square().sum() + last.h.square().sum() + last.conv.square().sum()
        leaves = {**dict(model.named_parameters()), **vars(start)}
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    assert_all_close(gradients([2, 6, 5]), gradients([13]), 1e-4, "gradient of ")


@pytest.mark.parametrize("scan", SCANS)
def test_left_padding_with_a_reset_gives_each_prompt_its_own_logits_state_and_gradients(scan):
    """Whole and in pieces, some of which are nothing but padding for some of the prompts."""
    model, lengths, weight = random_model(scan=scan).double(), (9, 1, 2, 6), torch.randn(9, 32)
    ids = random_ids(4, 9)  # what stands in the padding must not matter
    reset = torch.stack([torch.arange(9) == 9 - length for length in lengths])

    def gradients(rows) -> dict[str, Tensor]:
        squares = [state.h.square().sum() + state.conv.square().sum() for _, state in rows]
        products = [(logits * weight[-logits.shape[1] :]).sum() for logits, _ in rows]
        return gradients_of(sum(squares + products), model)

    alone = [model(ids[i : i + 1, -n:], model.init_state(1)) for i, n in enumerate(lengths)]
    for pieces in ((9,), (4, 5), (1, 7, 1)):
        where = f"in pieces of {pieces}: "
        logits, state = run_pieces(model, ids, pieces, model.init_state(4), reset)
        rows = [(logits[i : i + 1, -n:], state[:, i : i + 1]) for i, n in enumerate(lengths)]
        for row, expected in zip(rows, alone, strict=True):
            assert_same_results(row, expected, 1e-12, where)
        assert_all_close(gradients(rows), gradients(alone), 1e-11, where)


@pytest.mark.parametrize("scan", SCANS)
def test_packed_documents_with_resets_have_the_logits_and_states_of_separate_ones(scan):
    model = random_model(scan=scan)
    ids, reset = packed_documents()
    logits, state = model(ids, model.init_state(2), reset=reset)
    for row in range(2):
        starts = [0, *reset[row, 1:].nonzero().flatten().add(1).tolist(), ids.shape[1]]
        for start, end in itertools.pairwise(starts):
            alone, last = model(ids[row : row + 1, start:end], model.init_state(1))
            assert_close(f"document {start}:{end}", logits[row, start:end], alone[0], 3e-5)
        assert_all_close(vars(state[:, row]), vars(last[:, 0]), 3e-5, "state of the last ")


## The Mamba block ---------------------------------------------------------------------------------


def test_initial_step_sizes_are_log_uniform_from_dt_min_to_dt_max_and_not_below_the_floor():
    changes = {"d_model": 2000, "dt_rank": 1, "d_state": 1, "dt_min": 0.002, "dt_max": 0.3}
    delta = F.softplus(MambaBlock(MambaConfig(**changes)).dt_proj.bias.double())
    quantiles = (delta.log() - math.log(0.002)) / math.log(0.3 / 0.002)
    uniform = (torch.arange(4000) + 0.5) / 4000
    assert_close("sorted quantiles of Δ", quantiles.sort().values, uniform, 0.05)
    assert quantiles.min() > -1e-6 and quantiles.max() < 1 + 1e-6
    floored = F.softplus(MambaBlock(MambaConfig(**changes, dt_init_floor=0.05)).dt_proj.bias)
    assert floored.min().item() == pytest.approx(0.05) and floored.max() > 0.2
    for step in (1e-4, 0.3):  # and the inverse of softplus is exact
        bias = MambaBlock(MambaConfig(d_model=4, dt_min=step, dt_max=step)).dt_proj.bias
        assert_close("Δ", F.softplus(bias.double()), torch.full((8,), step), 1e-6)


def test_A_starts_at_minus_one_to_minus_n_and_D_at_one():
    block = MambaBlock(MambaConfig(d_model=8, d_state=20))
    assert_close("A", block.A, -torch.arange(1.0, 21).expand(16, 20), 1e-6)
    assert torch.equal(block.D, torch.ones(16))


def test_every_block_starts_smaller_by_the_root_of_the_number_of_layers_also_the_second_time():
    def std_of_out_proj(n_layer: int) -> float:
        block = MambaBlock(MambaConfig(d_model=64, n_layer=n_layer, bias=True))
        first = block.out_proj.weight.std().item()
        block.reset_parameters()
        assert block.out_proj.weight.std().item() == pytest.approx(first, rel=0.05)
        assert not block.out_proj.bias.any() and not block.in_proj.bias.any()
        return first

    assert std_of_out_proj(1) == pytest.approx(3 * std_of_out_proj(9), rel=0.05)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_a_float64_block_equal_finite_differences(rule):
    config = MambaConfig(d_model=2, d_state=2, d_conv=3, bias=True, rule=rule)
    block = randomise(MambaBlock(config).double())
    names, parameters = zip(*block.named_parameters(), strict=True)

    def run(u, conv, h, *parameters):
        weights = dict(zip(names, parameters, strict=True))
        y, state = torch.func.functional_call(block, weights, (u, MambaState(conv, h)))
        return y, state.conv, state.h

    u, conv, h = torch.randn(3, 1, 4, 2).double().requires_grad_().unbind()
    assert gradcheck(run, [u, conv, h, *parameters], atol=1e-7)


def test_the_convolution_sees_a_token_and_its_three_left_neighbours_and_nothing_else():
    raw, past = torch.randn(2, 9, 3).double(), torch.randn(2, 3, 3).double()
    conv1d = torch.nn.Conv1d(3, 3, 4, groups=3).double()
    x, next_past = mamba.causal_conv(raw, conv1d, past)
    sequence = torch.cat([past, raw.mT], dim=-1)
    assert_close("x", x, F.silu(conv1d(sequence)).mT, 1e-14)
    assert torch.equal(next_past, sequence[..., -3:])

    def channel_0_of_row_0(raw):
        return mamba.causal_conv(raw, conv1d, past)[0][0, :, 0]

    seen = torch.autograd.functional.jacobian(channel_0_of_row_0, raw) != 0  # (9, 2, 9, 3)
    ago = torch.arange(9).view(9, 1) - torch.arange(9)
    assert torch.equal(seen[:, 0, :, 0], (ago >= 0) & (ago <= 3))
    assert not seen[:, 1].any() and not seen[..., 1:].any()


def test_in_bfloat16_step_errs_no_more_than_forward_and_less_than_a_convolution_in_bfloat16():
    block = randomise(MambaBlock(MambaConfig(d_model=32))).bfloat16()
    exact, u = copy.deepcopy(block).double(), torch.randn(8, 20, 32).bfloat16()
    xs = []  # what comes out of the convolution goes into x_proj
    for each in (block, exact):
        each.x_proj.register_forward_hook(lambda module, inputs, output: xs.append(inputs[0]))
    expected, out = exact(u.double()), block(u)
    expected_x, x, outs, state = *xs, [], block.init_state(8)
    for u_t in u.unbind(1):
        out_t, state = block.step(u_t, state)
        outs.append(out_t)
    assert error_of(torch.stack(outs, dim=1), expected) <= 1.05 * error_of(out, expected)

    windows = F.pad(block.in_proj(u)[..., :64], (0, 0, 3, 0)).unfold(1, 4, 1)  # (8, 20, 64, 4)
    rounded_x = F.silu((windows * block.conv1d.weight.squeeze(1)).sum(-1) + block.conv1d.bias)
    for error in (error_of(x, expected_x), error_of(torch.stack(xs[2:], dim=1), expected_x)):
        assert error < 0.75 * error_of(rounded_x, expected_x)


## Selection, and the state ------------------------------------------------------------------------


@pytest.mark.parametrize("scan", SCANS)
def test_a_small_delta_skips_the_token_and_a_large_one_forgets_the_past(scan):
    for rule in ("mamba", "zoh"):
        inputs = scan_inputs(6)
        inputs["delta"] = torch.full_like(inputs["delta"], 1e-8)
        _, h_last = SCANS[scan](**inputs, rule=rule)
        assert_close("h after Δ -> 0", h_last, inputs["h0"], 1e-6)
        inputs["delta"] = torch.full_like(inputs["delta"], 2000.0)
        _, h_last = SCANS[scan](**inputs, rule=rule)
        _, h_of_another_past = SCANS[scan](**inputs | {"h0": 1000 * inputs["h0"]}, rule=rule)
        assert torch.equal(h_last, h_of_another_past) and h_last.any()


def test_with_one_state_and_A_minus_one_zoh_is_a_gated_recurrent_unit():
    """Theorem 1: h_t = (1 - g_t) h_{t-1} + g_t x_t with g_t = sigmoid(dt_t)."""
    x, dt = torch.randn(2, 9, 3), 3 * torch.randn(2, 9, 3)
    one = torch.ones(2, 9, 1)
    y, _ = selective_scan(x, dt, -torch.ones(3, 1), one, one, rule="zoh")
    h, gate = torch.zeros(2, 3), torch.sigmoid(dt)
    for t in range(9):
        h = (1 - gate[:, t]) * h + gate[:, t] * x[:, t]
        assert_close(f"h at {t}", y[:, t], h, 1e-5)


def test_a_state_is_a_value_that_forward_and_step_do_not_change():
    model = random_model()
    state = random_state(model, 2)
    kept = state.map(torch.clone)
    model(random_ids(2, 5), state)
    model.step(random_ids(2, 5)[:, 0], state)
    assert torch.equal(state.conv, kept.conv) and torch.equal(state.h, kept.h)


@pytest.mark.parametrize("scan", SCANS)
def test_a_state_has_one_size_at_every_length_and_keeps_nothing_else_in_memory(scan):
    block = MambaBlock(MambaConfig(d_model=8, scan=scan))
    for seqlen in (1, 2, 500):
        _, state = block(torch.randn(1, seqlen, 8), block.init_state(1))
        assert (state.conv.shape, state.h.shape) == ((1, 16, 3), (1, 16, 16))
        for name, tensor in vars(state.detach()).items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} after {seqlen}"


## Discretisation ----------------------------------------------------------------------------------


def test_the_table_of_the_rules_prints_the_equations_that_run_and_where_they_end():
    lengths = re.search(r"^## +Δ = ([\d.]+) +Δ = ([\d.]+)$", SOURCE, re.MULTILINE).groups()
    row = r'^##   "(\w+)" +Ā = (.+?)  +B̄ = (.+?)  +([\d.]+) +([\d.]+)$'
    rows = re.findall(row, SOURCE, re.MULTILINE)
    assert tuple(row[0] for row in rows) == RULES == mamba.RULES
    A, B, one = torch.tensor([[-0.7]]), torch.tensor([1.3]), torch.ones(1, 500, 1)
    for rule, *equations, first_end, second_end in rows:
        for delta, end in zip(map(float, lengths), (first_end, second_end), strict=True):
            names = {"exp": torch.exp, "Δ": delta, "A": A, "B": B}
            bars = mamba.discretize(torch.tensor([delta]), A, B, rule)
            for printed, bar in zip(equations, bars, strict=True):
                formula = re.sub(r"(?<=[ΔA])(?=[AB])| · ", " * ", printed)  # ΔA, A · B: products
                assert_close(f"{rule}: {printed}", bar, eval(formula, names).view(1, 1), 1e-6)
            y, _ = mamba.scan_sequential(one, delta * one, -torch.ones(1, 1), one, one, rule=rule)
            assert f"{y[0, -1].item():.3f}" == end, f"{rule}, Δ = {delta}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zoh_is_the_matrix_exponential_of_the_held_system_down_to_delta_A_of_zero(dtype):
    """Holding x makes (h, x) one linear system: exp(Δ [[A, B], [0, 0]]) = [[Ā, B̄], [0, 1]].

    Every element has to be right by itself, and its gradients too: hence the quotients.
    """
    A = -torch.tensor([0, 1e-12, 1e-7, 1e-4, 0.01, 0.033, 0.034, 0.1, 1, 5], dtype=dtype)
    delta, B = torch.full_like(A, 0.9), torch.tensor([1.7], dtype=dtype)
    leaves = [delta.requires_grad_(), A.requires_grad_()]
    A_bar, B_bar = mamba.discretize(delta, A.unsqueeze(-1), B, "zoh")

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    system = torch.zeros(len(A), 2, 2, dtype=torch.float64)
    system[:, 0, 0], system[:, 0, 1] = exact[0] * exact[1], exact[0] * B
    exact_A_bar, exact_B_bar = torch.linalg.matrix_exp(system)[:, 0].unbind(-1)

    one, tolerance = torch.ones(len(A)), 10 * torch.finfo(dtype).eps
    assert_close("A_bar / exact", A_bar.squeeze(-1) / exact_A_bar, one, tolerance)
    assert_close("B_bar / exact", B_bar.squeeze(-1) / exact_B_bar, one, tolerance)
    gradients = torch.autograd.grad(B_bar.sum(), leaves)
    exact_gradients = torch.autograd.grad(exact_B_bar.sum(), exact)
    for name, ours, right in zip(("delta", "A"), gradients, exact_gradients, strict=True):
        assert_close(f"gradient of B_bar by {name} / exact", ours / right, one, 100 * tolerance)


def test_no_step_and_no_value_of_A_log_lets_the_state_grow_under_any_rule():
    block = MambaBlock(MambaConfig(d_model=2, d_state=60))
    block.A_log.data.copy_(torch.linspace(-40, 40, 60))
    assert (block.A < 0).all()
    delta, B = torch.logspace(-8, 4, 50).unsqueeze(-1).expand(50, 4), torch.ones(60)
    for rule in RULES:
        A_bar, _ = mamba.discretize(delta, block.A, B, rule)
        assert A_bar.abs().max() <= 1, rule


## The recurrence, the combine and the selective scan ----------------------------------------------


def test_the_combine_of_the_text_is_associative_and_its_folds_are_the_recurrence():
    printed = re.search(r"^## +combine\(\(a1, v1\), \(a2, v2\)\) = (.*)$", SOURCE, re.MULTILINE)[1]
    formula = re.sub(r"(?<=\d) (?=[av])", " * ", printed)  # a2 a1: a product

    def combine(first, second):
        return eval(formula, dict(zip(("a1", "v1", "a2", "v2"), (*first, *second), strict=True)))

    inputs = {name: tensor.double() for name, tensor in scan_inputs(8).items()}
    A_bar, B_bar = mamba.discretize(inputs["delta"], inputs["A"], inputs["B"])
    steps = list(zip(A_bar.unbind(1), (B_bar * inputs["x"].unsqueeze(-1)).unbind(1), strict=True))
    _, h_last = by_hand(**inputs)

    def bracket(steps, cut):
        """Combined to one map; cut: how many of so many steps go into the left bracket."""
        if len(steps) == 1:
            return steps[0]
        left = cut(len(steps))
        return combine(bracket(steps[:left], cut), bracket(steps[left:], cut))

    for cut in (lambda n: n - 1, lambda n: 1, lambda n: n // 2):  # from the left, the right, a tree
        a, v = bracket(steps, cut)
        assert_close("h_last", a * inputs["h0"] + v, h_last, 1e-14)


@pytest.mark.parametrize("scan", SCANS)
def test_every_scan_equals_the_recurrence_in_values_and_gradients(scan):
    """Lengths 1, 2, odd, prime, a chunk and one less and one more; chunks of all sizes."""
    for rule in rules_of(scan):
        for seqlen, chunk in ((1, None), (2, None), (15, 8), (16, 8), (17, 8), (13, 1), (13, 99)):
            where = f"rule {rule}, l = {seqlen}, chunk = {chunk}: "
            judge_scan(scan, scan_inputs(seqlen), chunk=chunk, where=where, rule=rule)


@pytest.mark.parametrize("scan", SCANS)
def test_every_scan_equals_the_recurrence_across_resets(scan):
    for rule in rules_of(scan):
        for share in (0.1, 0.5, 1.0):
            reset = torch.rand(2, 19) < share
            reset[0, -1] = True
            where = f"rule {rule}, {share:.0%} resets: "
            judge_scan(scan, scan_inputs(19), chunk=8, where=where, rule=rule, reset=reset)


@pytest.mark.parametrize("scan", SCANS)
def test_every_scan_is_as_exact_after_a_thousand_tokens(scan):
    judge_scan(scan, scan_inputs(1000))


@pytest.mark.parametrize("scan", ["auto", *SCANS])
def test_the_selective_scan_is_the_recurrence_with_softplus_D_and_the_gate_around_it(scan):
    inputs = selective_inputs()
    x, dt, A, B, C, D, z, h0, dt_bias = (
        inputs[name].double() for name in "x dt A B C D z h0 dt_bias".split()
    )
    y, h_last = by_hand(x, torch.log1p(torch.exp(dt + dt_bias)), A, B, C, h0)
    actual_y, actual_h = selective_scan(**inputs, scan=scan)
    assert_close("y", actual_y, (y + D * x) * z / (1 + torch.exp(-z)), 1e-5)
    assert_close("h_last", actual_h, h_last, 1e-5)
    alone = {name: inputs[name] for name in "xABC"} | {"dt": inputs["dt"].abs()}
    for options in ({}, {"dt_bias": inputs["dt_bias"].abs()}):
        y, h_last = by_hand(x, alone["dt"] + options.get("dt_bias", 0), A, B, C)
        actual = selective_scan(**alone, **options, dt_softplus=False, scan=scan)
        for name, *pair in zip(("y", "h_last"), actual, (y, h_last), strict=True):
            assert_close(f"{name} alone", *pair, 1e-5)


def test_the_selective_scan_of_one_token_equals_that_of_a_sequence_of_one():
    inputs = selective_inputs(1)
    token = {n: t.squeeze(1) if n in ("x", "dt", "B", "C", "z") else t for n, t in inputs.items()}
    for rule in RULES:
        for reset in (None, torch.tensor([[True], [False]])):
            y, h = selective_scan(**inputs, rule=rule, reset=reset)
            of_token = None if reset is None else reset.squeeze(1)
            y_of_token, h_of_token = selective_scan(**token, rule=rule, reset=of_token)
            assert_close(f"{rule}: y", y_of_token, y.squeeze(1), 1e-6)
            assert_close(f"{rule}: h", h_of_token, h, 1e-6)


## The same recurrence, faster ---------------------------------------------------------------------


def test_log_space_errs_no_more_than_its_docstring_states():
    """Relative to the sum of the sizes of all that h adds up: by_hand of the absolute values."""
    for delta in ((1e-3, 1.0), (1.0, 50.0), (50.0, 2000.0)):
        for reset in (None, torch.rand(2, 150) < 0.2):
            inputs = {name: t.detach() for name, t in scan_inputs(150, delta).items()}
            sizes = {name: t.abs() for name, t in inputs.items()} | {"A": inputs["A"]}
            expected, size = (by_hand(**each, reset=reset) for each in (inputs, sizes))
            actual = mamba.scan_logspace(**inputs, reset=reset)
            bound = logspace_bound(inputs, 64, reset)
            for name, *each in zip(("y", "h_last"), actual, expected, size, strict=True):
                worst = ((each[0] - each[1]).abs() / each[2]).max().item()
                assert worst <= bound, f"{name}, Δ in {delta}: {worst:.1e}, stated {bound:.1e}"


@pytest.mark.parametrize("scan", ["chunked", "recompute"])
def test_no_chunk_is_too_long_no_decay_too_strong_and_no_last_token_lost(scan):
    """Dividing by running products of decays turns to NaN as chunks grow, and codes that take whole
    chunks only lose what is over. Decays here reach e^-160 in one step."""
    for seqlen, chunks in ((1, (1, 64)), (65, (1, 16, 64, 1000)), (129, (64, 128))):
        for chunk in chunks:
            where = f"l = {seqlen}, chunk {chunk}: "
            judge_scan(scan, scan_inputs(seqlen, (1e-3, 20.0)), chunk=chunk, where=where)


def test_recomputation_keeps_the_inputs_and_one_state_a_chunk_and_no_other_byte():
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()  # kept, so that no address is used twice
        kept[storage.data_ptr()] = storage
        return tensor

    shapes = [(1, 64, 8), (1, 64, 8), (8, 32), (1, 64, 32), (1, 64, 32)]
    x, delta, A, B, C = (torch.rand(shape, requires_grad=True) for shape in shapes)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mamba.scan_recompute(x, delta, -A, B, C, chunk=16)
    inputs, states = sum(math.prod(shape) for shape in shapes), 4 * 8 * 32
    assert sum(storage.nbytes() for storage in kept.values()) <= 4 * (inputs + states)


def test_recomputation_refuses_a_second_derivative_which_the_chunked_scan_has():
    inputs = {name: t.detach()[:1].double().requires_grad_() for name, t in scan_inputs(4).items()}
    inputs["A"] = inputs["A"].detach().expand(3, 4).clone().requires_grad_()
    for loss in (Tensor.sum, Tensor.norm):  # the gradient of a sum is constant and has no graph
        y, _ = mamba.scan_recompute(**inputs)
        with pytest.raises(RuntimeError, match=r"second derivatives.*chunked"):
            torch.autograd.grad(loss(y), inputs["x"], create_graph=True)
    assert gradgradcheck(lambda *tensors: mamba.scan_chunked(*tensors)[0], [*inputs.values()])


@pytest.mark.filterwarnings("ignore:Converting a tensor", "ignore:.torch.jit.trace. is deprecated")
def test_auto_recomputes_on_a_cpu_and_runs_chunks_for_compilers_transforms_and_tracers(monkeypatch):
    inputs = selective_inputs(4)

    def run(x):
        return selective_scan(**inputs | {"x": x})[0]

    def another_scan(*args, **kwargs):
        raise AssertionError("another scan was chosen")

    x, expected = inputs["x"], run(inputs["x"])
    with monkeypatch.context() as patch:
        patch.setattr(mamba, "scan_chunked", another_scan)
        assert torch.equal(run(x), expected)
    monkeypatch.setattr(mamba, "scan_recompute", another_scan)
    with pytest.raises(AssertionError, match="another scan"):
        run(x)
    for name, chosen in (
        ("torch.compile", torch.compile(run, backend="eager", fullgraph=True)(x)),
        ("torch.func", torch.func.vmap(run)(x.unsqueeze(0))[0]),
        ("torch.jit", torch.jit.trace(run, x, check_trace=False)(x)),
    ):
        assert_close(name, chosen, expected, 1e-5)


def test_gradients_for_each_sample_by_torch_func_are_those_of_each_alone():
    model, ids = random_model(), random_ids(3, 7)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row):
        logits = torch.func.functional_call(model, parameters, (row.unsqueeze(0),))
        return logits.square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    for i, row in enumerate(ids):
        expected = gradients_of(model(row.unsqueeze(0)).square().mean(), model)
        actual = {f"gradient of {name}": gradients[i] for name, gradients in each.items()}
        assert_all_close(actual, expected, 1e-4, f"sample {i}: ")


def test_a_compiled_model_is_the_model_and_is_compiled_whole():
    """fullgraph: a graph break is an error. The backend needs no C++ compiler."""
    model, ids = random_model(n_layer=1), random_ids(2, 3)
    torch.compiler.reset()
    whole, state = {"backend": "aot_eager", "fullgraph": True}, random_state(model, 2)
    forward, step = torch.compile(model, **whole), torch.compile(model.step, **whole)
    (logits, last), (right_logits, right_last) = pair = forward(ids, state), model(ids, state)
    assert_same_results(*pair)
    gradients = gradients_of(logits.square().mean() + last.h.sum(), model)
    right = gradients_of(right_logits.square().mean() + right_last.h.sum(), model)
    assert_all_close(gradients, right, 1e-4)
    assert_same_results(step(ids[:, 0], state), model.step(ids[:, 0], state), where="step: ")


## Precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scan", SCANS)
def test_the_state_has_float32_digits_whatever_the_precision_around_the_scan(scan, dtype):
    """Slow decays, between 0.9961 and 1, are all the same to bfloat16: h would never forget."""
    inputs = scan_inputs(300, delta=(1e-4, 1e-3), minus_A=(1.0, 4.0))
    dt = torch.log(torch.expm1(inputs.pop("delta"))).detach()
    inputs = {n: t.detach().to(dtype if n in "xBC" else t.dtype) for n, t in inputs.items()}
    D, z, dt = torch.randn(3).to(dtype), torch.randn(2, 300, 3).to(dtype), dt.to(dtype)
    y, h_last = by_hand(**inputs, delta=F.softplus(dt.double()))
    y = (y + D.double() * inputs["x"]) * F.silu(z.double())
    with torch.autocast("cpu", dtype):
        actual_y, actual_h = selective_scan(**inputs, D=D, z=z, dt=dt, scan=scan)
    assert (actual_y.dtype, actual_h.dtype) == (dtype, torch.float32)
    assert_close("h_last", actual_h, h_last, 1e-5)
    assert_close("y", actual_y, y, 1.02 * error_of(y.to(dtype), y))  # rounded once


@pytest.mark.parametrize("scan", SCANS)
def test_a_scan_of_bfloat16_computes_in_float32_and_one_float64_tensor_makes_it_float64(scan):
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(50).items()}
    short = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    tolerance = max(1e-5, 2 * logspace_bound(inputs, 64))
    for wide in (None, *inputs):
        mixed = short if wide is None else inputs | {wide: inputs[wide].double()}
        for name, *pair in zip(("y", "h"), SCANS[scan](**mixed), by_hand(**mixed), strict=True):
            assert pair[0].dtype == (torch.float64 if wide else torch.float32)
            assert_close(f"{name}, float64: {wide}", *pair, 1e-12 if wide else tolerance)


def test_A_and_delta_of_a_bfloat16_block_are_not_rounded_to_bfloat16():
    """On a bias of -6 bfloat16 has steps of 0.03: what a token says about Δ would be lost."""
    block, seen = randomise(MambaBlock(MambaConfig(d_model=16))).bfloat16(), {}
    for name in ("x_proj", "dt_proj"):
        module = getattr(block, name)
        module.register_forward_hook(lambda _, i, o, name=name: seen.update({name: (i[0], o)}))
    with torch.no_grad():
        block.dt_proj.bias -= 4
        block.dt_proj.weight /= 50
    _, state = block(torch.randn(1, 20, 16).bfloat16(), block.init_state(1))
    (x, low_rank_B_C), (_, dt) = seen["x_proj"], seen["dt_proj"]
    B, C = low_rank_B_C[..., 1:].split(16, dim=-1)
    delta = F.softplus(dt.double() + block.dt_proj.bias.double())
    _, h = by_hand(x, delta, -block.A_log.double().exp(), B, C)
    assert_close("h", state.h, h, 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_short_floats_lose_no_more_than_in_transformers_and_step_no_more_than_forward(shape):
    """The state is float32, and so is the stream between layers if the configuration says so."""
    ours, theirs = our_model_and_theirs(shape)
    ids = random_ids(2, 40, 40)
    for dtype, autocast in ((torch.bfloat16, False), (torch.float16, False), (None, True)):
        short, their_short = (copy.deepcopy(model).to(dtype) for model in (ours, theirs))
        exact, streams = copy.deepcopy(short).double(), []
        for layer in short.backbone.layers:
            layer.register_forward_hook(lambda _, i, out, streams=streams: streams.append(out[0]))
        expected = exact(ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            logits, state = short(ids, short.init_state(2))
            of_steps, last = run_steps(short, ids, short.init_state(2))
            of_theirs = their_short(ids).logits
        error, where = error_of(logits, expected), f"autocast: {autocast}, {dtype}"
        assert error <= 1.05 * error_of(of_theirs, expected), where
        assert error_of(of_steps, expected) <= 1.05 * error, where
        assert {each.h.dtype for each in (short.init_state(1), state, last)} == {torch.float32}
        wide = autocast or short.config.residual_in_fp32
        assert {stream.dtype for stream in streams} == {torch.float32 if wide else dtype}, where


## Training ----------------------------------------------------------------------------------------


def test_weight_decay_spares_A_D_biases_and_norms_and_forgets_no_parameter():
    model = random_model(tie_embeddings=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = model.param_groups(0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    everything = [id(parameter) for parameter in decayed["params"] + kept["params"]]
    assert sorted(everything) == sorted(names)
    spared = re.compile(r"A_log$|\.D$|bias$|norm(_f)?\.weight$")
    assert {names[id(p)] for p in kept["params"]} == {n for n in names.values() if spared.search(n)}
