"""The flow of data through a model, or a part of it, as a graph of calls of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from batchnorm.layers.recurrent import BatchNormLSTM
from batchnorm.tools.folding.kinds import kind, passes

#: Methods whose result has the same values in the same places.
_SAME = ("contiguous", "clone")
_SAME_OPERATORS = tuple(f"aten.{name}.default" for name in _SAME)

_FLATTEN = ("flatten", "aten.flatten.using_ints")

_DROPOUTS = tuple(
    getattr(functional, f"{name}dropout") for name in ("", "alpha_", "feature_alpha_")
)
_DROPOUTS += tuple(getattr(functional, f"dropout{d}d") for d in (1, 2, 3))
_DROPOUT_OPERATORS = tuple(
    f"aten.{name}dropout.default" for name in ("", "feature_", "alpha_", "feature_alpha_")
)

#: What may be asked of a tensor without reading its values, which folding changes.
_PROPERTIES = ("dtype", "device", "shape", "ndim", "requires_grad")
_QUESTIONS = ("size", "dim", "numel", "is_floating_point")

#: Methods that ask their second argument for no more.
_LIKE = ("reshape_as", "view_as", "expand_as", "type_as")


class _Tracer(fx.Tracer):
    """Takes every layer that folding knows as one node, and shows what reads parameters."""

    proxy_buffer_attributes = True

    def __init__(self, arguments: Any) -> None:
        super().__init__()
        self._leaves, self._structure = tree_flatten(arguments)  # positional, by name

    def create_args_for_root(self, *_: Any, **__: Any) -> tuple[Any, list[Any]]:
        """The arguments as they were; torch.fx's own has no *args and **kwargs."""

        def symbol(index: int) -> fx.Proxy:
            return self.create_proxy("placeholder", f"input_{index}", (), {})

        values = [
            symbol(index) if isinstance(leaf, Placeholder) else leaf
            for index, leaf in enumerate(self._leaves)
        ]
        args, kwargs = tree_unflatten(values, self._structure)

        def forward() -> Any:
            # Not the function of the class: an instance may have a forward of its own.
            output = self.root.forward(*args, **kwargs)
            self._keep()
            return output

        return forward, []

    def _keep(self) -> None:
        """What modules keep of a forward pass, for whoever asks later, has one more reader."""
        root: Any = self.root
        for module in root.modules():
            for value in tree_leaves(module.__dict__):
                if isinstance(value, fx.Proxy) and value.tracer is self:
                    self.create_proxy("call_function", _kept, (value,), {})

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if kind(m) is not None or isinstance(m, BatchNormLSTM):
            return True
        holds = any(isinstance(part, _BatchNorm) for part in m.modules())
        return not holds and super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        given = super().call_module(m, forward, args, kwargs)
        leaf = self.is_leaf_module(m, self.path_of_module(m))
        if not leaf and (m._forward_hooks or m._forward_pre_hooks):
            # A hook on a part sees what flows in and out, though it may only store it.
            fx.node.map_aggregate((args, kwargs, given), self._seen_by_a_hook)
        return given

    def _seen_by_a_hook(self, value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            self.create_proxy("call_function", _seen_by_a_hook, (value,), {})
        return value


def _seen_by_a_hook(_: Any) -> None:
    """Stands for the reader that a hook is."""  # mutant: no statement


def _kept(_: Any) -> None:
    """Stands for who reads what a module keeps."""  # mutant: no statement


class Placeholder:
    """Stands for a tensor in the arguments of a call."""


def symbolic(module: nn.Module, arguments: Any) -> fx.Graph:
    """Run a module on symbols, in the place of tensors; all else is as it was in a call."""
    return _Tracer(arguments).trace(module)


@dataclass
class Flow:
    """A graph whose nodes of calls of modules are known by the names of the whole model.

    Attributes:
        graph: of torch.fx.
        layers: for each call of a module, its name.
        modules: the modules by name.
        times: how often this happens in a run on the example inputs.
        read: layers whose parameters are asked for outside of them; True if for their values.
    """

    graph: fx.Graph
    layers: dict[fx.Node, str]
    modules: dict[str, nn.Module]
    times: int
    read: dict[str, bool]

    @classmethod
    def of(cls, graph: fx.Graph, root: nn.Module, names: Mapping[int, str], times: int) -> Flow:
        """With the names of the whole model for the modules of a part."""
        layers: dict[fx.Node, str] = {}
        modules: dict[str, nn.Module] = {}
        read: dict[str, bool] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                module = root.get_submodule(str(node.target))
                layers[node] = names[id(module)]
                modules[names[id(module)]] = module
        owners = _owners(root, names)
        for node in graph.nodes:
            if node.op == "get_attr" and node.users:
                for name in owners.get(id(_attribute(root, str(node.target))), ()):
                    read[name] = read.get(name, False) or not all(map(asks_only, node.users))
        return cls(graph, layers, modules, times, read)

    def layer(self, node: Any) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        name = self.layers.get(node)
        return None if name is None else self.modules[name]

    def source(self, node: fx.Node) -> Any:
        """What a layer, or what passes on its input, takes as that."""
        if node.args:
            return node.args[0]
        return node.kwargs.get("input", node.kwargs.get("x"))

    def passes(self, node: fx.Node) -> bool:
        """Whether a node gives out what it takes in."""
        if node.op == "call_module":
            module = self.layer(node)
            return module is not None and passes(module)
        if node.op == "call_function" and node.target in _DROPOUTS:
            return node.kwargs.get("training") is False
        if str(node.target) in _DROPOUT_OPERATORS:
            return node.args[2] is False
        return node.target in _SAME or str(node.target) in _SAME_OPERATORS

    def joins_leading_axes(self, node: fx.Node) -> bool:
        """Whether a node makes one axis of the first few, and leaves the last: flatten(0, 1)."""
        if node.target is not torch.flatten and str(node.target) not in _FLATTEN:
            return False
        bounds = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        # To some axis from the front: it is not the last if the result has more than one.
        end = bounds.get("end_dim", -1)
        return bool(bounds.get("start_dim", 0) == 0 and isinstance(end, int) and end != -1)

    def describe(self, node: Any) -> str:
        """What a node is, for people."""
        if not isinstance(node, fx.Node):
            return "a constant"
        if node.op == "placeholder":
            return "an argument of the model"
        if node.op == "output":
            return "the result of the model"
        if node.op == "call_module":
            return f"{self.layers[node]!r} ({type(self.layer(node)).__name__})"
        target = node.target
        return f"{target if isinstance(target, str) else getattr(target, '__name__', target)}()"


def readers(node: fx.Node) -> list[fx.Node]:
    """What reads the values of a node, and not its shape only; what reads them twice is twice."""
    found: list[fx.Node] = []
    for user in node.users:
        if asks_only(user):
            continue
        arguments = user.args
        if user.op == "call_method" and user.target in _LIKE:
            arguments = arguments[:1]

        def note(argument: fx.Node, user: fx.Node = user) -> fx.Node:
            if argument is node:
                found.append(user)
            return argument

        map_arg((arguments, user.kwargs), note)
    return found


def _owners(root: nn.Module, names: Mapping[int, str]) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for module in root.modules():
        if kind(module) is not None:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    owners.setdefault(id(tensor), []).append(names[id(module)])
    return owners


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def asks_only(user: fx.Node) -> bool:
    """Whether a node asks for a property of a tensor that folding leaves as it is."""
    if user.op == "call_method":
        return user.target in _QUESTIONS
    if user.target is getattr:
        return user.args[1] in _PROPERTIES
    return str(user.target).startswith("aten.sym_")
