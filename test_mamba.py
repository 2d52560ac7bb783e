"""What mamba.py and generate.py claim, as sentences that a doubtful reader can run.

    python -m pytest test_mamba.py

No claim is judged by the code that makes it. The judges are the recurrence written out below in
float64, transformers' MambaForCausalLM, matrix exponentials, probabilities computed by hand, and
finite differences. Models are random in every parameter: a fresh one hides errors, because its
norms and D are 1 and its biases 0. An error is norm(actual - expected) / norm(expected).

The sections follow mamba.py, then generate.py.
"""

from __future__ import annotations

import ast
import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
import mamba
from mamba import Mamba, MambaBlock, MambaConfig, MambaState, selective_scan

RULES = ("mamba", "zoh", "bilinear", "dirac")
SCANS = {
    "sequential": mamba.scan_sequential,
    "logspace": mamba.scan_logspace,
    "chunked": mamba.scan_chunked,
    "recompute": mamba.scan_recompute,
}
# Log space has no logarithm for the negative decays of the bilinear rule.
SCANS_AND_RULES = [(s, r) for s in SCANS for r in RULES if (s, r) != ("logspace", "bilinear")]
SOURCE = Path(mamba.__file__)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


## ================================================================================================
## Judges and helpers
## ================================================================================================


@pytest.fixture(autouse=True)
def same_random_numbers_in_every_run():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors as small as these, threads do nothing but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-300)
    assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.1e}"


def assert_all_close(actual: dict, expected: dict, tolerance: float, where: str = "") -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(f"{where}{name}", actual[name], expected[name], tolerance)


def recurrence(x, delta, A, B, C, h0=None, *, rule="mamba", reset=None) -> tuple[Tensor, Tensor]:
    """The judge of all scans: (2a) and (2b) in float64, each rule as its equation is printed."""
    x, delta, A, B, C = (tensor.double() for tensor in (x, delta, A, B, C))
    h = 0 if h0 is None else h0.double()
    ys = []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        if rule == "bilinear":
            decay, gain = (1 + step * A / 2) / (1 - step * A / 2), step / (1 - step * A / 2)
        else:
            decay = torch.exp(step * A)
            gain = {"mamba": step, "zoh": torch.expm1(step * A) / A, "dirac": 1}[rule]
        if reset is not None:
            decay = torch.where(reset[:, t, None, None], 0, decay)
        h = decay * h + gain * B[:, t, None, :] * x[:, t, :, None]
        ys.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return torch.stack(ys, dim=1), h


def scan_inputs(seqlen: int, delta=(1e-3, 1.0), minus_A=(0.1, 8.0)) -> dict[str, Tensor]:
    """x, delta, A, B, C and h0 of a scan, delta and -A log-uniform between two bounds."""
    batch, d_inner, d_state = 2, 3, 4

    def log_uniform(bounds, *shape):
        low, high = map(math.log, bounds)
        return torch.empty(shape).uniform_(low, high).exp()

    inputs = {
        "x": torch.randn(batch, seqlen, d_inner),
        "delta": log_uniform(delta, batch, seqlen, d_inner),
        "A": -log_uniform(minus_A, d_inner, d_state),
        "B": torch.randn(batch, seqlen, d_state),
        "C": torch.randn(batch, seqlen, d_state),
        "h0": torch.randn(batch, d_inner, d_state),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def values_and_gradients(scan, inputs: dict[str, Tensor], **options) -> tuple[dict, dict]:
    """y and h_last, and the gradients of all inputs for a loss that depends on both of them."""
    y, h_last = scan(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, generator=generator)).sum() for v in (y, h_last))
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    names = [f"gradient of {name}" for name in inputs]
    return {"y": y, "h_last": h_last}, dict(zip(names, gradients, strict=True))


def check_scan(scan: str, inputs, *, chunk=None, where="", together=(), **options) -> None:
    """Values and gradients of a scan equal those of the recurrence.

    together: names of inputs whose gradients, times these inputs, are judged as one vector. The
    gradient of Δ is exactly zero where exp(ΔA) is, and no rounding is small relative to that.
    """
    tolerance = 1e-5
    if scan == "logspace":
        tolerance = max(tolerance, 2 * logspace_bound(inputs, chunk or 64, options.get("reset")))
    values, gradients = values_and_gradients(recurrence, inputs, **options)
    if scan != "sequential" and chunk is not None:
        options["chunk"] = chunk
    actual_values, actual_gradients = values_and_gradients(SCANS[scan], inputs, **options)
    if together:

        def weigh(gradients):
            parts = [inputs[name] * gradients[f"gradient of {name}"] for name in together]
            return {"gradients": torch.cat([part.flatten() for part in parts])}

        gradients, actual_gradients = weigh(gradients), weigh(actual_gradients)
    assert_all_close(actual_values, values, tolerance, where)
    assert_all_close(actual_gradients, gradients, 10 * tolerance, where)


def logspace_bound(inputs: dict[str, Tensor], chunk: int, reset: Tensor | None) -> float:
    """The error that scan_logspace states: ε (|A| ΣΔ + 104 resets), largest over the chunks."""
    sums = [part.sum(1).max().item() for part in inputs["delta"].split(chunk, dim=1)]
    resets = 0 if reset is None else max(p.sum(1).max().item() for p in reset.split(chunk, dim=1))
    return torch.finfo().eps * (inputs["A"].abs().max().item() * max(sums) + 104 * resets)


@torch.no_grad()
def randomise(module: torch.nn.Module) -> torch.nn.Module:
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


def run_pieces(model: Mamba, pieces, state: MambaState, **options) -> tuple[Tensor, MambaState]:
    """Logits of all pieces, each continuing from the state that the piece before it returned."""
    logits = []
    for i, piece in enumerate(pieces):
        here = {name: option[i] for name, option in options.items()}
        piece_logits, state = model(piece, state, **here)
        logits.append(piece_logits)
    return torch.cat(logits, dim=1), state


