"""The cross-entropy of a large vocabulary, without ever holding all logits. To copy: torch alone.

loss = chunked_cross_entropy(hidden, weight, targets)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

## The loss is where a language model needs most memory at once. Logits are tokens x vocabulary: 8
## rows of 2048 tokens and 50280 words make 824 million numbers, 3.3 GB in float32, and the loss and
## its gradient hold two or three tensors of that size. None of them is needed as a whole. A token's
## loss is log Σ_j exp(logit_j) - logit_target, so the gradient of its logits is
##
##     softmax(logits) - onehot(target)
##
## which asks for the logits of this token alone. It needs nothing that comes later, either: what
## arrives in the backward pass is one number, and multiplies everything. So the forward pass takes
## a chunk of tokens, computes its logits, their gradient, and from these at once the gradients of
## what made the logits, u and the weight; then it forgets them. (For 256 bytes this saves little,
## for the vocabulary of a published model most of it.)


class ChunkedCrossEntropy(torch.autograd.Function):
    """See `chunked_cross_entropy`. The gradients are there when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        rounded = weight.to(dtype)
        du = torch.empty_like(u)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=u.device)
        for i in range(0, len(u), chunk):
            part = u[i : i + chunk].to(dtype)  # (c, d_model), c tokens
            target = targets[i : i + chunk].unsqueeze(1)  # (c, 1)
            log_p = F.log_softmax(part @ rounded.T, dim=1, dtype=torch.float32)  # (c, vocabulary)
            total -= log_p.gather(1, target).sum()
            # 1 is subtracted before rounding: the difference from a p near 1 is all digits.
            minus_1 = log_p.new_full(target.shape, -1.0)
            dlogits = log_p.exp_().scatter_add_(1, target, minus_1).to(dtype)
            du[i : i + chunk] = dlogits @ rounded
            dweight += dlogits.T @ part
        ctx.save_for_backward(du, dweight)
        ctx.dtype = weight.dtype
        return total / len(u)

    @staticmethod
    @once_differentiable  # an error for second derivatives, which would be silently zero
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        ## What was kept are gradients of the sum: those of a mean of 16384 tokens would be too
        ## small for float16 before the incoming gradient has scaled them.
        du, dweight = ctx.saved_tensors
        scale = dloss / len(du)
        return (du * scale).to(du.dtype), (dweight * scale).to(ctx.dtype), None, None, None


def chunked_cross_entropy(u: Tensor, weight: Tensor, targets: Tensor, chunk: int = 2048) -> Tensor:
    """The mean of F.cross_entropy(u @ weight.T, targets) without ever holding all logits.

    u (tokens, d_model), weight (vocabulary, d_model), targets (tokens,) int64 -> a float32 number.
    chunk: tokens at a time; it changes the memory and the rounding only. Differentiable in u and
    weight, once. Products in the dtype of u, or of autocast where that is on; the softmax and the
    sum over chunks in float32. Every target counts: there is no index to ignore. It always computes
    the gradients; where none is wanted, F.cross_entropy on a part at a time costs a third.

    Raises ValueError for shapes that do not fit.
    """
    if u.ndim != 2 or weight.ndim != 2 or u.shape[1] != weight.shape[1] or not len(u):
        raise ValueError(
            "need u (tokens, d_model), not empty, and weight (vocabulary, d_model), "
            f"got {tuple(u.shape)}, {tuple(weight.shape)}"
        )
    if targets.shape != u.shape[:1] or chunk < 1:
        raise ValueError(
            f"need targets ({len(u)},) and chunk >= 1, got {tuple(targets.shape)}, {chunk}"
        )
    device, dtype = u.device.type, u.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    # Off inside: the casts are made by hand, the one of the weight once and not for every chunk.
    with torch.autocast(device, enabled=False):
        return ChunkedCrossEntropy.apply(u, weight, targets, chunk, dtype)
