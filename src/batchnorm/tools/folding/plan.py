"""What is folded into what, and why the rest is not."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from batchnorm.tools.folding import algebra
from batchnorm.tools.folding.capture import Capture
from batchnorm.tools.folding.flow import Flow, asks_only, readers
from batchnorm.tools.folding.kinds import (
    Kind,
    kind,
    known,
    not_normalizing_by_constants,
    only_rank,
    unfit,
)
from batchnorm.tools.folding.steps import Step, Work
from batchnorm.tools.layers import every_batch_norm, stepwise

#: What only steps from one value to another, whatever runs before or after it.
_PURE = ("placeholder", "get_attr")


@dataclass(frozen=True)
class _Site:
    flow: Flow
    node: fx.Node


class _Reason(Exception):  # noqa: N818  no error: it never leaves the plan
    """Why a layer is not folded."""  # mutant: no statement


def plan(model: nn.Module, captured: Capture) -> tuple[tuple[Step, ...], dict[str, str]]:
    """The steps in order, and for each layer that is left the reason."""
    planner = _Planner(model, captured)
    planner.run()
    return tuple(planner.steps), planner.left


class _Planner:
    def __init__(self, model: nn.Module, captured: Capture) -> None:
        self.captured = captured
        self.work = Work(model)
        self.modules = self.work.modules
        self.by_step = stepwise(model)
        self.layers = [name for name, _ in every_batch_norm(model)]
        self.steps: list[Step] = []
        self.left: dict[str, str] = {}
        self.folded: set[str] = set()
        self.view: dict[str, int] = {}  # the first that shows a layer
        self.sites: list[dict[str, list[_Site]]] = []
        for view in captured.views:
            found: dict[str, list[_Site]] = defaultdict(list)
            for flow in view:
                for node, name in flow.layers.items():
                    found[name].append(_Site(flow, node))
            self.sites.append(found)

    def run(self) -> None:
        """Fold what can be, until nothing more can."""
        waiting = []
        for name in self._in_order():
            try:
                self._check_layer(name)
                waiting.append(name)
            except _Reason as reason:
                self.left[name] = str(reason)
        # What is folded away lets others become neighbours.
        before = None
        while len(waiting) != before:
            before = len(waiting)
            waiting = [name for name in waiting if not self._fold(name)]
        self.left = {name: self.left[name] for name in self.layers if name in self.left}

    def _in_order(self) -> list[str]:
        """The layers as they are called, then those that are not."""
        called = [name for found in self.sites for name in found]
        return list(dict.fromkeys([*(n for n in called if n in set(self.layers)), *self.layers]))

    def _fold(self, name: str) -> bool:
        reasons = []
        for find in (self._after, self._before):
            try:
                step = find(name)
                self._check_numbers(step)
            except _Reason as reason:
                reasons.append(str(reason))
                continue
            self.work.take(step)
            self.steps.append(step)
            self.folded.add(name)
            self.left.pop(name, None)
            return True
        self.left[name] = "; ".join(dict.fromkeys(reasons))
        return False  # mutant: None is as good

    # --- what holds for a layer alone --------------------------------------------------------

    def _check_layer(self, name: str) -> None:
        if not self.captured.seen.calls[name]:
            raise _Reason("it is not called with the example inputs")
        if self.modules[name] in self.by_step:
            raise _Reason("each step of its recurrent network has statistics of its own")
        reason = not_normalizing_by_constants(self.modules[name])
        if reason is not None:
            raise _Reason(f"it {reason}")
        view = next((index for index, found in enumerate(self.sites) if name in found), None)
        if view is None:
            raise _Reason(self.captured.why_not(name))
        self.view[name] = view
        self._check_calls(view, name)
        if any(name in flow.read for flow in self.captured.views[view]):
            raise _Reason("its parameters are read outside of it")

    def _check_calls(self, view: int, name: str) -> None:
        shown = sum(site.flow.times for site in self.sites[view][name])
        seen = self.captured.seen.calls[name]
        if shown != seen:
            raise _Reason(
                f"{name!r} was called {seen} times with the example inputs, of which the captured "
                f"flow of data shows {shown}"
            )

    def _check_host(self, view: int, name: str) -> Kind:
        host = self.modules[name]
        if (reason := unfit(host)) is not None:
            raise _Reason(f"{name!r} {reason}")
        self._check_calls(view, name)
        if any(flow.read.get(name, False) for flow in self.captured.views[view]):
            raise _Reason(f"the parameters of {name!r} are read outside of it")
        return known(host)

    def _check_numbers(self, step: Step) -> None:
        if algebra.overflows(self.modules[step.into], self.work.after(step)):
            raise _Reason(f"the weights of {step.into!r} would overflow their dtype")

    # --- a layer and its neighbours ----------------------------------------------------------

    def _after(self, name: str) -> Step:
        """The step that folds it into what comes before it."""
        view = self.view[name]
        host = self._partner(view, name, self._feeding)
        found = self._check_host(view, host)
        if found.name == "norm":
            self._check_plain(view, host)
        return Step(name, host, after=True, rank=self._rank(name, host))

    def _before(self, name: str) -> Step:
        """The step that folds it into what comes after it."""
        view = self.view[name]
        self._check_plain(view, name)
        host = self._partner(view, name, self._fed)
        found = self._check_host(view, host)
        if found.name == "norm":
            raise _Reason(f"its output goes to the batch norm {host!r}, which stays")
        rank = self._rank(name, host)
        shifted = bool((self.work.affine(name).shift != 0).any())
        reason = _takes_no_shift(self.modules[host], found)
        if reason is not None and shifted:
            raise _Reason(f"it comes before {host!r}, which {reason}")
        return Step(name, host, after=False, rank=rank, unshifted=reason is not None)

    def _partner(self, view: int, name: str, find: Any) -> str:
        """The layer that is next to it wherever it is called, and nowhere without it."""
        nodes = [(site.flow, find(site)) for site in self.sites[view][name]]
        hosts = {flow.layers[node] for flow, node in nodes}
        if len(hosts) > 1:
            raise _Reason(f"it is called next to several layers: {', '.join(sorted(hosts))}")
        (host,) = hosts
        calls = self.sites[view][host]
        if len(calls) != len(nodes):
            raise _Reason(
                f"{host!r} is called in {len(calls)} places, of which this is next to it in "
                f"{len(nodes)}"
            )
        return host

    def _feeding(self, site: _Site) -> fx.Node:
        """The call whose result is what a call of a batch norm normalises, and nothing else's."""
        flow, node = site.flow, site.flow.source(site.node)
        last_only = False
        while True:
            if not isinstance(node, fx.Node):
                # torch.fx makes a node of everything, as far as is known.
                raise _Reason("its input is not shown in the captured flow of data")  # mutant: see
            module = flow.layer(node)
            found = None if module is None else kind(module)
            joins = flow.joins_leading_axes(node)
            passes = joins or self._passes(flow, node)
            if not passes and found is None:
                raise _Reason(
                    f"its input comes from {flow.describe(node)}, which is no convolution, linear "
                    "layer or batch norm"
                )
            if (number := len(readers(node))) != 1:
                raise _Reason(
                    f"it reads the output of {flow.describe(node)}, which has {number} readers"
                )
            if not passes:
                break
            last_only |= joins
            node = flow.source(node)
        # The rank that is recorded is that of what comes out of the flattening, 2 at least.
        if last_only and (found is None or found.axis != -1):
            raise _Reason(f"the output of {flow.describe(node)} is flattened in between")
        return node

    def _fed(self, site: _Site) -> fx.Node:
        """The call that alone reads what a call of a batch norm puts out."""
        flow, node = site.flow, site.node
        path = {node}
        while True:
            found = readers(node)
            if len(found) != 1:
                raise _Reason(f"its output has {len(found)} readers")
            (user,) = found
            passes, module = self._passes(flow, user), flow.layer(user)
            layer = module is not None and kind(module) is not None
            if flow.source(user) is not node or not (layer or passes):
                raise _Reason(f"its output goes to {flow.describe(user)}")
            if not passes:
                break
            path.add(user)
            node = user
        # Without the batch norm, its input itself is read: nothing may change it in between.
        between = site.node.next
        while between is not user:
            pure = between.op in _PURE or between in path or asks_only(between)
            if not pure and kind(flow.layer(between)) is None:
                raise _Reason(
                    f"{flow.describe(between)} comes between it and {flow.describe(user)}"
                )
            between = between.next
        return user

    def _passes(self, flow: Flow, node: fx.Node) -> bool:
        """Whether a node gives out what it takes in, when what was folded so far is gone."""
        if flow.layers.get(node) in self.folded:
            return _plain(flow, node)
        return flow.passes(node)

    def _check_plain(self, view: int, name: str) -> None:
        """Refuse a batch norm that does more than an affine map."""
        for site in self.sites[view][name]:
            if not _plain(site.flow, site.node):
                raise _Reason(f"{name!r} adds a residual or applies an activation")

    def _rank(self, name: str, host: str) -> int | None:
        """For which rank of input the channels of two layers are on the same axis.

        None if for all that the batch norm accepts.
        """
        own, axis = known(self.modules[name]).axis, known(self.modules[host]).axis
        ranks = self.captured.seen.ranks[name]
        wrong = [rank for rank in ranks if not rank or own % rank != axis % rank]
        if wrong:
            raise _Reason(
                f"its channels are on axis {own} of inputs of rank {wrong[0]}, those of {host!r} "
                f"on axis {axis}"
            )
        if own == axis:
            return None
        # One counts from the front, the other from the back: they meet in one rank only.
        (rank,) = ranks
        return None if only_rank(self.modules[name]) == rank else rank


def _plain(flow: Flow, node: fx.Node) -> bool:
    """Whether a call of a batch norm is an affine map and nothing more; a mask is nothing here."""
    residual = node.args[2] if len(node.args) > 2 else node.kwargs.get("residual")
    return residual is None and getattr(flow.layer(node), "activation", None) is None


def _takes_no_shift(layer: Any, found: Kind) -> str | None:
    """Why a shift of a layer's input is not a shift of its output, or None if it is."""
    if found.name == "transposed":
        return "is transposed: not every output sees every tap, and so the shift of its input"
    if found.name != "conv" or layer.padding_mode != "zeros":
        return None  # other paddings repeat values of the input, shifted as they are
    padded = layer.padding == "same" and any(size > 1 for size in layer.kernel_size)
    if not isinstance(layer.padding, str):
        padded = any(layer.padding)
    return "pads with zeros, to which the shift of its input does not apply" if padded else None
