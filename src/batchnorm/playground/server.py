"""Serving the page: on this machine, and until Ctrl-C."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

from batchnorm.errors import ArgumentError

#: Where the search for a free port begins, and how many are tried: Gradio's.
PORT, TRIES = 7860, 100

#: Seconds that an open page has to let go of the server.
GRACE = 1

#: Gradio moves a number beyond its slider's ends to the end, without a word, as soon as another
#: thing is clicked. It is to come here, where it is refused in words.
ON_LOAD = """() => {
    document.documentElement.lang = "LANGUAGE";
    document.addEventListener("blur", event => {
        if (event.target.type === "number") event.stopPropagation();
    }, true);
}"""


def listen(host: str, port: int | None) -> socket.socket:
    """Return a listening socket, on the port, or on the first free one where none is asked for.

    Raises:
        ArgumentError: The host is none of this machine's, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ArgumentError(
            f"--host: expected an address of this machine, got {host!r}: {error.strerror}. "
            "Leave --host away for 127.0.0.1."
        ) from error
    ports = range(PORT, PORT + TRIES) if port is None else (port,)
    for number in ports:
        found = socket.socket(family, socket.SOCK_STREAM)
        # A port that a server has just left is free.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((address[0], number))
            found.listen()
        except OSError as error:
            found.close()
            reason = error.strerror
        else:
            return found
    wanted = f"port {port}" if port is not None else f"a port from {PORT} to {PORT + TRIES - 1}"
    raise ArgumentError(
        f"expected to listen on {wanted} of {host}, got: {reason}. Choose another with --port, or "
        "leave --port away for the first that is free."
    )


def is_loopback(found: socket.socket) -> bool:
    """Whether nobody but this machine can reach it."""
    return ipaddress.ip_address(found.getsockname()[0]).is_loopback


def address(found: socket.socket) -> str:
    """Return what to type into a browser.

    >>> with listen("127.0.0.1", 0) as found:
    ...     address(found)
    'http://127.0.0.1:...'
    """
    host, port = found.getsockname()[:2]
    # Of all addresses, the one that this machine's browser has in any case.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(found: socket.socket, language: str, ready: Callable[[], None]) -> None:
    """Serve the page until the process is interrupted; trainings end with it.

    Args:
        found: where to listen.
        language: of the page at first, "zh" or "en".
        ready: is called when the page can be asked for.

    Raises:
        KeyboardInterrupt: Ctrl-C, after everything has been closed.
    """
    import fastapi
    import gradio as gr
    import torch
    import uvicorn

    from batchnorm.playground.app import CSS, Playground

    # A second thread gains nothing with layers this small, and every tab trains in one of its own.
    torch.set_num_threads(1)
    app = gr.mount_gradio_app(
        fastapi.FastAPI(),
        Playground().page(language),
        path="/",
        theme=gr.themes.Base(font="system-ui", font_mono="monospace"),  # others are fetched
        css_paths=[CSS],
        js=ON_LOAD.replace("LANGUAGE", language),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
    )
    ready()
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=GRACE)
    uvicorn.Server(config).run(sockets=[found])