def run_steps(model: Mamba, ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
    """Logits of all tokens, one `step` each."""
    logits = []
    for token_ids in ids.unbind(1):
        step_logits, state = model.step(token_ids, state)
        logits.append(step_logits)
    return torch.stack(logits, dim=1), state


def check_same_results(actual, expected, tolerance: float = 1e-5, where: str = "") -> None:
    """Both are (logits, state)."""
    (logits, state), (expected_logits, expected_state) = actual, expected
    assert_close(f"{where}logits", logits, expected_logits, tolerance)
    assert_all_close(vars(state), vars(expected_state), tolerance, where)


## ================================================================================================
## The file
## ================================================================================================


def test_importing_mamba_loads_torch_and_einops_alone_and_prints_nothing():
    code = (
        "import sys, torch, einops; before = set(sys.modules); import mamba;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "new -= {'mamba', 'torch', 'einops', *sys.stdlib_module_names}; assert not new, new"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE.parent, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_file_without_its_teaching_lines_is_the_same_program():
    source = SOURCE.read_text()
    stripped = "".join(
        line for line in source.splitlines(keepends=True) if not re.match(r" *##", line)
    )  # grep -v '^ *##'
    assert "##" not in stripped
    assert ast.dump(ast.parse(stripped)) == ast.dump(ast.parse(source))


## ================================================================================================
## The whole model, against transformers
## ================================================================================================

# The same model in both vocabularies. What a pair does not mention has equal defaults.
SHAPES = {
    "all defaults": ({}, {}),
    "d_state 5, d_conv 3, expand 1, biases, no conv bias": (
        {"d_state": 5, "d_conv": 3, "expand": 1, "bias": True, "conv_bias": False, "dt_rank": 3},
        {
            **{"state_size": 5, "conv_kernel": 3, "expand": 1, "time_step_rank": 3},
            **{"use_bias": True, "use_conv_bias": False, "intermediate_size": 24},
        },
    ),
    "d_state 1, d_conv 2, expand 3, own head, own eps, stream as it comes": (
        {
            **{"d_state": 1, "d_conv": 2, "expand": 3, "norm_eps": 1e-2},
            **{"tie_embeddings": False, "residual_in_fp32": False},
        },
        {
            **{"state_size": 1, "conv_kernel": 2, "expand": 3, "layer_norm_epsilon": 1e-2},
            **{"tie_word_embeddings": False, "residual_in_fp32": False, "intermediate_size": 72},
        },
    ),
}


def our_model_and_theirs(shape: str) -> tuple[Mamba, torch.nn.Module]:
    """The same random weights in this project's Mamba and in transformers' MambaForCausalLM."""
    import transformers

    our_changes, their_changes = SHAPES[shape]
    ours = random_model(
        **{"d_model": 24, "vocab_size": 40, "d_state": 16, "bias": False, **our_changes}
    )
    config = transformers.MambaConfig(
        **{"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 40, **their_changes}
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    theirs.load_state_dict({their_name(k): v for k, v in ours.state_dict().items()}, strict=True)
    return ours, theirs


def their_name(name: str) -> str:
    return name.replace("backbone.embedding.", "backbone.embeddings.")


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_of_all_parameters_equal_transformers(shape):
    ours, theirs = our_model_and_theirs(shape)
    ids, targets = random_ids(2, 17, 40), random_ids(2, 17, 40)
    our_logits, their_logits = ours(ids), theirs(ids).logits
    assert_close("logits", our_logits, their_logits, 1e-5)
    for logits in (our_logits, their_logits):
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    their_parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        theirs_of_it = their_parameters.pop(their_name(name))
        assert_close(f"gradient of {name}", parameter.grad, theirs_of_it.grad, 1e-4)
    assert not their_parameters


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


@needs_gpu
@pytest.mark.parametrize("scan", SCANS)
def test_a_gpu_gives_the_numbers_of_the_cpu(scan):
    model, ids = random_model(scan=scan), random_ids(2, 70)
    mask, reset = torch.ones(2, 70, dtype=torch.bool), torch.zeros(2, 70, dtype=torch.bool)
    mask[0, :5], reset[:, 40] = False, True
    numbers, internals = {}, []
    model(ids, mask=mask, reset=reset, internals=internals)
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        options = {"mask": mask.to(device), "reset": reset.to(device)}
        logits, state = there(ids.to(device), there.init_state(2), **options)
        logits.square().mean().backward()
        next_logits, state = there.step(ids[:, -1].to(device), state)
        gradients = {name: p.grad.cpu() for name, p in there.named_parameters()}
        outputs = {"logits": logits[mask], "next logits": next_logits, "h": state.h}
        numbers[device] = {name: t.cpu() for name, t in outputs.items()}, gradients
        tokens = list(
            generate.stream(there, ids[:, :9].to(device), max_new_tokens=9, temperature=0)
        )
        numbers[device][0]["tokens"] = torch.stack(tokens).cpu()
    # As in check_scan: log space within what it states about itself, the others within 1e-5.
    bound = max(logspace_bound(layer, 64, reset) for layer in internals)
    tolerance = max(1e-5, 2 * bound) if scan == "logspace" else 1e-5
    assert_all_close(numbers["cuda"][0], numbers["cpu"][0], tolerance)
    assert_all_close(numbers["cuda"][1], numbers["cpu"][1], 10 * tolerance, "gradient of ")


## ================================================================================================
## Initialisation
## ================================================================================================


def test_initial_step_sizes_are_log_uniform_from_dt_min_to_dt_max_and_not_below_the_floor():
    changes = {"d_model": 2000, "dt_rank": 1, "d_state": 1, "dt_min": 0.002, "dt_max": 0.3}
    delta = F.softplus(MambaBlock(MambaConfig(**changes)).dt_proj.bias.double())
    quantiles = (delta.log() - math.log(0.002)) / math.log(0.3 / 0.002)
    uniform = (torch.arange(4000) + 0.5) / 4000
    assert_close("sorted quantiles of Δ", quantiles.sort().values, uniform, 0.05)
    assert quantiles.min() > -1e-6 and quantiles.max() < 1 + 1e-6
    floored = F.softplus(MambaBlock(MambaConfig(**changes, dt_init_floor=0.05)).dt_proj.bias)
    assert floored.min().item() == pytest.approx(0.05) and floored.max() > 0.2


def test_A_starts_at_minus_one_to_minus_n_and_D_at_one():
    block = MambaBlock(MambaConfig(d_model=8, d_state=6))
    expected = -torch.tensor([1.0, 2, 3, 4, 5, 6]).expand(16, 6)
    assert_close("A", block.A, expected, 1e-6)
    assert torch.equal(block.D, torch.ones(16))


def test_every_block_starts_smaller_by_the_root_of_the_number_of_layers():
    def std_of_out_proj(n_layer: int) -> float:
        model = Mamba(MambaConfig(d_model=64, n_layer=n_layer, vocab_size=8, bias=True))
        assert not any(layer.mixer.out_proj.bias.any() for layer in model.backbone.layers)
        return model.backbone.layers[0].mixer.out_proj.weight.std().item()

    assert std_of_out_proj(1) == pytest.approx(3 * std_of_out_proj(9), rel=0.05)


def test_initialising_twice_does_not_scale_twice():
    model = Mamba(MambaConfig(d_model=64, n_layer=4, vocab_size=8))
    once = model.backbone.layers[0].mixer.out_proj.weight.std().item()
    model.reset_parameters()
    assert model.backbone.layers[0].mixer.out_proj.weight.std().item() == pytest.approx(once, 0.05)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("d_model", 8.0), ("n_layer", 0), ("d_conv", -1), ("vocab_size", True)),
        *(("tie_embeddings", "false"), ("norm_eps", "1e-5"), ("dt_min", 0), ("dt_init", "zeros")),
    ],
)
def test_a_configuration_value_of_the_wrong_kind_is_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*{value!r}"):
        MambaConfig(**{"d_model": 8, name: value})


def test_embeddings_start_with_standard_deviation_two_hundredths():
    weight = Mamba(MambaConfig(d_model=64, vocab_size=1000)).backbone.embedding.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(weight.mean().item()) < 0.001


@pytest.mark.parametrize("dt_init", ["constant", "random"])
def test_dt_proj_starts_at_dt_scale_over_the_root_of_its_rank(dt_init):
    config = MambaConfig(d_model=64, dt_rank=16, dt_scale=3.0, dt_init=dt_init)
    weight = MambaBlock(config).dt_proj.weight
    bound = 3 / 4
    if dt_init == "constant":
        assert torch.equal(weight, torch.full_like(weight, bound))
    else:
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_weight_decay_spares_A_D_biases_and_norms_and_forgets_no_parameter():
    model = random_model(tie_embeddings=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = model.param_groups(0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    everything = [id(parameter) for parameter in decayed["params"] + kept["params"]]
    assert sorted(everything) == sorted(names)
    spared = re.compile(r"A_log$|\.D$|bias$|norm(_f)?\.weight$")
    assert {names[id(p)] for p in kept["params"]} == {n for n in names.values() if spared.search(n)}


## ================================================================================================
## One sequence in several ways
## ================================================================================================


@pytest.mark.parametrize(
    "changes", [{"rule": rule} for rule in RULES] + [{"d_conv": 1, "conv_bias": False}], ids=str
)
def test_step_by_step_equals_forward_under_every_rule_and_without_a_convolution(changes):
    model = random_model(**changes)
    ids, state = random_ids(2, 11), random_state(model, 2)
    check_same_results(run_steps(model, ids, state), model(ids, state))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(
    "lengths", [(11, 12), (1, 22), (22, 1), (2, 1, 2, 18), (1, 1, 1, 1, 19), (7, 3, 13)], ids=str
)
def test_feeding_a_sequence_in_pieces_equals_feeding_it_whole(lengths, scan):
    """Pieces shorter than the convolution's reach, d_conv - 1 = 4, are where it goes wrong."""
    model = random_model(scan=scan, d_conv=5)
    ids, state = random_ids(2, 23), random_state(model, 2)
    pieces = run_pieces(model, ids.split(lengths, dim=1), state)
    check_same_results(pieces, model(ids, state), 3e-5 if scan == "logspace" else 1e-5)


@pytest.mark.parametrize("scan", SCANS)
def test_gradients_through_a_carried_state_equal_those_of_the_whole_sequence(scan):
    model = random_model(scan=scan)
    ids, state = random_ids(2, 13), random_state(model, 2)

    def gradients(pieces) -> dict[str, Tensor]:
        start = state.map(lambda tensor: tensor.clone().requires_grad_())
        logits, last = run_pieces(model, pieces, start)
        loss = logits.square().sum() + last.h.square().sum() + last.conv.square().sum()
        leaves = {**dict(model.named_parameters()), **vars(start)}
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    assert_all_close(gradients(ids.split([2, 6, 5], dim=1)), gradients([ids]), 1e-4, "gradient of ")


@pytest.mark.parametrize("rule", ["mamba", "dirac"])
@pytest.mark.parametrize("lengths", [(9,), (4, 5), (1, 7, 1)], ids=str)
def test_a_left_padded_batch_gives_each_prompt_its_own_numbers(lengths, rule):
    """Whole and in pieces, some of which are nothing but padding for some of the prompts."""
    model = random_model(rule=rule)
    tokens_in_row = [9, 1, 2, 6]
    ids = random_ids(4, 9)  # what stands in the padding must not matter
    mask = torch.stack([torch.arange(9) >= 9 - length for length in tokens_in_row])
    next_ids = random_ids(4, 3)

    pieces, masks = ids.split(lengths, dim=1), mask.split(lengths, dim=1)
    logits, state = run_pieces(model, pieces, model.init_state(4), mask=masks)
    continued = run_steps(model, next_ids, state)
    for row, length in enumerate(tokens_in_row):
        alone = model(ids[row : row + 1, -length:], model.init_state(1))
        padded = (logits[row : row + 1, -length:], state[:, row : row + 1])
        check_same_results(padded, alone, where=f"prompt of {length}: ")
        alone = run_steps(model, next_ids[row : row + 1], alone[1])
        padded = (continued[0][row : row + 1], continued[1][:, row : row + 1])
        check_same_results(padded, alone, where=f"after a prompt of {length}: ")


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[True, True, False]]),
        torch.tensor([[True, False, True]]),
        torch.tensor([[0, 1, 1]]),
        torch.tensor([[False], [True]]),
        torch.tensor([[False, True]]),
        torch.tensor([[False, True, True, True]]),
        torch.tensor([[False]]),
    ],
    ids=["right padding", "a hole", "not bool", "two rows", "short", "long", "one for all"],
)
def test_a_mask_that_is_not_left_padding_is_refused(mask):
    with pytest.raises(ValueError, match="mask"):
        random_model()(random_ids(1, 3), mask=mask)


