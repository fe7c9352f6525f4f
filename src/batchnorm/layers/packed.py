"""A PackedSequence as a padded batch, in which each sequence is a sample."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class Sequences(NamedTuple):
    """Where the elements of a PackedSequence lie in a batch (sequences, time, …).

    Attributes:
        places: for each row of the packed data, its place among all sequences · time.
        number: how many sequences there are.
        time: length of the longest.
    """

    places: Tensor
    number: int
    time: int

    @classmethod
    def of(cls, x: PackedSequence) -> Sequences:
        """The sequences in the order that they were packed in, before the sorting by length."""
        sizes = x.batch_sizes  # of each time: the sequences, the longest first, that last so long
        number, time = int(sizes[0]), len(sizes)
        time_of_row = torch.arange(time).repeat_interleave(sizes)
        sequence = torch.arange(len(x.data)) - (sizes.cumsum(0) - sizes)[time_of_row]
        if x.sorted_indices is not None:
            sequence = x.sorted_indices.cpu()[sequence]
        return cls((sequence * time + time_of_row).to(x.data.device), number, time)

    def pad(self, data: Tensor) -> Tensor:
        """(sequences, time, …) from packed data, with zeros where a sequence has ended."""
        padded = data.new_zeros(self.number * self.time, *data.shape[1:])
        padded = padded.index_copy(0, self.places, data)
        return padded.reshape(self.number, self.time, *data.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        """The packed data again."""
        return padded.flatten(0, 1).index_select(0, self.places)

    def mask(self, axes: int) -> Tensor:
        """What is not padding, of the first two axes of so many."""
        real = self.pad(torch.ones(len(self.places), dtype=torch.bool, device=self.places.device))
        return real.reshape(self.number, self.time, *(1,) * (axes - 2))
