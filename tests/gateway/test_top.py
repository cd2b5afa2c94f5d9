"""`tokentape top`: a picture of a gateway, plain words of anything else, never an escape."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner

from tokentape.cli import main

METRICS = """\
# TYPE tokentape_turns_total counter
tokentape_turns_total{finish_reason="stop"} 5.0
# TYPE tokentape_failures_total counter
tokentape_failures_total{kind="[/red]\x1b[2J"} 2.0
# TYPE tokentape_turn_seconds histogram
tokentape_turn_seconds_bucket{le="60.0"} 0.0
tokentape_turn_seconds_bucket{le="+Inf"} 5.0
"""
WORKER = {"url": "http://e", "state": "out", "running": 1, "sessions": 2, "weight_version": "[bold]7[/bold]"}


@contextlib.contextmanager
def answering(metrics: str, workers: object = None) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            body = metrics if self.path == "/metrics" else json.dumps(workers)
            self.send_response(404 if body == "null" else 200)
            self.send_header("content-length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def once(url: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["top", url, "--once"])
    return done.exit_code, done.output


def test_what_engines_say_is_text() -> None:
    worker = {**WORKER, "last_error": "[/] \x1b]0;pwned\x07"}
    with answering(METRICS, {"workers": [worker]}) as url:
        code, said = once(url)
    assert code == 0, said
    assert "[bold]7[/bold]" in " ".join(said.split())
    assert "2 [/red]" in said
    assert "\x1b" not in said
    assert "\x07" not in said


def test_longer_than_any_bucket() -> None:
    with answering(METRICS) as url:
        _, said = once(url)
    assert "more than 60000 ms" in said
    assert "inf" not in said


@pytest.mark.parametrize(
    ("metrics", "workers"),
    [
        ("<html><body>hello</body></html>", None),
        ("", None),
        ('sglang:num_running_reqs{model_name="x"} 3.0\n', None),
        (METRICS, {}),
        (METRICS, []),
        (METRICS, {"workers": [{"url": 1}]}),
    ],
)
def test_what_is_no_gateway(metrics: str, workers: object) -> None:
    with answering(metrics, workers) as url:
        code, said = once(url)
    assert (code, len(said.splitlines())) == (2, 1), said
    assert "not a tokentape gateway" in said


@pytest.mark.parametrize("url", ["foo", "localhost:8000", "http://[::1", "http://h:99999", "ftp://h"])
def test_what_is_no_address(url: str) -> None:
    code, said = once(url)
    assert (code, "must look like http://HOST:PORT" in said) == (2, True)


def test_it_goes_on_watching_until_it_is_told_to_stop() -> None:
    """A gateway that starts again is no end; Ctrl-C is, and no failure."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(answering(METRICS))
        terminal, inner = pty.openpty()
        command = [sys.executable, "-m", "tokentape", "top", url]
        process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner)
        os.close(inner)
        assert b"whole turn" in read_until(terminal, b"whole turn")
        stack.close()
        assert b"no gateway answers" in read_until(terminal, b"no gateway answers")
        process.send_signal(signal.SIGINT)
        rest = read_until(terminal, b"\0")
        assert process.wait(30) == 0, rest
        assert b"Aborted" not in rest
        os.close(terminal)


def read_until(terminal: int, text: bytes) -> bytes:
    out, end = b"", time.monotonic() + 30
    while text not in out and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                out += os.read(terminal, 65536)
            except OSError:  # it has ended
                break
    return out
