"""Fails the import of `batchnorm.lab`, with a message that helps, where its extra is missing."""

import importlib.util

from batchnorm.errors import MissingDependencyError

_MODULES = {
    "numpy": "numpy",
    "joblib": "joblib",
    "matplotlib": "matplotlib",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "jinja2": "jinja2",
}

missing = [name for name, module in _MODULES.items() if importlib.util.find_spec(module) is None]
if missing:
    raise MissingDependencyError(
        f"batchnorm.lab needs {', '.join(missing)}, not installed here. Install with: "
        "pip install --no-build-isolation '.[lab]' (in the clone)"
    )
