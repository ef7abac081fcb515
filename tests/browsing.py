"""The page of the service in a real browser: opened, used and watched.

Chromium is Debian's (`.ci/browser` installs it). The page's own policy forbids `eval`, which is
what playwright's `wait_for_function` needs: the tests wait with `expect`.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from fastgen.engine.schedule import Scheduler

CHROMIUM = shutil.which("chromium")
BEGUN = re.compile(r"\S[\s\S]*\S")  # some of an answer, whatever a model samples on this processor
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
COMPLETIONS, CHATS = "**/v1/completions", "**/v1/chat/completions"

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """`visit(address, **context)`: the page, opened; `beside` is a page to be a second tab of.

    At the end of the test: nothing was asked of anything but the service, no script failed, and
    the console is empty but for what `expected` (an argument) allows.
    """
    contexts, requests, complaints = [], [], []

    def go(
        address: str, expected: str = "$nothing", beside: Page | None = None, **settings: Any
    ) -> Page:
        if beside is None:
            contexts.append(browser.new_context(**settings))
        page = (beside.context if beside else contexts[-1]).new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append((address, request.url)))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda said: re.search(expected, said.text) or complaints.append(said.text),
        )
        page.goto(address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert not complaints
    assert requests
    for address, url in requests:
        assert url.startswith((address + "/", "data:", f"blob:{address}/")), url


def posted(address: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def send(page: Page, text: str) -> None:
    """Write a message, press Enter, and wait until its run has begun and ended."""
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")
    ended(page)


def ended(page: Page) -> None:
    """Wait until a run has begun and ended."""
    expect(page.locator("#status")).to_have_text(re.compile("Done|Stopped"))
    expect(page.locator("body.busy")).to_have_count(0)


def slowly(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.03) -> None:
    """Let a step take as long as with a larger model."""
    step = Scheduler.step

    def slower(self: Scheduler) -> Any:
        time.sleep(seconds)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", slower)


def delta(**said: Any) -> dict[str, Any]:
    """A choice of a chunk of a chat that says something."""
    return {"index": 0, "delta": said, "logprobs": None, "finish_reason": None}


def end(reason: str = "stop") -> dict[str, Any]:
    return {"index": 0, "delta": {}, "logprobs": None, "finish_reason": reason}


def answers(page: Page, path: str, *choices: Any, ends: bool = True) -> None:
    """Let the service answer with these choices, a chunk each; a dict with "error" is an error."""
    lines = [one if "error" in one else {"choices": [one]} for one in choices]
    body = "".join(f"data: {json.dumps(line)}\n\n" for line in lines)
    body += "data: [DONE]\n\n" if ends else ""

    def answer(route: Route) -> None:
        route.fulfill(body=body, content_type="text/event-stream")

    page.unroute(path)
    page.route(path, answer)


def in_view(page: Page, selector: str) -> bool:
    """True where the whole of an element is on the screen."""
    box = page.locator(selector).bounding_box()
    size = page.viewport_size
    assert size
    return (
        box is not None
        and box["x"] >= 0
        and box["y"] >= 0
        and box["x"] + box["width"] <= size["width"]
        and box["y"] + box["height"] <= size["height"]
    )
