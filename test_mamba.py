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
from torch.autograd import gradgradcheck

import mamba
from mamba import Mamba, MambaBlock, MambaConfig, MambaState, selective_scan

RULES = ("mamba", "zoh", "bilinear", "dirac")
SCANS = {
    "sequential": mamba.scan_sequential,
    "logspace": mamba.scan_logspace,
    "chunked": mamba.scan_chunked,
    "recompute": mamba.scan_recompute,
}
ALONG_TIME = ("x", "dt", "B", "C", "z", "reset")
ONE_BY_ONE = "no scan, token by token"
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


def selective_by_hand(
    x, dt, A, B, C, D=None, z=None, h0=None, *, dt_bias=None, dt_softplus=True, **options
) -> tuple[Tensor, Tensor]:
    delta = dt.double() if dt_bias is None else dt.double() + dt_bias.double()
    delta = torch.log1p(torch.exp(delta)) if dt_softplus else delta
    y, h_last = by_hand(x, delta, A, B, C, h0, **options)
    y = y if D is None else y + D.double() * x.double()
    return y if z is None else y * z.double() / (1 + torch.exp(-z.double())), h_last


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


def run_selective(scan: str, inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    """selective_scan by one of the scans; or by none, one call for each token."""
    if scan != ONE_BY_ONE:
        return selective_scan(**inputs, scan=scan, **options)
    ys, h = [], inputs["h0"]
    for t in range(inputs["x"].shape[1]):
        token = {
            name: value[:, t] if name in ALONG_TIME and value is not None else value
            for name, value in {**inputs, **options, "h0": h}.items()
        }
        y, h = selective_scan(**token)
        ys.append(y)
    return torch.stack(ys, dim=1), h


def gradients_of(loss: Tensor, leaves: nn.Module | dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = dict(leaves.named_parameters()) if isinstance(leaves, nn.Module) else leaves
    gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    return {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def values_and_gradients(scan, inputs: dict[str, Tensor], **options) -> tuple[dict, dict]:
    """y and h_last, and the gradients of all inputs for a loss that depends on both of them."""
    y, h_last = scan(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, generator=generator)).sum() for v in (y, h_last))
    return {"y": y, "h_last": h_last}, gradients_of(loss, inputs)


def judge_scan(scan: str, inputs, chunk=None, where="", **options) -> None:
    """Values and gradients of a scan equal those of the recurrence."""
    tolerance = 1e-5
    if scan == "logspace":
        tolerance = max(tolerance, 2 * logspace_bound(inputs, chunk or 64, options.get("reset")))
    expected = values_and_gradients(by_hand, inputs, **options)
    if scan != "sequential" and chunk is not None:
        options["chunk"] = chunk
    actual = values_and_gradients(SCANS[scan], inputs, **options)
    assert_all_close(actual[0], expected[0], tolerance, where)
    assert_all_close(actual[1], expected[1], 10 * tolerance, where)


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
    return randomise(Mamba(MambaConfig(**sizes | changes)))


def random_ids(batch: int, seqlen: int, vocab_size: int = 30) -> Tensor:
    return torch.randint(vocab_size, (batch, seqlen))


def random_state(model: Mamba, batch: int) -> MambaState:
    return model.init_state(batch).map(torch.randn_like)


def run_steps(model: Mamba, ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
    """Logits of all tokens, one `step` each."""
    logits = []
    for token_ids in ids.unbind(1):
        step_logits, state = model.step(token_ids, state)
        logits.append(step_logits)
    return torch.stack(logits, dim=1), state


def packed_documents(lengths=(5, 1, 7, 2, 1)) -> tuple[Tensor, Tensor]:
    """Rows of documents, and the reset that marks where they start: all of these lengths back to
    back; the first two behind padding, or the end of a text begun earlier; and the last token."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    reset = torch.zeros(3, sum(lengths), dtype=torch.bool)
    for row, first in enumerate((0, 2, len(lengths) - 1)):
        reset[row, starts[first:]] = True
    return random_ids(*reset.shape), reset


# Three models, by what differs from the defaults of both projects; and transformers' words for it.
SHAPES = {
    "defaults": {},
    "biases": dict(d_state=5, d_conv=3, expand=1.3, bias=True, conv_bias=False, dt_rank=3),
    "own head": dict(
        d_state=1, d_conv=2, expand=3, norm_eps=1e-2, tie_embeddings=False, residual_in_fp32=False
    ),
}
THEIR_FIELDS = dict(
    d_state="state_size", d_conv="conv_kernel", dt_rank="time_step_rank", bias="use_bias",
    conv_bias="use_conv_bias", norm_eps="layer_norm_epsilon", tie_embeddings="tie_word_embeddings",
)  # fmt: skip


def our_model_and_theirs(shape: str) -> tuple[Mamba, nn.Module]:
    """The same random weights in this project's Mamba and in transformers' MambaForCausalLM."""
    import transformers

    changes = SHAPES[shape]
    ours = random_model(**dict(d_model=24, vocab_size=40, d_state=16, bias=False) | changes)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    sizes |= {THEIR_FIELDS.get(name, name): value for name, value in changes.items()}
    config = transformers.MambaConfig(**sizes | {"expand": 2})
    config.intermediate_size = ours.config.d_inner  # its `expand` is an integer
    theirs = transformers.MambaForCausalLM(config).eval()
    weights = ours.state_dict()
    weights["backbone.embeddings.weight"] = weights.pop("backbone.embedding.weight")
    theirs.load_state_dict(weights, strict=True)
    return ours, theirs


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
    assert model.config.vocab_size == 50277 and state.conv.is_meta and state.h.is_meta
    assert sum(parameter.numel() for parameter in model.parameters()) == 129_135_360
    assert sum(tensor.nbytes for tensor in vars(state).values()) == 2_801_664
    assert "24 layers x 1536 x (16 + 3) x 4 bytes = 2.8 MB" in SOURCE


## The language model ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_gradients_and_greedy_continuations_equal_transformers(shape):
    """Continued here by steps, and there by reading the whole text again for every token."""
    ours, theirs = our_model_and_theirs(shape)
    ids, targets = random_ids(2, 17, 40), random_ids(2, 17, 40)
    our_logits, their_logits = ours(ids), theirs(ids).logits
    assert_close("logits", our_logits, their_logits, 1e-5)
    parameters = dict(theirs.named_parameters())
    parameters["backbone.embedding.weight"] = parameters.pop("backbone.embeddings.weight")
    actual, expected = (
        gradients_of(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), leaves)
        for logits, leaves in ((our_logits, ours), (their_logits, parameters))
    )
    assert_all_close(actual, expected, 1e-4)

    text = prompt = random_ids(6, 5, 40)
    logits, state = ours(prompt, ours.init_state(6))
    token_ids = logits[:, -1].argmax(-1)
    for _ in range(12):
        text = torch.cat([text, theirs(text).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(token_ids, text[:, -1])
        logits, state = ours.step(token_ids, state)
        token_ids = logits.argmax(-1)
    assert text[:, 5:].unique().numel() > 6, "a continuation that repeats itself proves little"


@pytest.mark.parametrize("scan", SCANS)
def test_texts_in_any_pieces_or_by_steps_give_the_values_and_gradients_of_the_whole(scan):
    """So no token sees a later one. Pieces shorter than the convolution's reach, d_conv - 1 = 4,
    and cuts beside a reset are where it goes wrong."""
    model, (ids, documents) = random_model(scan=scan, d_conv=5).double(), packed_documents()
    start = random_state(model, 3).map(Tensor.requires_grad_)

    def results(lengths, reset: Tensor) -> dict[str, Tensor]:
        state, logits = start, []
        for piece, piece_reset in zip(ids.split(lengths, 1), reset.split(lengths, 1), strict=True):
            piece_logits, state = model(piece, state, reset=piece_reset if reset.any() else None)
            logits.append(piece_logits)
        logits = torch.cat(logits, dim=1)
        loss = logits.square().sum() + state.h.square().sum() + state.conv.square().sum()
        leaves = {**dict(model.named_parameters()), **vars(start)}
        return {"logits": logits, **vars(state), **gradients_of(loss, leaves)}

    for reset in (documents, torch.zeros_like(documents)):
        whole = results([16], reset)
        for lengths in ((1, 15), (15, 1), (2, 1, 2, 11), (1, 1, 1, 1, 12), (6, 8, 2), (7, 6, 3)):
            assert_all_close(results(lengths, reset), whole, 1e-11, f"{lengths}: ")
    assert_same_results(run_steps(model, ids, start), model(ids, start), 1e-12, "steps: ")


@pytest.mark.parametrize("scan", SCANS)
def test_behind_a_reset_a_document_or_a_padded_prompt_is_as_if_it_stood_alone(scan):
    model, (ids, reset) = random_model(scan=scan).double(), packed_documents()
    start = random_state(model, len(ids))
    logits, last = model(ids, start, reset=reset)
    for row in range(len(ids)):
        state = start[:, row : row + 1]
        cuts = sorted({0, *reset[row].nonzero().flatten().tolist(), ids.shape[1]})
        for begin, end in itertools.pairwise(cuts):
            before = model.init_state(1) if reset[row, begin] else state
            alone, state = model(ids[row : row + 1, begin:end], before)
            where = f"row {row}, {begin}:{end}: "
            assert_close(f"{where}logits", logits[row, begin:end], alone[0], 1e-12)
        assert_all_close(vars(last[:, row]), vars(state[:, 0]), 1e-12, where)


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


def test_all_else_starts_as_in_the_official_code_also_the_second_time():
    def start_of(**changes) -> MambaBlock:
        block = MambaBlock(MambaConfig(64, dt_rank=16, bias=True, **changes))
        block.reset_parameters()
        return block

    block, ninth = start_of(d_state=20), start_of(n_layer=9, dt_init="constant", dt_scale=3.0)
    assert_close("A", block.A, -torch.arange(1.0, 21).expand(128, 20), 1e-6)
    assert torch.equal(block.D, torch.ones(128))
    assert not block.in_proj.bias.any() and not block.out_proj.bias.any()
    assert torch.equal(ninth.dt_proj.weight, torch.full((128, 16), 3 / 4))  # dt_scale / sqrt(rank)
    embedding = Mamba(MambaConfig(64, vocab_size=1000)).backbone.embedding.weight
    for name, weight, std in (
        ("dt_proj", block.dt_proj.weight, 1 / 4 / 3**0.5),
        ("out_proj of 1 layer", block.out_proj.weight, (3 * 128) ** -0.5),
        ("out_proj of 9 layers", ninth.out_proj.weight, (3 * 128) ** -0.5 / 3),
        ("embedding", embedding, 0.02),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(weight.mean().item()) < 0.05 * std, name


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_convolution_is_that_of_pytorch_behind_its_past_and_is_rounded_once(dtype, taps):
    """Of a sequence, and of one token after the other. Nothing is seen to the right."""
    raw, past = torch.randn(2, 40, 3).to(dtype), torch.randn(2, 3, taps - 1).to(dtype)
    conv1d = nn.Conv1d(3, 3, taps, groups=3).to(dtype)
    x, next_past = mamba.causal_conv(raw, conv1d, past)
    xs, last = [], past
    for raw_t in raw.unbind(1):
        x_t, last = mamba.causal_conv(raw_t, conv1d, last)
        xs.append(x_t)
    sequence = torch.cat([past, raw.mT], dim=-1)
    exact = F.silu(copy.deepcopy(conv1d).double()(sequence.double())).mT
    tolerance = 1e-14 + 1.02 * error_of(exact.to(dtype), exact)
    assert_close("x of the sequence", x, exact, tolerance)
    assert_close("x of its tokens", torch.stack(xs, dim=1), exact, tolerance)
    assert torch.equal(next_past, sequence[..., 40:]) and torch.equal(last, next_past)


## Selection, and the state ------------------------------------------------------------------------


@pytest.mark.parametrize("change", [*SCANS, "hook"])
def test_a_state_is_a_value_of_one_size_and_keeps_nothing_else_in_memory(change):
    block = MambaBlock(MambaConfig(d_model=8, scan="auto" if change == "hook" else change))
    if change == "hook":
        block.conv1d.register_forward_hook(lambda *arguments: None)
    start = block.init_state(1).map(torch.randn_like)
    kept = start.map(torch.clone)
    for seqlen in (1, 2, 500):
        u = torch.randn(1, seqlen, 8)
        out, state = block(u, start)
        assert_close("step", block.step(u[:, 0], start)[0], out[:, 0], 1e-6)
        out_of_wide, of_wide = block(u, MambaState(start.conv.double(), start.h))
        assert torch.equal(out_of_wide, out) and of_wide.conv.dtype == torch.float32
        for name, tensor in vars(state.detach()).items():
            assert tensor.shape == getattr(start, name).shape
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} after {seqlen}"
    assert torch.equal(start.conv, kept.conv) and torch.equal(start.h, kept.h)


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
    Every element has to be right by itself, and its gradients too: hence the quotients."""
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


## The recurrence and the selective scan -----------------------------------------------------------


@pytest.mark.parametrize("scan", SCANS)
def test_every_scan_equals_the_recurrence_in_values_and_gradients(scan):
    """Lengths 1, 2, prime, a chunk and one more; chunks of all sizes; few, many and all resets; no
    less exact after 300 tokens, nor for tiny inputs."""
    cases = ((1, None, 0), (2, None, 1), (17, 8, 0), (16, 8, 0.1), (13, 1, 0.5), (13, 99, 0.2))
    for rule in rules_of(scan):
        for seqlen, chunk, share in cases:
            reset = torch.rand(2, seqlen) < share if share else None
            where = f"rule {rule}, l = {seqlen}, chunk = {chunk}, {share:.0%} resets: "
            judge_scan(scan, scan_inputs(seqlen), chunk, where, rule=rule, reset=reset)
    inputs = scan_inputs(300)
    judge_scan(scan, inputs, where="300 tokens: ")
    tiny = {name: 1e-20 * inputs[name] if name in ("x", "h0") else inputs[name] for name in inputs}
    judge_scan(scan, tiny, where="tiny: ")


@pytest.mark.parametrize("scan", ["auto", *SCANS, ONE_BY_ONE])
def test_the_selective_scan_is_the_recurrence_with_softplus_D_and_the_gate_around_it(scan):
    """Each of its parts may be left out; one token, without the axis l, needs no scan."""
    reset, may_be_missing = torch.rand(2, 7) < 0.3, () if scan == ONE_BY_ONE else ("h0",)
    cases = [{"rule": rule, "reset": reset} for rule in rules_of(scan)]
    for options in (*cases, {"reset": None}, {"dt_softplus": False}):
        for without in (None, "D", "z", "dt_bias", *may_be_missing):
            inputs = {name: tensor.double() for name, tensor in selective_inputs().items()}
            inputs |= {without: None} if without else {}
            if "dt_softplus" in options:
                inputs["dt"] = inputs["dt"].exp()
            y, h_last = selective_by_hand(**inputs, **options)
            actual_y, actual_h = run_selective(scan, inputs, **options)
            assert_close(f"y without {without}, {options}", actual_y, y, 1e-12)
            assert_close(f"h_last without {without}, {options}", actual_h, h_last, 1e-12)


## The same recurrence, faster ---------------------------------------------------------------------


def test_recomputation_keeps_the_inputs_and_one_state_a_chunk_and_no_other_byte():
    """Of storage: the last state of a chunk, as a view, would keep all states of the chunk."""
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
    inputs = {name: t.detach().double().requires_grad_() for name, t in scan_inputs(2).items()}
    for loss in (Tensor.sum, Tensor.norm):  # the gradient of a sum is constant and has no graph
        y, _ = mamba.scan_recompute(**inputs)
        with pytest.raises(RuntimeError, match=r"second derivatives.*chunked"):
            torch.autograd.grad(loss(y), inputs["x"], create_graph=True)
    assert gradgradcheck(lambda *tensors: mamba.scan_chunked(*tensors)[0], [*inputs.values()])


## Precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scan", [*SCANS, ONE_BY_ONE])
def test_the_state_has_float32_digits_whatever_the_precision_around_the_scan(scan, dtype):
    """Slow decays, between 0.9961 and 1, are all the same to bfloat16: h would never forget."""
    inputs = scan_inputs(300, delta=(1e-4, 1e-3), minus_A=(1.0, 4.0))
    inputs |= {"dt": torch.log(torch.expm1(inputs.pop("delta"))), "z": torch.randn(2, 300, 3)}
    inputs |= {"D": torch.randn(3)}
    inputs = {name: tensor.detach().to(dtype) for name, tensor in inputs.items()}
    y, h_last = selective_by_hand(**inputs)
    with torch.autocast("cpu", dtype):
        actual_y, actual_h = run_selective(scan, inputs)
    assert (actual_y.dtype, actual_h.dtype) == (dtype, torch.float32)
    assert_close("h_last", actual_h, h_last, 1e-5)
    assert_close("y", actual_y, y, 1.02 * error_of(y.to(dtype), y))  # rounded once


@pytest.mark.parametrize("scan", [*SCANS, ONE_BY_ONE])
def test_one_float64_tensor_makes_a_scan_float64(scan):
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(20).items()}
    inputs["dt"] = inputs.pop("delta")
    for wide in inputs:
        mixed = inputs | {wide: inputs[wide].double()}
        y, h_last = selective_by_hand(**mixed, dt_softplus=False)
        actual_y, actual_h = run_selective(scan, mixed, dt_softplus=False)
        assert (actual_y.dtype, actual_h.dtype) == (mixed["x"].dtype, torch.float64)
        assert_close(f"h_last, float64: {wide}", actual_h, h_last, 1e-12)
        rounded_once = 1.02 * error_of(y.to(actual_y.dtype), y)
        assert_close(f"y, float64: {wide}", actual_y, y, 1e-12 + rounded_once)


def test_A_and_delta_of_a_bfloat16_block_are_not_rounded_to_bfloat16():
    """On a bias of -6 bfloat16 has steps of 0.03: what a token says about Δ would be lost."""
    block = randomise(MambaBlock(MambaConfig(d_model=16))).bfloat16()
    block.dt_proj.bias.data -= 4
    block.dt_proj.weight.data /= 50
    u, start = torch.randn(1, 20, 16).bfloat16(), block.init_state(1)
    x, _ = mamba.causal_conv(block.in_proj(u)[..., :32], block.conv1d, start.conv)
    dt, B, C = block.select(x)
    delta = F.softplus(dt.double() + block.dt_proj.bias.double())
    _, h = by_hand(x, delta, -block.A_log.double().exp(), B, C)
    assert_close("h", block(u, start)[1].h, h, 1e-5)


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
    network = nn.Sequential(nn.Linear(4, 8), MambaBlock(MambaConfig(8, bias=True)), nn.LayerNorm(8))
    spared = re.compile(r"A_log$|\.D$|bias$|norm(_f)?\.weight$|^2\.weight$")
    for module in (network, random_model(tie_embeddings=False)):
        decayed, kept = mamba.param_groups(module, 0.1)
        assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
        for group, is_spared in ((decayed, False), (kept, True)):
            named = [p for n, p in module.named_parameters() if bool(spared.search(n)) is is_spared]
            assert [*map(id, group["params"])] == [*map(id, named)]
    assert Mamba.param_groups is mamba.param_groups
