"""Who may ask this server, and for what: its own page, and nothing that the page has no use for."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

#: Where Gradio takes files, and hands them out, other machines' too. The page has none.
FILES = tuple(f"/gradio_api/{name}" for name in ("file", "upload", "process_recording"))


class Guard:
    """Keeps out what a page of another website can send here through its visitor's browser.

    Args:
        app: what answers the rest.
        loopback: whether it is served to this machine only. Then it must be asked for by an address
            of this machine: a name of another site's may have been turned to point here.
    """

    def __init__(self, app: ASGIApp, *, loopback: bool) -> None:
        self.app, self.loopback = app, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        answer: ASGIApp = self.app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if self.loopback and not _is_loopback(host):
                answer = PlainTextResponse("Ask for 127.0.0.1 or localhost.", 403)
            elif origin is not None and origin.partition("://")[2] != host:
                answer = PlainTextResponse("Only this server's own page may ask.", 403)
            elif scope["path"].startswith(FILES):
                answer = PlainTextResponse("There are no files here.", 404)
        await answer(scope, receive, send)


def _is_loopback(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
