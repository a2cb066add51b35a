"""Every way to damage a safetensors file is refused with exit code 3 and the name of the file."""

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from _safetensors_build import DATA, HEADER, changed, packed
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_convert.containers import safetensors
from mtp_convert.containers.base import Stored
from mtp_convert.errors import ConvertError

NAME = "model.safetensors"
RAW = json.dumps(HEADER).encode()


def entry(dtype: str = "U8", shape: list[Any] | None = None, offsets: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [1], "data_offsets": offsets or [0, 1]}


def only(name: str) -> bytes:
    """A file with one tensor of one byte."""
    return packed({name: entry()}, b"x")


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "header of 0 bytes in a file of 0"),
    "7-byte file": (b"\2\0\0\0\0\0\0", "in a file of 7"),
    "header length 0": (packed(b"", length=0), "header of 0 bytes"),
    "header longer than the file": (packed(HEADER, length=10**6), "header of 1000000 bytes"),
    "header length 2^63": (packed(HEADER, length=1 << 63), "header of 9223372036854775808 bytes"),
    "header length 2^64-1": (packed(HEADER, length=(1 << 64) - 1), "header of"),
    "header over 25 MB": (packed(RAW + b" " * 25_000_000), "header of"),
    "not JSON": (packed(b"{nonsense}"), "not JSON"),
    "JSON array": (packed(b"[1, 2]"), "not a JSON object"),
    "JSON number": (packed(b"12"), "not a JSON object"),
    "not UTF-8": (packed(RAW.replace(b'"a"', b'"\xff"')), "not JSON"),
    "truncated data": (packed(HEADER, DATA[:-1]), "its header describes"),
    "trailing bytes": (packed(HEADER, DATA + b"x"), "its header describes"),
    "overlap": (packed(changed("b", data_offsets=[20, 28]), DATA[:28]), "overlap"),
    "same range twice": (packed({"a": entry(), "b": entry()}, b"x"), "overlap"),
    "hole": (packed(changed("b", data_offsets=[28, 36]), DATA + bytes(4)), "leave a hole at 24"),
    "size is not shape times dtype": (packed(changed("a", shape=[2, 2])), "'a' has 24 bytes"),
    "end before begin": (packed(changed("a", data_offsets=[24, 0])), "'a' has -24 bytes"),
    "product overflow": (packed(changed("a", shape=[1 << 40, 1 << 40, 0])), "'a' has 24 bytes"),
    "negative dimension": (packed(changed("a", shape=[-2, -3])), "unusable entry 'a'"),
    "fractional dimension": (packed(changed("a", shape=[2.0, 3])), "unusable entry 'a'"),
    "boolean dimension": (packed(changed("b", shape=[True, 4])), "unusable entry 'b'"),
    "dimension of 10^5000": (packed(RAW.replace(b"[2, 3]", b"[1" + b"0" * 5000 + b"]")), "not JSON"),
    "a million dimensions": (packed({"a": entry(shape=[1 << 61] * 10**6)}, b"x"), "unusable entry 'a'"),
    "unknown dtype": (packed(changed("a", dtype="F31")), "unusable entry 'a'"),
    "dtype of another type": (packed(changed("a", dtype=["F32"])), "unusable entry 'a'"),
    "no dtype": (packed({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x"), "unusable entry 'a'"),
    "entry is a list": (packed({"a": [1]}, b""), "unusable entry 'a'"),
    "three offsets": (packed(changed("a", data_offsets=[0, 24, 24])), "unusable entry 'a'"),
    "offsets as text": (packed(changed("a", data_offsets="0,24")), "unusable entry 'a'"),
    "duplicate name": (packed(RAW[:-1] + b', "b": ' + json.dumps(HEADER["b"]).encode() + b"}"), "twice: 'b'"),
    "duplicate field": (packed(RAW.replace(b'"dtype": "F32"', b'"dtype": "I32", "dtype": "F32"')), "twice: 'dtype'"),
    "name with NUL": (only("a\0b"), r"'a\\x00b'"),
    "name with escape codes": (only("\x1b[31mred"), r"'\\x1b\[31mred'"),
    "name with a line feed": (only("a\nb"), r"'a\\nb'"),
    "name with half a character": (only("a\ud800"), r"'a\\ud800'"),
    "empty name": (only(""), "unusable name ''"),
    "name of 2 kB": (only("x" * 2000), "unusable name 'xxx"),
    "metadata is a list": (packed({**HEADER, "__metadata__": []}), "__metadata__"),
    "metadata with numbers": (packed({**HEADER, "__metadata__": {"n": 1}}), "__metadata__"),
    "deep nesting": (packed(b'{"a":' + b"[" * 200_000), "not JSON"),
    "deep nesting that closes": (packed(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "not JSON|unusable entry"),
    "a git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "header of"),
    "an HTML page": (b"<!DOCTYPE html><html><body>Not found</body></html>", "header of"),
}


def folder_with(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / NAME).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "C64", "F8_E4M3FNUZ"])
def test_a_type_that_nobody_reads_is_no_damage(dtype: str, tmp_path: Path) -> None:
    """The format defines it, and sizes of sub-byte elements follow other rules."""
    data = packed({**HEADER, "a": {**HEADER["a"], "dtype": dtype}})
    with pytest.raises(ConvertError) as caught:
        safetensors.read(folder_with(tmp_path, data))
    assert caught.value.code == "MTP031"
    (problem,) = caught.value.problems
    assert problem.line() == f"'a': unknown type in {NAME}: got {dtype}"


def test_the_sound_file_is_read(tmp_path: Path) -> None:
    stored = safetensors.read(folder_with(tmp_path, packed(HEADER)))
    assert {n: (t.dtype.name, t.shape) for n, t in stored.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
    }
    assert stored.tensors["b"].chunks[0].start == 8 + len(RAW) + 24
    assert stored.headers == {NAME: RAW}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_refused_quickly(tmp_path: Path, what: str) -> None:
    data, message = DAMAGED[what]
    folder_with(tmp_path, data)
    begin = time.monotonic()
    with pytest.raises(ConvertError, match=message) as caught:
        safetensors.read(tmp_path)
    assert time.monotonic() - begin < 2
    assert (caught.value.code, caught.value.exit_code) == ("MTP010", 3)
    assert {p.where for p in caught.value.problems} == {NAME}
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("what", "hint"),
    [("a git-LFS pointer", "git lfs pull"), ("an HTML page", "HTML page"), ("not JSON", "download the file again")],
)
def test_hints(tmp_path: Path, what: str, hint: str) -> None:
    with pytest.raises(ConvertError) as caught:
        safetensors.read(folder_with(tmp_path, DAMAGED[what][0]))
    assert hint in caught.value.hint


