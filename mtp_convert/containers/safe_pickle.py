"""Reads the pickles inside Megatron checkpoints without running anything they name.

Every global is looked up in an allow-list and answered with an inert stand-in: a class that only remembers its
arguments and state. Unknown names are refused. Neither torch nor Megatron is imported.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
from collections.abc import Callable
from typing import Any

from mtp_convert.containers.pickle_sizes import asks_too_much
from mtp_convert.encodings.dtype import BY_TORCH_NAME
from mtp_convert.errors import ConvertError, Problem

LARGEST_PICKLE = 1 << 30  # bytes; `.metadata` takes about 150 per stored item


class Inert:
    """Stands for an object of an allowed class: keeps what it was given, does nothing."""

    cls = ""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.args = args
        self.state: object = kwargs

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, name: str, default: object = None) -> Any:  # noqa: ANN401 - the caller checks the type
        """A field of the pickled object."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = state[1]  # (dict state, slot state)
        return state.get(name, default) if isinstance(state, dict) else default


class TensorStub(Inert):
    """A tensor that was pickled: `storage` is (type, key, location, elements), then offset, size and stride."""

    cls = "tensor"


class StorageType(str):
    """A storage class by name, e.g. `FloatStorage`."""

    __slots__ = ()


def _inert(module: str, name: str) -> type[Inert]:
    return type(name, (Inert,), {"cls": f"{module}.{name}", "__module__": __name__})


def _size(*args: Any) -> tuple[int, ...]:  # noqa: ANN401 - checked where it is used
    return tuple(args[0]) if args else ()


def _tensor(storage: object, offset: object, size: object, stride: object, *rest: object) -> TensorStub:
    return TensorStub(storage, offset, size, stride)


def _typed_tensor(storage: object, offset: object, size: object, stride: object, *rest: object) -> TensorStub:
    return TensorStub(storage, offset, size, stride, rest[2] if len(rest) > 2 else None)


def _parameter(tensor: object, *rest: object) -> object:
    return tensor


# What real checkpoints of Megatron-Core 0.12 .. 0.20 and of torch.distributed.checkpoint name.
_DCP = "torch.distributed.checkpoint"
STAND_INS: dict[str, Callable[..., object]] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": argparse.Namespace,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": lambda *a: collections.OrderedDict(),
    "torch.Size": _size,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,  # element types that have no storage class
    "torch._utils._rebuild_parameter": _parameter,
    "io.BytesIO": _inert("io", "BytesIO"),
    "pathlib.PosixPath": _inert("pathlib", "PosixPath"),
    "pathlib._local.PosixPath": _inert("pathlib", "PosixPath"),
    "signal.Signals": _inert("signal", "Signals"),
    "torch.device": _inert("torch", "device"),
    "torch.serialization._get_layout": _inert("torch", "layout"),
    "torch._C.Generator": _inert("torch", "Generator"),
    "_codecs.encode": _inert("_codecs", "encode"),
    **{
        f"numpy.{core}.multiarray.{n}": _inert("numpy", n)
        for core in ("_core", "core")
        for n in ("_reconstruct", "scalar")
    },
    "numpy.ndarray": _inert("numpy", "ndarray"),
    "numpy.dtype": _inert("numpy", "dtype"),
    "numpy.dtypes.UInt32DType": _inert("numpy", "UInt32DType"),
    **{
        f"{_DCP}.metadata.{n}": _inert(_DCP, n)
        for n in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    **{f"{_DCP}.filesystem.{n}": _inert(_DCP, n) for n in ("_StorageInfo", "_StoragePrefix")},
    **{f"{_DCP}.planner.{n}": _inert(_DCP, n) for n in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")},
    "torch.distributed.checkpoint._extension.StreamTransformExtension": _inert(_DCP, "Extension"),
}
# Megatron's own enums and configs appear in `args`; they are answered by stand-ins whatever their name.
STAND_IN_PACKAGES = ("megatron.",)


def _fresh(stand_in: Callable[..., object]) -> Callable[..., object]:
    """A stand-in of its own for every pickle: a pickle can set attributes of what it names, ours must not change."""
    if isinstance(stand_in, type):
        return stand_in if stand_in.__module__ == "collections" else type(stand_in.__name__, (stand_in,), {})
    return lambda *args: stand_in(*args)


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self.where = where

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - the signature of pickle
        full = f"{module}.{name}"
        if full in STAND_INS:
            return _fresh(STAND_INS[full])
        if module == "torch" and (name in BY_TORCH_NAME or name.endswith("Storage")):
            return StorageType(name)
        if module == "torch.storage" and name in ("UntypedStorage", "TypedStorage"):
            return StorageType(name)
        if module.startswith(STAND_IN_PACKAGES) and "." not in name:
            return _inert(module, name)
        raise ConvertError(
            "MTP014",
            Problem(f"the pickle asks for {full!r}", self.where, expected="a name on the allow-list"),
            hint="nothing was executed; do not load this file with tools that unpickle it",
        )

    def persistent_load(self, pid: object) -> object:
        return pid


def read_pickle(data: bytes, where: str) -> Any:  # noqa: ANN401 - callers check the type of everything they use
    """Unpickle `data` into plain containers and stand-ins.

    Raises:
        ConvertError: MTP014 for a name outside the allow-list, MTP013 for bytes that are no pickle.
    """
    if len(data) > LARGEST_PICKLE:
        raise ConvertError("MTP013", Problem("pickle too large", where, f"{len(data)} bytes"))
    if asks_too_much(data):
        raise ConvertError("MTP013", Problem("the pickle asks for more memory than its size can need", where))
    try:
        return _Unpickler(data, where).load()
    except ConvertError:
        raise
    except Exception as error:  # pickle raises nearly anything on damaged bytes
        raise ConvertError(
            "MTP013",
            Problem("not a readable pickle", where, f"{type(error).__name__}: {error}"),
            hint="the file is damaged or truncated; copy it again",
        ) from error
