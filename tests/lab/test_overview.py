import dataclasses
import shutil

import pytest

import lab_tiny
from batchnorm import lab
from batchnorm.errors import InputError
from batchnorm.lab.experiments import convergence, explosion
from batchnorm.lab.overview import markdown, overview, strongest
from batchnorm.lab.verdict import judge, judge_within
from web_page import Page

BETTER, WORSE, SAME = [3.0, 4.0, 5.0], [-3.0, -4.0, -5.0], [-1.0, 0.0, 1.0]


def verdict(differences):
    return judge(differences, [0.0] * len(differences), unit="steps")


def section(name, differences, *, profile="quick", data="digits", also=(), ours=()):
    return {
        "anchor": f"{name}-{profile}-{data}",
        "experiment": {"name": name, "claim": f"{name} helps.", "source": f"{name} 2015"},
        "profile": profile,
        "data": {"fingerprint": data, "name": data},
        "verdict": verdict(differences),
        "also": [{"claim": c, "verdict": verdict(d), "ours": c in ours} for c, d in also],
    }


def test_every_claim_is_counted_once_and_failures_are_listed():
    found = overview(
        [
            section("a", BETTER, also=[("More.", WORSE), ("Less.", SAME)]),
            section("b", WORSE),
            section("b", BETTER, data="wine"),
        ]
    )
    assert found.counts == "5 claims of the sources: 2 reproduced, 2 contradicted, 1 unresolved."
    claims = ["a helps.", "More.", "Less.", "b helps.", "b helps."]
    assert [row.claim for row in found.rows] == claims
    assert [row.main for row in found.rows] == [True, False, False, True, True]
    assert [(row.anchor, row.claim) for row in found.failed] == [
        ("a-quick-digits", "More."),
        ("a-quick-digits", "Less."),
        ("b-quick-digits", "b helps."),
    ]
    assert found.both == ()
    # 3 seeds: all must agree, 1/8 by chance, and the mean must be 2 standard errors away.
    rate = 5 * found.rows[0].verdict.false_rate
    assert f"still call about {rate:.1f} of them reproduced, and as many" in found.by_chance
    assert found.weakness == ""


def test_questions_of_ours_are_counted_apart_and_do_not_fail():
    found = overview([section("a", BETTER, also=[("Ours.", WORSE), ("Theirs.", SAME)],
                              ours=["Ours."])])  # fmt: skip
    assert found.counts == (
        "2 claims of the sources: 1 reproduced, 1 unresolved. "
        "1 question of our own: 1 contradicted."
    )
    assert [row.claim for row in found.failed] == ["Theirs."]
    assert "| Ours. *(ours)* | contradicted |" in markdown(found)
    assert found.omitted.startswith("1 question of our own also came out otherwise")
    assert found.omitted in markdown(found)
    assert overview([section("a", BETTER, also=[("Ours.", BETTER)], ours=["Ours."])]).omitted == ""


def test_data_sets_are_told_apart_even_of_one_name():
    both = [
        section(name, BETTER, profile=profile, data=data)
        for name in ("a", "b")
        for profile in ("quick", "full")
        for data in ("digits", "wine")
    ]
    found = overview(both)
    assert {row.where for row in found.rows} == {
        "a, digits, full", "a, wine, full", "b, digits, full", "b, wine, full"
    }  # fmt: skip
    assert sorted(name for name, *_ in found.both) == [
        "a, digits",
        "a, wine",
        "b, digits",
        "b, wine",
    ]
    for one in both:
        one["data"]["name"] = "my.npz"
    found = overview(both)
    assert found.data == ("my.npz (digits)", "my.npz (wine)")
    assert found.rows[0].where == "a, my.npz (digits), full"


def test_a_link_to_a_folder_of_any_name_is_whole():
    one = {**section("a", BETTER), "anchor": "a-my data (1)"}
    assert "[a, quick](a-my%20data%20%281%29/)" in markdown(overview([one]))


def test_a_limit_stands_beside_what_was_measured():
    within = {**section("a", BETTER), "verdict": judge_within(9.0, [6.0, 5.0, 4.0], unit="s")}
    numbers = overview([within]).rows[0].numbers
    assert numbers == "5 (2.52 to 7.48) s, limit 9; 3 of 3 seeds"


def test_a_decided_outcome_whose_interval_includes_zero_is_marked():
    # Mean 2, standard error 0.577: more than 2 of them, and less than Student's 4.3.
    found = overview([section("a", [1.0, 2.0, 3.0], also=[("Sure.", BETTER), ("Open.", SAME)])])
    assert [row.weak for row in found.rows] == [True, False, False]
    assert found.weakness.startswith("1 decided outcome has an interval that includes zero")
    assert "| **reproduced** (weak) | +2 (-0.484 to +4.48) steps; 3 of 3 seeds |" in markdown(found)


def test_no_interval_where_there_is_no_chance_or_only_a_bound():
    same = overview([section("a", [2.0, 2.0, 2.0])])
    assert same.rows[0].numbers == "+2 steps; 3 of 3 seeds"
    assert "about 0.0 of them" in same.by_chance
    never = {**section("a", BETTER), "verdict": judge([None] * 3, [1, 2, 3], unit="s", horizon=9)}
    assert overview([never]).rows[0].numbers == "+7 s; 3 of 3 seeds"


