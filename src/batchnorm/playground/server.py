"""Serving the page: on this machine, and until Ctrl-C."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from batchnorm.errors import ArgumentError

if TYPE_CHECKING:
    import fastapi

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
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host's name"
        raise _elsewhere(host, reason) from error
    ports = range(PORT, PORT + TRIES) if port is None else (port,)
    for number in ports:
        try:
            return socket.create_server((address[0], number), family=family)
        except OSError as error:
            # `create_server` adds the address, which is said already.
            reason = str(error.strerror).partition(" (while")[0]
            if error.errno == errno.EADDRNOTAVAIL:
                raise _elsewhere(host, reason) from error
    wanted = f"port {port}" if port is not None else f"a port from {PORT} to {PORT + TRIES - 1}"
    raise ArgumentError(
        f"expected to listen on {wanted} of {host}, got: {reason}. Choose another with --port, or "
        "leave --port away for the first that is free."
    )


def _elsewhere(host: str, reason: str | None) -> ArgumentError:
    return ArgumentError(
        f"--host: expected an address of this machine, got {host!r}: {reason}. "
        "Leave --host away for 127.0.0.1."
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


def application(language: str, *, loopback: bool) -> fastapi.FastAPI:
    """Return what answers the browser.

    Args:
        language: of the page at first, "zh" or "en".
        loopback: whether it is served to this machine only.
    """
    import fastapi
    import gradio as gr

    from batchnorm.playground.app import CSS, Playground
    from batchnorm.playground.guard import Guard

    app: fastapi.FastAPI = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),  # its documentation is fetched
        Playground().page(language),
        path="/",
        theme=gr.themes.Base(font="system-ui", font_mono="monospace"),  # others are fetched
        css_paths=[CSS],
        js=ON_LOAD.replace("LANGUAGE", language),
        footer_links=[],
        run_history=False,
        max_file_size=0,  # the page takes no files
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
    )
    app.add_middleware(Guard, loopback=loopback)
    return app


def serve(found: socket.socket, language: str, ready: Callable[[], None]) -> None:
    """Serve the page until the process is interrupted; trainings end with it.

    Args:
        found: where to listen.
        language: of the page at first, "zh" or "en".
        ready: is called when the page can be asked for.

    Raises:
        KeyboardInterrupt: Ctrl-C, after everything has been closed.
    """
    import torch
    import uvicorn

    # A second thread gains nothing with layers this small, and every tab trains in one of its own.
    torch.set_num_threads(1)
    app = application(language, loopback=is_loopback(found))
    ready()
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=GRACE)
    uvicorn.Server(config).run(sockets=[found])
