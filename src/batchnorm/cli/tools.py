"""`batchnorm inspect` and `batchnorm diagnose`."""

# No `from __future__ import annotations`: the commands are defined inside a function, and typer
# could not look up the names in their annotations afterwards.

import json
import math
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from batchnorm._version import __version__
from batchnorm.cli.load import load
from batchnorm.cli.printing import print_text
from batchnorm.cli.status import FOUND, MISUSED
from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm.tools.findings import SEVERITIES, Diagnosis, check_codes

_STATUS = (
    "Exit status: 0, nothing at or above --fail-on was found; 1, something was; 2, the command "
    "could not do its work."
)
INSPECT_HELP = (
    "Find what is wrong with batch normalization in a checkpoint, without the model.\n\n"
    "Running statistics that are not finite, without variance, never or hardly updated or in half "
    "precision, dead channels, layers that count differently. No code in the file is run.\n\n"
    + _STATUS
    + " A file without batch norm layers is such a case."
)
DIAGNOSE_HELP = (
    "Find what is wrong with batch normalization in a model, on some of its data.\n\n"
    "How far train() and eval() are apart, which layers make the difference, why, and what to do. "
    "MODEL and --data are names as in package.module:name, looked for in the current directory "
    "first; a function or a class is called without arguments. The model is left as it was.\n\n"
    "For example: batchnorm diagnose train:make_model --data train:make_loader\n\n" + _STATUS
)

_Json = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write all that was found there, too.")
]
_FailOn = Annotated[
    str,
    typer.Option(
        metavar="|".join(SEVERITIES), help="From what severity on the exit status is to be 1."
    ),
]
_Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="CODE", help="Leave findings out, such as BN304; several: repeat it."),
]


def add(app: typer.Typer) -> None:
    """Add the commands."""

    @app.command("inspect", help=INSPECT_HELP)
    def inspect(
        file: Annotated[
            Path,
            typer.Argument(
                metavar="FILE",
                help="By torch.save (.pt, .pth, .ckpt, .bin), a .safetensors, or the .index.json "
                "of one in parts.",
            ),
        ],
        json: _Json = None,
        fail_on: _FailOn = "error",
        ignore: _Ignore = None,
    ) -> None:
        from batchnorm.tools.checkpoint import inspect_checkpoint

        codes = _checked(json, fail_on, ignore)
        diagnosis = inspect_checkpoint(file, ignore=codes)
        _finish(diagnosis, str(file), {"file": str(file)}, json, fail_on)
        if not diagnosis.layers:  # not what was meant, and nothing to be right
            raise typer.Exit(MISUSED)
        _leave(diagnosis, fail_on)

    @app.command("diagnose", help=DIAGNOSE_HELP)
    def diagnose(
        model: Annotated[str, typer.Argument(metavar="MODEL", help="The model, or what makes it.")],
        data: Annotated[
            str,
            typer.Option(
                metavar="NAME",
                help="Batches, or what makes them: tensors, tuples with the input first, or "
                "dictionaries of the model's arguments.",
            ),
        ],
        optimizer: Annotated[
            str | None,
            typer.Option(
                metavar="NAME",
                help="The optimizer, or what makes it of the model: to look at weight decay.",
            ),
        ] = None,
        max_batches: Annotated[
            int, typer.Option(min=1, metavar="N", help="Batches to look at, at most.")
        ] = 32,
        json: _Json = None,
        plot: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Draw the layers' drift there: .svg, .png or .pdf."),
        ] = None,
        fail_on: _FailOn = "error",
        ignore: _Ignore = None,
    ) -> None:
        from torch import nn

        from batchnorm.tools.plot import check_file, drift

        codes = _checked(json, fail_on, ignore)
        if plot:
            _make_folder(plot)
            check_file(plot)
        net = load(model, "MODEL")
        if not isinstance(net, nn.Module):
            raise ArgumentError(
                f"expected MODEL to be or to make a torch.nn.Module, got {type(net).__name__} from "
                f"{model}"
            )
        batches = load(data, "--data")
        used = load(optimizer, "--optimizer", net) if optimizer else None
        from batchnorm.tools.diagnose import diagnose

        try:
            diagnosis = diagnose(
                net, batches, max_batches=max_batches, optimizer=used, ignore=sorted(codes)
            )
        except BatchNormError:
            raise
        except Exception as error:
            # The status of an uncaught exception is that of findings.
            traceback.print_exc()
            raise BatchNormError(
                f"the model or its batches raised {type(error).__name__}, see above; does the "
                "model run on these batches? A tuple's first element alone is given to it."
            ) from error
        source = {"model": model, "data": data}
        _finish(diagnosis, f"{model}, {type(net).__name__}", source, json, fail_on)
        if plot:
            drift(diagnosis, plot)
            print_text(Console(), f"Written: {plot}")
        _leave(diagnosis, fail_on)


def _checked(path: Path | None, fail_on: str, ignore: list[str] | None) -> frozenset[str]:
    """Find out before the work starts what cannot be done after it; return the codes to ignore."""
    if fail_on not in SEVERITIES:
        raise ArgumentError(f"expected --fail-on {', '.join(SEVERITIES)}, got {fail_on!r}")
    if path:
        if path.suffix != ".json" or path.is_dir():
            raise ArgumentError(f"expected a file that ends in .json in --json, got {path}")
        _make_folder(path)
    codes = [code for given in ignore or () for code in given.upper().split(",") if code]
    return check_codes(codes)


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"expected a directory for {path}, got: {error.strerror}; choose another file"
        ) from error


def _finish(
    diagnosis: Diagnosis, title: str, source: dict[str, str], path: Path | None, fail_on: str
) -> None:
    from batchnorm.tools.show import show

    show(diagnosis, Console(), title)
    if path:
        content = {"version": __version__, **source, "fail_on": fail_on, **diagnosis.to_dict()}
        text = json.dumps(_finite(content), indent=1, allow_nan=False, ensure_ascii=False)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise BatchNormError(
                f"expected to write {path}, got: {error.strerror}; make room or choose another file"
            ) from error
        print_text(Console(), f"Written: {path}")


def _leave(diagnosis: Diagnosis, fail_on: str) -> None:
    worst = diagnosis.worst()
    if worst is not None and SEVERITIES.index(worst) <= SEVERITIES.index(fail_on):
        raise typer.Exit(FOUND)


def _finite(value: Any) -> Any:
    """None for numbers that JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
