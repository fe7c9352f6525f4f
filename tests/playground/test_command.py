"""`batchnorm playground`: a real process, a real port, Ctrl-C."""

import shlex
import signal
import socket
import sys
import time

import pytest
from typer.testing import CliRunner

pytest.importorskip("gradio")

import playground_command
from batchnorm import cli
from batchnorm.errors import ArgumentError
from batchnorm.playground import server

#: A browser that `webbrowser` waits for, as it does for those of a terminal: it saves the page
#: beside itself. The machine's proxy, if it has one, is not for what is on the machine itself.
BROWSER = """
import pathlib, sys, urllib.request as u
saved = pathlib.Path(__file__).with_name("page")
saved.write_bytes(u.build_opener(u.ProxyHandler({})).open(sys.argv[1]).read())
saved.rename(saved.with_suffix(".html"))
"""


@pytest.mark.slow
def test_it_serves_the_page_to_this_machine_until_ctrl_c(tmp_path):
    opened, browser = tmp_path / "page.html", tmp_path / "browser.py"
    browser.write_text(BROWSER)
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(browser))} %s"
    with playground_command.serving("--lang", "zh", BROWSER=command) as (process, address):
        host, port = address.removeprefix("http://").split(":")
        assert host == "127.0.0.1"
        ends = time.monotonic() + playground_command.PATIENCE
        while not opened.exists():
            assert time.monotonic() < ends
            time.sleep(0.1)
        text = opened.read_text(encoding="utf-8")
        assert "批量归一化：实验场" in text
        for outside in ("fonts.g", "cdn", 'src="http', 'href="http'):
            assert outside not in text
        # Nobody else: not on another of the machine's own addresses either.
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", int(port)), timeout=5)
    with socket.create_server(("127.0.0.1", int(port))):  # it is free again
        pass


@pytest.mark.slow
def test_others_are_warned_of_and_ctrl_c_ends_a_training_that_is_watched(browser):
    said = (
        "Starting.\n"
        "Note: 0.0.0.0 is no loopback address. Others on the network can reach the page and "
        "make this machine train.\n"
    )
    serving = playground_command.serving("--lang", "en", "--host", "0.0.0.0", said=said)
    with serving as (process, address), browser.new_page() as page:
        page.goto(address)
        page.locator("#steps input[type=number]").fill("5000")
        page.click("#start")
        page.wait_for_selector("#pictures svg")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=15) == 130


def refused(*arguments):
    result = CliRunner().invoke(cli._command(), ["playground", "--no-browser", *arguments])
    return result.exception, result.output


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error, out = refused("--port", str(port))
    assert isinstance(error, ArgumentError)
    assert f"expected to listen on port {port} of 127.0.0.1, got: Address already in use" in str(
        error
    )
    assert "leave --port away" in str(error)
    assert "attempting" not in str(error)  # the address is said once
    assert out == ""


def test_without_a_port_the_next_free_one_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(server, "PORT", port)
        with server.listen("127.0.0.1", None) as found:
            assert port < found.getsockname()[1] < port + server.TRIES
            assert server.address(found) == f"http://127.0.0.1:{found.getsockname()[1]}"
        monkeypatch.setattr(server, "TRIES", 1)
        with pytest.raises(ArgumentError, match=f"a port from {port} to {port} of 127.0.0.1"):
            server.listen("127.0.0.1", None)


# None of them is a name that somebody would be asked for.
@pytest.mark.parametrize("host", ["192.0.2.1", "", "127.0..1", ".localhost", "a" * 64])
def test_an_address_that_is_not_this_machines_is_told(host):
    error, _ = refused("--host", host, "--port", "0")
    assert isinstance(error, ArgumentError)
    assert str(error).startswith("--host: expected an address of this machine")


def test_others_are_warned_of():
    with server.listen("127.0.0.1", 0) as found:
        assert server.is_loopback(found)
    with server.listen("0.0.0.0", 0) as found:
        assert not server.is_loopback(found)
        assert server.address(found).startswith("http://127.0.0.1:")


def test_a_language_that_is_not_there_is_told():
    error, out = refused("--lang", "fr")
    assert isinstance(error, ArgumentError)
    assert str(error) == "expected --lang zh or en, got 'fr'"
    assert out == ""


def test_without_gradio_it_says_how_to_install_it():
    code = "import sys; sys.modules['gradio'] = None\n" + playground_command.CODE
    process = playground_command.start("--no-browser", code=code)
    status, out, err = playground_command.finish(process)
    assert (status, out) == (2, "")
    assert err.startswith("Error: batchnorm playground needs gradio, not installed here.")
    assert "pip install --no-build-isolation '.[playground]'" in err
    assert len(err.splitlines()) == 1


def test_help_explains_every_option():
    result = CliRunner().invoke(
        cli._command(), ["playground", "--help"], env={"COLUMNS": "80", "NO_COLOR": "1"}
    )
    for word in ("--port", "--host", "--lang", "--no-browser", "Ctrl-C", "7860"):
        assert word in result.output
