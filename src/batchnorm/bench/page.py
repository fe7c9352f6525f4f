"""The results as a page of Markdown, beside the file they are in and the figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchnorm.bench import report
from batchnorm.bench.results import HEADING

KB, MB = 1 << 10, 1 << 20


def page(content: dict[str, Any], figures: Sequence[str]) -> str:
    """Return the page: where it was measured, the figures, and all that is printed."""
    place = content["environment"]
    caches = ", ".join(f"{name} {_bytes(size)}" for name, size in place["cache_bytes"].items())
    printed = "\n".join(text.plain for text in report.lines(content))
    pictures = "\n\n".join(f"![{_words(name)}]({name})" for name in figures)
    return f"""\
{HEADING}: the {content["suite"]} suite on {place["device"]}

Written by `{content["command"]} --json FILE`.

| | |
|---|---|
| processor | {place["cpu"]}, {place["cores"]} cores, {place["threads"]} threads; {caches} |
| software | batchnorm {place["batchnorm"]} at {place["commit"]}, torch {place["torch"]}, \
Python {place["python"]}, {place["platform"]}, {place["libc"]} |
| kernels | {place["backends"][0]} |
| date, seed | {place["date"]}, {place["seed"]} |

{pictures}

```text
{printed}
```
"""


def _bytes(size: int) -> str:
    return f"{size / MB:g} MB" if size >= MB else f"{size / KB:g} KB"


def _words(name: str) -> str:
    """What a figure shows, from the name of its file: cpu-ratios-default.svg."""
    words = name.removesuffix(".svg").replace("-", " ")
    if "ratios" in words:
        return f"Ratios by case, allocator: {words.partition('ratios ')[2]}"
    return "Cost of a KB by the size of the tensor"
