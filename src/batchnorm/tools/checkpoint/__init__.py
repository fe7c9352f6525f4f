"""Checkpoints: what the buffers of batch norm layers tell without the model."""

from batchnorm.tools.checkpoint.inspection import inspect_checkpoint as inspect_checkpoint