def test_padding_after_tokens_is_refused_even_when_it_starts_a_piece():
    model = random_model()
    _, state = model(random_ids(2, 3), model.init_state(2))
    with pytest.raises(ValueError, match="mask"):
        model(random_ids(2, 3), state, mask=torch.tensor([[True] * 3, [False, True, True]]))


@pytest.mark.parametrize("reset", [torch.ones(1, 2) > 0, torch.ones(1, 1) > 0, torch.ones(1, 3)])
def test_a_reset_that_is_not_one_bool_for_each_token_is_refused(reset):
    with pytest.raises(ValueError, match="reset"):
        random_model()(random_ids(1, 3), reset=reset)


def packed_documents(lengths=(5, 1, 7, 2, 1)) -> tuple[Tensor, Tensor]:
    """Two rows of documents back to back, and the reset that marks where each of them starts."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    ids, reset = random_ids(2, sum(lengths)), torch.zeros(2, sum(lengths), dtype=torch.bool)
    reset[0, starts] = True
    reset[1, starts[2:]] = True  # the second row's first document is longer
    return ids, reset


@pytest.mark.parametrize("scan", SCANS)
def test_packed_documents_with_resets_equal_separate_documents(scan):
    model = random_model(scan=scan)
    ids, reset = packed_documents()
    logits, state = model(ids, model.init_state(2), reset=reset)
    for row in range(2):
        starts = {0, *reset[row].nonzero().flatten().tolist()}
        for start, end in zip(sorted(starts), [*sorted(starts - {0}), ids.shape[1]], strict=True):
            alone, last = model(ids[row : row + 1, start:end], model.init_state(1))
            assert_close(f"document {start}:{end}", logits[row, start:end], alone[0], 3e-5)
        assert_all_close(vars(state[:, row]), vars(last[:, 0]), 3e-5, "state of the last ")


@pytest.mark.parametrize("scan", SCANS)
def test_no_gradient_crosses_a_reset(scan):
    """Exactly none, but in log space, where it is a difference of equal sums, rounded."""
    block = randomise(MambaBlock(MambaConfig(d_model=8, scan=scan)))
    u = torch.randn(1, 12, 8, requires_grad=True)
    reset = (torch.arange(12) == 5).unsqueeze(0)
    y, state = block(u, block.init_state(1), reset=reset)
    (y[:, 5:].sum() + state.h.sum()).backward()
    assert u.grad[:, :5].norm() <= (1e-5 if scan == "logspace" else 0) * u.grad.norm()
    assert u.grad[:, 5:].abs().sum(-1).all()


@pytest.mark.parametrize("scan", SCANS)
def test_a_sequence_with_resets_may_be_cut_anywhere(scan):
    """Also right behind a reset, where the next piece's convolution must not see beyond it."""
    model = random_model(scan=scan)
    ids, reset = packed_documents()
    state = random_state(model, 2)
    whole = model(ids, state, reset=reset)
    for cut in range(1, ids.shape[1]):
        lengths = [cut, ids.shape[1] - cut]
        pieces = run_pieces(
            model, ids.split(lengths, dim=1), state, reset=reset.split(lengths, dim=1)
        )
        check_same_results(pieces, whole, 3e-5, f"cut at {cut}: ")


