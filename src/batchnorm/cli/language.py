"""The language that a command speaks, where it speaks both."""

import os

from batchnorm.errors import ArgumentError

LANGUAGES = ("zh", "en")


def choose_language(option: str | None) -> str:
    """Return "zh" or "en": what is asked for, else what the environment says.

    Raises:
        ArgumentError: another language is asked for.
    """
    if option is None:
        variables = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
        return "zh" if next(filter(None, variables), "").startswith("zh") else "en"
    if option not in LANGUAGES:
        raise ArgumentError(f"expected --lang {' or '.join(LANGUAGES)}, got {option!r}")
    return option
