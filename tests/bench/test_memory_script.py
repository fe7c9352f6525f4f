"""benchmarks/memory.py: what it writes, of networks so small that it takes a second."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("memory_script", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "memory_script", module)  # for its dataclass
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SIZES", {"cpu": (2, 6, 4, 2), "cuda": (2, 6, 4, 2)})
    monkeypatch.setattr(module, "TINY", (2, 4, 8))
    monkeypatch.setattr(module, "ROUNDS", 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of this process
    return module


def test_both_files(script, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["memory.py", "--json", str(tmp_path / "of.json")])
    script.main()
    content = json.loads((tmp_path / "of.json").read_text())
    page = (tmp_path / "of.md").read_text()
    assert page == script.page(content)
    rows = {(r["network"], r["activation"], r["contender"]): r for r in content["rows"]}
    ours, input_, output = (
        rows["ResNet", "leaky_relu", name]["kept_bytes"]
        for name in ("ours", "ours, input", "ours, output")
    )
    # Made again: the outputs of the two narrow layers of each block, and of every other block; or
    # the inputs of the narrow layers, which have no residual.
    narrow = 2 * 4 * 6 * 6 * 4
    assert ours - input_ == 2 * 2 * narrow + 4 * narrow
    assert ours - output == 2 * 2 * narrow
    for (_, _, name), row in rows.items():
        assert (row["kept_bytes"] is None) == ("checkpoint" in name)
    assert page.count("| | peak | time | from | to | peak, MiB | held | kept |") == 3
    assert page.count("| – |") == 6
    for keep, row in content["host"].items():
        assert f"| {keep} | {row['layer_us']:.0f} µs | {row['ratio']:.2f} |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py", "--device", "cuda"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    assert "error: expected a CUDA device, found none" in capsys.readouterr().err
