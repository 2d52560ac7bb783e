"""A training step as a CUDA graph: recorded once, then asked for in one call.

    run = recorded(step, optimizer).__next__ if on_gpu else step
    for _ in range(steps):
        loss = run()

On a GPU, Python takes longer to ask for the work of a small model than the GPU to do it. A CUDA
graph is a whole step, its random numbers and its optimizer included. It reads and writes where it
did when it was recorded: new data are copied into the same tensors, and what changes from step to
step, a learning rate too, is a tensor and not a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def recorded(step: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The losses of one step after the other. The first three are run as they are, on a stream of
    their own: they make what the graph will use, such as the moments of the optimizer.

    step() -> a loss without gradient. The optimizer is to be one of PyTorch's, "capturable" or
    "fused", so that it keeps its count of steps on the GPU.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    for _ in range(3):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = step()
        torch.cuda.current_stream().wait_stream(side)
        yield loss
    for group in optimizer.param_groups:
        group["capturable"] = True
    with torch.cuda.graph(graph):
        loss = step()
    while True:
        graph.replay()
        yield loss.clone()
