"""BatchNorm, the layer."""

from __future__ import annotations

import inspect
import sys
import warnings
from functools import partial
from numbers import Integral
from typing import Any, overload

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence

from batchnorm import functional
from batchnorm.errors import ArgumentError, BatchNormError, InputError, NonFiniteWarning
from batchnorm.layers.control import Controlled
from batchnorm.layers.packed import Sequences
from batchnorm.pooled import Population, normalize_together
from batchnorm.renorm import Renorm, check_renorm
from batchnorm.running import nonfinite_message
from batchnorm.sync import WORLD, Group, check_group
from batchnorm.validation import Activation, Settings, check_options, check_virtual_batch_size

#: The outline's names for torch's parameters.
_ALIASES = {"gamma": "weight", "beta": "bias"}


class BatchNorm(Controlled, _BatchNorm):
    """Batch normalization of any input: dense, image, sequence; masked; fused with what follows.

        y = activation(γ · (x − mean) / √(var + eps) + β + residual)

    In training, `mean` and `var` are the batch's, over all axes but the channels', var the *biased*
    variance; the running statistics move toward the batch's with weight `momentum`, taking in the
    *unbiased* variance. In evaluation the running statistics normalise. `batch_norm` is the
    function behind it and says more about each argument.

    It is a `torch.nn.modules.batchnorm._BatchNorm`, with torch's positional arguments, parameter
    and buffer names: it replaces `torch.nn.BatchNorm1d/2d/3d` in place, and `state_dict`s load both
    ways with `strict=True`. (torch's own converters, `convert_sync_batchnorm` and
    `fuse_conv_bn_eval`, see a plain batch norm: they lose `activation` and `channel_dim`.) Where it
    differs from torch:

    - `running_mean` and `running_var` stay float32 under `.half()` and `.bfloat16()`: in bfloat16 a
      running mean of 100 stalls at 96.
    - NaN and infinity do not enter the running statistics; a `NonFiniteWarning` names the layer.
    - Nothing has changed when an error is raised, `num_batches_tracked` included; an empty batch
      changes nothing either.
    - What is computed during a backward pass updates nothing: activation checkpointing does there
      again what has been counted. (Compiled code cannot tell, and counts twice.)

    Shape:
        x: any rank from 2 up, `num_features` channels on `channel_dim`; or a `PackedSequence`.
        Output: the shape of x (a `PackedSequence` for one), its dtype and memory format.

    Args:
        num_features: number of channels C.
        eps: added to the variance, in the square of the unit of x.
        momentum: weight of the newest batch in the running statistics, in [0, 1]; None for the
            plain average of all batches so far.
        affine: have γ and β.
        track_running_stats: keep running statistics; without, evaluation uses the batch's too.
        device: of the parameters and buffers.
        dtype: of the parameters; buffers are float32 at least.
        features: another name for `num_features`; give exactly one of the two.
        bias: have β (with `affine`).
        channel_dim: the axis of the channels; -1 for channels-last data. Nothing is copied.
        activation: None; "relu" or "leaky_relu" (slope 0.01), fused; or any function or module,
            applied after, to every element, masked ones included.
        virtual_batch_size: in training, normalise each group of so many samples, in order, by its
            own statistics (ghost batches, Hoffer et al. 2017). The last group may be smaller; of a
            `PackedSequence` a sample is a sequence, in the order before packing. The
            running statistics take in all groups together, once a step; evaluation is as without.
        renorm: in training, draw the batch's statistics toward the running ones: see `Renorm`. The
            state dict is as without.
        process_group: in training, share the statistics with other processes, as if one of them had
            the batches of all in the order of ranks: a torch.distributed group, or "world" for all
            processes (until torch.distributed is initialised, this one alone). Batches may differ
            in size and be empty; every process must call the layer equally often, in train(). The
            gradients of γ and β are this process's share, which DistributedDataParallel averages.

    Attributes:
        weight: γ, also called `gamma`.
        bias: β, also called `beta`.
        running_mean: running mean, (C,).
        running_var: running unbiased variance, (C,).
        num_batches_tracked: how many batches the running statistics have taken in; one that was
            refused for NaN in every channel (in any, with momentum=None) is not among them.

    Raises:
        ArgumentError: an option is impossible.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167

    Example:
        >>> import torch
        >>> from batchnorm import BatchNorm
        >>> bn = BatchNorm(features=10)
        >>> bn(torch.randn(64, 10)).shape
        torch.Size([64, 10])
        >>> block = BatchNorm(16, activation="relu")
        >>> x, skip = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
        >>> block(x, residual=skip).min()
        tensor(0., grad_fn=<MinBackward1>)
        >>> padded, lengths = torch.randn(4, 16, 7), torch.tensor([7, 5, 2, 1])
        >>> y = BatchNorm(16)(padded, mask=torch.arange(7) < lengths[:, None])
    """

    channel_dim: int
    activation: Activation
    _told_nonfinite: bool

    def __init__(
        self,
        num_features: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        features: int | None = None,
        bias: bool = True,
        channel_dim: int = 1,
        activation: Activation = None,
        virtual_batch_size: int | None = None,
        renorm: Renorm | None = None,
        process_group: Group = None,
    ) -> None:
        if (num_features is None) == (features is None):
            raise ArgumentError(
                "expected exactly one of num_features and features (two names for the number of "
                f"channels), got num_features={num_features!r}, features={features!r}"
            )
        channels = features if num_features is None else num_features
        if not isinstance(channels, Integral) or isinstance(channels, bool) or channels < 1:
            raise ArgumentError(f"expected a positive number of channels, got {channels!r}")
        if not isinstance(channel_dim, Integral):
            raise ArgumentError(f"expected channel_dim to be an integer, got {channel_dim!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise ArgumentError(f"expected a floating dtype, got {dtype}")
        check_options(eps, momentum, activation)
        check_virtual_batch_size(virtual_batch_size)
        check_renorm(renorm)
        check_group(process_group)
        if renorm is not None and not track_running_stats:
            raise ArgumentError(
                "expected track_running_stats=True with renorm, which draws the batch's statistics "
                "toward the running ones"
            )
        super().__init__(int(channels), eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # torch 2.11 has no such argument
            self.register_parameter("bias", None)
        self.channel_dim = int(channel_dim)
        self.activation = activation
        self.virtual_batch_size = virtual_batch_size
        self.renorm = renorm
        self.process_group = process_group
        self._told_nonfinite = False
        self._set_free()
        self._widen_statistics()

    def reset_parameters(self) -> None:
        """γ = 1, β = 0, and the running statistics as if no batch had come."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                torch.nn.init.constant_(parameter, value)

    @property
    def features(self) -> int:
        """The number of channels, by the outline's name."""
        return self.num_features

    @property
    def gamma(self) -> Tensor | None:
        """γ, the scale; `weight` in torch."""
        return self.weight

    @property
    def beta(self) -> Tensor | None:
        """β, the shift; `bias` in torch."""
        return self.bias

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_ALIASES.get(name, name), value)

    @overload
    def forward(
        self, x: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: PackedSequence, mask: None = None, residual: PackedSequence | None = None
    ) -> PackedSequence: ...

    def forward(
        self,
        x: Tensor | PackedSequence,
        mask: Tensor | None = None,
        residual: Tensor | PackedSequence | None = None,
    ) -> Tensor | PackedSequence:
        """Normalise; in training, update the running statistics too.

        Args:
            x: see the class.
            mask: shape of x without the channel axis, broadcastable: bool, True = counts, or
                non-negative weights. It decides the statistics only, and what it leaves out may
                hold NaN. A `PackedSequence` takes none: it has no padding.
            residual: added before the activation; shape of x, or packed like it.

        Raises:
            InputError: the input does not fit, or in training a channel has no more than one value.
                The message names the layer; nothing has been changed.
        """
        if type(x) is not Tensor and isinstance(x, Proxy):
            # torch.fx takes torch's own layers as one node, and must not look inside this one.
            arguments = (x,) if mask is None and residual is None else (x, mask, residual)
            path = x.tracer.path_of_module(self)
            return x.tracer.create_proxy("call_module", path, arguments, {})
        try:
            if type(x) is Tensor and residual is None:  # the most usual call, 0.1 µs sooner
                return self._forward(x, mask, None)
            if isinstance(x, PackedSequence):
                return self._forward_packed(x, mask, residual)
            if isinstance(residual, PackedSequence):
                raise InputError("expected a tensor as residual of a tensor, got a PackedSequence")
            return self._forward(x, mask, residual)
        except BatchNormError as error:
            self.locate(error)
            raise

    def locate(self, error: BatchNormError) -> None:
        """Name this layer in an error of its function, if no layer is named yet."""
        if not error.located:
            error.args = (f"{self._location()}: {error}",)
            error.located = True

    def _forward_packed(self, x: PackedSequence, mask: Any, residual: Any) -> PackedSequence:
        if mask is not None:
            raise InputError("expected no mask with a PackedSequence, which has no padding")
        if residual is not None:
            if not isinstance(residual, PackedSequence) or not _packed_alike(x, residual):
                raise InputError(
                    "expected a residual packed like x: the same lengths in the same order"
                )
            residual = residual.data
        training = self.training and not self._frozen
        # The data's axes: on the first, time and sequences are one.
        axes = x.data.dim()
        channel_dim = self.channel_dim + axes * (self.channel_dim < 0)
        if self.virtual_batch_size is None or not training or not 0 < channel_dim < axes:
            return x._replace(data=self._forward(x.data, None, residual))
        # Groups are of whole sequences.
        sequences = Sequences.of(x)
        activation: Any = self.activation
        function = callable(activation)  # which may care for the axes
        after = (lambda y: activation(sequences.pack(y))) if function else activation
        settings: Settings = self.momentum, self.eps, channel_dim + 1, after
        residual = None if residual is None else sequences.pad(residual)
        y = self._forward(sequences.pad(x.data), sequences.mask(axes), residual, settings)
        return x._replace(data=y if function else sequences.pack(y))

    def _forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        residual: Tensor | None,
        settings: Settings | None = None,
    ) -> Tensor:
        training = self.training and not self._frozen
        if settings is None:
            settings = self.momentum, self.eps, self.channel_dim, self.activation
        bank: Any = self if "banks" not in self._modules else self._keeper(x, mask, settings)
        buffers, parameters = bank._buffers, self._parameters
        try:
            # Modules look their tensors up by a slow way, 0.4 µs each.
            mean, var = buffers["running_mean"], buffers["running_var"]
            count = buffers["num_batches_tracked"]
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # torch's parametrizations and pruning put others in their place
            mean, var, count = bank.running_mean, bank.running_var, bank.num_batches_tracked
            weight, bias = self.weight, self.bias
        if bank is not self and bank.weight is not None:
            weight, bias = bank.weight, bank.bias
        from_batch = training or mean is None or var is None
        running = mean, var, count
        population = sink = None
        if training:
            population = (
                self._population(running, bank)
                if self.virtual_batch_size is not None
                or self.renorm is not None
                or self.process_group is not None
                else None
            )
            if self._together is not None:
                meet = self._together(self, bank)
                if meet is not None:
                    population = population or Population(reference=running)
                    return normalize_together(
                        x, weight, bias, residual, mask, settings, population, meet
                    )
            if not self.track_running_stats:
                running = None, None, None
            elif self._collect is not None:
                running = None, None, None
                sink = partial(self._collect, self, bank)
        elif self.process_group is not None and (sync := self._synchronizer()) is not None:
            sync.listen()
        y, refused = functional.step(
            x, weight, bias, residual, mask, running, from_batch, settings, population, sink
        )
        if refused is not None:
            self.warn_nonfinite(refused)
        if not torch.compiler.is_compiling() and self._watched is not None:
            self._watched(self, x, bias, residual, y)
        return y

    def warn_nonfinite(self, refused: Tensor, name: str | None = None) -> None:
        """Tell, the first time, which channels' statistics were left as they were.

        A name says which layer it is where no model is running that could tell.
        """
        if not self._told_nonfinite:
            self._told_nonfinite = True
            message = f"{self._location(name)}: {nonfinite_message(refused)}"
            warnings.warn(message, NonFiniteWarning, stacklevel=2)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for alias, name in _ALIASES.items():
            if prefix + alias in state_dict and prefix + name not in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + alias)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _location(self, name: str | None = None) -> str:
        """This layer as the user knows it: its name in the outermost module that is running."""
        kind = f"{type(self).__name__}({self.num_features})"
        if torch.compiler.is_compiling():
            return kind  # Dynamo cannot look at frames, and shows by itself where the call was.
        frame = None if name else inspect.currentframe()
        while frame is not None:
            if frame.f_code.co_varnames[:1] == ("self",):
                seen = frame.f_locals
                owner = seen.get("self")
                if sys.version_info < (3, 13):
                    # Until then a copy that the frame keeps, and with it the caller's tensors.
                    seen.clear()
                if isinstance(owner, torch.nn.Module) and owner is not self:
                    names = (n for n, module in owner.named_modules() if module is self)
                    name = next(names, name)
            frame = frame.f_back
        return kind if not name else f"layer {name!r}, {kind}"

    def extra_repr(self) -> str:
        """torch's, and what differs from the defaults of this class."""
        parts = [super().extra_repr()]
        if self.channel_dim != 1:
            parts.append(f"channel_dim={self.channel_dim}")
        if self.activation is not None and not isinstance(self.activation, torch.nn.Module):
            parts.append(f"activation={getattr(self.activation, '__name__', self.activation)!r}")
        options = ((name, getattr(self, name)) for name in ("virtual_batch_size", "renorm"))
        parts += [f"{name}={value!r}" for name, value in options if value is not None]
        if self.process_group is not None:
            parts.append("process_group=" + (repr(WORLD) if self.process_group == WORLD else "..."))
        if self._frozen:
            parts.append("frozen")
        return ", ".join(parts)


def _packed_alike(a: PackedSequence, b: PackedSequence) -> bool:
    """Whether the elements of the two stand for the same places of the same sequences."""

    def same(one: Tensor | None, other: Tensor | None) -> bool:
        return one is other or (one is not None and other is not None and torch.equal(one, other))

    return same(a.batch_sizes, b.batch_sizes) and same(a.sorted_indices, b.sorted_indices)
