"""Casts of a module that spare some of its tensors."""

from collections.abc import Callable, Iterable

from torch import Tensor


def sparing(fn: Callable[[Tensor], Tensor], tensors: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, which `nn.Module._apply` calls on every tensor, but `tensors` and their gradients get no narrower by it."""
    spared = {id(t) for tensor in tensors for t in (tensor, tensor.grad) if t is not None}

    def guarded(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        narrower = out.dtype.itemsize < tensor.dtype.itemsize
        return tensor.to(out.device) if id(tensor) in spared and narrower else out

    return guarded
