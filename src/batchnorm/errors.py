"""Everything that batchnorm raises, under one base class, and its one warning.

A message says what was expected, what came, and what to do next; an error is raised before anything
is changed.
"""


class BatchNormError(Exception):
    """Base class of every error that batchnorm raises on purpose.

    Attributes:
        located: whether the message names the layer already.
    """

    located = False


class ArgumentError(BatchNormError, ValueError):
    """An option is impossible whatever the data: `eps=0`, an unknown activation, a bad path."""


class InputError(BatchNormError, ValueError):
    """The data do not fit: a tensor's shape, dtype or values, a mask, a file's contents."""


class SyncError(BatchNormError, RuntimeError):
    """The processes that share statistics do not agree, or did not all come."""


class FoldError(BatchNormError, RuntimeError):
    """A model with its batch norm layers folded away would not be the same function."""


class MissingDependencyError(BatchNormError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class NonFiniteWarning(UserWarning):
    """A batch held NaN or infinity; those channels' running statistics were left as they were."""
