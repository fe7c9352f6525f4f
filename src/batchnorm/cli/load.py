"""Objects of the user's own, by the names that the command line has for them."""

from __future__ import annotations

import difflib
import importlib
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from torch import nn

from batchnorm.errors import ArgumentError


def load(reference: str, option: str, *arguments: Any) -> Any:
    """What `package.module:name` stands for; a function or a class is called.

    Modules are looked for in the current directory first, as by `python -m`.

    Args:
        reference: what was given.
        option: what it was given as, for messages.
        arguments: what a function or a class is called with.

    Raises:
        ArgumentError: there is no such thing, or making it failed.
    """
    module, _, name = reference.partition(":")
    if not module or not name:
        raise ArgumentError(
            f"expected {option} as package.module:name, such as train:make_model, got {reference!r}"
        )
    if module.endswith(".py") or "/" in module:
        dotted = ".".join(Path(module).with_suffix("").parts)
        raise ArgumentError(
            f"expected the name of a module in {option}, got the file {module}; write "
            f"{dotted}:{name}, in the directory from which it can be imported"
        )
    found = _imported(module, option)
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"expected {part!r} in {module} ({option}), got none{hint}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        return found
    try:
        return found(*arguments)
    except (Exception, SystemExit) as error:
        raise _theirs(f"{reference} ({option})", error) from error


def _imported(module: str, option: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            raise ArgumentError(
                f"expected a module that can be imported in {option}, got {module}: there is no "
                f"{error.name!r} in {here} or among what is installed"
            ) from error
        raise _theirs(f"importing {module} ({option})", error) from error
    except (Exception, SystemExit) as error:
        raise _theirs(f"importing {module} ({option})", error) from error


def _theirs(doing: str, error: BaseException) -> ArgumentError:
    """What their code raised, and where; our part of the way there is no news."""
    if isinstance(error, SystemExit):
        said = f"it ended the program ({error}): put what is to run behind __name__ == '__main__'"
    else:
        # One line of it: some libraries' messages are pages.
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, SyntaxError):
        where = f"{error.filename}, line {error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        # The last of their own: libraries check what they are given.
        aside = (str(Path(__file__).parent), sysconfig.get_paths()["purelib"], "<frozen")
        own = [frame for frame in frames if not frame.filename.startswith(aside)]
        where = f"{own[-1].filename}, line {own[-1].lineno}" if own else ""
    return ArgumentError(f"{doing} failed: {said}" + (f" ({where})" if where else ""))
