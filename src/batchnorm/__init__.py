"""Batch normalization for PyTorch: one layer that is right on every input."""

from ._version import __version__ as __version__
from .errors import ArgumentError as ArgumentError
from .errors import BatchNormError as BatchNormError
from .errors import InputError as InputError
from .errors import MissingDependencyError as MissingDependencyError
from .errors import NonFiniteWarning as NonFiniteWarning
from .functional import BatchNormOutput as BatchNormOutput
from .functional import batch_norm as batch_norm
from .functional import batch_norm_pure as batch_norm_pure
from .kernels.select import backends as backends
from .layers.batch_norm import BatchNorm as BatchNorm
from .moments import Moments as Moments
