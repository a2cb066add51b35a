"""Writes pickles of objects whose classes are not imported: torch's checkpoint records, without torch.

Values are plain containers and four nouns: a name to look up (`Global`), a call (`Call`), an object made of a state
(`Made`), and torch's reference to a storage (`Persistent`). Protocol 2, which every reader understands.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Global(NamedTuple):
    """A class or function by module and name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """The result of calling `function` with `args`."""

    function: Global
    args: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """A new instance of `cls`, given `state` (None: none)."""

    cls: Global
    state: object = None


@dataclass(frozen=True, slots=True)
class Persistent:
    """A storage that lies beside the pickle."""

    key: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict that is written item by item, so that a large one never exists as objects."""

    items: Iterable[tuple[object, object]]


def dumps(value: object) -> bytes:
    """The pickle of `value`.

    Raises:
        TypeError: a value of a type that no checkpoint record needs.
    """
    writer = _Writer()
    writer.write(value)
    return b"\x80\x02" + bytes(writer.out) + b"."


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray()
        self.memo: dict[object, bytes] = {}

    def write(self, value: object) -> None:
        """Append the opcodes of one value."""
        if isinstance(value, Global):
            self._once(value, b"c" + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, str):
            data = value.encode("utf-8", "surrogatepass")
            self._once(value, b"X" + struct.pack("<I", len(data)) + data)
        elif value is None or isinstance(value, bool):
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self._int(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, (tuple, list, dict, Pairs)):
            self._container(value)
        else:
            self._noun(value)

    def _noun(self, value: object) -> None:
        if isinstance(value, Call):
            self.write(value.function)
            self.write(value.args)
            self.out += b"R"
        elif isinstance(value, Made):
            self.write(value.cls)
            self.out += b")\x81"
            if value.state is not None:
                self.write(value.state)
                self.out += b"b"
        elif isinstance(value, Persistent):
            self.write(value.key)
            self.out += b"Q"
        else:
            raise TypeError(f"cannot write a {type(value).__name__}")

    def _container(self, value: tuple[object, ...] | list[object] | dict[object, object] | Pairs) -> None:
        if isinstance(value, (dict, Pairs)):
            self.out += b"}("
            for key, item in value.items() if isinstance(value, dict) else value.items:
                self.write(key)
                self.write(item)
            self.out += b"u"
            return
        self.out += b"(" if isinstance(value, tuple) else b"]("
        for item in value:
            self.write(item)
        self.out += b"t" if isinstance(value, tuple) else b"e"

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += b"K" + bytes([value])
        elif -(2**31) <= value < 2**31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            data = value.to_bytes((value.bit_length() // 8) + 1, "little", signed=True)
            self.out += b"\x8a" + bytes([len(data)]) + data

    def _once(self, key: object, opcodes: bytes) -> None:
        """Names and strings repeat by the thousand: write them once and refer back."""
        reference = self.memo.get(key)
        if reference is not None:
            self.out += reference
            return
        number = struct.pack("<I", len(self.memo))
        self.memo[key] = b"j" + number
        self.out += opcodes + b"r" + number
