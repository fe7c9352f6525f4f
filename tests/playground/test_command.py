"""`batchnorm playground`: a real process, a real port, Ctrl-C."""

import signal
import socket
import time
from urllib.request import ProxyHandler, build_opener

import pytest
from typer.testing import CliRunner

pytest.importorskip("gradio")

import playground_command
from batchnorm import cli
from batchnorm.errors import ArgumentError
from batchnorm.playground import server

# The machine's proxy, if it has one, is not for what is on the machine itself.
fetch = build_opener(ProxyHandler({})).open


@pytest.mark.slow
def test_it_serves_the_page_to_this_machine_until_ctrl_c():
    with playground_command.serving("--lang", "zh") as (process, address):
        host, port = address.removeprefix("http://").split(":")
        assert host == "127.0.0.1"
        with fetch(address, timeout=20) as answer:
            assert answer.status == 200
            text = answer.read().decode()
        assert "批量归一化：实验场" in text
        for outside in ("fonts.g", "cdn", 'src="http', 'href="http'):
            assert outside not in text
        # Nobody else: not on another of the machine's own addresses either.
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", int(port)), timeout=5)
    with socket.create_server(("127.0.0.1", int(port))):  # it is free again
        pass


@pytest.mark.slow
def test_ctrl_c_ends_a_training_that_is_watched(browser):
    with playground_command.serving("--lang", "en") as (process, address):
        page = browser.new_page()
        page.goto(address)
        page.locator("#steps input[type=number]").fill("5000")
        page.click("#start")
        page.wait_for_selector("#pictures svg")
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=15) == 130
        assert time.monotonic() - begun < 10
        page.close()


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


@pytest.mark.parametrize("host", ["no such host", "192.0.2.1", ""])
def test_an_address_that_is_not_this_machines_is_told(host):
    error, _ = refused("--host", host, "--port", "0")
    assert isinstance(error, ArgumentError)


def test_others_are_warned_of():
    with server.listen("127.0.0.1", 0) as found:
        assert server.is_loopback(found)
    with server.listen("0.0.0.0", 0) as found:
        assert not server.is_loopback(found)
        assert server.address(found).startswith("http://127.0.0.1:")


@pytest.mark.slow
def test_the_warning_comes_before_the_page():
    process = playground_command.start("--no-browser", "--port", "0", "--host", "0.0.0.0")
    with process:
        assert process.stderr.readline() == "Starting.\n"
        assert process.stderr.readline().startswith(
            "Note: 0.0.0.0 is no loopback address. Others on the network can reach the page"
        )
        playground_command.address(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=15) == 130


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
