"""BatchNormLSTM: batch normalization inside a recurrent network, with statistics of each step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from batchnorm.errors import ArgumentError, InputError
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.layers.lstm_step import step_of
from batchnorm.layers.recurrent_checks import (
    check_input,
    check_mask,
    check_options,
    check_packed,
    check_pair,
    check_state,
    check_state_dict,
    check_steps,
)
from batchnorm.layers.steps import add_steps, along, steps_by_batch

#: What can be normalised.
PARTS = ("input", "hidden", "cell")

State = tuple[Tensor, Tensor]


class BatchNormLSTM(nn.RNNBase):
    """An LSTM with batch normalization of input, hidden state and cell, step by step.

        i, f, g, o = BN(W_ih x_t; γ_x) + BN(W_hh h_{t−1}; γ_h) + β
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(g)
        h_t = σ(o) ⊙ tanh(BN(c_t; γ_c, β_c))

    Each BN is a `BatchNorm` over the sequences of the batch, at one time: what an LSTM does at its
    first steps is unlike what it does later, and common statistics fit neither. So each step has
    running statistics of its own, up to `max_length`; γ and β are common. γ starts small: at 1,
    gradients vanish or explode on their way back.

    It is called as `torch.nn.LSTM` is, and gives what that gives. Sequences of different lengths
    come as a `PackedSequence`, or with a mask; where they have ended they count nowhere. Once fewer
    than two go on, there are no statistics of a batch, and the running ones normalise, in training
    too. A step that no batch has reached is evaluated with the last that one has.

    Shape:
        input: (L, N, input_size), (N, L, input_size) with batch_first, (L, input_size), or packed.
        h_0, h_n: (num_layers · directions, N, hidden_size, or proj_size if there is one).
        c_0, c_n: (num_layers · directions, N, hidden_size).
        output: as the input, with directions · hidden_size (or proj_size) channels.

    Args:
        input_size: channels of the input.
        hidden_size: channels of the state, H.
        num_layers: one upon the other.
        bias: have β (and β_c; where only the cell is normalised, torch's two biases).
        batch_first: the first axis is the batch's, not time.
        dropout: of the outputs of all layers but the last, in training.
        bidirectional: also run over the reversed sequences, each from its own end.
        proj_size: h_t is projected to so many channels; 0: not.
        device: of parameters and buffers.
        dtype: of the parameters; buffers are float32 at least.
        max_length: steps that have running statistics of their own. The last one's are those of all
            that come after it, too.
        normalize: which of "input", "hidden" and "cell"; none of them: `torch.nn.LSTM` itself.
            "input" alone is what Laurent et al. 2015 found to help, in its per-step form.
        gamma: what γ starts from.
        eps: added to variances.
        momentum: weight of the newest batch in the running statistics; None for the plain average.

    Attributes:
        norms: the `BatchNorm` layers, `norms[layer · directions + direction]["hidden"]`. Their own
            running statistics are those of step `max_length` − 1 and after; each step before has a
            bank, "step0" and so on.

    Raises:
        ArgumentError: an option is impossible.

    Source: Cooijmans et al. 2016, "Recurrent Batch Normalization", https://arxiv.org/abs/1603.09025

    Example:
        >>> import torch
        >>> from batchnorm import BatchNormLSTM
        >>> lstm = BatchNormLSTM(8, 16, max_length=20, batch_first=True)
        >>> x, lengths = torch.randn(4, 20, 8), torch.tensor([20, 13, 6, 2])
        >>> output, (h, c) = lstm(x, mask=torch.arange(20) < lengths[:, None])
        >>> output.shape, h.shape, bool(torch.equal(h[0, 1], output[1, 12]))
        (torch.Size([4, 20, 16]), torch.Size([1, 4, 16]), True)
    """

    # What torch's own forward, with nothing normalised, is made of. Not by inheritance:
    # torch.compile refuses whatever is an nn.LSTM.
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    get_expected_cell_size = nn.LSTM.get_expected_cell_size

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int = 100,
        normalize: Collection[str] = PARTS,
        gamma: float = 0.1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        check_options(max_length, normalize, gamma, PARTS)
        gates = [part for part in ("hidden", "input") if part in normalize]
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias and not gates, batch_first, dropout,
            bidirectional, proj_size, device, dtype,
        )  # fmt: skip
        self.max_length = int(max_length)
        self.normalize = tuple(part for part in PARTS if part in normalize)
        self.gamma = float(gamma)
        self._reached = 0  # steps that batches have had, in training; 0: not known
        self.norms = nn.ModuleList()
        for _ in range(num_layers * (1 + bidirectional)):
            norms = nn.ModuleDict()
            for part in self.normalize:
                channels = hidden_size * (1 if part == "cell" else 4)
                shifts = bias and (part == "cell" or part == gates[0])  # one β for both sums
                norm = BatchNorm(channels, eps, momentum, device=device, dtype=dtype, bias=shifts)
                add_steps(norm, self.max_length)
                norms[part] = norm
            self.norms.append(norms)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's for what is torch's; γ = `gamma`, β = 0, no batch has come."""
        norms = self._modules.pop("norms", None)  # torch's knows no other parameters than its own
        super().reset_parameters()
        if norms is None:
            return
        self._modules["norms"] = norms
        for norm in self._every_norm():
            norm.reset_parameters()
            nn.init.constant_(norm.weight, self.gamma)

    def _every_norm(self) -> Iterator[BatchNorm]:
        for norms in self.norms:
            yield from norms.values()  # type: ignore[operator]

    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002 (torch's name for it)
        hx: State | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run over sequences; in training, update the running statistics too.

        Args:
            input: see the class.
            hx: (h_0, c_0); zeros if it is not given.
            mask: of the input's first two axes, True where a sequence goes on. What it leaves out
                is skipped: the state passes by, and the output there is 0. A `PackedSequence` takes
                none.

        Returns:
            output: h of the last layer at each step, both directions side by side.
            (h_n, c_n): what each layer and direction ended in, at each sequence's own end.

        Raises:
            InputError: the input does not fit, or in training there is but one sequence.
            ArgumentError: within `with bank(...)`: steps have banks of their own.
        """
        check_pair(hx)
        if not self.normalize and mask is None:
            lstm: Any = nn.LSTM.forward
            output: tuple[Tensor | PackedSequence, State] = lstm(self, input, hx)
            return output
        for norm in self._every_norm():
            if not isinstance(norm, BatchNorm):
                raise ArgumentError(
                    f"expected BatchNorm within {type(self).__name__}, which has statistics for "
                    f"each step, got {type(norm).__name__}; leave it out when converting a model"
                )
            if norm._bank is not None:
                raise ArgumentError(
                    f"expected no bank around {type(self).__name__}, got {norm._bank!r}: its steps "
                    "have banks of their own; keep a layer for each kind of data"
                )
        if isinstance(input, PackedSequence):
            if mask is not None:
                raise InputError("expected no mask with a PackedSequence, which has no padding")
            return self._forward_packed(input, hx)
        masked = mask is not None
        check_input(input, self.input_size, batch_first=self.batch_first, masked=masked)
        if masked:
            check_mask(mask, input, batch_first=self.batch_first)
        batched = input.dim() == 3
        x = input.transpose(0, 1) if batched and self.batch_first else input
        x = x if batched else x[:, None]
        time, number, channels = x.shape
        state = self._state(hx, number if batched else None, x)
        if mask is None:
            y, state = self._layers(x.reshape(-1, channels), [number] * time, state)
            y = y.view(time, number, -1)
        else:
            y, state = self._forward_masked(x, state, mask)
        if not batched:
            return y[:, 0], (state[0][:, 0], state[1][:, 0])
        return y.transpose(0, 1) if self.batch_first else y, state

    def _forward_packed(
        self, packed: PackedSequence, hx: State | None
    ) -> tuple[PackedSequence, State]:
        check_packed(packed.data, self.input_size)
        sizes = packed.batch_sizes.tolist()
        state = self._state(hx, sizes[0], packed.data)
        if packed.sorted_indices is not None:
            state = _rows(state, packed.sorted_indices)
        y, state = self._layers(packed.data, sizes, state)
        if packed.unsorted_indices is not None:
            state = _rows(state, packed.unsorted_indices)
        return packed._replace(data=y), state

    def _forward_masked(self, x: Tensor, state: State, mask: Tensor) -> tuple[Tensor, State]:
        """What the mask leaves, packed: the longest sequence first, each without its gaps."""
        mask = mask.transpose(0, 1) if self.batch_first else mask
        time, number, _ = x.shape
        lengths, order = mask.sum(0).sort(descending=True, stable=True)
        sizes = mask.sort(0, descending=True).values.sum(1).tolist()
        sizes = sizes[: sizes.index(0)] if 0 in sizes else sizes
        y = x.new_zeros(time, number, self._width() * (1 + self.bidirectional))
        if not sizes:
            return y, state
        places = mask.sort(dim=0, descending=True, stable=True).indices[: len(sizes), order]
        real = torch.arange(len(sizes), device=x.device)[:, None] < lengths
        index = places[real], order.expand(len(sizes), -1)[real]
        begun = order[: sizes[0]]  # a sequence may have nothing that counts
        packed, last = self._layers(x[index], sizes, _rows(state, begun))
        h, c = (old.index_copy(1, begun, new) for old, new in zip(state, last, strict=True))
        return y.index_put(index, packed), (h, c)

    def _layers(self, data: Tensor, sizes: list[int], state: State) -> tuple[Tensor, State]:
        """All layers and directions over packed data."""
        back = _reversal(sizes, data.device) if self.bidirectional else None
        ends: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                data = functional.dropout(data, self.dropout, self.training)
            both = []
            for direction in range(1 + self.bidirectional):
                index = len(ends)
                given = data[back] if direction else data
                start = state[0][index], state[1][index]
                y, end = self._steps(_Cell.of(self, index), given, sizes, start)
                both.append(y[back] if direction else y)
                ends.append(end)
            data = torch.cat(both, 1) if back is not None else both[0]
        return data, (torch.stack([h for h, _ in ends]), torch.stack([c for _, c in ends]))

    def _steps(
        self, cell: _Cell, data: Tensor, sizes: list[int], state: State
    ) -> tuple[Tensor, State]:
        """One layer in one direction: the recurrence."""
        training = any(norm.training for norm in cell.norms.values())
        reached = max(self._reached, steps_by_batch(sizes) if training else 0)
        norms = {
            part: along(norm, sizes, reached, self.max_length) for part, norm in cell.norms.items()
        }
        h, c = state
        outputs, ended = [], []
        inputs = functional.linear(data, cell.weight_ih, cell.bias)
        parts = norms["input"].each(inputs) if "input" in norms else inputs.split(sizes)
        take = step_of(norms.get("hidden"), norms.get("cell"), inputs, c)
        for step, (given, number) in enumerate(zip(parts, sizes, strict=True)):
            if number < len(h):
                ended.append((h[number:], c[number:]))
                h, c = h[:number], c[:number]
            h, c = take(step, functional.linear(h, cell.weight_hh), given, c)
            if cell.weight_hr is not None:
                h = functional.linear(h, cell.weight_hr)
            outputs.append(h)
        if training:
            self._reached = reached
        ended.append((h, c))
        h, c = (torch.cat(parts) for parts in zip(*reversed(ended), strict=True))
        return torch.cat(outputs), (h, c)

    def _width(self) -> int:
        return self.proj_size or self.hidden_size

    def _state(self, hx: State | None, number: int | None, x: Tensor) -> State:
        """What to start from, in the batch's order; number: of sequences, None for one alone."""
        layers = self.num_layers * (1 + self.bidirectional)
        batch = () if number is None else (number,)
        shapes = (layers, *batch, self._width()), (layers, *batch, self.hidden_size)
        if hx is None:
            h, c = x.new_zeros(shapes[0]), x.new_zeros(shapes[1])
        else:
            h, c = hx
            check_state(h, c, shapes, x)
        return (h, c) if batch else (h[:, None], c[:, None])

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """torch's; InputError for a state dict of other steps, or if it must fit of other keys."""
        if self.normalize:
            check_state_dict(state_dict, self, strict=strict)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Raised here: told at the end, as torch tells of sizes, the norms would have taken banks.
        check_steps(state_dict, self, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        counts = [
            int(count) > 0
            for part in self.normalize[:1]
            for key, count in state_dict.items()
            if _is_counter(key, f"{prefix}norms.0.{part}.")
        ]
        if counts:  # none of them: statistics stay as they are
            self._reached = sum(counts)

    def __repr__(self) -> str:
        """One line, as nn.LSTM's: the norms within are too many to be shown, a bank for each step.

        They are in `norms`.
        """
        return f"{self._get_name()}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """torch's, what is normalised, and how."""
        norms = list(self._every_norm())
        text = super().extra_repr()
        if any(norm.bias is not None for norm in norms):
            text = text.replace(", bias=False", "")  # of torch's biases, in whose place is β
        parts = [text, f"normalize={self.normalize}"]
        if norms:
            parts[1:1] = [f"max_length={self.max_length}"]
            parts.append(f"gamma={self.gamma}")
        for name, usual in (("eps", 1e-5), ("momentum", 0.1)):
            values = {getattr(norm, name) for norm in norms}
            if values - {usual}:
                parts.append(f"{name}={values.pop() if len(values) == 1 else 'various'}")
        frozen = sum(getattr(norm, "_frozen", False) for norm in norms)  # may be converted ones
        if frozen:
            parts.append("frozen" if frozen == len(norms) else f"{frozen} of {len(norms)} frozen")
        return ", ".join(parts)


class _Cell(NamedTuple):
    """What one layer needs in one direction."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    weight_hr: Tensor | None
    norms: dict[str, BatchNorm]

    @classmethod
    def of(cls, lstm: BatchNormLSTM, index: int) -> _Cell:
        layer, reverse = divmod(index, 1 + lstm.bidirectional)
        suffix = f"_l{layer}" + ("_reverse" if reverse else "")

        def tensor(name: str) -> Any:
            return getattr(lstm, name + suffix, None)

        norms: Any = lstm.norms[index]
        bias = tensor("bias_ih")
        return cls(
            tensor("weight_ih"),
            tensor("weight_hh"),
            None if bias is None else bias + tensor("bias_hh"),
            tensor("weight_hr"),
            dict(norms.items()),
        )


def _is_counter(key: str, start: str) -> bool:
    return key.startswith(start) and key.endswith(".num_batches_tracked")


def _rows(state: State, index: Tensor) -> State:
    h, c = state
    return h[:, index], c[:, index]


def _reversal(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Where each row of packed data is once every sequence runs from its end; its own inverse."""
    steps = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    begins = torch.tensor([0, *sizes]).cumsum(0)
    row = torch.arange(len(steps)) - begins[steps]
    lengths = (torch.tensor(sizes)[:, None] > torch.arange(sizes[0])).sum(0)
    return (begins[lengths[row] - 1 - steps] + row).to(device)
