"""In which language to speak."""

from __future__ import annotations

import os
from typing import Literal

from batchnorm.errors import ArgumentError

#: In the order in which they overrule each other.
VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")


def choose_language(option: str | None) -> Literal["zh", "en"]:
    """The language of `--lang`; that of the environment where it is not given.

    Args:
        option: what was given, if anything was.

    Raises:
        ArgumentError: it is a language that there is nothing in.

    Example:
        >>> choose_language("zh")
        'zh'
    """
    if option not in (None, "zh", "en"):
        raise ArgumentError(f"expected --lang zh or en, got {option!r}")
    if option is None:
        wanted = next((value for name in VARIABLES if (value := os.environ.get(name))), "")
        return "zh" if wanted.lower().startswith("zh") else "en"
    return "zh" if option == "zh" else "en"