def test_a_reset_at_the_first_token_forgets_the_state():
    model = random_model()
    ids, reset = random_ids(2, 6), torch.arange(6).expand(2, 6) == 0
    check_same_results(
        model(ids, random_state(model, 2), reset=reset), model(ids, model.init_state(2))
    )


@pytest.mark.parametrize("scan", SCANS)
def test_a_later_token_changes_nothing_before_it_and_everything_after_it(scan):
    model = random_model(scan=scan)
    ids = random_ids(1, 21)
    before = model(ids)
    for t in (0, 10, 20):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 30
        differs = (model(changed) != before).any(-1)[0]
        assert torch.equal(differs, torch.arange(21) >= t)


@pytest.mark.parametrize("bad", [-1, 32, 1000])
def test_a_token_id_without_a_row_is_named(bad):
    ids = random_ids(2, 5)
    ids[1, 3] = bad
    with pytest.raises(IndexError, match=rf"\[0, 32\).*{bad}"):
        random_model()(ids)


@pytest.mark.parametrize("ids", [torch.rand(2, 5), torch.ones(2, 5) > 0, torch.ones(5, dtype=int)])
def test_ids_of_the_wrong_type_or_shape_are_refused(ids):
    with pytest.raises(ValueError, match=r"\(batch, seqlen\)"):
        random_model()(ids)


## ================================================================================================
## The block
## ================================================================================================


def test_the_recurrence_over_the_internals_gives_every_layers_state_and_the_logits():
    model, internals = random_model(), []
    ids, start = random_ids(2, 9), random_state(model, 2)
    logits, state = model(ids, start, internals=internals)
    u = model.backbone.embedding(ids)
    for i, (layer, seen) in enumerate(zip(model.backbone.layers, internals, strict=True)):
        block, x, delta = layer.mixer, seen["x"], seen["delta"]
        expected = torch.log1p(torch.exp(seen["dt"] + block.dt_proj.bias))
        assert_close(f"delta of layer {i}", delta, expected, 1e-6)
        y, h = recurrence(x, delta, -block.A_log.exp(), seen["B"], seen["C"], start.h[i])
        assert_close(f"h of layer {i}", state.h[i], h, 1e-5)
        z = block.in_proj(layer.norm(u))[..., 32:]
        u = u + block.out_proj(((y + block.D * x) * z * torch.sigmoid(z)).float())
    assert_close("logits", logits, model.lm_head(model.backbone.norm_f(u)), 1e-5)


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


## ================================================================================================
## Selection and discretisation
## ================================================================================================


@pytest.mark.parametrize("rule", ["mamba", "zoh"])
def test_a_small_delta_skips_the_token_and_a_large_one_forgets_the_past(rule):
    inputs = scan_inputs(6)
    inputs["delta"] = torch.full_like(inputs["delta"], 1e-8)
    _, h_last = mamba.scan_sequential(**inputs, rule=rule)
    assert_close("h after Δ -> 0", h_last, inputs["h0"], 1e-6)
    inputs["delta"] = torch.full_like(inputs["delta"], 2000.0)
    _, h_last = mamba.scan_sequential(**inputs, rule=rule)
    inputs["h0"] = 1000 * inputs["h0"]
    _, h_of_another_past = mamba.scan_sequential(**inputs, rule=rule)
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


@pytest.mark.parametrize(
    ("dtype", "tolerance", "of_gradients"),
    [(torch.float32, 1e-6, 1e-4), (torch.float64, 1e-13, 1e-12)],
)
def test_zoh_is_the_matrix_exponential_of_the_held_system_down_to_delta_A_of_zero(
    dtype, tolerance, of_gradients
):
    """Holding x makes (h, x) one linear system: exp(Δ [[A, B], [0, 0]]) = [[Ā, B̄], [0, 1]].

    Every element has to be right by itself, and its gradients too: hence the quotients.
    """
    A = -torch.tensor([0, 1e-12, 1e-7, 1e-4, 0.01, 0.033, 0.034, 0.1, 1, 5], dtype=dtype)
    delta, B = torch.full_like(A, 0.9), torch.tensor([1.7], dtype=dtype)
    leaves = [delta.requires_grad_(), A.requires_grad_()]
    bars = mamba.discretize(delta, A.unsqueeze(-1), B, "zoh")

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    system = torch.zeros(len(A), 2, 2, dtype=torch.float64)
    system[:, 0, 0], system[:, 0, 1] = exact[0] * exact[1], exact[0] * B
    exponential = torch.linalg.matrix_exp(system)

    actual, expected = [bars[0].squeeze(-1), bars[1].squeeze(-1)], exponential[:, 0].unbind(-1)
    actual += torch.autograd.grad(bars[1].sum(), leaves)
    expected += torch.autograd.grad(expected[1].sum(), exact)
    names = ("A_bar", "B_bar", "gradient of B_bar by delta", "gradient of B_bar by A")
    for name, a, b in zip(names, actual, expected, strict=True):
        assert_close(
            f"{name} / exact",
            a / b,
            torch.ones(len(A)),
            of_gradients if "by" in name else tolerance,
        )


## ================================================================================================
## Scans
## ================================================================================================


@pytest.mark.parametrize(("scan", "rule"), SCANS_AND_RULES)
def test_every_scan_equals_the_recurrence_in_values_and_gradients(scan, rule):
    """Lengths 1, 2, odd, prime, a chunk and one less and one more; chunks of all sizes."""
    for seqlen, chunk in ((1, None), (2, None), (15, 8), (16, 8), (17, 8), (13, 1), (13, 99)):
        where = f"l = {seqlen}, chunk = {chunk}: "
        check_scan(scan, scan_inputs(seqlen), chunk=chunk, where=where, rule=rule)


@pytest.mark.parametrize("scan", SCANS)
def test_scans_are_as_exact_after_2000_tokens(scan):
    check_scan(scan, scan_inputs(2000))


@pytest.mark.parametrize(("scan", "rule"), SCANS_AND_RULES)
def test_scans_stay_exact_for_extreme_step_sizes_and_decays(scan, rule):
    """In each corner by itself, where no larger number hides a smaller one, and all mixed.

    In log space an error in Σ ΔA counts |ΔA| times in the gradients of Δ and A: not judged there.
    """
    names = ("x", "B", "C", "h0", *(() if scan == "logspace" else ("delta", "A")))
    for delta in ((1e-8, 1e-7), (20.0, 50.0), (1e-8, 50.0)):
        for minus_A in ((1e-4, 2e-4), (50.0, 100.0), (1e-4, 100.0)):
            inputs, where = scan_inputs(16, delta, minus_A), f"Δ in {delta}, -A in {minus_A}: "
            check_scan(scan, inputs, chunk=4, where=where, rule=rule, together=names)


