"""The data that an experiment trains on: one bundled set, or a file of the user's own.

Sigmoid networks need inputs of moderate size. How inputs are shifted and scaled follows from their
rank, always with the mean and the standard deviation of the training part alone:

- Images and the like (`x` of rank 3 or more) have *one* mean and *one* standard deviation, over
  every element. Neighbours share a unit; and to standardise each pixel by itself would be a batch
  normalization of the first layer, given to both arms, and would blow up the pixels that are nearly
  always dark.
- A table (`x` of rank 2) has them for *each column*. Columns come in different units, so with one
  scale for all those with large numbers would drown the others. A column that is constant in
  training is only shifted.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.errors import ArgumentError, InputError
from batchnorm.lab import folders
from batchnorm.lab.words import counted

# The split is part of the data's identity, not of a run: every seed sees the same test rows.
SPLIT_SEED = 0

# 28% of the digits are 504 test images, so that one image is 0.2 points of accuracy.
TEST_SHARE = 0.28

# What an .npy file begins with.
NPY = b"\x93NUMPY"

# How labels that are words become class numbers.
NUMBERED = "`classes, y = numpy.unique(labels, return_inverse=True)`"

# 72 training rows: enough for one batch of 60 with a different one to follow.
MIN_ROWS = 100

# A class of 4 has about one row in the test part, and three to learn from; and there are never more
# classes than test rows.
MIN_ROWS_PER_CLASS = 4


@dataclass(frozen=True)
class Dataset:
    """Scaled inputs and class numbers 0…classes-1, split into a training and a test part.

    `fingerprint` is the SHA-256 of the arrays as split and scaled; runs are filed under it.
    `scaling` says in a sentence how the inputs were scaled.
    """

    name: str
    fingerprint: str
    scaling: str
    classes: int
    x_train: npt.NDArray[np.float32]
    y_train: npt.NDArray[np.int64]
    x_test: npt.NDArray[np.float32]
    y_test: npt.NDArray[np.int64]

    def describe(self) -> dict[str, Any]:
        """Return name, fingerprint and sizes, as JSON values."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "scaling": self.scaling,
            "train_rows": len(self.x_train),
            "test_rows": len(self.x_test),
            "row_shape": list(self.x_train.shape[1:]),
            "classes": self.classes,
        }


def load(source: str | Path) -> Dataset:
    """Load `"digits"`, an .npz file, or a folder with MNIST's or CIFAR's files.

    A file has arrays `x` (rows first) and `y` (class of each row). What a folder must hold
    `batchnorm.lab.folders` says; its own division into training and test rows is kept. The rank of
    `x` decides how it is scaled; the module says how.

    `"digits"` is scikit-learn's bundled set of 1797 handwritten 8×8 digits: real, and no download.

    Raises:
        ArgumentError: `source` is neither text nor a path.
        InputError: The file is not what is described above; the message says how it differs.
    """
    if not isinstance(source, (str, Path)):
        raise ArgumentError(
            f"data: expected 'digits' or the path of a file or folder; got a "
            f"{type(source).__name__}. Save arrays with numpy.savez(PATH, x=inputs, y=classes), "
            "and give that path."
        )
    if source == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return _prepare("digits", bunch.images, bunch.target)
    path = Path(source)
    if path.is_dir():
        x, y, x_test, y_test = folders.read(path)
        name = path.resolve().name
        _checked(path, x, y)
        return _finished(name, x, y, x_test, y_test)
    x, y = _read(path)
    return _prepare(path.name, *_checked(path, x, y))


