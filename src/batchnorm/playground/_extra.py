"""Fails the import of `batchnorm.playground`, with a message that helps, without its extra."""

import importlib.util

from batchnorm.errors import MissingDependencyError

if importlib.util.find_spec("gradio") is None:
    raise MissingDependencyError(
        "batchnorm playground needs gradio, not installed here. Install with: "
        "pip install --no-build-isolation '.[playground]' (in the clone)"
    )
