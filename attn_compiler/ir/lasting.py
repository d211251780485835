"""Tensors that outlive a call on a device: schedules and places that every call of a shape reads.

    table = on_device(numbers, cuda)   once;   recorded(table)   at every use

What a thread allocates while PyTorch warms up or records a CUDA graph lies in the graph's own
memory, where nothing may outlive the call; what a graph reads has to live as long as the graph
(PyTorch 2.13, torch._inductor.cudagraph_trees: `_use_cuda_memory_pool_manager`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# what CUDA graphs read whenever they are replayed
_kept: set[Tensor] = set()


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy outside of any graph's memory: another thread makes it."""
    if x.device == device:
        return x
    with ThreadPoolExecutor(1) as worker:
        return worker.submit(x.to, device).result()


def recorded(*tensors: Tensor) -> None:
    """Keep them for good if a graph is being recorded that reads them."""
    there = any(x.device.type == "cuda" for x in tensors)
    if there and torch.cuda.is_current_stream_capturing():
        _kept.update(tensors)
