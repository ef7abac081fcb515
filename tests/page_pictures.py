"""The pictures of the page in docs/service.md, made by the tests' browser.

    python tests/page_pictures.py MODEL

writes docs/pictures/page-*.png: a chat with a model that has a chat template (those that are there
show SmolLM2-135M-Instruct in int8), in a light and a dark window and on a narrow one, and the
probabilities of a text that the embedded model continues. The answers are drawn with a seed.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from serving import served

import fastgen

OUT = Path(__file__).parents[1] / "docs" / "pictures"
COLORS = 64  # of a picture: enough for a page of few of them
EARLIER = "Explain in two sentences why the sky is blue."
QUESTIONS = [
    "Give me three names for a small boat.",
    "Write a Python function that reverses a string.",
]
SEED = "7"


def opened(browser: Browser, address: str, size: tuple[int, int], scheme: str = "light") -> Page:
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    expect(page.locator("#knob-seed")).to_be_attached()
    return page


def said(page: Page, text: str) -> None:
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(re.compile("^Done"), timeout=120_000)


def taken(page: Page, name: str) -> None:
    """Write what is seen, in few colors."""
    place = OUT / f"{name}.png"
    page.screenshot(path=place)
    Image.open(place).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(
        place, optimize=True
    )
    print(place, place.stat().st_size)


def chat(browser: Browser, address: str) -> None:
    page = opened(browser, address, (1280, 800))
    page.locator("#knob-seed").fill(SEED)
    said(page, EARLIER)
    page.get_by_role("button", name="New chat").click()
    for question in QUESTIONS:
        said(page, question)
    page.mouse.move(0, 0)
    taken(page, "page-light")
    kept = page.evaluate("import('/page/store.js').then(({ exported }) => exported())")
    for scheme, size, name in (
        ("dark", (1280, 800), "page-dark"),
        ("light", (320, 640), "page-narrow"),
    ):
        other = opened(browser, address, size, scheme)
        other.evaluate(
            "text => import('/page/store.js').then(({ imported }) => imported(text))", kept
        )
        other.reload()
        if size[0] < 1000:
            other.get_by_role("button", name="Chats").click()
        other.locator("#chats .open").first.click()
        other.mouse.move(0, 0)
        expect(other.locator(".turn")).to_have_count(2 * len(QUESTIONS))
        taken(other, name)


def probabilities(browser: Browser, address: str) -> None:
    page = opened(browser, address, (720, 600))
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Show probabilities").check()
    page.locator("#knob-seed").fill(SEED)
    page.locator("#knob-max_new_tokens").fill("64")
    page.keyboard.press("Escape")
    said(page, "def open(")
    page.locator(".doubt-3").first.hover()
    expect(page.locator("#card")).to_be_visible()
    taken(page, "page-probabilities")


def main(model: str) -> None:
    OUT.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        with served(fastgen.load(model), name=Path(model).name) as address:
            chat(browser, address)
        with served(fastgen.load()) as address:
            probabilities(browser, address)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
