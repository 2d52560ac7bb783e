"""In the place of others: the official scan function and layer, and the mixer of transformers.

Code that was written against mamba_ssm needs one other line:

    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn    # before
    from mamba_ssm import Mamba
    from examples.drop_in import Layer as Mamba, selective_scan_fn          # after

The scan runs on a CPU and, through triton_scan.py, on a GPU, forward and backward. Two things are
better than in the official function: gradients flow through the last state (the CUDA kernel ignores
them), and nothing has to be built. One is missing: complex A.

`Mixer` puts a MambaBlock into a model of transformers, with the parameters that it finds there. The
model trains, generates and is saved as before:

    for layer in model.backbone.layers:
        layer.mixer = Mixer(layer.mixer)
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generate import reset_after_padding
from mamba import MambaBlock, MambaConfig, MambaState, at_least_float32, selective_scan


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """out (b, d, l) in u's dtype, contiguous; with return_last_state also the state, (b, d, n) in
    float32 (float64 for float64 inputs).

    u, delta, z (b, d, l): time is the last axis here. A (d, n), D and delta_bias (d,). B and C each
    (b, n, l), the same for all channels, or (b, g, n, l), the same for d / g channels side by side,
    or (d, n), constant in time. Raises ValueError for shapes that do not fit and for complex A.
    """
    check(u, delta, A, B, C, D, z, delta_bias)
    if len(u) == 0:  # a scan takes no empty batch: add a row that nobody sees
        u, delta, z = (None if t is None else F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (u, delta, z))
        B, C = (t if t.ndim == 2 else F.pad(t, (0, 0) * (t.ndim - 1) + (0, 1)) for t in (B, C))
        out, h = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
        return (out[:0], h[:0]) if return_last_state else out[:0]
    x, delta, z = u.mT, delta.mT, None if z is None else z.mT  # (b, l, d) from here on
    if B.ndim == 2 or C.ndim == 2:
        y, h = scan_state_by_state(x, delta, A, B, C, D, delta_bias, delta_softplus)
        y = y if z is None else y * F.silu(at_least_float32(z))
    else:
        y, h = scan_group_by_group(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    out = y.mT.to(u.dtype).contiguous()
    return (out, h) if return_last_state else out


def scan_group_by_group(x, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """mamba.py's scan has one B and one C for all channels: here for those of one group."""
    B, C = (tensor.unsqueeze(1) if tensor.ndim == 3 else tensor for tensor in (B, C))
    groups = math.lcm(B.shape[1], C.shape[1])
    # What is repeated is cast first: the copies' gradients are then summed before they are rounded.
    B, C = (at_least_float32(t) if t.shape[1] < groups else t for t in (B, C))
    B, C = (tensor.repeat_interleave(groups // tensor.shape[1], 1) for tensor in (B, C))
    B, C = B.mT.unbind(1), C.mT.unbind(1)
    results, size = [], len(A) // groups
    for i in range(groups):
        part = slice(i * size, (i + 1) * size)
        D_i, bias_i = (None if vector is None else vector[part] for vector in (D, delta_bias))
        z_i = None if z is None else z[..., part]
        results.append(
            selective_scan(
                x[..., part], delta[..., part], A[part], B[i], C[i], D_i, z_i,
                dt_bias=bias_i, dt_softplus=delta_softplus,
            )
        )  # fmt: skip
    ys, hs = zip(*results, strict=True)
    return torch.cat(ys, dim=-1), torch.cat(hs, dim=1)


def scan_state_by_state(x, delta, A, B, C, D, delta_bias, delta_softplus):
    """Where B or C is (d, n), each channel has its own. But states do not mix: scan them singly.

    With one state, B scales the input and C the output, and the scan itself needs only ones.
    """
    # Once, and not for every state: each cast rounds its share of the gradient.
    x, delta = at_least_float32(x, delta)
    bias = None if delta_bias is None else at_least_float32(delta_bias)
    B, C = (for_every_state(at_least_float32(tensor), len(A)) for tensor in (B, C))
    one = x.new_ones(()).expand(*x.shape[:2], 1)
    y, hs = 0 if D is None else D * x, []
    for A_i, B_i, C_i in zip(A.unbind(1), B, C, strict=True):
        options = {"dt_bias": bias, "dt_softplus": delta_softplus}
        h_i, h_last = selective_scan(x * B_i, delta, A_i.unsqueeze(-1), one, one, **options)
        y = y + h_i * C_i
        hs.append(h_last)
    return y, torch.cat(hs, dim=-1)


def for_every_state(tensor: Tensor, d: int) -> Tensor:
    """B or C in any layout -> (n, b, l, d), or with 1 where it is the same for all."""
    if tensor.ndim == 2:
        return tensor.T[:, None, None, :]
    if tensor.ndim == 3:
        return tensor.permute(1, 0, 2).unsqueeze(-1)
    return tensor.permute(2, 0, 3, 1).repeat_interleave(d // tensor.shape[1], dim=-1)


def check(u, delta, A, B, C, D, z, delta_bias) -> None:
    """All shapes, in the layouts of this file; dtypes are left to `selective_scan`."""
    if A.is_complex():
        raise ValueError("A is complex: complex states are not implemented, take a real A")
    if not u.is_floating_point():
        raise ValueError(f"u must be real and of a float dtype, got {u.dtype}")
    if u.ndim != 3 or A.ndim != 2 or len(A) != u.shape[1] or 0 in (*u.shape[1:], *A.shape):
        raise ValueError(
            f"need u (b, d, l) and A (d, n), with d, l and n at least 1, got {tuple(u.shape)}, "
            f"{tuple(A.shape)}"
        )
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None and tensor.shape != u.shape:
            raise ValueError(f"{name} must be {tuple(u.shape)}, as u is, got {tuple(tensor.shape)}")
    (b, d, seqlen), n = u.shape, A.shape[1]
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tensor.shape != (d,):
            raise ValueError(f"{name} must be {(d,)}, got {tuple(tensor.shape)}")
    for name, tensor in (("B", B), ("C", C)):
        shape = tuple(tensor.shape)
        groups = shape[1] if len(shape) == 4 and shape[1] > 0 else 1
        if shape not in ((d, n), (b, n, seqlen), (b, groups, n, seqlen)) or d % groups:
            raise ValueError(
                f"{name} must be {(d, n)}, {(b, n, seqlen)}, or ({b}, g, {n}, {seqlen}) with g a "
                f"divisor of {d}, got {shape}"
            )


class Layer(MambaBlock):
    """A MambaBlock with the arguments of the official layer. Its state is an argument and a result,
    where the official one keeps it in `inference_params`: ValueError unless these are None."""

    def __init__(
        self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: float = 2,
        dt_rank: int | str = "auto", dt_min: float = 0.001, dt_max: float = 0.1,
        dt_init: str = "random", dt_scale: float = 1.0, dt_init_floor: float = 1e-4,
        conv_bias: bool = True, bias: bool = False, use_fast_path: bool = True,
        layer_idx: int | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        config = MambaConfig(
            d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank, dt_min=dt_min,
            dt_max=dt_max, dt_init=dt_init, dt_scale=dt_scale, dt_init_floor=dt_init_floor,
            conv_bias=conv_bias, bias=bias, scan="auto" if use_fast_path else "chunked",
        )  # fmt: skip
        with torch.get_default_device() if device is None else torch.device(device):
            super().__init__(config)
        A_log, D = self.A_log.data, self.D.data
        self.to(torch.get_default_dtype() if dtype is None else dtype)
        self.A_log.data, self.D.data = A_log, D  # float32, whatever the rest is
        self.layer_idx = layer_idx

    def forward(
        self, u: Tensor, state: MambaState | None = None, *, reset: Tensor | None = None,
        inference_params: None = None,
    ) -> Tensor | tuple[Tensor, MambaState]:  # fmt: skip
        if inference_params is not None or not isinstance(state, MambaState | None):
            raise ValueError("Layer takes a MambaState, not inference_params: see `init_state`")
        return super().forward(u, state, reset=reset)


class Mixer(MambaBlock):
    """A MambaBlock where transformers has its MambaMixer: the same parameters under the same names.

    For training, for prompts, padded on the left or not at all, and for the host's `generate`. (For
    padding on the right leave the mask out: a causal model does not see it.) What the host saves
    loads without Mixers, too, and its optimizer goes on. Raises ValueError for padding on the
    right, another activation, a width that does not fit, and whatever it does not know of the host:
    the cache is that of transformers 5.24, and an older one's hosts need use_cache=False.
    """

    def __init__(self, mixer: nn.Module) -> None:
        # Others have the same names, and more inside: FalconMamba's norms are in its buffers.
        if type(mixer).__name__ != "MambaMixer":
            raise ValueError(f"need a MambaMixer of transformers, got {type(mixer).__name__}")
        c = mixer.config
        if c.intermediate_size != int(c.expand * c.hidden_size) or c.hidden_act != "silu":
            raise ValueError(
                "need intermediate_size = expand * hidden_size and silu, got "
                f"{c.intermediate_size}, {c.expand} * {c.hidden_size} and {c.hidden_act}"
            )
        config = MambaConfig(
            d_model=c.hidden_size, d_state=c.state_size, d_conv=c.conv_kernel, expand=c.expand,
            dt_rank=int(c.time_step_rank), bias=c.use_bias, conv_bias=c.use_conv_bias,
        )  # fmt: skip
        with torch.device("meta"):
            super().__init__(config)
        theirs = mixer.state_dict(keep_vars=True)
        frozen = [parameter for parameter in theirs.values() if not parameter.requires_grad]
        self.load_state_dict(theirs, assign=True)  # which lets all of them learn
        for parameter in frozen:
            parameter.requires_grad_(False)
        self.layer_idx = mixer.layer_idx
        self.train(mixer.training)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None,
        cache: object | None = None, **others: object,
    ) -> Tensor:  # fmt: skip
        # Each version of the host has its own cache and names: refuse whatever is not known.
        if unknown := [name for name, value in others.items() if value is not None]:
            raise ValueError(
                f"Mixer knows no {', '.join(unknown)}: for an unknown cache take use_cache=False"
            )
        if attention_mask is not None and attention_mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"attention_mask must be {tuple(hidden_states.shape[:2])}, one number a token, "
                f"got {tuple(attention_mask.shape)}"
            )
        start = self.init_state(len(hidden_states))
        if cache is not None:
            start = self.read_cache(cache, start)
        reset = None if attention_mask is None else reset_after_padding(attention_mask, start)
        if hidden_states.shape[1] == 1 and reset is None:
            out, state = super().forward(hidden_states.squeeze(1), start)
            out = out.unsqueeze(1)
        else:
            out, state = super().forward(hidden_states, start, reset=reset)
        if cache is not None:
            # The cache appends, and keeps d_conv numbers where d_conv - 1 are needed: the last.
            cache.update_conv_state(state.conv, self.layer_idx, conv_kernel_size=self.config.d_conv)
            cache.update_recurrent_state(state.h, self.layer_idx)
        return out

    def read_cache(self, cache: Any, zero: MambaState) -> MambaState:
        """What the cache holds for this layer, or zero where it holds nothing yet."""
        names = ("get_conv_state", "get_recurrent_state", "update_conv_state")
        names += ("update_recurrent_state", "is_recording_past")
        if not all(hasattr(cache, name) for name in names):
            raise ValueError(f"Mixer knows no cache {type(cache).__name__}: take use_cache=False")
        if cache.is_recording_past(self.layer_idx):
            raise ValueError("Mixer cannot take tokens back: generate without an assistant model")
        conv, h = cache.get_conv_state(self.layer_idx), cache.get_recurrent_state(self.layer_idx)
        return zero if conv is None else MambaState(conv[..., 1:], h)


if __name__ == "__main__":
    print(__doc__)
