"""What is printed: all of it, in lines that fit, plain in a pipe."""

import io

import pytest
from rich.console import Console

from batchnorm.tools.findings import Diagnosis, Finding, Gap, LayerReport
from batchnorm.tools.show import ROWS, SAME, show

WIDTHS = pytest.mark.parametrize("width", [72, 80, 200])


def printed(diagnosis, width=80, title="", **options):
    file = io.StringIO()
    show(diagnosis, Console(file=file, width=width, **options), title)
    return file.getvalue()


def layer(name, **known):
    return LayerReport(name, "BatchNorm2d", 64, **known)


def found(code, severity, name, message="it is wrong, by 0.5 σ", remedy="Mend it."):
    return Finding(code, severity, name, message, {}, remedy)


DIAGNOSED = Diagnosis(
    findings=(
        found("BN202", "info", "stem.bn"),
        found("BN101", "error", "blocks.1.bn", "the mean is 2.1 σ away", "Recalibrate it."),
        found("BN201", "warning", ""),
    ),
    layers=(
        layer("stem.bn", updates=1000, mean_drift=0.01, var_drift=0.0123, gap=0.001, share=-0.02),
        layer("blocks.1.bn", updates=None, mean_drift=2.1, var_drift=0.5, gap=0.7, share=0.65),
    ),
    gap=Gap(0.83, 0.021, 0.05, 1),
    notes=("The optimizer was not given: weight decay was not looked at.",),
)


def test_everything_is_there_in_order():
    text = printed(DIAGNOSED, title="train:make_model")
    words = " ".join(text.split())
    expected = [
        "train:make_model 2 batch norm layers: 1 error, 1 warning, 1 remark",
        "Outputs of train() and eval() differ by 0.83 ± 0.02",
        "0.05 would be left with exact running statistics. From 1 batch.",
        "Of that, by layer: blocks.1.bn 65%.",
        "ERROR BN101 running statistics are not those of the data",
        "blocks.1.bn: the mean is 2.1 σ away → Recalibrate it.",
        "WARNING BN201 momentum keeps",
        "the model: it is wrong, by 0.5 σ → Mend it.",
        "INFO BN202 bias right before",
        "channels updates drift drift gap of gap layer",
        "i 64 1000 0.010 0.012 0.001 -2% stem.bn BN202",
        "E 64 - 2.100 0.500 0.700 65% blocks.1.bn BN101",
        "The optimizer was not given",
    ]
    places = [words.index(part) for part in expected]
    assert places == sorted(places)


def test_columns_are_below_each_other():
    lines = printed(DIAGNOSED).splitlines()
    (head,) = [line for line in lines if line.endswith("layer")]
    rows = [line for line in lines if "stem.bn  " in line or "blocks.1.bn  " in line]
    for column, cells in (("channels", ("64", "64")), ("gap", ("0.001", "0.700"))):
        end = head.index(column) + len(column)
        for row, cell in zip(rows, cells, strict=True):
            assert row[:end].endswith(cell)


@WIDTHS
def test_lines_fit_and_names_are_never_cut(width):
    name = "backbone.encoder.stages.3.blocks.17.downsample.norm"
    diagnosis = Diagnosis(
        (found("BN103", "error", name, "it is not finite " * 20, "Do this. " * 20),),
        (layer(name, updates=10),),
        notes=("A note. " * 30,),
    )
    text = printed(diagnosis, width)
    assert text.count(name) == 2
    for line in text.splitlines():
        assert len(line) <= min(width, 110) or name in line
    # Neither is anything lost between the lines.
    assert " ".join(text.split()).count("it is not finite") == 20


def test_plain_in_a_pipe_and_coloured_in_a_terminal():
    assert "\x1b" not in printed(DIAGNOSED)
    assert not set(printed(DIAGNOSED)) & set("─│┃━┏╭")
    text = printed(DIAGNOSED, force_terminal=True, color_system="standard")
    assert "\x1b[1;31mERROR\x1b" in text
    assert "\x1b[1;33mWARNING\x1b" in text