def test_full_goes_before_quick_and_many_seeds_before_few():
    quick = section("a", BETTER, also=[("More.", BETTER), ("Turned.", BETTER), ("Old.", SAME)])
    full = section(
        "a", SAME, profile="full", also=[("More.", BETTER), ("Turned.", WORSE), ("New.", SAME)]
    )
    other = section("a", WORSE, data="wine")
    for order in ([quick, full, other], [other, full, quick]):
        assert [s["anchor"] for s in sorted(strongest(order), key=lambda s: s["anchor"])] == [
            "a-full-digits",
            "a-quick-wine",
        ]
        found = overview(order)
        assert (
            found.counts == "5 claims of the sources: 1 reproduced, 2 contradicted, 2 unresolved."
        )
        assert [(claim, q.outcome, f.outcome) for _, claim, q, f in found.both] == [
            ("a helps.", "reproduced", "unresolved"),
            ("More.", "reproduced", "reproduced"),
            ("Turned.", "reproduced", "contradicted"),
        ]
        assert found.agreement == (
            "1 of 3 claims came out the same in both; 1 turned from reproduced to contradicted, or "
            "back."
        )
        assert found.unasked == (
            "Judged in quick only (a, digits): “Old.” Judged in full only (a, digits): “New.”"
        )
        assert sorted(found.data) == ["digits", "wine"]
    more = section("a", [1.0, -1.0, 2.0, 3.0])
    assert overview([quick, more, full]).both[0][2] == more["verdict"]
    few, many = section("a", BETTER[:2]), section("a", BETTER)
    assert strongest([few, many]) == strongest([many, few]) == [many]


def test_markdown_says_the_same():
    text = markdown(overview([section("a|b", SAME), section("a|b", BETTER, profile="full")]))
    assert "1 claim of the sources: 1 reproduced." in text
    assert " reproduced. Data: digits. Made by" in text
    claim = "| [a\\|b, full](a%7Cb-full-digits/) | **a\\|b helps.** a\\|b 2015 | **reproduced** | "
    assert f"{claim}+4 (+1.52 to +6.48) steps; 3 of" in text
    assert "## What did not" not in text
    assert text.endswith("\n\n| experiment | claim | quick | full |\n| --- | --- | --- | --- |\n"
                         "| a\\|b | a\\|b helps. | unresolved | **reproduced** |\n")  # fmt: skip
    text = markdown(overview([section("a", WORSE)]))
    assert (
        "\n- a, quick: **a helps.** Contradicted. 0 of 3 paired seeds went the claim's way" in text
    )
    assert "## Quick" not in text


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """One experiment in both profiles, another in one, as `lab run` leaves them."""
    directory = tmp_path_factory.mktemp("everything")
    quick = dataclasses.replace(lab_tiny.SETTINGS, steps=60)
    profiles = {"quick": quick, "full": dataclasses.replace(quick, seeds=3)}
    small = dataclasses.replace(explosion.PROFILES["quick"], seeds=2, width=32)
    with pytest.MonkeyPatch.context() as patch:
        tiny = dataclasses.replace(lab_tiny.EXPERIMENT, profiles=profiles)
        patch.setattr(convergence, "EXPERIMENT", tiny)
        lab.run("convergence", directory / "convergence", jobs=1)
        lab.run("convergence", directory / "convergence-full", profile="full", jobs=1)
        fast = dataclasses.replace(explosion.EXPERIMENT, profiles={"quick": small})
        patch.setattr(explosion, "EXPERIMENT", fast)
        lab.run("explosion", directory / "explosion", jobs=1)
    return directory


def test_a_directory_of_results_becomes_one_page(everything, tmp_path):
    path = lab.write_report(everything)
    assert path == everything / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    text = " ".join(page.text.split())
    assert page.tags.count("article") == 2
    assert {"convergence-full", "explosion"} <= set(page.ids)
    assert "--profile full" in text
    assert "--profile quick --data digits --seeds 2" in text  # explosion's
    assert "Quick and full" in text
    assert "What did not reproduce" in text
    assert len(page.ids) == len(set(page.ids))
    assert {target[1:] for target in page.targets} <= set(page.ids)
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & set(page.tags)
    assert "http" not in html
    for folder in ("convergence", "convergence-full", "explosion"):
        assert (everything / folder / "report.html").is_file()

    # From results alone, the same bytes.
    for folder in ("convergence", "convergence-full", "explosion"):
        (tmp_path / folder).mkdir()
        shutil.copy(everything / folder / "results.json", tmp_path / folder)
    assert lab.write_report(tmp_path).read_bytes() == path.read_bytes()
    claims = (everything / "claims.md").read_text(encoding="utf-8")
    assert claims == (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert explosion.EXPERIMENT.claim in claims


def test_results_that_cannot_be_read_are_left_out_and_told(everything, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text(
        '{"schema": 1, "environment": {"batchnorm": "0.0.1"}}'
    )
    with pytest.raises(InputError, match="expected schema"):
        lab.write_report(tmp_path)
    (tmp_path / "explosion").mkdir()
    shutil.copy(everything / "explosion" / "results.json", tmp_path / "explosion")
    told = []
    page = Page(lab.write_report(tmp_path, told.append).read_text(encoding="utf-8"))
    assert page.tags.count("article") == 1
    (message,) = told
    assert message.startswith(f"Left out of the page: {tmp_path / 'old'}")
