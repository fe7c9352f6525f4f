import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from batchnorm import BatchNorm, cli
from batchnorm.bench import peers, results, runner, worker
from batchnorm.bench.cases import SUITES
from batchnorm.kernels import native

KEYS = {"case", "dtype", "layout", "pass", "fusion", "peer", "ratio", "bandwidth_fraction"}
KEYS |= {"allocator", "interval", "noisy", "by_process"}


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "batchnorm", "bench", *arguments],
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_one_small_case_from_end_to_end(tmp_path):
    path = tmp_path / "new" / "one.json"
    done = bench("--filter", "64x10 ", "--threads", "1", "--json", str(path))
    assert (done.returncode, "\x1b" in done.stdout) == (0, False)
    # And a second line where the machine is busy.
    first = "Measuring the quick suite: 72 steps, about 20 seconds on 2 quiet cores."
    assert done.stderr.splitlines()[0] == first
    *text, first, second, third, _ = done.stdout.splitlines()
    assert max(map(len, text)) <= 80
    assert (first, second, third) == (
        f"Written: {path}",
        f"Written: {path.with_suffix('.md')}",
        f"Written: {path.with_name('one-ratios-default.svg')}",
    )
    content = json.loads(path.read_text())
    assert content["command"] == (
        "batchnorm bench --suite quick --device cpu --threads 1 --filter '64x10 '"
    )
    assert content["environment"]["threads"] == 1
    found = content["rows"]
    assert len(found) == 9 * 2
    for row in found:
        assert row.keys() >= KEYS
        assert (row["case"], row["peer"], row["status"]) == ("64x10", "torch eager", "ok")
        assert f"{row['ratio']:.2f}" in done.stdout
        processes = SUITES["quick"].processes
        assert (len(row["by_process"]), row["rounds"]) == (processes, 3 * processes)
        low, high = row["interval"]
        assert low <= row["ratio"] <= high
    assert {row["allocator"] for row in found} == {"default", "no page faults"}
    assert content["geomean"] == results.geomeans(found)
    # Of one case, the mean is the ratio.
    means = {tuple(mean[key] for key in results.GROUP): mean for mean in content["geomean"]}
    for row in found:
        mean = means[tuple(row[key] for key in results.GROUP)]
        assert (mean["ratio"], mean["cases"]) == (pytest.approx(row["ratio"], rel=1e-4), 1)
    assert (content["complete"], content["filter"]) == (True, "64x10 ")
    assert content["kernels"]["native" if native.MISSING is None else "others"] == 3 * 2


def test_ctrl_c_keeps_what_was_measured_and_says_so(tmp_path):
    path = tmp_path / "cut.json"
    with subprocess.Popen(
        [sys.executable, "-m", "batchnorm", "bench", "--filter", "x10 ", "--json", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr.readline().startswith("Measuring the quick suite")
        # A process that measures, and then is alone: its parent's children tell.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            process.kill()
            pytest.skip("the system does not tell a process's children")
        seen = set()
        while len(seen) < 2:  # the first has ended, so there are rows
            assert process.poll() is None
            seen |= set(children.read_text().split())
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert f"Interrupted: what was measured is kept.\nWritten: {results.incomplete(path)}\n" in err
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cut-incomplete.json",
        "cut-incomplete.md",
    ]
    content = json.loads(results.incomplete(path).read_text())
    assert not content["complete"]
    assert {row["status"] for row in content["rows"]} == {"ok"}
    assert {len(row["by_process"]) for row in content["rows"]} <= {1, 2}


def test_a_wrong_result_ends_in_status_1(tmp_path, monkeypatch):
    class Off(BatchNorm):
        def forward(self, x, mask=None, residual=None):
            return super().forward(x, mask, residual) + 1e-3

    monkeypatch.setattr(peers, "BatchNorm", Off)
    monkeypatch.setattr(runner, "measured", worker.work)  # in this process, where it is patched
    monkeypatch.setattr(runner, "allocators", lambda device: ("default",))
    monkeypatch.setattr(runner, "WATCH_S", 0)
    path = tmp_path / "wrong.json"
    arguments = ["bench", "--filter", "64x10 ", "--json", str(path)]
    done = CliRunner().invoke(cli._command(), arguments)
    assert done.exit_code == 1
    assert done.stdout.count("  wrong result") == 9
    assert "9 of our results were wrong" in done.stdout
    assert all(row["ratio"] is None for row in json.loads(path.read_text())["rows"])


def test_help_explains_every_option():
    done = bench("--help")
    assert done.returncode == 0
    assert "allocator as it is, and set up to keep its memory, so that" in re.sub(
        r"\s+", " ", done.stdout
    )
    words = " ".join(done.stdout.split())
    # Every paragraph fills its lines: no line but the last ends long before the margin.
    prose = done.stdout.partition("Usage")[2].partition("╭")[0].split("\n")[2:]
    for line, following in itertools.pairwise(map(str.strip, prose)):
        if line and following:
            assert len(f"{line} {following.split()[0]}") > 78, line
    # What is given as an example is in the suite that is measured unless told otherwise.
    shown = re.search(r"such as (\S+) or (\S+)\.", words.replace("│ │ ", ""))
    assert all(SUITES["quick"].matching(example).cases for example in shown.groups())
    for word in ("quick|full", "cpu|cuda", "--json", "--threads", "--filter", "float64"):
        assert word in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "nope"), "Expected one of: quick, full"),
        (("--filter", "7x7x7x7x7"), "has '7x7x7x7x7' in its name"),
        (("--threads", "0"), "--threads"),
        (("--json", "/"), "ends in .json"),
        (("--filter", "65536x64"), "The full suite has some: add --suite full."),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(arguments, message):
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 5
