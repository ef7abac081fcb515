"""The page of the service, in a real browser, as a person uses it.

Chromium is Debian's (`.ci/browser` installs it). The page's own policy forbids `eval`, which is
what playwright's `wait_for_function` needs: the tests wait with `expect`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from serving import served

import fastgen
from fastgen.engine.schedule import Scheduler

CHROMIUM = shutil.which("chromium")
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

Open = Callable[..., Page]

FIRST = {"top_p": 0.9, "top_k": 50}  # besides a temperature of 0.7: where a model says nothing


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with served(fastgen.load()) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """`visit(address, **context)`: the page, opened.

    At the end of the test: nothing was asked of anything but the service, no script failed, and
    the console is empty but for what `expected` (an argument) allows.
    """
    contexts, requests, complaints = [], [], []

    def go(address: str, expected: str = "$nothing", **settings: Any) -> Page:
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
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
        assert url.startswith((address + "/", "data:")), url


def posted(address: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def written(page: Page) -> Locator:
    return page.locator("#output .written")


def ended(page: Page) -> None:
    """Wait until a run has begun and ended."""
    expect(page.locator("#status")).to_have_text(re.compile("Done|Stopped"))
    expect(page.locator("body.busy")).to_have_count(0)


def slowly(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.03) -> None:
    """A step takes as long as with a larger model."""
    step = Scheduler.step

    def slower(self: Scheduler) -> Any:
        time.sleep(seconds)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", slower)


def test_text_streams_and_is_the_services(
    service: str, visit: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = {"max_tokens": 60, "seed": 11, "temperature": 0.8, **FIRST}
    prompt = "The os module <b>&amp;</b>"
    wanted = posted(service, "/v1/completions", prompt=prompt, **knobs)["choices"][0]["text"]
    slowly(monkeypatch)
    page = visit(service)
    page.get_by_label("max_new_tokens").fill("60")
    page.get_by_label("seed").fill("11")
    page.get_by_label("temperature").fill("0.8")
    page.get_by_label("Prompt", exact=True).nth(1).fill(prompt)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".token").nth(3)).to_be_attached()
    early = written(page).text_content() or ""
    assert wanted.startswith(early) and len(early) < len(wanted)
    ended(page)
    assert written(page).text_content() == wanted
    assert page.locator("#output .echo").text_content() == prompt  # as a text, not as elements
    assert page.locator(".token").count() > 40
    expect(page.locator("#count")).to_contain_text("60 written")
    expect(page.locator("#first")).to_have_text(re.compile(r"^[\d.]+ m?s$"))
    speed = re.match(r"([\d.]+) tokens/s", page.locator("#speed").text_content() or "")
    assert speed and 0 < float(speed[1]) < 500


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_it_stops_and_so_does_the_service(
    service: str, visit: Open, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    slowly(monkeypatch)
    page = visit(service)
    page.get_by_label("max_new_tokens").fill("400")
    page.locator("#prompt").fill("The os module")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".token").nth(2)).to_be_attached()
    page.keyboard.press("Escape") if how == "Escape" else page.locator("#go").click()
    ended(page)
    expect(page.locator("#reason")).to_have_text("you")
    expect(page.locator("#go")).to_have_text("Generate")
    text = written(page).text_content()
    assert text and page.locator(".token").count() < 300
    until = time.monotonic() + 10
    while _running(service):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert written(page).text_content() == text


def _running(service: str) -> float:
    with urllib.request.urlopen(service + "/metrics", timeout=10) as answer:
        found = re.search(r"^fastgen_rows_running (\S+)", answer.read().decode(), re.M)
    assert found
    return float(found[1])


def test_what_was_changed_is_sent_and_nothing_else(service: str, visit: Open) -> None:
    page = visit(service)
    page.locator("#prompt").fill("class ")
    common = page.locator("#common label")
    assert common.first.text_content() == "max_new_tokens"
    assert common.last.text_content() == "stop"
    page.get_by_text("All other knobs").click()
    page.get_by_label("Search the knobs").fill("smallest typical")  # words of two knobs
    expect(page.locator("#found")).to_contain_text("0 of")
    expect(page.locator("#others .knob:visible")).to_have_count(0)
    page.get_by_label("Search the knobs").fill("n-grams once")
    expect(page.locator("#others .knob:visible label")).to_have_text(["no_repeat_ngram_size"])
    page.get_by_label("no_repeat_ngram_size", exact=True).fill("3")
    page.get_by_label("Search the knobs").fill("")
    page.get_by_label("do_sample").select_option("on")
    page.get_by_label("logit_bias").fill('{"5": -1.5}')
    page.get_by_label("stop", exact=True).fill('["zq", "qz"]')
    page.get_by_label("top_p").fill("0.75")
    page.get_by_label("num_return_sequences").fill("2")
    with page.expect_request("**/v1/completions") as sent:
        page.keyboard.press("Control+Enter")
    ended(page)
    assert sent.value.post_data_json == {
        "prompt": "class ",
        "max_tokens": 128,
        "do_sample": True,
        **FIRST,
        "top_p": 0.75,
        "temperature": 0.7,
        "stop": ["zq", "qz"],
        "num_return_sequences": 2,
        "no_repeat_ngram_size": 3,
        "logit_bias": {"5": -1.5},
        "logprobs": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    expect(written(page)).to_have_count(2)
    page.get_by_role("button", name="Reset 6 changed").click()
    page.locator("#prompt").focus()
    with page.expect_request("**/v1/completions") as sent:
        page.keyboard.press("Control+Enter")
    ended(page)
    assert sent.value.post_data_json == {
        "prompt": "class ",
        "max_tokens": 128,
        "temperature": 0.7,
        **FIRST,
        "logprobs": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("own", "fields"),
    [
        ({"temperature": 0.6, "min_p": 0.1}, ["", "0.6", "1", "50", "0.1"]),
        ({"do_sample": False, "top_k": 20}, ["false", "1", "1", "20", ""]),
    ],
)
def test_it_begins_with_the_models_own_sampling(
    visit: Open, own: dict[str, Any], fields: list[str]
) -> None:
    model = fastgen.load()
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    with served(model) as address:
        page = visit(address)
        names = ["do_sample", "temperature", "top_p", "top_k", "min_p"]
        for name, value in zip(names, fields, strict=True):
            expect(page.locator(f"#knob-{name}")).to_have_value(value)
        expect(page.locator("#reset")).to_be_hidden()  # nothing was changed
        page.locator("#prompt").fill("class ")
        with page.expect_request("**/v1/completions") as sent:
            page.keyboard.press("Control+Enter")
        ended(page)
        body = sent.value.post_data_json
        assert own.items() <= body.items()
        assert [body[name] for name in ("temperature", "top_p", "top_k")] == [
            float(value) for value in fields[1:4]
        ]


def test_beams_come_at_the_end(service: str, visit: Open) -> None:
    knobs = {"max_tokens": 20, "num_beams": 3}
    wanted = posted(service, "/v1/completions", prompt="The os", **knobs)["choices"][0]["text"]
    page = visit(service)
    page.get_by_label("max_new_tokens").fill("20")
    page.get_by_label("num_beams").fill("3")
    page.locator("#prompt").fill("The os")
    page.keyboard.press("Control+Enter")
    ended(page)
    assert written(page).text_content() == wanted
    expect(page.locator("#speed")).to_have_text(re.compile(r"^[\d.]+ tokens/s$"))


def test_a_tokens_probability_on_hover(service: str, visit: Open) -> None:
    whole = posted(
        service,
        "/v1/completions",
        prompt="The os module",
        max_tokens=12,
        do_sample=False,
        logprobs=5,
    )["choices"][0]["logprobs"]
    page = visit(service)
    page.get_by_label("max_new_tokens").fill("12")
    page.get_by_label("do_sample").select_option("off")
    page.locator("#prompt").fill("The os module")
    page.keyboard.press("Control+Enter")
    ended(page)
    place = next(i for i, token in enumerate(whole["tokens"]) if re.fullmatch(r" ?\w+", token))
    page.locator(".token").nth(place).hover()
    card = page.locator("#card")
    expect(card).to_be_visible()
    expect(card.locator("tr")).to_have_count(5)
    top = whole["top_logprobs"][place]
    signs = str.maketrans({"\n": "↵", "\t": "⇥"})
    names = [re.sub("^ | $", "␣", name.translate(signs)) for name in top]
    assert card.locator("th").all_text_contents() == names
    chosen = card.locator(".chosen td").last.text_content() or ""
    share = 100 * math.exp(whole["token_logprobs"][place])
    assert abs(float(chosen.removesuffix(" %")) - share) < 0.1
    card.hover()  # the pointer can go over to it
    page.wait_for_timeout(250)
    expect(card).to_be_visible()
    page.locator("h1").hover()
    expect(card).to_be_hidden()


def test_the_keyboard_alone(service: str, visit: Open) -> None:
    page = visit(service)
    expect(page.locator("#knob-seed")).to_be_visible()
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("The os module")
    page.keyboard.press("Control+Enter")
    ended(page)
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#go")).to_be_focused()
    page.keyboard.press("Tab")
    tokens = page.locator(".token")
    expect(tokens.first).to_be_focused()
    card = page.locator("#card")
    expect(card.locator(".chosen")).to_have_count(1)
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    page.keyboard.press("End")
    expect(tokens.last).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(tokens.last).not_to_be_focused()
    page.keyboard.press("Home")
    expect(tokens.first).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(tokens.first).to_be_focused()
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()
    page.keyboard.press("Tab")  # past all tokens at once: they are one stop
    seen = []
    for _ in range(9):
        seen.append(page.locator(":focus").get_attribute("id"))
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # on the other knobs
    page.keyboard.press("Tab")
    expect(page.locator("#search")).to_be_focused()
    assert seen[:4] == ["knob-max_new_tokens", "knob-do_sample", "knob-temperature", "knob-top_p"]
    page.locator("#prompt").focus()
    for _ in range(5):
        page.keyboard.press("Shift+Tab")
        if page.locator(":focus").get_attribute("id") == "key-toggle":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_focused()


def test_everything_has_a_name(service: str, visit: Open) -> None:
    page = visit(service)
    expect(page.locator("#knob-seed")).to_be_visible()
    page.get_by_text("All other knobs").click()
    page.get_by_role("button", name="API key").click()
    for control in page.locator("button:visible, input:visible, textarea:visible").all():
        assert control.evaluate("e => e.labels?.[0]?.textContent.trim() || e.textContent.trim()")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens(service: str, visit: Open, scheme: str) -> None:
    page = visit(service, viewport={"width": 320, "height": 640}, color_scheme=scheme)
    page.locator("#prompt").fill("The " + "very" * 60)
    page.keyboard.press("Control+Enter")
    ended(page)
    page.get_by_text("All other knobs").click()
    page.get_by_role("button", name="API key").click()
    page.locator(".token").nth(5).click()  # what a finger does in place of pointing
    box = page.locator("#card").bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= 320
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (_light(paper) > _light(ink)) == (scheme == "light")


def _light(color: str) -> int:
    return sum(map(int, re.findall(r"\d+", color)[:3]))


def test_errors_are_shown_as_text(service: str, visit: Open) -> None:
    page = visit(service, expected="status of 400")
    alert = page.get_by_role("alert")
    page.locator("#prompt").fill("The os module")
    page.get_by_label("temperature").fill("-1")
    page.keyboard.press("Control+Enter")
    expect(alert).to_contain_text("temperature")
    expect(page.locator("#output > *")).to_have_count(0)
    expect(page.locator("#go")).to_have_text("Generate")
    page.get_by_label("temperature").fill("")
    page.get_by_text("All other knobs").click()
    page.get_by_label("logit_bias").fill("{5")
    page.keyboard.press("Control+Enter")
    expect(alert).to_contain_text("logit_bias: no JSON")
    expect(page.get_by_label("logit_bias")).to_be_focused()
    page.get_by_label("logit_bias").fill("")
    page.keyboard.press("Control+Enter")
    ended(page)
    expect(alert).to_be_hidden()


def test_an_error_within_a_stream(service: str, visit: Open) -> None:
    page = visit(service)
    message = "no token can be chosen <img src=x>"
    lines = [
        {"choices": [{"index": 0, "text": "Be", "logprobs": None, "finish_reason": None}]},
        {"error": {"message": message}},
    ]
    body = "".join(f"data: {json.dumps(line)}\n\n" for line in lines)
    page.route(
        "**/v1/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )
    page.locator("#prompt").fill("The os module")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_have_text(message)
    assert written(page).text_content() == "Be"


def test_characters_of_several_tokens(service: str, visit: Open) -> None:
    """All text is there once, whatever of it a token has."""
    page = visit(service)

    def chunk(text: str, *tokens: str) -> dict[str, Any]:
        scores = {
            "tokens": list(tokens), "token_logprobs": [-0.5] * len(tokens),
            "top_logprobs": [{token: -0.5} for token in tokens],
        }  # fmt: skip
        choice = {"index": 0, "text": text, "logprobs": scores, "finish_reason": None}
        return {"choices": [choice]}

    chunks = [
        chunk("Hi", " Hi"), chunk("é f", "bytes:\\xc3", "bytes:\\xa9", " foo"), chunk("oo"),
        chunk("", "</s>"), chunk("\U0001f600!", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "!"),
    ]  # fmt: skip
    body = "".join(f"data: {json.dumps(one)}\n\n" for one in chunks) + "data: [DONE]\n\n"
    page.route(
        "**/v1/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )
    page.keyboard.press("Control+Enter")
    ended(page)
    assert written(page).text_content() == "Hié foo\U0001f600!"
    assert page.locator(".token").all_text_contents() == ["Hi", "é foo", "\U0001f600", "!"]
    page.locator(".token").nth(1).hover()
    expect(page.locator("#card table")).to_have_count(3)


def test_events_may_be_cut_anywhere(service: str, visit: Open) -> None:
    page = visit(service)
    body = 'data: {"text": "é\U0001f600"}\r\n\r\n: a comment\n\ndata: {"text": "b"}\n\n'
    body += "data: [DONE]\n\n"
    found = page.evaluate(
        """async (bytes) => {
            const cut = new ReadableStream({
                start(stream) {
                    for (const byte of bytes) stream.enqueue(new Uint8Array([byte]));
                    stream.close();
                },
            });
            const all = [];
            for await (const some of events(new Response(cut))) all.push(...some);
            return all;
        }""",
        list(body.encode()),
    )
    assert found == [{"text": "é\U0001f600"}, {"text": "b"}]


def test_the_key_is_asked_for_and_kept_in_the_tab(visit: Open) -> None:
    with served(fastgen.load(), api_key="sesame") as address:
        page = visit(address, expected="status of 401")
        expect(page.get_by_role("alert")).to_contain_text("API key")
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("mellon")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("API key")
        page.locator("#key").fill("sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#key-form")).to_be_hidden()
        expect(page.locator("#prompt")).to_be_focused()
        page.keyboard.type("The os module")
        page.keyboard.press("Control+Enter")
        ended(page)
        assert written(page).text_content()
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.reload()
        expect(page.locator("#model")).to_contain_text(fastgen.load().model.info.name)
        other = visit(address, expected="status of 401")  # another tab of another session
        expect(other.locator("#key")).to_be_visible()


def test_no_chat_without_a_template(service: str, visit: Open) -> None:
    page = visit(service)
    expect(page.locator("#mode-note")).to_contain_text("no chat template")
    expect(page.get_by_role("radio", name="Chat")).to_be_disabled()


def test_a_chat(visit: Open, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(Path(fastgen.__file__).parent / "demo", place)
    (place / "chat_template.jinja").write_text(TEMPLATE)
    with served(fastgen.load(place)) as address:
        page = visit(address)
        page.get_by_role("radio", name="Chat").check()
        page.get_by_label("do_sample").select_option("off")
        page.get_by_label("max_new_tokens").fill("12")
        page.get_by_label("System message").fill("Be brief.")
        messages = [{"role": "system", "content": "Be brief."}]
        for question in ("What is os?", "And sys?"):
            messages.append({"role": "user", "content": question})
            wanted = posted(
                address, "/v1/chat/completions", messages=messages, max_tokens=12, do_sample=False
            )["choices"][0]["message"]["content"]
            page.get_by_label("Message", exact=True).fill(question)
            page.keyboard.press("Control+Enter")
            expect(page.locator(".turn")).to_have_count(len(messages))
            ended(page)
            assert page.locator(".turn .written").last.text_content() == wanted
            messages.append({"role": "assistant", "content": wanted})
            expect(page.locator("#prompt")).to_have_value("")
        page.locator(".turn .token").last.hover()
        expect(page.locator("#card .chosen")).to_have_count(1)
        page.get_by_role("button", name="New chat").click()
        expect(page.locator(".turn")).to_have_count(0)
