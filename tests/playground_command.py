"""`batchnorm playground` in a process of its own, which tells of whatever leaves the machine."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

CODE = """
import sys

def tell(event, arguments):
    if event == "socket.connect":
        to = arguments[1]
    elif event == "socket.getaddrinfo":
        to = arguments
    else:
        return
    host = to[0] if isinstance(to, tuple) else to
    if isinstance(host, bytes):
        host = host.decode()
    if host not in ("127.0.0.1", "localhost", "0.0.0.0", "::1", None):
        print("OUTSIDE", event, to, file=sys.stderr, flush=True)

sys.addaudithook(tell)
sys.argv[0] = "batchnorm"
from batchnorm.cli import main
main()
"""

#: Seconds for the imports, on a busy machine.
PATIENCE = 60


def start(*arguments, code=CODE, **environment):
    """Start the command, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", code, "playground", *arguments],
        env={**os.environ, "COLUMNS": "80", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finish(process, timeout=PATIENCE):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def address(process):
    """What it prints when it is ready."""
    timer = threading.Timer(PATIENCE, process.kill)  # which ends the reading
    timer.start()
    line = process.stdout.readline()
    timer.cancel()
    if not line:
        raise AssertionError(finish(process))
    return line.split()[0]


#: Tells of tabs whose runs are still kept at the end.
KEEPING = (
    """
import atexit, gc

def tell_kept():
    for one in gc.get_objects():
        if type(one).__name__ == "Playground" and one.runs:
            print("KEPT", one.runs.keys(), file=sys.stderr)

atexit.register(tell_kept)
"""
    + CODE
)


@contextmanager
def serving(*arguments, code=CODE, said="Starting.\n", **environment):
    """The process and its address; it ends with Ctrl-C, cleanly and soon."""
    if "BROWSER" not in environment:
        arguments = ("--no-browser", *arguments)
    process = start("--port", "0", *arguments, code=code, **environment)
    with process:  # closes its pipes
        try:
            yield process, address(process)
            process.send_signal(signal.SIGINT)
            assert finish(process, timeout=15) == (130, "", said)
        finally:
            process.kill()