SOUND: dict[str, bytes] = {
    "data that starts unaligned": packed(RAW + b" "),
    "blanks before the header": packed(b" " * 8 + RAW),
    "a scalar": packed({"a": entry("F32", [], [0, 4]) | {"shape": []}}, b"1234"),
    "an empty tensor": packed({"a": entry("F32", [0, 3], [0, 0]), "b": entry()}, b"x"),
    "no tensors": packed({}, b""),
    "no metadata": packed({"a": entry()}, b"x"),
    "names with dots, blanks and other scripts": packed({"../ä b.名": entry()}, b"x"),
    "order of names and bytes differ": packed({"a": entry(offsets=[1, 2]), "b": entry()}, b"xy"),
}


@pytest.mark.parametrize("what", SOUND)
def test_odd_but_sound_files_are_read(tmp_path: Path, what: str) -> None:
    stored = safetensors.read(folder_with(tmp_path, SOUND[what]))
    assert sum(t.nbytes for t in stored.tensors.values()) == len(SOUND[what]) - 8 - len(stored.headers[NAME])


def test_a_duplicate_among_very_many_names_is_found_in_time(tmp_path: Path) -> None:
    pairs = [f'"{i}":0' for i in range(300_000)] + ['"299999":0']
    begin = time.monotonic()
    with pytest.raises(ConvertError, match="twice: '299999'"):
        safetensors.read(folder_with(tmp_path, packed(("{" + ",".join(pairs) + "}").encode())))
    assert time.monotonic() - begin < 4


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(ConvertError) as caught:
        safetensors.read(tmp_path)
    assert caught.value.exit_code == 3
    with pytest.raises(ConvertError, match="not a regular file"):
        safetensors.read_file(tmp_path / NAME)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["dtype", "shape", "data_offsets", "extra"])
SIZES = st.lists(st.integers(-1, 40) | st.integers(0, 2**64), max_size=3)
DTYPES = st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "I64", "X"])


@st.composite
def mutated_headers(draw: st.DrawFn) -> bytes:
    header = json.loads(RAW)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(["a", "b", "c", "__metadata__"]) | st.text(max_size=4))
        if isinstance(header.get(name), dict) and draw(st.booleans()):
            header[name][draw(FIELDS)] = draw(DTYPES | SIZES | VALUES)
        elif draw(st.booleans()):
            header[name] = draw(VALUES)
        else:
            header[name] = {"dtype": draw(DTYPES), "shape": draw(SIZES), "data_offsets": draw(SIZES)}
    return packed(header, DATA[: draw(st.integers(0, 32))])


@st.composite
def mutated_bytes(draw: st.DrawFn) -> bytes:
    data = bytearray(packed(HEADER))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(data)) | st.just(len(data)))
    return bytes(data[:cut]) + draw(st.binary(max_size=3))


def read_or_refused(folder: Path) -> Stored | ConvertError:
    try:
        return safetensors.read(folder)
    except ConvertError as error:
        return error


@settings(max_examples=300, deadline=None)
@given(data=st.one_of(mutated_headers(), mutated_bytes()))
def test_fuzzed_files_are_refused_or_read_correctly(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_bytes(data)
    stored = read_or_refused(folder)
    if isinstance(stored, ConvertError):
        assert stored.exit_code == 3
        assert NAME in str(stored)
        return
    # Whatever is accepted tiles the file exactly.
    (length,) = struct.unpack("<Q", data[:8])
    spans = sorted((t.chunks[0].start, t.nbytes) for t in stored.tensors.values())
    at = 8 + length
    for start, nbytes in spans:
        assert start == at
        at += nbytes
    assert at == len(data)