def test_brackets_are_no_markup():
    diagnosis = Diagnosis(
        (found("BN103", "error", "[red]a[/red]", "[b]"),), (layer("[red]a[/red]"),)
    )
    assert printed(diagnosis).count("[red]a[/red]") == 2


def test_what_is_said_of_many_layers_is_said_once():
    names = [f"blocks.{n}" for n in range(100)]
    same = Diagnosis(tuple(found("BN105", "error", n) for n in names), tuple(map(layer, names)))
    text = printed(same)
    assert "100 layers (blocks.0, blocks.1, blocks.2, …): it is wrong" in text
    assert text.count("Mend it.") == 1
    assert f"… and {100 - ROWS} layers with less to tell" in text
    each = Diagnosis(tuple(found("BN105", "error", n, f"by {n}") for n in names), ())
    text = printed(each)
    assert text.count(": by") == SAME
    assert f"… and {100 - SAME} more layers" in text


def test_of_many_layers_the_worst_are_shown():
    layers = tuple(layer(f"l{n}", mean_drift=0.1, gap=n / 1000) for n in range(200))
    text = printed(Diagnosis((found("BN101", "warning", "l3"),), layers))
    rows = [line.split() for line in text.splitlines() if line.rpartition(" ")[2].startswith("l")]
    names = [row[-1] for row in rows if row[-1] != "layer"]
    assert len(names) == ROWS - 1  # and that with the code at its end
    assert "l3  BN101" in text
    assert names == [f"l{n}" for n in range(199, 199 - len(names), -1)]


def test_only_known_columns():
    text = printed(Diagnosis((), (layer("a", updates=3), layer("b"))))
    assert "drift" not in text
    assert "calls" not in text
    assert "2 batch norm layers: nothing found" in text
    # The same for all: nothing to compare.
    same = (layer("a", momentum=0.1, calls=1.0), layer("b", momentum=0.1, calls=1.0))
    assert "tum" not in printed(Diagnosis((), same))
    differ = (layer("a", momentum=0.1, calls=1.0), layer("b", momentum=None, calls=2.0))
    assert "tum" in printed(Diagnosis((), differ))
    assert "/pass" in printed(Diagnosis((), differ))


def test_numbers_that_are_none():
    values = {"mean_drift": float("nan"), "var_drift": float("inf"), "values": float("inf")}
    text = printed(Diagnosis((), (layer("a", **values), layer("b"))))
    assert "nan" in text
    assert "inf" in text


def test_nothing_at_all():
    assert printed(Diagnosis((), (), notes=("No layers.",))).startswith(
        "0 batch norm layers: nothing found"
    )


def test_gaps_that_are_none():
    def said(*gap):
        return " ".join(printed(Diagnosis((), (layer("a"),), Gap(*gap))).split())

    nan = float("nan")
    assert "differ by 0.5 (1: as much as examples differ from each other). From 1 batch." in said(
        0.5, nan, None, 1
    )
    assert "NaN or infinity in them. From 2 batches." in said(nan, nan, nan, 2)
    assert "NaN or infinity in them; 0.2 would be left with" in said(nan, nan, 0.2, 2)
    assert "NaN or infinity in them." in said(float("inf"), nan, None, 2)


def test_the_headline_tells_shares_of_either_sign():
    """They add up to 1 with those that undo what others do, and not without."""
    shares = {"a": -0.71, "b": 0.78, "c": 0.05, "d": 0.84, "e": 0.04}
    layers = tuple(layer(name, share=share) for name, share in shares.items())
    diagnosis = Diagnosis((found("BN101", "error", "b"),), layers, Gap(0.8, 0.1, 0.1, 4))
    assert "Of that, by layer: d 84%, b 78%, a -71%." in printed(diagnosis)
