"""The page in a real browser: it trains and stops, in both languages, narrow and wide."""

import re
import time
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import psutil
import pytest

pytest.importorskip("gradio")

from batchnorm.playground.presets import PRESETS
from batchnorm.playground.texts import TEXTS

pytestmark = pytest.mark.slow

#: No training of a test ends by itself.
ENDLESS = "5000"

# The machine's proxy, if it has one, is not for what is on the machine itself.
OPENER = build_opener(ProxyHandler({}))


def curve(page, name="accuracy"):
    """The path of the network with batch normalization."""
    paths = page.locator(f'#pictures svg[aria-labelledby="{name}-title"] path')
    every = paths.evaluate_all(
        "all => all.filter(p => (p.getAttribute('style') || '').includes('series2'))"
        ".map(p => p.getAttribute('d'))"
    )
    return max(every, key=len)


def step(page):
    return int(re.search(r"\d+", page.inner_text("#status"))[0])


def settle(seen, timeout=20):
    """Wait until something is so."""
    ends = time.monotonic() + timeout
    while not seen():
        assert time.monotonic() < ends
        time.sleep(0.05)


def fill(page, name, value):
    kind = "textarea, #rate input" if name == "rate" else "input[type=number]"
    page.locator(f"#{name} {kind}").first.fill(value)


def end(page, state):
    page.wait_for_selector(f".status.{state}")
    # The frame before may still be on its way.
    page.wait_for_function("!document.querySelector('#start').disabled")


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize(("language", "width"), [("zh", 400), ("en", 1200)])
def test_it_trains_and_stops_and_starts_again(served, visit, language, width):
    _, address = served
    words = TEXTS[language]
    page = visit(address, width=width)
    page.click(f"#language label:has-text('{'中文' if language == 'zh' else 'English'}')")
    page.wait_for_selector(f"h1:has-text('{words['title']}')")
    assert page.evaluate("document.documentElement.lang") == language
    assert page.inner_text("#hint") == words["look.sigmoid"]
    assert page.is_disabled("#stop")
    assert fits(page)

    fill(page, "steps", ENDLESS)
    page.click("#start")
    page.wait_for_selector("#pictures svg")
    first, begun = curve(page), step(page)
    page.wait_for_function("!document.querySelector('#stop').disabled")
    assert page.is_disabled("#start")
    settle(lambda: curve(page) != first and step(page) > begun)
    assert page.locator("#pictures figure").count() == 4
    for name in ("loss", "accuracy", "gradients", "inputs"):
        assert words[name] in page.inner_text("#pictures")
    assert fits(page)

    page.click("#stop")
    end(page, "stopped")
    stopped = step(page)
    pattern = words["stopped"].format(
        step=stopped, steps=ENDLESS, accuracies=words["accuracies"].format(
            plain=r"\d+\.\d%", BatchNorm=r"\d+\.\d%")
    )  # fmt: skip
    assert re.fullmatch(pattern, page.inner_text("#status"))
    last = curve(page)
    time.sleep(1)
    assert (step(page), curve(page)) == (stopped, last)

    fill(page, "steps", "60")
    page.click("#start")
    end(page, "done")
    assert page.inner_text("#status").startswith(words["done"].split("{")[0])
    assert step(page) == 60
    assert curve(page) != last

    page.click("#reset")
    page.wait_for_selector(".status.ready")
    assert page.locator("#pictures svg").count() == 0
    assert page.locator("#steps input[type=number]").input_value() == "500"


def test_the_pictures_change_their_language_with_the_page(served, visit):
    _, address = served
    page = visit(address)
    fill(page, "steps", "20")
    page.click("#start")
    end(page, "done")
    assert "test accuracy" in page.inner_text("#pictures")
    page.click("#language label:has-text('中文')")
    page.wait_for_selector(f"figcaption:has-text('{TEXTS['zh']['accuracy']}')")
    assert "测试准确率" in page.inner_text("#pictures")
    assert "test accuracy" not in page.inner_text("#pictures")
    assert page.inner_text("#status").startswith("完成：20 步。")
    assert page.inner_text("#start") == "开始"
    assert page.inner_text("#depth label") == "隐藏层数"


