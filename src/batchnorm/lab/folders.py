"""Folders of images in the formats that data sets are handed out in: IDX and CIFAR's binaries.

- IDX, as MNIST, Fashion-MNIST and their like: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`
  and the same with `t10k` (or `test`), each perhaps with `.gz`. A file is two zero bytes, a type, a
  number of axes, the axes' lengths as big-endian 32-bit numbers, and the values.
- CIFAR-10: `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`; CIFAR-100: `train.bin`
  and `test.bin`, with fine labels. A row is its labels, then 3 × 32 × 32 bytes.

Their own division into training and test images is kept.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.errors import InputError

Parts = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
"""Training inputs and labels, test inputs and labels."""

#: IDX's code for unsigned bytes, the only type that images come in.
UNSIGNED_BYTE = 8

#: Of a CIFAR image: colours, rows, columns.
CIFAR = (3, 32, 32)

EXPECTED = (
    "expected a folder with the IDX files of MNIST (train-images-idx3-ubyte, "
    "train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte, perhaps with .gz), "
    "with CIFAR-10's data_batch_1.bin to 5 and test_batch.bin, or with CIFAR-100's train.bin and "
    "test.bin"
)


def read(folder: Path) -> Parts:
    """Read the images of a folder.

    Raises:
        InputError: it has none of those files, or one of them is missing, cut short or another.
    """
    names = {path.name for path in folder.iterdir()}
    if any("-idx" in name for name in names):
        return _read_idx(folder)
    if "test_batch.bin" in names or "data_batch_1.bin" in names:
        # Labels of one byte.
        train = [f"data_batch_{n}.bin" for n in range(1, 6)]
        return (*_read_cifar(folder, train, 1), *_read_cifar(folder, ["test_batch.bin"], 1))
    if "train.bin" in names or "test.bin" in names:
        # A coarse label and the fine one, which is last.
        return (*_read_cifar(folder, ["train.bin"], 2), *_read_cifar(folder, ["test.bin"], 2))
    some = ", ".join(sorted(names)[:5]) or "no file"
    raise InputError(f"{folder}: {EXPECTED}; there is {some}. Unpack the data set there.")


def _read_idx(folder: Path) -> Parts:
    parts = []
    for names in (("train",), ("t10k", "test")):
        for what, axes in (("images", 3), ("labels", 1)):
            parts.append(_idx(_find(folder, [f"{n}-{what}-idx{axes}-ubyte" for n in names])))
    x_train, y_train, x_test, y_test = parts
    for part, x, y in (("train", x_train, y_train), ("t10k", x_test, y_test)):
        if len(x) != len(y) or x.ndim != 3 or y.ndim != 1:
            raise InputError(
                f"{folder}: expected as many {part} labels as images, got images of shape "
                f"{x.shape} and labels of shape {y.shape}. Are the files of one data set?"
            )
    return x_train, y_train, x_test, y_test


def _find(folder: Path, names: list[str]) -> Path:
    for name in names:
        for suffix in ("", ".gz"):
            if (path := folder / f"{name}{suffix}").is_file():
                return path
    raise InputError(f"{folder}: {EXPECTED}; there is no {' or '.join(names)}. Unpack all of it.")


def _bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except FileNotFoundError as error:
        raise InputError(f"{path.parent}: {EXPECTED}; there is no {path.name}.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: expected a whole file; got: {error}. Fetch it again.") from error


def _idx(path: Path) -> npt.NDArray[np.uint8]:
    content = _bytes(path)

    def reject(got: str) -> InputError:
        return InputError(
            f"{path}: expected an IDX file of unsigned bytes; {got}. Fetch it again, or unpack it."
        )

    if len(content) < 4 or content[:2] != b"\0\0":
        raise reject("it begins otherwise")
    if content[2] != UNSIGNED_BYTE:
        raise reject(f"it has values of type {content[2]:#04x}")
    axes = content[3]
    if len(content) < 4 + 4 * axes:
        raise reject("it ends in its head")
    shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
    values = content[4 + 4 * axes :]
    if len(values) != math.prod(shape):
        raise reject(f"it has {len(values)} values, not the {math.prod(shape)} of shape {shape}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _read_cifar(
    folder: Path, names: list[str], labels: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    row = labels + math.prod(CIFAR)
    rows = []
    for name in names:
        content = _bytes(folder / name)
        if not content or len(content) % row:
            raise InputError(
                f"{folder / name}: expected rows of {row} bytes; got {len(content)} bytes, which "
                "are no whole number of rows. Fetch it again."
            )
        rows.append(np.frombuffer(content, np.uint8).reshape(-1, row))
    whole = np.concatenate(rows)
    return whole[:, labels:].reshape(-1, *CIFAR), whole[:, labels - 1]
