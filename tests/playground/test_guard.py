"""Who may ask the playground's server, and for what."""

import pytest

pytest.importorskip("gradio")

from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from batchnorm.playground.guard import Guard


@pytest.fixture(params=[True, False])
def status(request):
    """What a request is answered; 200 where it is let in."""
    client = TestClient(Guard(PlainTextResponse("in"), loopback=request.param))

    def ask(host, origin=None, path="/gradio_api/queue/join"):
        headers = {"Host": host} if origin is None else {"Host": host, "Origin": origin}
        return client.post(path, headers=headers).status_code

    ask.loopback = request.param
    return ask


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "127.9.9.9", "localhost:9000", "[::1]:7860"])
def test_the_page_itself_may_ask(status, host):
    assert status(host, f"http://{host}") == 200
    assert status(host) == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://127.0.0.1:1", "http://evil.example/127.0.0.1:7860"]
)
def test_another_websites_page_may_not(status, origin):
    assert status("127.0.0.1:7860", origin) == 403
    assert status("127.0.0.1:7860", "null") == 403


@pytest.mark.parametrize(
    "host", ["evil.example:7860", "evil.example", "127.0.0.1.evil.example", "192.0.2.1:7860", "["]
)
def test_a_name_that_may_have_been_turned_to_point_here_is_refused(status, host):
    assert status(host, f"http://{host}") == (403 if status.loopback else 200)


def test_nothing_is_taken_and_nothing_fetched(status):
    for path in ("upload", "upload/", "process_recording", "file=http://a.example/", "file/a"):
        assert status("localhost", path=f"/gradio_api/{path}") == 404
