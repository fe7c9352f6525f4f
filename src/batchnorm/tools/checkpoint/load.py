"""Loads a checkpoint's tensors, and runs nothing that is in the file."""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError, InputError, MissingDependencyError
from batchnorm.tools.checkpoint.keys import of_batch_norms

#: The number with which torch.save began its files before they were zip archives, as in a pickle.
_LEGACY = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")

#: What a safetensors header may have at most, by the format.
_LONGEST_HEADER = 100_000_000

#: What is often found in the place of a checkpoint, by its first bytes.
_OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer: get the file itself with `git lfs pull`"),
    (b"<", "a web page or XML, perhaps what a failed download left"),
    (b"\x89HDF", "HDF5, as of Keras"),
    (b"GGUF", "GGUF, which keeps no batch normalization"),
    (b"\x93NUMPY", "a NumPy array"),
    (
        b"\x80",
        "a pickle that torch.save did not write, and such are not opened: any code may be in it",
    ),
    (b"{", "JSON or a dictionary in text"),
)

#: What training scripts save beside weights. Something inert takes the place of these; anything
#: else that is not of torch's own list stops the reading.
_LEFT_OUT = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"pathlib.{kind}Path" for kind in ("Posix", "Windows", "PurePosix", "PureWindows")),
    *(f"pathlib._local.{kind}Path" for kind in ("Posix", "Windows", "PurePosix", "PureWindows")),
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    "numpy.ndarray",
    "numpy.dtype",
    "datetime.datetime",
    "datetime.timedelta",
)


#: What torch's reader says of a name that it will not look up.
_UNKNOWN = re.compile(r"GLOBAL (\S+)")


class _LeftOut:
    """Stands for an object that is not a weight: takes anything, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _LeftOut:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


#: What checkpoints are usually called.
_USUAL = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".index.json")


def load(path: str | os.PathLike[str]) -> Any:
    """What is in a file: nested dictionaries and lists, with tensors for leaves."""
    return _load(_checked(path))


def _checked(given: str | os.PathLike[str]) -> Path:
    try:
        path = Path(given)
    except TypeError:
        raise ArgumentError(
            f"expected the path of a checkpoint, got {type(given).__name__}; for a model in memory "
            "there is `diagnose`"
        ) from None
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.name.endswith(_USUAL))[:3]
        hint = f"; there is {', '.join(inside)} in it" if inside else ""
        raise ArgumentError(f"expected a checkpoint, got a directory: {path}{hint}")
    if not path.exists():
        raise ArgumentError(f"expected a checkpoint, got {path}, but there is no such file")
    if not path.is_file():
        raise ArgumentError(f"expected a file, got {path}, which is something else")
    return path


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ArgumentError(
            f"expected a file that can be read: {path}: {error.strerror}"
        ) from error
    if not head:
        raise InputError(f"expected a checkpoint, got an empty file: {path}")
    if path.name.endswith(".index.json"):
        return _load_shards(path)
    if head.startswith(b"PK\x03\x04"):
        return _load_torch(path, mmap=_check_archive(path))
    if _LEGACY in head:
        return _load_torch(path, mmap=False)
    header = int.from_bytes(head[:8], "little")
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and header <= _LONGEST_HEADER):
        return _load_safetensors(path)
    what = next((what for start, what in _OTHERS if head.lstrip().startswith(start)), None)
    raise InputError(
        "expected a checkpoint written by torch.save or by safetensors, got "
        f"{what or f'a file that begins with {head[:12]!r}'}: {path}"
    )


def _check_archive(path: Path) -> bool:
    """Refuse zip archives that hold no checkpoint, and those whose end is missing.

    Returns:
        Whether tensors lie in it as they are: torch never compresses them, other tools may, and
        what is compressed cannot be mapped into memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            stored = all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())
    except zipfile.BadZipFile as error:
        raise _damaged(path, ValueError("the end of the archive is missing")) from error
    except Exception as error:  # a damaged archive may raise anything
        raise _damaged(path, error) from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(
            f"expected a state dict, got a TorchScript archive: {path}; save its own with "
            "torch.save(torch.jit.load(path).state_dict(), …) and inspect that"
        )
    if not any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        raise InputError(
            f"expected a checkpoint written by torch.save, got another zip archive: {path}"
        )
    return stored


def _load_torch(path: Path, *, mmap: bool) -> Any:
    """By torch's own reader that calls nothing but what rebuilds tensors.

    With mmap only the tensors that are looked at are read from the disk, which the older format
    cannot do.
    """
    stand_ins: list[Any] = [(_LeftOut, name) for name in _LEFT_OUT]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how old the file is
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        refused = isinstance(error, UnpicklingError)
        raise (_refused(path, str(error)) if refused else _damaged(path, error)) from error


def _refused(path: Path, said: str) -> InputError:
    """What to say of a pickle that wants more than tensors, or is none of torch.save's usual."""
    wanted = _UNKNOWN.findall(said)
    if not wanted:
        why = said.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0][:160]
        return InputError(
            "expected a checkpoint as torch.save writes it (pickle protocol 2), got one that "
            f"torch.load(weights_only=True) refuses: {path} ({why}); if you trust it, save it anew"
        )
    # All of them, which only torch's archives tell; else the first.
    with suppress(Exception):
        every = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        wanted = sorted(set(every) - set(_LEFT_OUT)) or wanted
    names = f" ({', '.join(wanted[:3])}{', …' if len(wanted) > 3 else ''})"
    return InputError(
        f"expected tensors in dictionaries, got objects of other classes{names}: {path}; a whole "
        "pickled model, or settings beside the weights. Rebuilding them would run code, and a "
        "file's code can do anything. If you trust it, save what is needed, with "
        "torch.save(model.state_dict(), …), and inspect that"
    )


def _load_safetensors(path: Path, every: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of batch norm layers; nothing else is read. `every`: all parts' keys."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise MissingDependencyError(
            f"to read {path.name}, safetensors is needed, which is not installed. Install it with: "
            "pip install --no-build-isolation '.[tools]' (in the clone)"
        ) from error
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            return {
                key: file.get_tensor(key)
                for key in of_batch_norms(keys, keys if every is None else every)
            }
    except MemoryError:
        raise
    except Exception as error:  # SafetensorError, and whatever torch says of sizes
        raise _damaged(path, error) from error


def _load_shards(path: Path) -> dict[str, Any]:
    """The parts that an index names, as one."""
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = dict.fromkeys(parts[key] for key in of_batch_norms(parts, parts))
        if any(Path(name).name != name or name.endswith(".json") for name in files):
            raise ValueError("its parts are no files beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(
            path, error, "an index of a sharded checkpoint, with a weight_map"
        ) from error
    tensors: dict[str, Any] = {}
    for name in files:
        part = _checked(path.with_name(name))
        safe = part.suffix == ".safetensors"
        content = _load_safetensors(part, parts) if safe else _load(part)
        if not isinstance(content, Mapping):
            raise _damaged(part, TypeError("no dictionary of tensors"))
        tensors.update(content)
    return tensors


def _damaged(path: Path, error: Exception, expected: str = "a whole checkpoint") -> InputError:
    first = str(error).strip().partition("\n")[0][:160] or type(error).__name__
    return InputError(
        f"expected {expected}, got a file that is damaged or cut off: {path} ({first}); save or "
        "download it again"
    )
