"""Ports, requests and answers: bytes are counted and faults applied here."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import socketserver
import struct
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from helpers.hub.repositories import PIECE, Content
from helpers.hub.traffic import Record, Refusal

if TYPE_CHECKING:
    from helpers.hub.server import HubServer


class Listener(ThreadingHTTPServer):
    """One port. Quick to start (no look-up of its own name) and to stop (waits for no one)."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: HubServer, handler: type[Handler]) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing to say: what matters was kept in `hub.errors`."""

    def hang_up(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Dropped(ConnectionError):
    """The connection was cut because a test asked for it."""


class Handler(BaseHTTPRequestHandler):
    """Reads requests and writes answers, counting bytes and applying faults."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener
    routes: tuple[tuple[str, str, str], ...] = ()

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Tests read stderr."""

    def serve(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.record = Record(self.command, unquote(self.path), self.headers.get("Range"), token)
        self.body = self.read_body()
        if self.path == "/api/agent-harnesses":
            # The client asks this once per cache, whatever it is about: no part of a test.
            return self.json({"standardEnvVars": [], "harnesses": {}})
        self.hub.log.append(self.record)
        self.query = {k: v[-1] for k, v in parse_qs(urlsplit(self.path).query).items()}
        try:
            call = self.hub.rule("call", self.record)
            if call and self.hub.take(call) and call.callback:
                call.callback()
            fault = self.hub.rule("fail", self.record)
            if fault and self.hub.take(fault):
                raise Refusal(fault.status, fault.message, headers=fault.headers)
            hang = self.hub.rule("hang", self.record)
            if hang and hang.after < 0:
                self.wait()
            odd = self.hub.rule("answer", self.record)
            if odd and self.hub.take(odd):
                return self.reply(odd.status, [odd.body], len(odd.body), dict(odd.headers))
            self.dispatch()
        except Refusal as refusal:
            self.json(refusal.body, refusal.status, refusal.headers)
        except ConnectionError:
            self.close_connection = True
        except Exception as error:
            self.hub.errors.append(error)
            self.json({"error": repr(error)}, 500)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def dispatch(self) -> None:
        path = urlsplit(self.path).path  # still quoted, as revisions hold slashes
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                groups = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                return getattr(self, name)(**groups)
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    # The request's body

    def read_body(self) -> Iterator[bytes]:
        rule = self.hub.cut_rule("request", self.record)
        for size in self.body_sizes():
            while size:
                want = min(size, PIECE)
                if rule and rule.times:
                    want = min(want, rule.after - self.record.received)
                    if want <= 0 and self.hub.take(rule):
                        self.drop(rule.reset)
                piece = self.rfile.read(want)
                if len(piece) < want:
                    raise ConnectionError("the client went away")
                self.record.received += len(piece)
                size -= len(piece)
                yield piece

    def body_sizes(self) -> Iterator[int]:
        """The one size of a body whose length is known, or that of each chunk."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            yield int(self.headers.get("Content-Length") or 0)
            return
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            yield size
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def read_json(self) -> dict[str, Any]:
        return json.loads(b"".join(self.body) or b"{}")

    # The response

    def json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        headers = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        self.reply(status, [body], len(body), headers)

    def reply(
        self, status: int, body: Iterable[bytes], length: int, headers: dict[str, str]
    ) -> None:
        for _ in self.body:  # what is left of the request would be read as the next one
            pass
        self.record.status = status
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            # A header is one line of latin-1.
            plain = " ".join(value.split()).encode("latin-1", "replace").decode("latin-1")
            self.send_header(name, plain)
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(body, length)

    def wait(self) -> None:
        """Say nothing for as long as the client stays."""
        self.connection.settimeout(30)
        with contextlib.suppress(OSError):
            while self.connection.recv(1024):
                pass
        raise Dropped

    def send_body(self, body: Iterable[bytes], length: int) -> None:
        rule = self.hub.cut_rule("response", self.record)
        hang = self.hub.rule("hang", self.record)
        drip = self.hub.rule("drip", self.record)
        for piece in body:
            for byte in piece if drip else b"":
                self.send_piece(bytes([byte]))
                self.wfile.flush()
                time.sleep(drip.pause if drip else 0)
            if drip:
                continue
            if hang and hang.after < self.record.sent + len(piece):
                self.send_piece(piece[: hang.after])
                self.wait()
            room = rule.after - self.record.sent if rule else len(piece)
            if rule and room < len(piece) and self.hub.take(rule):
                self.send_piece(piece[:room])
                self.drop(rule.reset)
            self.send_piece(piece)
        if self.record.sent < length:
            self.close_connection = True  # a file that shrank

    def send_piece(self, piece: bytes) -> None:
        self.record.sent += len(piece)  # before the client can have it and the test can look
        self.wfile.write(piece)

    def drop(self, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # The files made of the socket keep it open, so its descriptor is closed below them.
        socket.close(self.connection.detach())
        raise Dropped

    def send_content(self, content: Content, headers: dict[str, str]) -> None:
        """A file or the range of it that was asked for."""
        size = content.available
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": f'"{content.etag}"',
            **headers,
        }
        asked = re.fullmatch(r"\s*bytes\s*=\s*(\d*)-(\d*)\s*", self.headers.get("Range") or "")
        if not asked or not any(asked.groups()):
            return self.reply(200, content.pieces(0, size), size, headers)
        first, last = asked.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            wrong = {"Content-Range": f"bytes */{size}"}
            raise Refusal(416, "Requested Range Not Satisfiable", headers=wrong)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return self.reply(206, content.pieces(start, stop), stop - start, headers)
