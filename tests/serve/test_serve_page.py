"""The page of the service, in a real browser: its requests, its settings and its errors."""

from __future__ import annotations

import functools
import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import (
    BEGUN,
    CHATS,
    CHROMIUM,
    COMPLETIONS,
    TEMPLATE,
    Open,
    answers,
    browser,
    ended,
    in_view,
    posted,
    send,
    slowly,
    visit,
)
from playwright.sync_api import Locator, Page, Route, expect
from serving import counts
from serving import served as served_with

import fastgen
from fastgen.store import hub
from fastgen.store.model_info import CHAT_TEMPLATE

__all__ = ["browser", "visit"]  # fixtures

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

served = functools.partial(served_with, chunk=64)  # without measuring which is best

FIRST = {"top_p": 0.9, "top_k": 50}  # besides a temperature of 0.7: where a model says nothing


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with served(fastgen.load()) as address:
        yield address


def written(page: Page) -> Locator:
    """The texts that the model wrote."""
    return page.locator(".turn.assistant .written")


def knob(page: Page, name: str) -> Locator:
    return page.locator(f"#knob-{name}")


def test_text_streams_and_is_the_services(
    service: str, visit: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = {"max_tokens": 60, "seed": 11, "temperature": 0.8, **FIRST}
    prompt = "The os module <b>&amp;</b>"
    wanted = posted(service, "/v1/completions", prompt=prompt, **knobs)["choices"][0]["text"]
    slowly(monkeypatch)
    page = visit(service)
    page.get_by_label("Longest answer").fill("60")
    page.get_by_label("Repeatable").fill("11")
    page.get_by_label("Randomness").fill("0.8")
    page.get_by_label("Text to continue").fill(prompt)
    page.get_by_role("button", name="Send").click()
    expect(written(page)).to_have_text(BEGUN)
    early = written(page).text_content() or ""
    assert wanted.startswith(early) and len(early) < len(wanted)
    ended(page)
    assert written(page).text_content() == wanted
    body = page.locator(".turn.user .body")
    assert body.text_content() == prompt  # as a text, not as elements
    expect(page.locator(".token")).to_have_count(0)  # nothing is underlined unless one asks for it
    numbers = page.locator(".numbers").text_content() or ""
    found = re.fullmatch(r"60 tokens · ([\d.]+) a second · first after [\d.]+ m?s · (.*)", numbers)
    assert found and 0 < float(found[1]) < 500 and found[2] == "reached the longest answer"
    used = len(posted(service, "/tokenize", prompt=prompt)["tokens"]) + 60
    expect(page.locator("#context-text")).to_have_text(f"{used} of 512 tokens")


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_it_stops_and_so_does_the_service(
    service: str, visit: Open, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    slowly(monkeypatch)
    page = visit(service)
    page.get_by_label("Longest answer").fill("400")
    page.locator("#prompt").fill("The os module")
    page.keyboard.press("Enter")
    expect(written(page)).to_have_text(BEGUN)
    page.keyboard.press("Enter")  # no second request, and no stop
    page.keyboard.press("Escape") if how == "Escape" else page.locator("#go").click()
    expect(page.locator("#status")).to_have_text(re.compile("^Stopped after"))
    ended(page)
    expect(page.locator(".numbers")).to_contain_text("stopped by you")
    expect(page.locator("#go")).to_have_text("Send")
    text = written(page).text_content()
    assert text
    until = time.monotonic() + 10
    while counts(service)["num_requests_running"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert written(page).text_content() == text
    answers(page, COMPLETIONS, {"index": 0, "text": " and so on", "finish_reason": "stop"})
    with page.expect_request(COMPLETIONS) as sent:
        page.get_by_role("button", name="Continue this text").click()
    assert sent.value.post_data_json["prompt"] == "The os module" + text
    expect(written(page).last).to_have_text(" and so on")


def test_what_was_changed_is_sent_and_nothing_else(service: str, visit: Open) -> None:
    page = visit(service)
    model = fastgen.load().model.info.name
    common = page.locator("#common label")
    assert common.first.text_content() == "Longest answer"
    assert page.locator("#common code").first.text_content() == "max_new_tokens"
    assert "torch" not in (page.locator("#settings").text_content() or "")
    page.get_by_text("All other settings").click()
    page.get_by_label("Search the settings").fill("smallest typical")  # words of two knobs
    expect(page.locator("#found")).to_contain_text("0 of")
    expect(page.locator("#others .knob:visible")).to_have_count(0)
    page.get_by_label("Search the settings").fill("n-grams once")
    expect(page.locator("#others .knob:visible code")).to_have_text(["no_repeat_ngram_size"])
    knob(page, "no_repeat_ngram_size").fill("3")
    page.get_by_label("Search the settings").fill("")
    page.get_by_label("Draw at random").select_option("on")
    knob(page, "logit_bias").fill('{"5": -1.5}')
    page.get_by_label("Stop at").fill('["zq", "qz"]')
    page.get_by_label("Only likely words").fill("0.75")
    page.get_by_label("Answers").fill("2")
    expect(page.locator("[name=preset]:checked")).to_have_count(0)  # it is none of them
    with page.expect_request(COMPLETIONS) as sent:
        send(page, "class ")
    assert sent.value.post_data_json == {
        "model": model,
        "prompt": "class ",
        "max_tokens": 128,
        "do_sample": True,
        **FIRST,
        "top_p": 0.75,
        "temperature": 0.7,
        "stop": ["zq", "qz"],
        "n": 2,
        "no_repeat_ngram_size": 3,
        "logit_bias": {"5": -1.5},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    expect(page.locator(".branches")).to_contain_text("1 of 2")
    one = written(page).text_content()
    page.get_by_role("button", name="The next version").click()
    expect(page.locator(".branches")).to_contain_text("2 of 2")
    assert written(page).text_content() != one
    page.reload()
    expect(page.get_by_label("Only likely words")).to_have_value("0.75")  # kept in the browser
    page.get_by_role("button", name="Reset 6 changed").click()
    expect(page.get_by_role("radio", name="Balanced")).to_be_checked()
    with page.expect_request(COMPLETIONS) as sent:
        send(page, "class ")
    assert sent.value.post_data_json == {
        "model": model,
        "prompt": "class ",
        "max_tokens": 128,
        "temperature": 0.7,
        **FIRST,
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
def test_it_begins_with_the_models_own_sampling_and_has_presets(
    visit: Open, own: dict[str, Any], fields: list[str]
) -> None:
    model = fastgen.load()
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    names = ["do_sample", "temperature", "top_p", "top_k", "min_p"]
    with served(model) as address:
        page = visit(address)

        def shown() -> list[str]:
            return [knob(page, name).input_value() for name in names]

        expect(knob(page, "temperature")).to_have_value(fields[1])
        assert shown() == fields
        expect(page.locator("#reset")).to_be_hidden()  # nothing was changed
        with page.expect_request(COMPLETIONS) as sent:
            send(page, "class ")
        body = sent.value.post_data_json
        assert own.items() <= body.items()
        assert [body[name] for name in ("temperature", "top_p", "top_k")] == [
            float(value) for value in fields[1:4]
        ]
        page.get_by_role("radio", name="Precise").check()
        assert shown() == ["", "0.2", "0.9", *fields[3:]]
        page.get_by_role("radio", name="Creative").check()
        assert shown() == ["", "1", "0.95", *fields[3:]]
        page.get_by_label("Randomness").fill("1.5")
        expect(page.locator("[name=preset]:checked")).to_have_count(0)
        page.get_by_role("radio", name="Balanced").check()
        assert shown() == fields


def test_beams_come_at_the_end(service: str, visit: Open) -> None:
    knobs = {"max_tokens": 20, "num_beams": 3}
    wanted = posted(service, "/v1/completions", prompt="The os", **knobs)["choices"][0]["text"]
    page = visit(service)
    page.get_by_label("Longest answer").fill("20")
    page.get_by_text("All other settings").click()
    page.get_by_label("Width of the beam search").fill("3")
    send(page, "The os")
    assert written(page).text_content() == wanted
    expect(page.locator(".numbers")).to_have_text(re.compile(r"^20 tokens · [\d.]+ a second"))


def test_probabilities_are_shown_when_they_are_asked_for(service: str, visit: Open) -> None:
    asked = {"prompt": "The os module", "max_tokens": 12, "do_sample": False, "logprobs": 5}
    whole = posted(service, "/v1/completions", **asked)["choices"][0]["logprobs"]
    page = visit(service)
    page.get_by_label("Longest answer").fill("12")
    page.get_by_text("All other settings").click()
    page.get_by_label("Draw at random").select_option("off")
    page.get_by_label("Show probabilities").check()
    expect(page.locator("#token-note")).to_be_visible()
    send(page, "The os module")
    assert page.locator(".token").count() > 8
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
    page.locator("header").hover()
    expect(card).to_be_hidden()
    text = written(page).text_content()
    page.get_by_label("Show probabilities").uncheck()
    expect(page.locator(".token")).to_have_count(0)
    assert written(page).text_content() == text
    with page.expect_request(COMPLETIONS) as sent:
        send(page, "The os")
    assert "logprobs" not in sent.value.post_data_json


def test_the_keyboard_alone(service: str, visit: Open) -> None:
    page = visit(service)
    expect(knob(page, "seed")).to_be_visible()
    expect(page.locator("#prompt")).to_be_focused()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.locator(":focus").get_attribute("id") == "probabilities":
            break
    page.keyboard.press("Space")
    page.locator("#prompt").focus()
    page.keyboard.type("The os module")
    page.keyboard.press("Enter")
    ended(page)
    expect(page.locator("#prompt")).to_be_focused()
    names = []
    for _ in range(3):  # back through what can be done with the answer
        page.keyboard.press("Shift+Tab")
        names.append(page.locator(":focus").get_attribute("aria-label"))
    assert names == ["Continue this text", "Answer again", "Copy this message"]
    page.keyboard.press("Shift+Tab")  # all tokens at once: they are one stop
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
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="Edit this message")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("The message, to be edited")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Edit this message")).to_be_focused()
    page.locator("body").evaluate("() => document.activeElement.blur()")
    page.locator(".skip").last.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.locator(":focus").get_attribute("name") == "preset"
    page.locator("#more summary").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.locator("#search")).to_be_focused()
    page.locator("#code-open").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#code")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#code")).to_be_hidden()
    expect(page.locator("#code-open")).to_be_focused()


def test_everything_has_a_name(service: str, visit: Open) -> None:
    page = visit(service)
    send(page, "The os module")
    for summary in page.locator("summary:visible").all():
        summary.click()
    page.locator("#code-open").click()
    controls = page.locator("button, input:not([type=file]), textarea, select").evaluate_all(
        """all => all.map((e) => [
            e.labels?.[0]?.textContent.trim() || e.ariaLabel || e.textContent.trim(), e.outerHTML,
        ])"""
    )
    assert len(controls) > 60
    assert [html for name, html in controls if not name] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens(
    service: str, visit: Open, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch)
    page = visit(service, viewport={"width": 320, "height": 480}, color_scheme=scheme)

    def fits() -> bool:
        return bool(page.evaluate("document.documentElement.scrollWidth") <= 320)

    assert fits()
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#transcript")).to_be_hidden()
    page.get_by_text("All other settings").click()
    assert fits() and in_view(page, "#composer")  # a panel leaves the composer where it is
    page.get_by_label("Show probabilities").check()
    page.locator("#prompt").fill("The " + "very" * 60)
    page.keyboard.press("Enter")
    expect(page.locator(".token").nth(4)).to_be_attached()
    expect(page.locator("#go")).to_have_text("Stop")
    assert in_view(page, "#go")
    page.keyboard.press("Escape")
    ended(page)
    expect(page.locator("#transcript")).to_be_visible()  # who sends wants to see the answer
    page.locator(".token").nth(3).click()  # what a finger does in place of pointing
    box = page.locator("#card").bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= 320
    assert fits()
    page.get_by_role("button", name="Chats").click()
    expect(page.get_by_role("button", name="New chat")).to_be_visible()
    assert fits()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Chats")).to_be_focused()
    page.get_by_role("button", name="Show as code").click()
    assert fits()
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (_light(paper) > _light(ink)) == (scheme == "light")


def _light(color: str) -> int:
    return sum(map(int, re.findall(r"\d+", color)[:3]))


@pytest.mark.parametrize("width", [320, 1280])
def test_errors_stand_by_their_field_and_in_view(service: str, visit: Open, width: int) -> None:
    page = visit(service, "status of 400", viewport={"width": width, "height": 500})

    def settings() -> None:
        toggle = page.locator("#settings-toggle")
        if toggle.is_visible() and toggle.get_attribute("aria-expanded") == "false":
            toggle.click()

    settings()
    page.get_by_label("Randomness").fill("-1")
    if width < 1000:
        page.get_by_role("button", name="Settings").click()  # its field is not on the screen now
    page.locator("#prompt").fill("The os module")
    page.keyboard.press("Enter")
    field = knob(page, "temperature")
    expect(field).to_be_focused()
    assert field.get_attribute("aria-invalid") == "true"
    said = page.get_by_role("alert")
    expect(said).to_contain_text("temperature")
    assert in_view(page, "#knob-temperature") and in_view(page, "#knob-temperature-wrong")
    assert "knob-temperature-wrong" in (field.get_attribute("aria-describedby") or "").split()
    expect(page.locator(".turn")).to_have_count(0)  # nothing was said
    expect(page.locator("#prompt")).to_have_value("The os module")
    field.fill("")
    expect(said).to_have_count(0)
    assert field.get_attribute("aria-invalid") is None
    page.get_by_text("All other settings").click()
    knob(page, "logit_bias").fill("{5")
    page.get_by_text("All other settings").click()  # closed: it is opened again
    page.locator("#prompt").focus()
    page.keyboard.press("Enter")
    expect(knob(page, "logit_bias")).to_be_focused()
    expect(said).to_contain_text("This is no JSON")
    assert in_view(page, "#knob-logit_bias-wrong")
    knob(page, "logit_bias").fill("")
    page.get_by_text("Form of the answer").click()
    page.get_by_label("JSON schema").fill("[1]")
    page.locator("#prompt").focus()
    page.keyboard.press("Enter")
    expect(said).to_contain_text("A schema, such as {}")
    page.get_by_label("JSON schema").fill('{"type": "nothing"}')
    page.locator("#prompt").focus()
    page.keyboard.press("Enter")
    expect(said).to_contain_text("json_schema")
    expect(page.get_by_label("JSON schema")).to_be_focused()
    page.get_by_label("JSON schema").fill("")
    page.locator("#prompt").focus()
    page.keyboard.press("Enter")
    ended(page)
    expect(said).to_have_count(0)


def test_an_error_of_no_field_stands_over_the_message(service: str, visit: Open) -> None:
    page = visit(service, "status of 400", viewport={"width": 900, "height": 500})
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("500")
    page.get_by_role("button", name="Settings").click()
    text = "The os module " * 10
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator("#alert")).to_contain_text("the context is 512 tokens")
    assert in_view(page, "#alert")
    expect(page.locator("#prompt")).to_have_value(text)  # it can be changed and sent again


def test_an_error_within_a_stream(service: str, visit: Open) -> None:
    page = visit(service)
    message = "no token can be chosen <img src=x>"
    begun = {"index": 0, "text": "Be", "logprobs": None, "finish_reason": None}
    answers(page, COMPLETIONS, begun, {"error": {"message": message}}, ends=False)
    page.locator("#prompt").fill("The os module")
    page.keyboard.press("Enter")
    expect(page.locator("#alert")).to_have_text(message)
    assert written(page).text_content() == "Be"
    expect(page.locator(".numbers")).to_contain_text("ended by an error")


def test_a_service_that_is_gone(service: str, visit: Open) -> None:
    page = visit(service, "ERR_FAILED")
    page.route(COMPLETIONS, lambda route: route.abort())
    page.locator("#prompt").fill("The os module")
    page.keyboard.press("Enter")
    expect(page.locator("#alert")).to_have_text("The service does not answer. Is it still running?")
    expect(page.locator("#prompt")).to_have_value("The os module")
    expect(page.locator(".turn")).to_have_count(0)


def test_characters_of_several_tokens(service: str, visit: Open) -> None:
    """All text is there once, whatever of it a token has."""
    page = visit(service)

    def chunk(text: str, *tokens: str) -> dict[str, Any]:
        scores = {
            "tokens": list(tokens), "token_logprobs": [-0.5] * len(tokens),
            "top_logprobs": [{token: -0.5} for token in tokens],
        }  # fmt: skip
        return {"index": 0, "text": text, "logprobs": scores, "finish_reason": None}

    answers(
        page,
        COMPLETIONS,
        chunk("Hi", " Hi"),
        chunk("é f", "bytes:\\xc3", "bytes:\\xa9", " foo"),
        chunk("oo"),
        chunk("", "</s>"),
        chunk("\U0001f600!", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "!"),
    )
    page.get_by_label("Show probabilities").check()
    send(page, "H")
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
            const { events } = await import("/page/service.js");
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
        page = visit(address, "status of 401")
        expect(page.locator("#alert")).to_contain_text("API key")
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("mellon")
        page.keyboard.press("Enter")
        expect(page.locator("#alert")).to_contain_text("API key")
        page.locator("#key").fill("sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#key-form")).to_be_hidden()
        expect(page.locator("#prompt")).to_be_focused()
        send(page, "The os module")
        assert written(page).text_content()
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.locator("#code-open").click()
        program = page.locator("#program").text_content() or ""
        assert "$FASTGEN_API_KEY" in program and "sesame" not in program
        page.reload()
        expect(page.locator("#model")).to_contain_text(fastgen.load().model.info.name)
        other = visit(address, "status of 401")  # another tab of another session
        expect(other.locator("#key")).to_be_visible()


def test_no_chat_without_a_template(service: str, visit: Open) -> None:
    page = visit(service)
    expect(page.locator("#kind-note")).to_contain_text("no chat template")
    expect(page.get_by_role("radio", name="Chat")).to_be_disabled()
    expect(page.locator("#key-toggle")).to_be_hidden()  # nobody asks for one
    expect(page.locator("#models")).to_be_hidden()  # there is nothing to choose
    page.get_by_role("button", name="The os module").click()  # an example: sent by oneself
    expect(page.locator("#prompt")).to_have_value("The os module")


def test_ids_of_a_model_without_a_tokenizer(service: str, visit: Open) -> None:
    page = visit(service)
    _as_if(page, has_tokenizer=False)
    expect(page.locator("#prompt-label")).to_contain_text("Token ids")
    page.locator("#prompt").fill("5, six")
    page.keyboard.press("Enter")
    expect(page.locator("#alert")).to_contain_text("Whole numbers were expected")
    answers(page, COMPLETIONS, {"index": 0, "text": "", "token_ids": [7, 8]})
    with page.expect_request(COMPLETIONS) as sent:
        send(page, "5, 6")
    assert sent.value.post_data_json["prompt"] == [5, 6]
    expect(written(page)).to_have_text("7 8 ")
    with page.expect_request(COMPLETIONS) as sent:
        page.get_by_role("button", name="Continue this text").click()
    assert sent.value.post_data_json["prompt"] == [5, 67, 8]


def _as_if(page: Page, **facts: Any) -> None:
    """Let the service say this of its model, and load the page again."""

    def answer(route: Route) -> None:
        found = route.fetch().json()
        found["model"].update(facts)
        route.fulfill(json=found)

    page.route("**/knobs*", answer)
    page.reload()


def test_a_model_is_chosen_among_several(visit: Open, tmp_path: Path) -> None:
    place = tmp_path / "other"
    shutil.copytree(hub.DEMO, place)
    (place / CHAT_TEMPLATE).write_text(TEMPLATE)
    with served({"docs": hub.DEMO, "the/other": place}) as address:
        page = visit(address)
        menu = page.get_by_label("Model", exact=True)
        expect(menu).to_have_value("docs")
        expect(page.locator("#prompt-label")).to_have_text("Text to continue")
        menu.select_option("the/other")
        expect(page.locator("#prompt-label")).to_have_text("Message")  # it has a chat template
        page.get_by_label("Longest answer").fill("12")
        page.reload()
        expect(menu).to_have_value("the/other")
        with page.expect_request(CHATS) as sent:
            send(page, "What is os?")
        assert sent.value.post_data_json["model"] == "the/other"
        expect(page.locator(".turn.assistant h2")).to_have_text("the/other")
        assert counts(address, "the/other")["generation_tokens_total"] == 12
        menu.select_option("docs")
        expect(page.get_by_role("radio", name="Chat")).to_be_disabled()
        page.locator("#prompt").fill("And sys?")
        page.keyboard.press("Enter")
        expect(page.locator("#alert")).to_contain_text("docs has no chat template")
        page.get_by_role("button", name="New chat").click()
        expect(page.locator("#prompt-label")).to_have_text("Text to continue")