@pytest.mark.parametrize("seqlen", [1, 65, 129])
@pytest.mark.parametrize("scan", ["chunked", "recompute"])
def test_no_chunk_is_too_long_and_no_last_token_is_lost(scan, seqlen):
    """Dividing by running products of decays turns to NaN as chunks grow, and codes that take whole
    chunks only lose what is over. Decays here reach e^-160 in one step."""
    for chunk in (1, 16, 64, 128, 1000):
        check_scan(scan, scan_inputs(seqlen, (1e-3, 20.0)), chunk=chunk, where=f"chunk {chunk}: ")


@pytest.mark.parametrize("scan", SCANS)
def test_scans_keep_the_digits_of_tiny_inputs(scan):
    inputs = scan_inputs(20)
    for name in ("x", "h0"):
        inputs[name] = (1e-20 * inputs[name]).detach().requires_grad_()
    check_scan(scan, inputs, chunk=8)


@pytest.mark.parametrize(("scan", "rule"), SCANS_AND_RULES)
def test_every_scan_equals_the_recurrence_across_resets(scan, rule):
    for share in (0.1, 0.5, 1.0):
        reset = torch.rand(2, 19) < share
        reset[0, -1] = True
        where = f"{share:.0%} resets: "
        check_scan(scan, scan_inputs(19), chunk=8, where=where, rule=rule, reset=reset)


