"""The flow of data as torch.export sees it: operators, put together again to calls of layers."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn

from batchnorm.tools.folding.kinds import kind


def graph(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Graph:
    """Calls of the layers that folding knows, in a graph like torch.fx's.

    What Python code asked of shapes holds for these inputs; asking for values raises.
    """
    with torch.no_grad(), _quiet():
        program = torch.export.export(model, tuple(args), dict(kwargs), strict=False)
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    builder = _Builder(stored)
    every = list(program.graph.nodes)  # its own iterator starts again at the end
    for (_, name), nodes in groupby(every, key=lambda node: _call(node, model)):
        if name is None:
            for node in nodes:
                builder.copy(node)
        else:
            builder.layer(name, list(nodes))
    return builder.graph


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch.export logs of a failure is told in the report."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):  # it prints, too
            yield
    finally:
        logger.setLevel(level)


def _call(node: fx.Node, model: nn.Module) -> tuple[str, str | None]:
    """Which call of which layer an operator is part of; None for no layer that folding knows."""
    stack = node.meta.get("nn_module_stack")
    if node.op != "call_function" or not stack:
        return "", None
    # The key tells the second call of a layer from the first, the path does not.
    key, (path, _) = list(stack.items())[-1]
    name = re.sub(r"@\d+", "", path)
    return (key, name) if kind(model.get_submodule(name)) is not None else ("", None)


class _Builder:
    def __init__(self, stored: Mapping[str, str]) -> None:
        self.graph = fx.Graph()
        self._stored = stored  # parameters and buffers, by the argument that stands for them
        self._new: dict[fx.Node, fx.Node] = {}

    def copy(self, node: fx.Node) -> None:
        """Take a node over as it is."""
        if node.op != "placeholder" or str(node.target) not in self._stored:
            self._new[node] = self.graph.node_copy(node, self._get)

    def layer(self, name: str, nodes: list[fx.Node]) -> None:
        """Put one node in the place of all operators of a call of a layer."""
        inside = set(nodes)
        given: dict[Any, None] = dict.fromkeys(
            value
            for node in nodes
            for value in node.all_input_nodes
            if value not in inside and str(value.target) not in self._stored
        )
        if len(given) > 1:  # a residual: it may be met first
            (main,) = (n.args[0] for n in nodes if "batch_norm" in str(n.target))
            if main not in given:
                raise ValueError(f"cannot tell the input of {name!r} from its residual")
            given = dict.fromkeys((main, *given))
        made = [node for node in nodes if any(user not in inside for user in node.users)]
        if len(made) != 1 or not given:
            raise ValueError(f"cannot tell what {name!r} puts out")
        main, *others = map(self._get, given)
        self._new[made[0]] = self.graph.call_module(
            name, (main,), {"residual": others[0]} if others else {}
        )

    def _get(self, node: fx.Node) -> fx.Node:
        if node not in self._new:
            self._new[node] = self.graph.create_node("get_attr", self._stored[str(node.target)])
        return self._new[node]
