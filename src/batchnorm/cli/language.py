"""In which language to speak."""

from __future__ import annotations

import locale
import os
from typing import TYPE_CHECKING

from batchnorm.errors import ArgumentError

if TYPE_CHECKING:
    from batchnorm.exercises.exercise import Language

#: In the order in which they overrule each other.
VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")


def choose_language(option: str | None) -> Language:
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
        given = (value for name in VARIABLES if (value := os.environ.get(name)))
        # Windows sets none of them, and calls it "Chinese (Simplified)_China.936".
        wanted = next(given, None) or locale.setlocale(locale.LC_CTYPE)
        return "zh" if wanted.lower().startswith(("zh", "chinese")) else "en"
    return "zh" if option == "zh" else "en"