def test_bad_values_are_refused_in_words_and_nothing_starts(served, visit):
    _, address = served
    page = visit(address)
    for name, value in (
        ("rate", "abc"),
        ("rate", "<b>"),
        ("depth", "1000"),
        ("batch", "1"),
        ("seed", ""),
    ):
        fill(page, name, value)
        page.click("#start")
        said = f"{TEXTS['en'][name]}: expected a .*, got {f'“{value}”' if value else 'nothing'}\\. "
        page.wait_for_function(
            "said => new RegExp(said).test(document.querySelector('#status').innerText)", arg=said
        )
        assert page.locator(".status.refused b").count() == 0
        page.wait_for_function("!document.querySelector('#start').disabled")
        assert page.locator("#pictures svg").count() == 0
        page.click("#reset")
        page.wait_for_selector(".status.ready")
    # And in Chinese; the page goes on as if nothing had been.
    page.click("#language label:has-text('中文')")
    fill(page, "rate", "abc")
    page.click("#start")
    page.wait_for_selector(".status.refused:has-text('学习率：应为 0.0001 到 100 之间的数')")
    fill(page, "rate", "0.5")
    fill(page, "steps", "10")
    page.click("#start")
    end(page, "done")


def test_examples_and_the_slider_fill_the_form(served, visit):
    _, address = served
    page = visit(address)
    page.click("#example input")
    page.click(f"#example [role=option]:has-text('{TEXTS['en']['preset.tiny']}')")
    page.wait_for_selector(f"#hint:has-text('{TEXTS['en']['look.tiny'][:30]}')")
    tiny = PRESETS["tiny"]
    for name in ("depth", "batch", "steps"):
        shown = page.locator(f"#{name} input[type=number]").input_value()
        assert shown == str(getattr(tiny, name))
    rate = page.locator("#rate textarea, #rate input").first
    assert rate.input_value() == "0.05"
    assert page.locator("#activation input").input_value() == "ReLU"
    # What is said of the example is not said of other settings.
    page.locator("#exponent input[type=range]").fill("-1.5")
    page.wait_for_function("document.querySelector('#hint').innerText.trim() === ''")
    assert rate.input_value() == "0.032"
    example = page.locator("#example input")
    assert example.input_value() == ""
    # Into the box and out again, and with nonsense in it: nothing changes, and nothing fails.
    for typed in ("", "zzz"):
        example.click()
        example.fill(typed)
        with page.expect_response("**/run/predict") as answer:
            page.locator("#seed input").click()
        assert answer.value.ok
        assert example.input_value() == ""
        assert rate.input_value() == "0.032"
    # With the keyboard alone.
    example.fill(TEXTS["en"]["preset.fast"])
    page.locator(f"#example [role=option]:has-text('{TEXTS['en']['preset.fast']}')").wait_for()
    page.keyboard.press("Enter")
    page.wait_for_selector(f"#hint:has-text('{TEXTS['en']['look.fast'][:30]}')")
    assert rate.input_value() == "2"


def test_the_server_takes_nothing_but_what_its_page_asks_for(served):
    """The guard is at the door; what it refuses is tested beside it."""
    _, address = served

    def answer(path, data=None, kind="application/json", **headers):
        asked = Request(f"{address}/{path}", data, {"Content-Type": kind, **headers})
        try:
            with OPENER.open(asked, timeout=20) as found:
                return found.status
        except HTTPError as error:
            with error:
                return error.code

    start = (
        b'{"data": ["en", 1, 8, "tanh", "He", "x", 8, 5, 0], "fn_index": 0, "session_hash": "a"}'
    )
    join = "gradio_api/queue/join"
    assert answer(join, start, Origin=address) == 200
    assert answer(join, start, Origin="http://evil.example") == 403
    assert answer(join, start, Host="evil.example", Origin="http://evil.example") == 403
    file = (
        b'--0\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nb\r\n--0--\r\n'
    )
    form = "multipart/form-data; boundary=0"
    assert answer("gradio_api/upload", file, form) == 404
    # Where Gradio takes a file all the same, it takes no byte of it.
    assert answer("gradio_api/component_server", file, form) == 413
    # FastAPI's documentation, which would be fetched from elsewhere.
    assert answer("docs") == 404


def test_each_tab_trains_for_itself_and_takes_it_along(served, visit):
    server, address = served
    usage = psutil.Process(server.pid)
    one, other = visit(address), visit(address)
    for page, depth in ((one, "2"), (other, "4")):
        fill(page, "depth", depth)
        fill(page, "steps", ENDLESS)
        page.click("#start")
        page.wait_for_selector("#pictures svg")
    seen = step(one), step(other)
    settle(lambda: step(one) > seen[0] and step(other) > seen[1])
    for page, depth in ((one, 2), (other, 4)):
        layers = page.locator('#pictures svg[aria-labelledby="inputs-title"] text:has-text("σ")')
        assert layers.count() == 2 * depth
    one.context.close()
    seen = step(other)
    settle(lambda: step(other) > seen)
    other.context.close()
    # Two trainings took all that there was; without them the server only waits.
    settle(lambda: usage.cpu_percent(interval=1) < 15)