def _read(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    def reject(got: str, remedy: str = "") -> InputError:
        return InputError(
            f"{path}: expected an .npz archive with arrays x and y; {got}. "
            f"{remedy or 'Save one with numpy.savez(PATH, x=inputs, y=classes).'}"
        )

    if not path.is_file():
        raise InputError(
            f"{path}: expected an .npz file, a folder of MNIST's or CIFAR's files, or the name "
            "'digits'; there is no such file. Save one with numpy.savez(PATH, x=inputs, y=classes)."
        )
    try:
        # Opened and looked at here: numpy leaves a file open that it fails to read, and its advice
        # for what is no archive is to load it unsafely.
        with path.open("rb") as file:
            if file.read(len(NPY)) == NPY:
                raise reject("it is a single .npy array")
            if not zipfile.is_zipfile(file):
                raise reject("it is not an .npz archive, or one that was cut short")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            missing = [name for name in ("x", "y") if name not in archive.files]
            if missing:
                raise reject(f"it holds {', '.join(archive.files) or 'none'}")
            return _member(archive, "x", reject), _member(archive, "y", reject)
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise reject(f"it cannot be read ({error})") from error


def _member(archive: Any, name: str, reject: Callable[[str, str], InputError]) -> npt.NDArray[Any]:
    try:
        array = archive[name]
    except ValueError as error:
        # An array of Python objects is a pickle, which may run any code when it is loaded.
        if "allow_pickle" not in str(error):
            raise
        raise reject(
            f"{name} holds Python objects, not plain numbers",
            f"Save numbers only: inputs with x.astype('float64'), labels as {NUMBERED}.",
        ) from error
    if not isinstance(array, np.ndarray):
        raise reject(f"{name} in it is no array", "")
    return array


def _checked(
    path: Path, x: npt.NDArray[Any], y: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    def reject(expected: str, got: str, remedy: str) -> InputError:
        return InputError(f"{path}: expected {expected}; got {got}. {remedy}")

    if x.ndim < 2 or x.dtype.kind not in "biuf":
        raise reject(
            "x to be real numbers with one row for each example",
            f"shape {x.shape} of {x.dtype}",
            "Make it 2-D or more, for example with x.reshape(len(x), -1).",
        )
    if y.ndim == 1 and y.dtype.kind in "SU":
        raise reject("y to be whole-number classes", "words", f"Number them with {NUMBERED}.")
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise reject(
            "y to be 1-D whole-number classes",
            f"shape {y.shape} of {y.dtype}",
            "Convert class numbers with y.astype('int64'), one-hot rows with y.argmax(1).",
        )
    if len(x) != len(y):
        raise reject(
            "as many labels as rows", f"{len(x)} rows in x and {len(y)} labels in y", "Pair them."
        )
    if len(x) < MIN_ROWS:
        raise reject(f"at least {MIN_ROWS} rows", f"{len(x)}", "Give it more data.")
    if x[0].size == 0:
        raise reject("at least one feature a row", f"x of shape {x.shape}", "Fill x.")
    bad = int((~np.isfinite(x)).reshape(len(x), -1).any(1).sum())
    if bad:
        raise reject(
            "finite inputs", f"NaN or infinity in {bad} of {len(x)} rows", "Drop or fill them."
        )
    if not x.max() > x.min():
        raise reject("inputs that differ", f"{x.flat[0]} everywhere", "Check how x was made.")
    labels, counts = np.unique(y, return_counts=True)
    if len(labels) < 2:
        raise reject("at least 2 classes", f"only class {labels[0]}", "Add another class.")
    if counts.min() < MIN_ROWS_PER_CLASS:
        raise reject(
            f"at least {MIN_ROWS_PER_CLASS} rows in each class",
            f"{counts.min()} in class {labels[counts.argmin()]}",
            "Drop the rare classes; if y is a measured quantity, put it into bins.",
        )
    return x, y


def _prepare(name: str, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Dataset:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(x)),
        test_size=round(TEST_SHARE * len(x)),
        stratify=np.unique(y, return_inverse=True)[1],
        random_state=SPLIT_SEED,
    )
    return _finished(name, x[train], y[train], x[test], y[test])


def _finished(
    name: str,
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    x_test: npt.NDArray[Any],
    y_test: npt.NDArray[Any],
) -> Dataset:
    """Scale both parts by the first, and number the classes."""
    labels = np.unique(np.concatenate([y, y_test]))
    centre, scale, scaling = _scale(name, x.astype(np.float64))
    parts = (
        ((x - centre) / scale).astype(np.float32),
        np.searchsorted(labels, y).astype(np.int64),
        ((x_test - centre) / scale).astype(np.float32),
        np.searchsorted(labels, y_test).astype(np.int64),
    )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str((part.shape, part.dtype.str)).encode())
        digest.update(np.ascontiguousarray(part).tobytes())
    return Dataset(name, digest.hexdigest(), scaling, len(labels), *parts)


def _scale(
    name: str, reference: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], str]:
    """Return the mean, the standard deviation and the sentence on them, from the training rows."""
    constant = (reference == reference[0]).all(0)
    if constant.all():
        raise InputError(
            f"{name}: expected inputs that differ; the rows of the training part are all alike. "
            "Check how x was made."
        )
    if reference.ndim > 2:
        sentence = (
            "One mean and one standard deviation, of all training inputs together, scale every "
            "input."
        )
        return reference.mean(), reference.std(), sentence
    sentence = "Each column is scaled by its own mean and standard deviation over the training rows"
    if idle := int(constant.sum()):
        sentence += f"; {counted(idle, 'column')} that never changed there: only shifted"
    # Asked of the values themselves: rounding can leave a constant column a deviation above zero.
    scale = np.where(constant, 1.0, reference.std(0))
    return reference.mean(0), scale, f"{sentence}."
