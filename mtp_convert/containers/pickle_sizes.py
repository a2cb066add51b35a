"""Looks through the opcodes of a pickle for requests of memory that its own size cannot justify.

The unpickler of CPython makes room before it reads: a few bytes may ask for a memo of gigabytes.
"""

from __future__ import annotations

import pickletools

_PUT, _LONG_BINPUT, _STOP = b"pr."
_PAIRS = b"ci"  # GLOBAL and INST: two lines
_WIDTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_ARGUMENTS = [0] * 256
for _opcode in pickletools.opcodes:
    _ARGUMENTS[ord(_opcode.code)] = _opcode.arg.n if _opcode.arg is not None else 0


def asks_too_much(data: bytes) -> bool:
    """Whether any opcode names a length or a memo index beyond the size of the pickle; other damage is not judged."""
    at, total = 0, len(data)
    while at < total:
        op = data[at]
        if op == _STOP:
            return False
        at += 1
        kind = _ARGUMENTS[op]
        if kind >= 0:
            if op == _LONG_BINPUT and int.from_bytes(data[at : at + 4], "little") > total:
                return True
            at += kind
        elif kind == pickletools.UP_TO_NEWLINE:
            end = _line_end(data, at)
            if op == _PUT and not _small(data[at : end - 1], total):
                return True
            at = _line_end(data, end) if op in _PAIRS else end
        else:
            width = _WIDTHS[kind]
            size = int.from_bytes(data[at : at + width], "little")
            if size > total:
                return True
            at += width + size
    return False


def _line_end(data: bytes, at: int) -> int:
    """The position after the next line feed."""
    return data.find(b"\n", at) + 1 or len(data)


def _small(digits: bytes, total: int) -> bool:
    return len(digits) < 20 and digits.isdigit() and int(digits) <= total
