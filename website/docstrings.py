"""Docstrings as the site shows them: examples as code, and names of the library as links."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import griffe

import batchnorm

PUBLIC = [
    name
    for name, thing in vars(batchnorm).items()
    if not name.startswith("_") and not isinstance(thing, ModuleType)
]
NAMES = re.compile(rf"(?<![\[`>])`({'|'.join(PUBLIC)})`(?![\]`])")
SHAPE = re.compile(r"^Shape:\n((?:    .*\n)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Changes every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object, once its docstring is known."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = SHAPE.sub(_items, text)
            obj.docstring.value = NAMES.sub(r"[`\1`][batchnorm.\1]", text)


def _items(shape: re.Match[str]) -> str:
    return "**Shape:**\n\n" + re.sub(r"^    ", "- ", shape[1], flags=re.MULTILINE)
