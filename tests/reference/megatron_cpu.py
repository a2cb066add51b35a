"""Lets megatron-core be imported, built and run where there is no GPU.

`prepare` must run before anything of megatron-core is imported, also in the writer processes that a save starts.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any


def prepare() -> None:
    """Everything that has to happen before megatron-core is imported."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)
    _stub_triton()
    _redirect_cuda()


def start(tp: int = 1, pp: int = 1, ep: int = 1, etp: int | None = None, vpp: int | None = None) -> None:
    """Process groups over gloo: alone, or as RANK of WORLD_SIZE."""
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as parallel_random

    # The per-region generators are CUDA ones; nothing here depends on what they would draw.
    parallel_random.CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    parallel_random.CudaRNGStatesTracker.is_initialized = lambda _: True
    torch.manual_seed(0)
    parallel_state.initialize_model_parallel(
        tp, pp, vpp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
    )


class Anything:
    """Accepts every use that module-level code makes of a package that is never run: attributes, calls, decorators."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - stands for a foreign API
        is_decorator = len(args) == 1 and not kwargs and callable(args[0])
        return args[0] if is_decorator else self

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __getitem__(self, _: object) -> Anything:
        return self


def empty_module(name: str, attribute: Callable[[str], Any] | None = None) -> types.ModuleType:
    """A module put into `sys.modules` and into its parent; `attribute` answers for names that it lacks."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    if attribute is not None:

        def lookup(wanted: str) -> object:
            if wanted.startswith("__"):
                raise AttributeError(wanted)
            return attribute(wanted)

        module.__getattr__ = lookup  # type: ignore[method-assign]
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
    return module


def _stub_triton() -> None:
    """Since 0.19 `transformer/moe/ops/paged_stash.py` imports triton without a guard."""
    try:
        import triton  # noqa: F401
    except ImportError:
        # torch asks for triton too, and must have its true answer before the stub exists.
        import torch._dynamo
        import torch._inductor.utils
        import torch.utils._triton

        torch.utils._triton.has_triton_package()
        torch.utils._triton.has_triton()
        for name in ("", ".language", ".language.extra", ".language.extra.libdevice", ".testing", ".runtime"):
            empty_module("triton" + name, lambda _: Anything()).__version__ = "0.0.0"


def _redirect_cuda() -> None:
    """What building, loading and a forward pass ask of CUDA, answered for the CPU."""
    import torch

    @contextlib.contextmanager
    def on_stream(*_: object, **__: object) -> Iterator[None]:
        yield

    nothing: dict[str, Callable[..., Any]] = {
        name: lambda *_, **__: None for name in ("set_device", "synchronize", "set_rng_state", "manual_seed")
    }
    answers: dict[str, Any] = {
        **nothing,
        "current_device": lambda: "cpu",
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "Stream": Anything,
        "Event": Anything,
        "current_stream": lambda *_, **__: Anything(),
        "stream": on_stream,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_, **__: 0
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
