"""The language that a command speaks."""

import os

from batchnorm.errors import ArgumentError

LANGUAGES = ("zh", "en")


def choose_language(option: str | None) -> str:
    """Return the language of --lang, or else the one of the environment: "zh" or "en".

    Raises:
        ArgumentError: There is no such language.
    """
    if option is None:
        # The first of them that is set decides, as everywhere.
        names = ("LC_ALL", "LC_MESSAGES", "LANG")
        locale = next((value for name in names if (value := os.environ.get(name))), "")
        return "zh" if locale.lower().startswith("zh") else "en"
    if option not in LANGUAGES:
        raise ArgumentError(f"--lang: expected one of {', '.join(LANGUAGES)}, got {option!r}")
    return option
