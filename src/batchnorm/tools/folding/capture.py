"""Which layer of a model reads what another one puts out.

torch.fx runs the model once on symbols in place of tensors: what it shows holds for tensors of any
shape and value, and a model whose Python code asks for either cannot be shown as a whole. Then its
parts are, as far as they can; torch.export shows what is still missing, for inputs of the same
shapes. A run on the example inputs tells how often each layer is called, and on what ranks, and
must agree.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_map

from batchnorm.tools.folding import exported
from batchnorm.tools.folding.example import Example, is_packed
from batchnorm.tools.folding.flow import Flow, Placeholder, symbolic
from batchnorm.tools.folding.kinds import kind


@dataclass
class Seen:
    """What a run on the example inputs showed.

    Attributes:
        calls: of each module.
        ranks: of the inputs of each batch norm; 0 for what is no tensor.
        forms: of each module, the arguments it was called with, tensors replaced by placeholders,
            and how often.
    """

    calls: Counter[str] = field(default_factory=Counter)
    ranks: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    forms: dict[str, dict[Any, tuple[Any, int]]] = field(default_factory=lambda: defaultdict(dict))


@dataclass
class Capture:
    """All that is known of the flow of data.

    Attributes:
        seen: on the example inputs.
        views: the model, or as many of its parts as can be shown, by torch.fx; and if there are
            layers that this leaves out, the model by torch.export.
        failures: why the innermost module that holds a layer could not be captured, by its name.
        fx_failure: why torch.fx could not show the whole model, if so.
    """

    seen: Seen
    views: list[list[Flow]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    fx_failure: str | None = None

    def note(self) -> str | None:
        """What the flow of data depends on, if torch.fx could not show the whole model."""
        if not self.fx_failure:
            return None
        return (
            "torch.fx cannot follow the model as a whole "
            f"({self.fx_failure}): the copy is for inputs that lead its Python code the same way "
            "as the example does"
        )

    def why_not(self, layer: str) -> str:
        """Why there is nothing to know of a layer."""
        holders = [name for name in self.failures if _holds(name, layer)]
        if not holders:
            return "the flow of data around it could not be captured"
        name = max(holders, key=len)
        where = f"of {name!r} " if name else ""
        return f"the flow of data {where}could not be captured: {self.failures[name]}"


def capture(model: nn.Module, example: Example) -> Capture:
    """Learn the flow of data of a model in evaluation, which is left as it is."""
    # Copies: a forward pass may leave things in the model, and one on symbols leaves symbols.
    captured = Capture(_watch(copy.deepcopy(model), example), [[]])
    scratch = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fx tells of assertions that it leaves out
        _trace(scratch, "", names_of(scratch), captured)
        shown = {name for flow in captured.views[0] for name in flow.layers.values()}
        called = [name for name, m in scratch.named_modules() if isinstance(m, _BatchNorm)]
        if any(captured.seen.calls[name] and name not in shown for name in called):
            _export(copy.deepcopy(model), example, captured)
    return captured


def names_of(model: nn.Module) -> dict[int, str]:
    """The name of each module, the first of several, by its identity."""
    return {id(module): name for name, module in model.named_modules()}


def _watch(model: nn.Module, example: Example) -> Seen:
    seen = Seen()

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.calls[name] += 1
        if isinstance(module, _BatchNorm):
            first = args[0] if args else kwargs.get("input", kwargs.get("x"))
            seen.ranks[name].add(first.dim() if isinstance(first, Tensor) else 0)
        elif kind(module) is None:
            key, arguments = _form((args, kwargs))
            _, times = seen.forms[name].get(key, (None, 0))
            seen.forms[name][key] = arguments, times + 1

    for name, module in model.named_modules():

        def hook(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            before(name, module, args, kwargs)

        module.register_forward_pre_hook(hook, with_kwargs=True)
    example.run(model)
    return seen


def _form(arguments: Any) -> tuple[Any, Any]:
    """What two calls alike have in common, and the arguments without their tensors."""
    arguments = tree_map(
        lambda leaf: Placeholder() if isinstance(leaf, Tensor) or is_packed(leaf) else leaf,
        arguments,
        is_leaf=is_packed,
    )
    leaves, structure = tree_flatten(arguments)
    plain = (bool, int, float, str, type(None), Placeholder)
    values = [
        (type(leaf), None if isinstance(leaf, Placeholder) else repr(leaf))
        if isinstance(leaf, plain)
        else id(leaf)
        for leaf in leaves
    ]
    return (str(structure), *values), arguments


def _trace(module: nn.Module, name: str, names: dict[int, str], captured: Capture) -> None:
    """Capture a module, or what of its parts can be captured."""
    if not any(isinstance(part, _BatchNorm) for part in module.modules()) or kind(module):
        return
    forms = captured.seen.forms.get(name, {})
    try:
        flows = [
            Flow.of(symbolic(module, arguments), module, names, times)
            for arguments, times in forms.values()
        ]
    except Exception as error:
        captured.failures[name] = _told(error)
        if not name:
            captured.fx_failure = _told(error)
    else:
        if flows:
            captured.views[0] += flows
            return
    for child, part in module.named_children():
        path = names[id(part)]
        if path == (f"{name}.{child}" if name else child):  # others were met elsewhere
            _trace(part, path, names, captured)


def _export(model: nn.Module, example: Example, captured: Capture) -> None:
    """Capture the whole model, for the layers that its parts did not show."""
    try:
        graph = exported.graph(model, example.args, example.kwargs)
        captured.views.append([Flow.of(graph, model, names_of(model), 1)])
    except Exception as error:
        captured.failures = {
            name: f"{reason}; by torch.export: {_told(error)}"
            for name, reason in captured.failures.items()
        }


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _holds(name: str, layer: str) -> bool:
    return not name or layer.startswith(f"{name}.")
