"""Batch normalization for PyTorch: one layer that is right on every input."""

from batchnorm._version import __version__ as __version__
from batchnorm.errors import ArgumentError as ArgumentError
from batchnorm.errors import BatchNormError as BatchNormError
from batchnorm.errors import InputError as InputError
from batchnorm.errors import MissingDependencyError as MissingDependencyError
from batchnorm.errors import NonFiniteWarning as NonFiniteWarning
from batchnorm.errors import SyncError as SyncError
from batchnorm.functional import BatchNormOutput as BatchNormOutput
from batchnorm.functional import batch_norm as batch_norm
from batchnorm.functional import batch_norm_pure as batch_norm_pure
from batchnorm.kernels.select import backends as backends
from batchnorm.layers.batch_norm import BatchNorm as BatchNorm
from batchnorm.moments import Moments as Moments
from batchnorm.renorm import Renorm as Renorm
from batchnorm.tools.accumulate import accumulate_statistics as accumulate_statistics
from batchnorm.tools.bank import bank as bank
from batchnorm.tools.convert import convert as convert
from batchnorm.tools.diagnose import diagnose as diagnose
from batchnorm.tools.findings import Diagnosis as Diagnosis
from batchnorm.tools.findings import Finding as Finding
from batchnorm.tools.freeze import freeze as freeze
from batchnorm.tools.freeze import unfreeze as unfreeze
from batchnorm.tools.merge import sync_statistics as sync_statistics
from batchnorm.tools.pause import pause_statistics as pause_statistics
from batchnorm.tools.revert import revert as revert
from batchnorm.tools.together import forward_together as forward_together
