import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from batchnorm import BatchNorm, cli
from batchnorm.bench import peers, results, runner, worker

KEYS = {"case", "dtype", "layout", "pass", "fusion", "peer", "ratio", "bandwidth_fraction"}
KEYS |= {"allocator"}


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
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
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
    assert {row["allocator"] for row in found} == {"default", "no page faults"}
    assert content["geomean"] == results.geomeans(found)
    # Of one case, the mean is the ratio.
    assert [mean["ratio"] for mean in content["geomean"]] == [row["ratio"] for row in found]


def test_a_wrong_result_ends_in_status_1(tmp_path, monkeypatch):
    class Off(BatchNorm):
        def forward(self, x, mask=None, residual=None):
            return super().forward(x, mask, residual) + 1e-3

    monkeypatch.setattr(peers, "BatchNorm", Off)
    monkeypatch.setattr(runner, "measured", worker.work)  # in this process, where it is patched
    monkeypatch.setattr(runner, "allocators", lambda device: ("default",))
    path = tmp_path / "wrong.json"
    arguments = ["bench", "--filter", "64x10 ", "--json", str(path)]
    done = CliRunner().invoke(cli._command(), arguments)
    assert done.exit_code == 1
    assert done.stdout.count("wrong result") == 9
    assert "9 of our results were wrong" in done.stdout
    assert all(row["ratio"] is None for row in json.loads(path.read_text())["rows"])


def test_help_explains_every_option():
    done = bench("--help")
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    for word in ("quick|full", "cpu|cuda", "--json", "--threads", "--filter", "float64"):
        assert word in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "nope"), "Expected one of: quick, full"),
        (("--filter", "7x7x7x7x7"), "has '7x7x7x7x7' in its name"),
        (("--threads", "0"), "--threads"),
        (("--json", "/"), "ends in .json"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(arguments, message):
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 5
