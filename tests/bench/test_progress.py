import io
import re

import pytest
from rich.console import Console

from batchnorm.bench.progress import Bar, expected


@pytest.mark.parametrize("width", [80, 60])
def test_in_a_narrow_terminal_only_the_name_gives_way(width):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, legacy_windows=False)
    with Bar(console) as bar:
        bar.start("full", 4242, 30)
        bar.step(
            "32x64x56x56 bfloat16 channels-last, forward+backward, bn+add+relu, no page faults"
        )
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    line = next(line for line in re.split(r"[\r\n]+", plain) if "32x64" in line)
    assert len(line.rstrip()) <= width
    assert re.search(r"━{12} +0/4242 +0:00:00 +32x64x56x56 .*…", line)


def test_a_pipe_gets_one_line_and_the_notes():
    out = io.StringIO()
    with Bar(Console(file=out, width=80)) as bar:
        bar.start("quick", 888, 1.2)
        bar.step("this")
        bar.note("Other processes use 60% [of] it.")
    assert out.getvalue() == (
        "Measuring the quick suite: 888 steps, about a minute on 2 quiet cores.\n"
        "Other processes use 60% [of] it.\n"
    )


def test_no_time_is_foretold_where_none_is_known():
    out = io.StringIO()
    with Bar(Console(file=out, width=80)) as bar:
        bar.start("gpu", 594, None)
    assert out.getvalue() == "Measuring the gpu suite: 594 steps.\n"


def test_a_short_run_still_starts_its_processes():
    assert expected(0.01) == "20 seconds"
    assert expected(0.5) == "30 seconds"
