"""Whether two batch norm layers compute the same: tried with numbers that show every difference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: Sizes of the other axes: all differ, so that an axis mistaken for another shows.
_SIZES = (6, 3, 2, 5)

#: Running variances, by channel. An eps of 1e-5 that is another in one of the layers, or is added
#: elsewhere, changes what the first channel gives by several percent.
_VARIANCES = (1e-6, 1.0, 1e-3, 10.0)

#: The copies are in float64, where two ways of computing the same agree to 1e-10; a layer that goes
#: through float32 in between agrees to 1e-6 or so.
_TOLERANCE = 1e-5


def difference(
    layer: Any, change: Callable[[Any], None], ranks: Iterable[int], *, training: bool
) -> tuple[tuple[int, ...], str | None]:
    """Where a layer would give something else if it were changed.

    In evaluation: outputs and gradients; in training, also running statistics and what evaluation
    gives after the step. What matters in training only, as groups of samples, is left out.

    Args:
        layer: it stays as it is.
        change: what is done to a copy.
        ranks: of the inputs to try. What the layer itself refuses is left out.
        training: try training, too.

    Returns:
        The ranks that the layer accepts; and in words, what would differ, or that nothing could be
        tried.
    """
    modes = (False, True, False) if training else (False,)
    accepted = []
    refused = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        old, new = _bare(layer), _bare(layer)
        change(new)
        for copied in (old, new):  # a group would be waited for
            copied.virtual_batch_size = copied.renorm = copied.process_group = None
        # What never trains may not know how many channels it has.
        channels = (new if hasattr(new, "num_features") else old).num_features
        for rank in ranks:
            x = _input(channels, rank)
            try:
                expected = [_results(old, x, mode) for mode in modes]
            except Exception as error:  # whatever a layer refuses an input with
                refused.append(f"{type(error).__name__} at rank {rank}: {error}")
                continue
            accepted.append(rank)
            for mode, results in zip(modes, expected, strict=True):
                try:
                    got = _results(new, x, mode)
                except Exception as error:
                    return tuple(accepted), f"it would raise {type(error).__name__}: {error}"
                for name, value in results.items():
                    if name in got and not _close(got[name], value):
                        when = "training" if mode else "evaluation"
                        return tuple(accepted), f"its {name} in {when} would not be the same"
    return tuple(accepted), None if accepted else f"it cannot be tried ({'; '.join(refused)})"


def _bare(module: nn.Module) -> Any:
    """A copy on the CPU, in float64, without hooks and with made-up values in its tensors.

    It works for layers without memory (device "meta") too. Attributes are those of the original.
    """
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__ | vars(nn.Module()))
    copied._compiled_call_impl = None  # by `module.compile()`, and it would call the original
    made: dict[str, nn.Parameter] = {}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            made[name] = nn.Parameter(_value(name, parameter), parameter.requires_grad)
    copied._parameters = {name: made.get(name) for name in module._parameters}
    copied._buffers = {
        name: None if buffer is None else _value(name, buffer)
        for name, buffer in module._buffers.items()
    }
    copied._modules = {
        name: None if child is None else _bare(child) for name, child in module._modules.items()
    }
    for name, value in module.__dict__.items():
        if isinstance(value, Tensor):  # as pruning leaves one
            copied.__dict__[name] = _value(name, value)
        for key, child in module._modules.items():
            if child is value and child is not None:
                copied.__dict__[name] = copied._modules[key]
    return copied


def _value(name: str, like: Tensor) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype, device="cpu")  # mutant: of any value
    if name == "running_var":
        return _variances(len(like))
    generator = torch.Generator("cpu").manual_seed(len(name))
    # From 0.5 to 1.5 and of both signs: what takes |γ| for γ shows.
    size = 0.5 + torch.rand(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    return size * torch.randn(like.shape, generator=generator, device="cpu").sign()


def _variances(channels: int) -> Tensor:
    every = torch.tensor(_VARIANCES, dtype=torch.float64, device="cpu")
    return every[torch.arange(channels, device="cpu") % len(every)]


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)


def _input(channels: int, rank: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(rank)
    size = (_SIZES[0], channels, *_SIZES[1 : rank - 1])
    x = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    scale = _variances(channels).sqrt().reshape(-1, *(1,) * (rank - 2))
    return (x + 0.5) * scale


def _results(layer: Any, x: Tensor, training: bool) -> dict[str, Tensor]:
    layer.train(training)
    x = x.clone().requires_grad_()
    parameters = {name: p for name, p in layer._parameters.items() if p is not None}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    torch.default_generator.manual_seed(0)  # a dropout, or a leak that is random
    y = layer(x.clone())  # an activation may come first, in place
    cotangent = torch.randn(y.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    inputs = [x, *trained.values()]
    every = torch.autograd.grad(y, inputs, cotangent.to(y.dtype), allow_unused=True)
    names = ["gradient", *(f"gradient of {name}" for name in trained)]
    gradients = {name: g for name, g in zip(names, every, strict=True) if g is not None}
    buffers = {name: b.clone() for name, b in layer._buffers.items() if b is not None}
    return {"output": y.detach(), **gradients, **buffers}