@pytest.mark.parametrize(("scan", "rule"), SCANS_AND_RULES)
def test_gradients_of_every_scan_equal_finite_differences(scan, rule):
    inputs = {name: tensor.detach().double() for name, tensor in scan_inputs(5).items()}
    inputs = {
        **{name: inputs[name][:1, :, :2] for name in ("x", "delta", "B", "C")},
        **{"A": inputs["A"][:2, :2], "h0": inputs["h0"][:1, :2, :2]},
    }
    leaves = [inputs[name].clone().requires_grad_() for name in ("x", "delta", "A", "B", "C", "h0")]
    options = {} if scan == "sequential" else {"chunk": 2}
    assert gradcheck(lambda *args: SCANS[scan](*args, rule=rule, **options), leaves, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_the_table_of_the_rules_says_what_they_do(rule):
    row = re.search(rf'^##   "{rule}"((?: +-?[\d.]+){{6}})$', SOURCE.read_text(), re.MULTILINE)
    for delta, expected in zip(
        (0.1, 4.0), torch.tensor([*map(float, row[1].split())]).view(2, 3), strict=True
    ):
        one, steps = torch.ones(1, 500, 1), torch.full((1, 500, 1), delta)
        A_bar, B_bar = mamba.discretize(
            torch.tensor([delta]), -torch.ones(1, 1), torch.ones(1), rule
        )
        y, _ = mamba.scan_sequential(one, steps, -torch.ones(1, 1), one, one, rule=rule)
        actual = torch.stack([A_bar.squeeze(), B_bar.squeeze(), y[0, -1, 0]])
        assert torch.allclose(actual, expected, rtol=0, atol=6e-4)


def test_log_space_refuses_the_bilinear_rule_whose_decays_may_be_negative():
    with pytest.raises(ValueError, match="bilinear"):
        mamba.scan_logspace(**scan_inputs(3), rule="bilinear")


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


def test_recomputation_keeps_the_states_between_chunks_and_no_others():
    """The saved numbers do not grow with d_state, but for one state a chunk."""
    saved = []

    def note(tensor):
        saved.append(tensor.numel())
        return tensor

    x, delta, A = torch.randn(1, 64, 8), torch.rand(1, 64, 8), -torch.rand(8, 32)
    B, C = torch.randn(2, 1, 64, 32)
    leaves = [tensor.requires_grad_() for tensor in (x, delta, A, B, C)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mamba.scan_recompute(*leaves, chunk=16)
    states, inputs, A_each_time = 4 * 8 * 32, 2 * 64 * 8 + 2 * 64 * 32, 4 * 8 * 32
    assert sum(saved) <= states + inputs + A_each_time


def test_recomputation_refuses_a_second_derivative_which_it_does_not_know():
    inputs = scan_inputs(5)
    for loss in (Tensor.sum, Tensor.norm):  # the gradient of a sum is constant and has no graph
        y, _ = mamba.scan_recompute(**inputs)
        with pytest.raises(RuntimeError, match=r"second derivatives.*chunked"):
            torch.autograd.grad(loss(y), inputs["x"], create_graph=True)


def test_gradients_for_each_sample_by_torch_func_are_those_of_each_alone():
    model, ids = random_model(), random_ids(3, 7)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row):
        logits = torch.func.functional_call(model, parameters, (row.unsqueeze(0),))
        return logits.square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    for i, row in enumerate(ids):
        model.zero_grad()
        model(row.unsqueeze(0)).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert_close(f"{name}, sample {i}", each[name][i], parameter.grad, 1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_compiled_model_is_the_model_and_is_compiled_whole(device):
    """fullgraph: a graph break is an error. Forward, training and step."""
    model, ids = random_model().to(device), random_ids(2, 9).to(device)
    # On a CPU without a C++ compiler: what is traced and differentiated, run as it is.
    backend = "inductor" if device == "cuda" else "aot_eager"
    torch.compiler.reset()
    forward, step = (torch.compile(f, backend=backend, fullgraph=True) for f in (model, model.step))
    actual, expected = forward(ids), model(ids)
    assert_close("logits", actual, expected, 1e-5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = (
        torch.autograd.grad(logits.square().mean(), parameters) for logits in (actual, expected)
    )
    for name, *pair in zip(names, *gradients, strict=True):
        assert_close(f"gradient of {name}", *pair, 1e-4)
    with torch.no_grad():
        _, state = model(ids, model.init_state(2))
        (actual, after), (expected, wanted) = step(ids[:, 0], state), model.step(ids[:, 0], state)
    assert_close("logits of step", actual, expected, 1e-5)
    assert_close("h", after.h, wanted.h, 1e-5)


class BytesWritten(TorchDispatchMode):
    """Counts the bytes of every tensor that any operation returns, in forward and backward."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.total += sum(t.nbytes for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


## ================================================================================================
## The selective scan
## ================================================================================================


def selective_inputs(seqlen: int = 7) -> dict[str, Tensor]:
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(seqlen).items()}
    dt = 2 * torch.randn_like(inputs.pop("delta"))
    return {**inputs, "dt": dt, "D": torch.randn(3), "z": torch.randn_like(dt)}


@pytest.mark.parametrize("scan", ["auto", *SCANS])
def test_selective_scan_adds_softplus_D_and_the_gate_to_the_recurrence(scan):
    inputs, dt_bias = selective_inputs(), torch.randn(3)
    x, dt, A, B, C, D, z, h0 = (inputs[n].double() for n in ("x dt A B C D z h0".split()))
    delta = torch.log1p(torch.exp(dt + dt_bias))
    y, h_last = recurrence(x, delta, A, B, C, h0)
    actual_y, actual_h = selective_scan(**inputs, dt_bias=dt_bias, scan=scan)
    assert_close("y", actual_y, (y + D * x) * z / (1 + torch.exp(-z)), 1e-5)
    assert_close("h_last", actual_h, h_last, 1e-5)


def test_selective_scan_without_options_is_the_recurrence_alone():
    x, dt, A, B, C = (selective_inputs()[name] for name in ("x", "dt", "A", "B", "C"))
    y, _ = recurrence(x, dt.abs(), A, B, C)
    assert_close("y", selective_scan(x, dt.abs(), A, B, C, dt_softplus=False)[0], y, 1e-5)


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "z", "h0", "dt_bias", "reset"])
def test_a_tensor_of_the_wrong_shape_is_named(name):
    inputs = selective_inputs()
    inputs |= {"dt_bias": torch.randn(3), "reset": torch.zeros(2, 7, dtype=torch.bool)}
    inputs[name] = torch.cat([inputs[name]] * 2, dim=0)
    with pytest.raises(ValueError, match=rf"^{name} must have shape"):
        selective_scan(**inputs)


def test_complex_parameters_are_refused_and_not_cut_down_to_their_real_part():
    inputs = selective_inputs()
    inputs["A"] = inputs["A"].cfloat()
    with pytest.raises(ValueError, match=r"^A must be real"):
        selective_scan(**inputs)


def test_names_of_unknown_scans_and_rules_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"sequential.*'parallel'"):
        selective_scan(**selective_inputs(), scan="parallel")
    with pytest.raises(ValueError, match=r"bilinear.*'euler'"):
        selective_scan(**selective_inputs(), rule="euler")
    with pytest.raises(ValueError, match=r"bilinear.*'euler'"):
        MambaConfig(d_model=8, rule="euler")
    with pytest.raises(ValueError, match=r"sequential.*'parallel'"):
        MambaConfig(d_model=8, scan="parallel")


def test_an_explicit_triton_that_cannot_run_is_an_error_and_no_silent_fallback(monkeypatch):
    """Because tensors are on the CPU, with the interpreter off; because triton is not there."""
    if mamba.HAS_TRITON:
        monkeypatch.setattr(mamba.import_triton_scan(), "INTERPRETED", False)
        with pytest.raises(RuntimeError, match="on a GPU, got tensors on cpu"):
            selective_scan(**selective_inputs(), scan="triton")
    monkeypatch.setitem(sys.modules, "triton_scan", None)
    with pytest.raises(RuntimeError, match="triton_scan"):
        selective_scan(**selective_inputs(), scan="triton")


## ================================================================================================
## Precision
## ================================================================================================


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scan", SCANS)
def test_the_state_has_float32_digits_whatever_the_precision_around_the_scan(scan, dtype):
    """Slow decays, between 0.9961 and 1, are all the same to bfloat16: h would never forget."""
    inputs = scan_inputs(300, delta=(1e-4, 1e-3), minus_A=(1.0, 4.0))
    dt = torch.log(torch.expm1(inputs.pop("delta"))).detach()
    inputs = {n: t.detach().to(dtype if n in "xBC" else t.dtype) for n, t in inputs.items()}
    y, h_last = recurrence(**inputs, delta=F.softplus(dt.to(dtype).double()))
    with torch.autocast("cpu", dtype):
        actual_y, actual_h = selective_scan(**inputs, dt=dt.to(dtype), scan=scan)
    assert (actual_y.dtype, actual_h.dtype) == (dtype, torch.float32)
    assert_close("h_last", actual_h, h_last, 1e-5)
    assert_close("y", actual_y, y, torch.finfo(dtype).eps)


@pytest.mark.parametrize("scan", SCANS)
def test_a_scan_of_short_floats_computes_in_float32(scan):
    inputs = {name: tensor.detach().bfloat16() for name, tensor in scan_inputs(50).items()}
    for name, actual, expected in zip(
        ("y", "h_last"), SCANS[scan](**inputs), recurrence(**inputs), strict=True
    ):
        assert_close(name, actual, expected, 1e-4 if scan == "logspace" else 1e-5)


@pytest.mark.parametrize("scan", SCANS)
def test_autocast_changes_nothing_inside_a_scan(scan):
    inputs = scan_inputs(50)
    expected, expected_gradients = values_and_gradients(SCANS[scan], inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual, gradients = values_and_gradients(SCANS[scan], inputs)
    assert_all_close(actual, expected, 0)
    assert_all_close(gradients, expected_gradients, 0)


def test_A_and_delta_of_a_bfloat16_block_are_not_rounded_to_bfloat16():
    """On a bias of -6 bfloat16 has steps of 0.03: what a token says about Δ would be lost."""
    block, internals = randomise(MambaBlock(MambaConfig(d_model=16))).bfloat16(), []
    with torch.no_grad():
        block.dt_proj.bias -= 4
        block.dt_proj.weight /= 50
        block(torch.randn(1, 20, 16).bfloat16(), internals=internals)
    x, delta, A = (internals[0][name] for name in ("x", "delta", "A"))
    dt = block.dt_proj.weight.double() @ block.x_proj(x)[..., :1].double().mT
    expected = F.softplus(dt.mT + block.dt_proj.bias.double())
    assert_close("delta", delta, expected, 1e-3)
    assert_close("A", A, -block.A_log.double().exp(), 1e-6)


def test_the_norm_of_large_short_floats_is_that_of_float64():
    """1000 squared is infinite in float16."""
    norm, u = mamba.RMSNorm(16).half(), 1000 * torch.randn(3, 16).half()
    expected = u.double() / (u.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close("norm(u)", norm(u), expected, torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("residual_in_fp32", [True, False])
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_short_floats_stay_near_float64_and_keep_the_state_in_float32(how, residual_in_fp32):
    """So does the residual stream, if the configuration says so."""
    exact = random_model(d_model=32, d_state=16, residual_in_fp32=residual_in_fp32).double()
    autocast = how == "autocast"
    dtype = torch.float32 if autocast else getattr(torch, how)
    short, streams = copy.deepcopy(exact).to(dtype), []
    for layer in short.backbone.layers:
        layer.register_forward_hook(lambda layer, inputs, outputs: streams.append(outputs[0]))

    ids, next_ids = random_ids(2, 50), random_ids(2, 5)
    expected, exact_state = exact(ids, exact.init_state(2))
    expected_steps, _ = run_steps(exact, next_ids, exact_state)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, state = short(ids, short.init_state(2))
        logits_of_steps, last = run_steps(short, next_ids, state)
    assert_close("logits of forward", logits, expected, 2e-2)
    assert_close("logits of step", logits_of_steps, expected_steps, 2e-2)
    states = (short.init_state(1), state, last)
    assert [state.h.dtype for state in states] == [torch.float32] * 3
    stream_dtype = torch.float32 if residual_in_fp32 else dtype
    assert {stream.dtype for stream in streams} == {stream_dtype}


def test_a_float64_model_computes_in_float64():
    model = random_model().double()
    ids, state = random_ids(2, 15), random_state(model, 2)
    whole = model(ids, state)
    assert {whole[0].dtype, whole[1].h.dtype, whole[1].conv.dtype} == {torch.float64}
    check_same_results(run_steps(model, ids, state), whole, 1e-13)


## ================================================================================================
## The state
## ================================================================================================


def test_a_state_is_a_value_that_forward_and_step_do_not_change():
    model = random_model()
    state = random_state(model, 2)
    kept = state.clone()
    model(random_ids(2, 5), state)
    model.step(random_ids(2, 5)[:, 0], state)
    assert torch.equal(state.conv, kept.conv) and torch.equal(state.h, kept.h)


def test_a_state_keeps_nothing_of_the_sequence_but_its_own_numbers():
    block = MambaBlock(MambaConfig(d_model=8))
    for seqlen in (1, 2, 500):
        _, state = block(torch.randn(1, seqlen, 8), block.init_state(1))
        state = state.detach()
        assert (state.conv.shape, state.h.shape) == ((1, 16, 3), (1, 16, 16))
        for tensor in vars(state).values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("scan", SCANS)
def test_the_last_state_of_a_scan_does_not_keep_the_other_states_alive(scan):
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(50).items()}
    _, h_last = SCANS[scan](**inputs)
    assert h_last.untyped_storage().nbytes() == h_last.nbytes


@pytest.mark.parametrize(
    "changes", [{"n_layer": 3}, {"n_layer": 1}, {"d_state": 5}, {"d_conv": 1}, {"d_conv": 3}]
)
def test_the_state_of_another_model_is_refused(changes):
    model, stranger = random_model(), random_model(**changes)
    with pytest.raises(ValueError, match="state"):
        model(random_ids(2, 3), stranger.init_state(2))
    with pytest.raises(ValueError, match="state"):
        model.step(random_ids(2, 1)[:, 0], stranger.init_state(2))
    with pytest.raises(ValueError, match="state"):
        model(random_ids(2, 3), model.init_state(3))


def test_a_state_survives_a_file_that_may_hold_tensors_only(tmp_path):
    model = random_model()
    _, state = model(random_ids(2, 5), model.init_state(2))
    torch.save(vars(state), tmp_path / "state.pt")
    loaded = MambaState(**torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(loaded.conv, state.conv) and torch.equal(loaded.h, state.h)


## ================================================================================================
## Files
## ================================================================================================

ORIGINAL_CONFIG = {
    **{"d_model": 16, "n_layer": 2, "vocab_size": 30, "ssm_cfg": {}, "rms_norm": True},
    **{"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8},
}
ORIGINAL_SHAPES = {
    "backbone.embedding.weight": (32, 16),
    **{
        f"backbone.layers.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "norm.weight": (16,),
            "mixer.in_proj.weight": (64, 16),
            "mixer.conv1d.weight": (32, 1, 4),
            "mixer.conv1d.bias": (32,),
            "mixer.x_proj.weight": (33, 32),
            "mixer.dt_proj.weight": (32, 1),
            "mixer.dt_proj.bias": (32,),
            "mixer.A_log": (32, 16),
            "mixer.D": (32,),
            "mixer.out_proj.weight": (16, 32),
        }.items()
    },
    "backbone.norm_f.weight": (16,),
}


def original_weights() -> dict[str, Tensor]:
    """As state-spaces/mamba-* have them: the tied matrix is there under both of its names."""
    weights = {name: torch.randn(shape) for name, shape in ORIGINAL_SHAPES.items()}
    return {**weights, "lm_head.weight": weights["backbone.embedding.weight"]}


def write_original(folder: Path, weights: dict[str, Tensor], **changes) -> Path:
    (folder / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, **changes}))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def assert_same_weights(actual: Mamba, expected: dict[str, Tensor]) -> None:
    assert actual.state_dict().keys() == expected.keys()
    for name, tensor in actual.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_in_the_original_layout_loads_bit_by_bit_and_stays_tied(tmp_path):
    weights = original_weights()
    model = Mamba.from_pretrained(write_original(tmp_path, weights))
    assert_same_weights(model, weights)
    assert model.lm_head.weight is model.backbone.embedding.weight


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_bit_by_bit_with_its_whole_configuration(tied, tmp_path):
    changes = {"d_conv": 3, "dt_rank": 5, "norm_eps": 1e-3, "rule": "zoh", "tokenizer": "bytes"}
    model = random_model(**changes, tie_embeddings=tied, scan="sequential")
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = Mamba.from_pretrained(tmp_path / "new" / "folder", scan="sequential")
    assert loaded.config == model.config
    assert_same_weights(loaded, model.state_dict())
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == tied
    ids = random_ids(2, 5)
    assert torch.equal(loaded(ids), model(ids))


def test_saving_into_the_folder_that_the_model_came_from_is_safe(tmp_path):
    random_model().save_pretrained(tmp_path)
    model = Mamba.from_pretrained(tmp_path)
    with torch.no_grad():
        model.backbone.norm_f.weight += 1
    model.save_pretrained(tmp_path)
    assert_same_weights(Mamba.from_pretrained(tmp_path), model.state_dict())
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_dtype_is_float32_unless_asked_for_whatever_the_file_holds(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in original_weights().items()}
    folder = write_original(tmp_path, weights)
    assert {p.dtype for p in Mamba.from_pretrained(folder).parameters()} == {torch.float32}
    model = Mamba.from_pretrained(folder, dtype=torch.bfloat16)
    assert_same_weights(model, weights)
    assert model.lm_head.weight is model.backbone.embedding.weight


@pytest.mark.parametrize("name", ["backbone.layers.1.mixer.D", "backbone.embedding.weight"])
@pytest.mark.parametrize("fault", ["missing", "misshapen", "extra"])
def test_a_weight_that_is_missing_misshapen_or_too_many_is_named(fault, name, tmp_path):
    weights = original_weights()
    if fault == "missing":
        del weights[name]
        weights.pop("lm_head.weight" if "embedding" in name else "", None)
    elif fault == "misshapen":
        weights[name] = weights[name][1:]
        if "embedding" in name:
            weights["lm_head.weight"] = weights[name]
    else:
        name = name.replace("backbone", "backbones")
        weights[name] = torch.ones(1)
    with pytest.raises(RuntimeError, match=re.escape(name)):
        Mamba.from_pretrained(write_original(tmp_path, weights))


def test_a_head_that_contradicts_the_tied_embedding_is_refused(tmp_path):
    weights = {**original_weights(), "lm_head.weight": torch.randn(32, 16)}
    with pytest.raises(ValueError, match="lm_head"):
        Mamba.from_pretrained(write_original(tmp_path, weights))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ssm_cfg", {"layer": "Mamba2"}),
        ("ssm_cfg", {"n_groups": 4}),
        ("attn_layer_idx", [1]),
        ("d_intermediate", 64),
        ("rms_norm", False),
        ("d_stat", 16),
    ],
)
def test_a_configuration_of_another_architecture_is_refused_by_its_field(field, value, tmp_path):
    folder = write_original(tmp_path, original_weights(), **{field: value})
    with pytest.raises(ValueError, match="|".join(value) if field == "ssm_cfg" else field):
        Mamba.from_pretrained(folder)


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    for name in ("checkpoints/typo", "./typo", "typo", "", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor"):
            Mamba.from_pretrained(name)


def test_mamba_130m_has_129_135_360_parameters():
    with torch.device("meta"):
        model = Mamba(MambaConfig(d_model=768, n_layer=24))
    assert sum(parameter.numel() for parameter in model.parameters()) == 129_135_360


## ================================================================================================
## generate.py: the sampler
## ================================================================================================

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [10, 40, 5, 30, 15]),
        ({"temperature": 0.5}, [100, 1600, 25, 900, 225]),  # the squares
        ({"temperature": 2.0}, [10**0.5, 40**0.5, 5**0.5, 30**0.5, 15**0.5]),
        ({"top_k": 2}, [0, 40, 0, 30, 0]),
        ({"top_k": 9}, [10, 40, 5, 30, 15]),
        ({"top_p": 0.72}, [0, 40, 0, 30, 15]),  # two tokens make 0.70, three are needed
        ({"top_p": 0.68}, [0, 40, 0, 30, 0]),
        ({"top_p": 1e-9}, [0, 40, 0, 0, 0]),
        ({"min_p": 0.3}, [0, 40, 0, 30, 15]),  # 0.3 of 0.4 is 0.12
        ({"min_p": 1.0}, [0, 40, 0, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.85}, [0, 16, 0, 9, 0]),  # the squares are cut: 25 of 28.5
        ({"top_k": 4, "min_p": 0.3}, [0, 40, 0, 30, 15]),
        ({"top_k": 3, "top_p": 0.8}, [0, 40, 0, 30, 0]),  # of the mass that top-k leaves: 70 of 85
    ],
    ids=str,
)
def test_the_sampler_draws_each_token_as_often_as_its_probability_says(options, weights):
    draws = 20_000
    logits = PROBABILITIES.log().expand(draws, 5) + 7  # a constant changes nothing
    generator = torch.Generator().manual_seed(0)
    counts = generate.sample(logits, **options, generator=generator).bincount(minlength=5)
    expected = torch.tensor(weights) / sum(weights) * draws
    assert not counts[expected == 0].any()
    drawn = expected > 0
    chi_square = ((counts - expected).square() / expected)[drawn].sum().item()
    assert chi_square < 20, f"drawn {counts.tolist()}, expected {expected.tolist()}"


def test_temperature_zero_takes_the_most_probable_token_and_a_tiny_one_nearly_does():
    logits = torch.randn(50, 9)
    for temperature in (0, 1e-6, 1e-40):
        token_ids = generate.sample(logits, temperature=temperature)
        assert torch.equal(token_ids, logits.argmax(-1))


def test_the_repetition_penalty_lowers_what_was_seen_whatever_its_sign():
    logits = torch.tensor([[3.0, -3.0, 3.0, -3.0]])
    seen = torch.tensor([[True, True, False, False]])
    penalized = generate.penalize_repetition(logits, seen, 1.5)
    assert_close("logits", penalized, torch.tensor([[2.0, -4.5, 3.0, -3.0]]), 1e-6)


## ================================================================================================
## generate.py: the stream
## ================================================================================================


def streamed(model: Mamba, ids: Tensor, **options) -> Tensor:
    """(batch, new tokens)"""
    return torch.stack(list(generate.stream(model, ids, **options)), dim=1)


def scripted_model(script: Tensor, **changes) -> Mamba:
    """A model whose most probable tokens at the i-th call are script[:, i], whatever it reads."""
    model, calls = random_model(**changes), iter(script.unbind(1))

    def follow_script(lm_head, inputs, logits):
        one_hot = F.one_hot(next(calls), logits.shape[-1])
        return 100.0 * one_hot.view(len(one_hot), *[1] * (logits.ndim - 2), -1).expand_as(logits)

    model.lm_head.register_forward_hook(follow_script)
    return model


def test_greedy_streaming_equals_reading_the_whole_text_again_for_every_token():
    model = random_model()
    text = prompt = random_ids(3, 4)
    for _ in range(15):
        logits = model(text)[:, -1, :30]
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(streamed(model, prompt, max_new_tokens=15, temperature=0), text[:, 4:])


def test_with_a_huge_penalty_no_token_of_the_prompt_or_the_text_comes_again():
    model, ids = random_model(), random_ids(2, 4)
    options = {"max_new_tokens": 8, "temperature": 0, "repetition_penalty": 1e6}
    for prompt, new in zip(ids.tolist(), streamed(model, ids, **options).tolist(), strict=True):
        assert len(set(new)) == 8 and not set(new) & set(prompt)


def test_streams_with_one_seed_are_equal_and_leave_the_global_generator_alone():
    model, ids = random_model(), random_ids(2, 4)
    before = torch.get_rng_state()
    first, again, other = (streamed(model, ids, max_new_tokens=20, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_that_only_pad_the_vocabulary_are_never_sampled():
    """Even where they would be the most probable: the checkpoints have three such rows."""
    model = scripted_model(torch.full((4, 60), 30), vocab_size=29)
    assert model.lm_head.weight.shape[0] == 32
    assert streamed(model, random_ids(4, 3, 29), max_new_tokens=30).max() < 29
    assert streamed(model, random_ids(4, 3, 29), max_new_tokens=30, temperature=0).max() < 29


def test_a_prompt_with_an_id_that_only_pads_the_vocabulary_is_refused():
    model = random_model()
    assert model.config.padded_vocab_size > 30
    with pytest.raises(IndexError, match=r"\[0, 30\).*30"):
        next(generate.stream(model, torch.tensor([[3, 30]])))


def test_a_finished_row_repeats_the_end_token_until_all_rows_are_finished():
    script = torch.tensor([[5, 6, 0, 7, 8, 9, 9, 9], [5, 5, 5, 5, 0, 9, 9, 9]])
    tokens = streamed(scripted_model(script), random_ids(2, 3), temperature=0, eos_token_id=0)
    assert tokens.tolist() == [[5, 6, 0, 0, 0], [5, 5, 5, 5, 0]]
    tokens = streamed(scripted_model(script), random_ids(2, 3), temperature=0, max_new_tokens=7)
    assert torch.equal(tokens, script[:, :7])


def test_a_left_padded_batch_streams_each_prompts_own_continuation():
    model, lengths = random_model(), (7, 1, 3)
    ids = random_ids(3, 7)
    mask = torch.stack([torch.arange(7) >= 7 - length for length in lengths])
    options = {"max_new_tokens": 12, "temperature": 0, "repetition_penalty": 1.3}
    together = streamed(model, ids, mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = streamed(model, ids[row : row + 1, 7 - length :], **options)
        assert torch.equal(together[row], alone[0]), f"prompt of {length} tokens"


def test_streaming_switches_gradients_off_for_itself_alone():
    tokens = generate.stream(random_model(), random_ids(1, 3), max_new_tokens=2)
    next(tokens)
    assert torch.is_grad_enabled()


def test_streamed_text_is_whole_characters_and_adds_up_to_the_whole_text():
    text, tokenizer = "naïve – 3 € 😀 日本語\n", generate.ByteTokenizer()
    script = torch.tensor([tokenizer.encode(text)])
    model = scripted_model(script, vocab_size=256)
    options = {"max_new_tokens": script.shape[1], "temperature": 0}
    ids = (step.item() for step in generate.stream(model, random_ids(1, 3), **options))
    pieces = list(tokenizer.decode_stream(ids))
    assert "".join(pieces) == text == tokenizer.decode(script[0].tolist())
    assert not any("\ufffd" in piece for piece in pieces), "half of a character"


def test_generated_text_drops_a_character_that_the_last_token_leaves_incomplete():
    script = torch.tensor([list("café €".encode())])
    for length, expected in ((3, "caf"), (4, "caf"), (5, "café"), (8, "café "), (9, "café €")):
        model, tokenizer = scripted_model(script, vocab_size=256), generate.ByteTokenizer()
        options = {"max_new_tokens": length, "temperature": 0}
        assert generate.generate(model, tokenizer, "é", **options) == expected
