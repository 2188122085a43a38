"""A web server on the loopback that serves bytes, well or badly."""

import hashlib
import http.server
import pickle
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class FileServer:
    """What a server has and how it behaves; may be changed while it runs.

    Attributes:
        files: by path, which begins with a slash.
        has_ranges: answers requests for a part with that part (206), else with everything (200).
        chunked: sends chunks, without telling the size.
        range_shift: added to where a part begins.
        closes_after: so many bytes of its content are sent of the first response, the second, ...; None: all.
        stalls_after: after so many bytes it waits for `go_on`.
        status: of all responses, instead of 200 or 206.
        requests: (path, Range header or "") of each so far.
    """

    files: dict[str, bytes]
    has_ranges: bool = True
    chunked: bool = False
    range_shift: int = 0
    closes_after: list[int | None] = field(default_factory=list)
    stalls_after: int | None = None
    status: int | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)
    has_stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def url(self, path: str) -> str:
        return self.address + path


@contextmanager
def running(server: FileServer) -> Iterator[FileServer]:
    """The server on a free port, until the end of the block."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _respond(self, server)

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        server.address = f"http://127.0.0.1:{listener.server_address[1]}"
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.go_on.set()
            listener.shutdown()
            thread.join()


def _respond(handler: http.server.BaseHTTPRequestHandler, server: FileServer) -> None:
    number, wanted = len(server.requests), handler.headers.get("Range", "")
    server.requests.append((handler.path, wanted))
    content = server.files.get(handler.path)
    if server.status is not None or content is None:
        handler.send_error(server.status or 404)
        return
    start, total = 0, len(content)
    if wanted and server.has_ranges:
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) + server.range_shift
        if start >= total:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{total}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
    else:
        handler.send_response(200)
    handler.close_connection = True
    body = content[start:]
    if server.chunked:
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        return
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    sent = server.closes_after[number] if number < len(server.closes_after) else None
    if server.stalls_after is not None:
        handler.wfile.write(body[: server.stalls_after])
        server.has_stalled.set()
        server.go_on.wait()
        body = body[server.stalls_after :]
    handler.wfile.write(body[:sent])


def published_pickle(model: nn.Module) -> bytes:
    """A checkpoint as the published ones are: arrays by name, and an author."""
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return pickle.dumps({"model": arrays, "__author__": "the test"}, protocol=2)


def hash_prefix(content: bytes) -> str:
    """The six digits that stand in the names of published files."""
    return hashlib.sha256(content).hexdigest()[:6]
