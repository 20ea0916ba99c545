"""The safetensors header: read one strictly, build one.

A file is 8 bytes (little-endian length of the header), a JSON header, then the tensors' bytes.
The safetensors library reads and writes whole tensors; merging needs rows of a tensor, read
into a buffer that is used again, and a file written block by block, so the few rules of the
header are here. Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import itertools
import json
import math
import operator
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model_errors import ModelCompatibilityError
from model_files import chunks, read_all

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
}
"""The dtypes that can be merged, under their safetensors names, as numpy holds their values;
bfloat16, which numpy does not have, by its bits."""

DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What users and config.json call them."""

DTYPE_BITS = {
    name: bits
    for bits, names in {
        64: "F64 I64 U64 C64",
        32: "F32 I32 U32",
        16: "F16 BF16 I16 U16",
        8: "BOOL I8 U8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
        6: "F6_E2M3 F6_E3M2",
        4: "F4",
    }.items()
    for name in names.split()
}
"""Bits of an element, by safetensors name."""

MAX_HEADER = 32_000_000
MAX_TENSORS = 200_000
MAX_NAME = 512
MAX_RANK = 8
MAX_DIMENSION = 2**40

STRICTER = (
    "a name stands twice",
    "an entry has other fields than dtype, shape and data_offsets, or is a list",
    "a name is empty, begins with /, holds a NUL, or has more than 512 bytes",
    "more than 8 dimensions, or one of more than 2**40",
    "more than 32 MB, or more than 200,000 tensors",
    "something else than { in front, or than spaces behind",
    "__metadata__ is null",
)
"""What is refused although the safetensors library accepts it."""


class TensorInfo(NamedTuple):
    """Dtype (safetensors name, such as "BF16") and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPE_BITS[self.dtype] // 8


class HeaderEntry(NamedTuple):
    """A tensor in a file; `begin` is the offset of its first byte from the start of the file."""

    info: TensorInfo
    begin: int


class Header(NamedTuple):
    """What the first bytes of a file say.

    Attributes:
        entries: every tensor, in the order in which they are named.
        sha256: of these bytes.
    """

    entries: dict[str, HeaderEntry]
    sha256: str


def widen(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Values as numpy holds them (see `FLOAT_DTYPES`) in float32; a copy, but for float32.

    >>> widen(np.array([0x3FC0], dtype=np.uint16), "BF16")
    array([1.5], dtype=float32)
    """
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32, copy=False)


def narrow(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Values rounded to a dtype, to nearest even, as numpy holds them; float32 as it is.

    >>> widen(narrow(np.array([1.0, 1.005], dtype=np.float32), "BF16"), "BF16")
    array([1.       , 1.0078125], dtype=float32)
    """
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # infinity is found where results are checked
            return values.astype(FLOAT_DTYPES[dtype], copy=False)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding the bits of a NaN could make a number of it.
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def read_header(descriptor: int, label: str) -> Header:
    """Read and check the header of an open safetensors file.

    Stricter than the safetensors library, which accepts some headers that mean two things or
    exhaust their reader: see `STRICTER`.

    Args:
        descriptor: an open file.
        label: what errors call the file.

    Raises:
        ModelCompatibilityError: the file is cut off, or its header is not valid.
    """
    size = os.fstat(descriptor).st_size
    first = read_all(descriptor, 8)
    length = int.from_bytes(first, "little") if len(first) == 8 else 0
    if first in (b"version ", b"<!DOCTYP", b"<!doctyp"):
        what = "a Git LFS pointer, not the file. Fetch it with `git lfs pull`"
        page = "a web page. Download the file again, and look at what the page says"
        raise ModelCompatibilityError(f"{label}: is {what if first[:1] == b'v' else page}")
    if not 2 <= length <= size - 8:
        raise ModelCompatibilityError(
            f"{label}: not a complete safetensors file (it has {size} bytes and its header "
            f"claims {length}). Download or save it again"
        )
    try:
        if length > MAX_HEADER:
            raise ValueError(f"it claims {length} bytes, expected at most {MAX_HEADER}")
        text = b"".join(chunks(descriptor, 8, length))
        entries = parse_header(text, size)
    except (ValueError, RecursionError) as error:
        raise ModelCompatibilityError(
            f"{label}: the safetensors header is corrupt: {_short(error)}. Download or save the "
            "file again"
        ) from error
    return Header(entries, hashlib.sha256(first + text).hexdigest())


def parse_header(text: bytes, size: int) -> dict[str, HeaderEntry]:
    """The tensors of a header; `ValueError` or `RecursionError` where it is not valid.

    Args:
        text: the JSON, without the 8 bytes before it.
        size: of the whole file.
    """
    if not text.startswith(b"{") or not text.rstrip(b" ").endswith(b"}"):
        raise ValueError("it is not a JSON object, with nothing but spaces after it")
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_whole)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not an object of texts")
    "".join([*metadata, *metadata.values()]).encode()  # half a surrogate pair is no text
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it names {len(header)} tensors, expected at most {MAX_TENSORS}")
    data_start = 8 + len(text)
    entries = {name: _entry(name, value, data_start) for name, value in header.items()}
    _check_tiling(entries, data_start, size)
    return entries


def _short(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _whole(text: str) -> int:
    """A number of the header; -0 is below 0, as the safetensors library sees it."""
    return -1 if text == "-0" else int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice (the json module would keep the last)."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands in it twice")
    return values


def _entry(name: str, value: Any, data_start: int) -> HeaderEntry:
    """One tensor of the header; `ValueError` if it is not what the format says."""
    if not name or name.startswith("/") or "\0" in name or len(name.encode()) > MAX_NAME:
        raise ValueError(f"{name[:60]!r} is no name for a tensor")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{name!r} has shape {shape} at {offsets}, not whole numbers >= 0")
    if len(shape) > MAX_RANK or any(n > MAX_DIMENSION for n in shape):
        raise ValueError(
            f"{name!r} has shape {shape}, expected at most {MAX_RANK} dimensions of 2**40"
        )
    info = TensorInfo(dtype, tuple(shape))
    bits = info.numel * DTYPE_BITS[dtype]
    if max(*itertools.accumulate(shape, operator.mul, initial=1), bits) >= 2**64:
        raise ValueError(f"{name!r} with shape {shape} has more elements than can be counted")
    if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != bits:
        raise ValueError(f"{name!r} with {dtype} {shape} does not fill its bytes {offsets}")
    return HeaderEntry(info, data_start + offsets[0])


def _check_tiling(entries: Mapping[str, HeaderEntry], data_start: int, size: int) -> None:
    """`ValueError` unless the tensors cover the data exactly: no overlap, no hole, no rest."""
    position = data_start
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].begin, item[1].info.nbytes)
    ):
        if entry.begin != position:
            raise ValueError(f"{name!r} starts at byte {entry.begin}, expected {position}")
        position += entry.info.nbytes
    if position != size:
        raise ValueError(f"the tensors end at byte {position}, but the file has {size}")


def build_header(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, HeaderEntry]]:
    """The first bytes of a file with these tensors, in this order, and where each one goes.

    The header carries `{"format": "pt"}`, without which some readers refuse the file, and is
    padded so that the tensors start at a multiple of 8.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    entries = {
        name: HeaderEntry(info, start + header[name]["data_offsets"][0])
        for name, info in tensors.items()
    }
    return len(text).to_bytes(8, "little") + text, entries
