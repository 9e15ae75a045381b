"""A real S3 server on loopback (rclone's) behind a proxy that delays, fails, cuts and counts requests.

with ObjectStore(folder) as store:                   # folder/BUCKET/KEY are the objects
    for name, value in store.environment.items(): monkeypatch.setenv(name, value)
    store.latency_s = 0.05
    store.fail("cut", times=2, path="shards/")       # the next two answers to GETs of such paths break off half-way
    stat(Url("s3://bucket/index.json")); store.requests
"""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from stdit.config import Url
from stdit.data import objects

KEY, SECRET = "KEYOFTHETESTS", "a-secret-that-must-not-be-printed"
# cut: the connection is closed half-way; truncate: half a body that says it is whole; silent: no answer.
Kind = Literal["cut", "truncate", "silent", "400", "403", "404", "429", "500", "503"]


@dataclass
class Fault:
    kind: Kind
    times: int
    method: str
    path: str


class ObjectStore:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.latency_s = 0.0
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.server_port = free.getsockname()[1]
        rclone = Path(sys.executable).with_name("rclone")
        # Files that a test changes below the folder are seen at once.
        options = ["--dir-cache-time", "1ms", "--vfs-cache-mode", "off", "--auth-key", f"{KEY},{SECRET}"]
        self._server = subprocess.Popen(
            [
                rclone,
                "--config",
                "/dev/null",
                "serve",
                "s3",
                "--addr",
                f"127.0.0.1:{self.server_port}",
                *options,
                folder,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        until = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.server_port), 1).close()
                break
            except OSError:
                assert time.monotonic() < until, "the S3 server does not answer"
                assert self._server.poll() is None, "the S3 server has ended"
                time.sleep(0.05)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._proxy.server_address[1]}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # rclone's server knows no streamed checksums.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }

    def fail(self, kind: Kind, times: int = 1, method: str = "GET", path: str = "") -> None:
        """The next `times` requests of this method, whose path has `path` in it, fail."""
        self._faults.append(Fault(kind, times, method, path))

    def heal(self) -> None:
        """No faults, no latency; requests are counted anew."""
        self.latency_s = 0.0
        self._faults.clear()
        self.requests.clear()

    def fetches(self, path: str = "") -> list[str]:
        """Paths of the GETs from an object's start."""
        return [
            at
            for method, at, range_ in self.requests
            if method == "GET" and path in at and re.match(r"bytes=0-|$", range_) and "?" not in at
        ]

    def fault(self, method: str, path: str, range_: str) -> Kind | None:
        with self._lock:
            self.requests.append((method, path, range_))
            for fault in self._faults:
                if fault.times and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault.kind
        return None

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._server.terminate()
        self._server.wait(20)

    def __enter__(self) -> ObjectStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def write(url: Url, content: bytes | str) -> None:
    """Writes a small object through the client that the package reads with."""
    with objects._store(url.scheme).open_output_stream(url.key) as target:  # pyright: ignore[reportPrivateUsage]
        target.write(content.encode() if isinstance(content, str) else content)


def _handler(store: ObjectStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = store.fault(self.command, self.path, self.headers.get("Range", ""))
            time.sleep(store.latency_s)
            if kind == "silent":
                time.sleep(60)
            if kind and kind.isdigit():
                self.send_response(int(kind))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            upstream = http.client.HTTPConnection("127.0.0.1", store.server_port, timeout=60)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            content = answer.read()
            half = content[: len(content) // 2]
            length = answer.headers.get("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(half)) if kind == "truncate" else length or "0")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(half if kind in ("cut", "truncate") else content)
            if kind == "cut":
                self.close_connection = True
            upstream.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
