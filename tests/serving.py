"""The service in a thread of the tests, at a port of its own; the demo model, which it serves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import uvicorn

import fastgen
from fastgen.engine.schedule import Scheduler
from fastgen.serve import app
from fastgen.serve.engine import Engine
from fastgen.serve.server import config
from fastgen.store import hub
from fastgen.store.model_info import CHAT_TEMPLATE


@contextlib.contextmanager
def served(model: fastgen.CausalLM | Mapping[str, Any], **settings: Any) -> Iterator[str]:
    """The address, such as "http://127.0.0.1:43210", of a service of `model`, or of several."""
    made = app(model, **settings)
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    server = uvicorn.Server(config(made))
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[place])), daemon=True
    )
    thread.start()
    try:
        until = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until
            time.sleep(0.01)
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        place.close()


@pytest.fixture(scope="module")
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> fastgen.CausalLM:
    """The demo model (float32), with the chat template of the module's tests: its TEMPLATE."""
    place = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(hub.DEMO, place)
    (place / CHAT_TEMPLATE).write_text(request.module.TEMPLATE)
    return fastgen.load(place)


@pytest.fixture(scope="module")
def address(model: fastgen.CausalLM) -> Iterator[str]:
    """That of a service of `model`, called docs."""
    with served(model, name="docs") as found:
        yield found


# Roles, tools and calls of tools, as Hermes and Qwen write them.
TEMPLATE = """{% if tools %}{{ tools | tojson }}
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>.
{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}
{% for c in m.tool_calls or [] %}{% set f = c.function -%}
<tool_call>{{ f.name }} {{ f.arguments.x }}</tool_call>
{% endfor %}{% endfor %}assistant:"""
WAIT = 30.0  # seconds that something may take on a machine that is busy with other things
COMPLETIONS, CHATS, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"


def asked(
    address: str, path: str, body: Any = None, method: str | None = None, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and content of a plain request; `body` is bytes, or becomes JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        address + path, data, {"Content-Type": "application/json", **headers}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            content, status, found = answer.read(), answer.status, answer.headers
    except urllib.error.HTTPError as error:
        content, status, found = error.read(), error.code, error.headers
    named = {name.lower(): value for name, value in found.items()}
    as_json = named.get("content-type", "").startswith("application/json")
    return status, named, json.loads(content) if as_json else content.decode()


def counts(address: str, model: str | None = None) -> dict[str, float]:
    """The numbers of `/metrics`: of a model of several by its name, else of the only one.

    Names are those after "fastgen:"; `http_requests_total` is as it stands there.
    """
    _, _, text = asked(address, "/metrics")
    out: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        found = re.fullmatch(r'fastgen:(\w+)\{(.*?),?model_name="([^"]*)"\}', name)
        if found and model in (None, found[3]):
            labels = f"{{{found[2]}}}" if found[2] else ""
            assert found[1] + labels not in out, "of which model?"
            out[found[1] + labels] = float(value)
        elif name.startswith("http_requests_total"):
            out[name] = float(value)
    return out


class Watched:
    """The engine's work, step by step; `slow` seconds each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow: float = 0.02) -> None:
        self.begun = 0  # steps
        self.events: list[tuple[int, int]] = []  # the step, and how many tokens it brought
        self.cancelled: list[int] = []  # how many steps had begun
        self.scheduler: Scheduler | None = None
        step, cancel = Scheduler.step, Engine.cancel

        def watched(scheduler: Scheduler) -> Any:
            self.scheduler, self.begun = scheduler, self.begun + 1
            time.sleep(slow)
            out = step(scheduler)
            self.events.append((self.begun, sum(len(events) for _, events in out)))
            return out

        def noted(engine: Engine, stream: Any) -> None:
            if not stream.done:
                self.cancelled.append(self.begun)
            cancel(engine, stream)

        monkeypatch.setattr(Scheduler, "step", watched)
        monkeypatch.setattr(Engine, "cancel", noted)


def until(holds: Any) -> None:
    end = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextlib.contextmanager
def command(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`fastgen serve --port 0` as a process, and the address that it says."""
    words = [sys.executable, "-m", "fastgen", "serve", "--port", "0", *flags]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        timer = threading.Timer(2 * WAIT, process.kill)
        timer.start()
        try:
            said = process.stderr.readline()
            if "no MODEL given" in said:
                said += process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", said)
            assert found, said
            yield process, found[0]
        finally:
            timer.cancel()
            process.kill()
