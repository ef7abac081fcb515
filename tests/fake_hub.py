"""A hub on this machine, with what huggingface_hub asks of it, and somebody who uses it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """A hub that answers `snapshot_download` for folders of `root`: "org/name" is a model.

    Attributes:
        asked: the requests so far, such as "GET /org/name/resolve/<commit>/config.json".
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str) -> str:
        """A commit's name: that of the content's names and sizes."""
        files = sorted((p.name, p.stat().st_size) for p in (self.root / repository).rglob("*"))
        return hashlib.sha1(repr(files).encode()).hexdigest()


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "api":  # api/models/org/name/(revision|tree)/main
            self.api("/".join(parts[2:4]), *parts[4:6])
        else:  # org/name/resolve/commit/file
            self.file("/".join(parts[:2]), "/".join(parts[4:]))

    def api(self, repository: str, what: str, revision: str) -> None:
        place = self.server.root / repository
        if not place.is_dir():
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = self.server.commit(repository)
        if revision not in ("main", commit):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = [p for p in sorted(place.rglob("*")) if p.is_file()]
        names = [p.relative_to(place).as_posix() for p in files]
        found: object = {"id": repository, "sha": commit,
                         "siblings": [{"rfilename": name} for name in names]}  # fmt: skip
        if what == "tree":
            found = [
                {"type": "file", "path": name, "size": p.stat().st_size, "oid": self.etag(p)}
                for name, p in zip(names, files, strict=True)
            ]
        return self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def file(self, repository: str, name: str) -> None:
        path = self.server.root / repository / name
        if not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{self.etag(path)}"', "X-Repo-Commit": self.server.commit(repository),
            "Accept-Ranges": "bytes",
        }  # fmt: skip
        return self.answer(200, path.read_bytes(), headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def etag(self, path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def log_message(self, *_: object) -> None:
        """pytest shows nothing of it; `asked` has it."""


class World:
    """A hub, and a home directory of somebody who uses it."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home

    @cached_property
    def cache(self) -> Path:
        return self.home / "exports"

    def environment(self, **changes: str) -> dict[str, str]:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "FASTGEN_"))}
        return (
            keep
            | {
                "HF_ENDPOINT": self.hub.address,
                "HF_HOME": str(self.home / "hf"),
                "FASTGEN_CACHE": str(self.cache),
                "NO_PROXY": "127.0.0.1",
                "no_proxy": "127.0.0.1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            }
            | changes
        )

    def start(self, program: str, *args: str, **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", program, *args],
            env=self.environment(**changes),
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, program: str, *args: str, **changes: str) -> tuple[int, str, str]:
        process = self.start(program, *args, **changes)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def command(self, *args: str, **changes: str) -> tuple[int, str, str]:
        return self.run("from fastgen.__main__ import main; main()", *args, **changes)


def blocked(*names: str) -> str:
    """The beginning of a program that cannot import these packages."""
    return f"""
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in { {*names}!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Block())
"""


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A hub of the folders of `root`, while it is needed."""
    server = Hub(root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
