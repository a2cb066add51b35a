"""Pickles that would create a marker file if anything executed them."""

import os
import pickle
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path


class Call:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.args


def call(module: str, name: str, argument: str) -> bytes:
    """Protocol 0 opcodes: module.name(argument)."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def call4(module: str, name: str, argument: str) -> bytes:
    """Protocol 4 opcodes with STACK_GLOBAL, whose name may hold dots."""

    def text(s: str) -> bytes:
        return b"\x8c" + bytes([len(s)]) + s.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + _long(argument) + b"\x85R."


def _long(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def attacks(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Pickle, and the name that the refusal must give."""
    touch, create = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    found: dict[str, tuple[bytes, str]] = {}
    for protocol in range(6):
        found[f"os.system, protocol {protocol}"] = (pickle.dumps(Call(os.system, touch), protocol), "posix.system")
        found[f"eval, protocol {protocol}"] = (pickle.dumps(Call(eval, create), protocol), "eval")
    popen = {"weights": [1, {"deep": Call(subprocess.getoutput, touch)}]}
    found["nested in a dict"] = (pickle.dumps(popen), "subprocess.getoutput")
    found["a call as argument of a call"] = (pickle.dumps(Call(len, Call(os.system, touch))), "builtins.len")
    for module, name, argument in (
        ("os", "system", touch),
        ("builtins", "exec", create),
        ("__builtin__", "eval", create),
        ("builtins", "getattr", "os"),
        ("builtins", "__import__", "os"),
        ("importlib", "import_module", "os"),
        ("functools", "partial", touch),
        ("operator", "attrgetter", "system"),
        ("torch", "load", str(marker)),
        ("torch.hub", "load", str(marker)),
        ("torch.storage", "_load_from_bytes", touch),
        ("torch.jit", "load", str(marker)),
        ("torch._utils", "_import_dotted_name", "os.system"),
        ("numpy", "load", str(marker)),
        ("numpy.testing._private.utils", "runstring", create),
        ("copyreg", "_reconstructor", "x"),
        ("types", "FunctionType", "x"),
        ("pickle", "loads", touch),
        ("_pickle", "loads", touch),
        ("argparse", "FileType", "w"),
        ("pathlib", "Path.touch", str(marker)),
        ("collections", "namedtuple", "x"),
        ("torch.distributed.checkpoint.metadata", "os.system", touch),
        ("megatron.core", "os.system", touch),
        ("megatronx", "anything", touch),
    ):
        found[f"{module}.{name}"] = (call(module, name, argument), f"{module}.{name}")
        found[f"{module}.{name}, stacked"] = (call4(module, name, argument), f"{module}.{name}")
    inst = b"(V" + touch.encode() + b"\nios\nsystem\n."
    found["INST"] = (inst, "os.system")
    found["OBJ"] = (b"(cos\nsystem\nV" + touch.encode() + b"\no.", "os.system")
    found["NEWOBJ"] = (b"\x80\x02csubprocess\nPopen\n" + _long(touch) + b"\x85\x81.", "subprocess.Popen")
    found["NEWOBJ_EX"] = (b"\x80\x04csubprocess\nPopen\n" + _long(touch) + b"\x85}\x92.", "subprocess.Popen")
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\n" + b"V" + touch.encode() + b"\ntR."
    found["numpy's reconstruct with a function"] = (reconstruct, "os.system")
    return found


BOMBS: dict[str, bytes] = {
    "memo of 64 GiB": b"\x80\x02Nr\xff\xff\xff\xff.",
    "memo of 8 GiB": b"\x80\x02Nr\x00\x00\x00\x20.",
    "memo by text": b"Np4000000000\n.",
    "memo by text with a sign": b"Np+400000000\n.",
    "memo by text with underscores": b"Np4_000_000_00\n.",
    "bytearray of an exbibyte": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"x.",
    "bytearray of 64 GiB": b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b"x.",
    "text of 4 GiB": b"\x80\x02X\xff\xff\xff\xffx.",
    "bytes of 2^63": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 63) + b"x.",
    "memo after a line": b"I1\nr\x00\x00\x00\x20.",
    "memo after a line before another": b"I1\nr\x00\x00\x00\x200I2\n.",
    "memo after a global": b"c__main__\nx\nr\x00\x00\x00\x20."[:0]
    + b"\x80\x02ccollections\nOrderedDict\nr\x00\x00\x00\x20.",
}
ODD: dict[str, bytes] = {
    "nothing": b"",
    "no stop": b"\x80\x02N",
    "unknown opcode": b"\xff.",
    "protocol 9": b"\x80\x09N.",
    "pop from an empty stack": b"0.",
    "missing memo": b"g9\n.",
    "extension": b"\x80\x02\x82\x01.",
    "number of 100000 digits": b"I" + b"9" * 100_000 + b"\n.",
    "deep lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b")" + b"\x85" * 100_000 + b".",
    "a dict as key": b"}}Ns.",
    "call of a text": b"Vx\n)R.",
    "build on a text": b"Vx\n}b.",
}
