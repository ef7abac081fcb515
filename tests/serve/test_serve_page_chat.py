"""The page of the service, in a real browser: chats, as people have them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import (
    BEGUN,
    CHATS,
    CHROMIUM,
    TEMPLATE,
    Open,
    answers,
    browser,
    delta,
    end,
    ended,
    in_view,
    posted,
    send,
    slowly,
    visit,
)
from playwright.sync_api import Page, Route, expect
from serving import model, served

import fastgen

__all__ = ["TEMPLATE", "browser", "model", "visit"]  # fixtures, and what they read

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

AXE = Path(os.environ.get("FASTGEN_REAL_MODELS", "~/.cache/fastgen-tests")).expanduser() / (
    "axe-core/axe.min.js"
)


@pytest.fixture(scope="module")
def address(model: fastgen.CausalLM) -> Iterator[str]:
    with served(model, chunk=64) as found:  # without measuring which is best
        yield found


GREEDY = {"max_tokens": 12, "temperature": 0}


def greedy(page: Page, length: int = 12) -> None:
    """Let answers be short, and the same each time."""
    page.get_by_label("Longest answer").fill(str(length))
    page.get_by_label("Randomness").fill("0")


def said(page: Page) -> list[str]:
    """The texts of the turns on the screen."""
    return [text.strip() for text in page.locator(".turn .body").all_text_contents()]


def test_a_chat_is_the_services(address: str, visit: Open) -> None:
    page = visit(address)
    greedy(page)
    page.get_by_label("Instructions").fill("Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for question in ("What is os?", "And sys?"):
        messages.append({"role": "user", "content": question})
        answer = posted(address, "/v1/chat/completions", messages=messages, **GREEDY)
        messages.append(answer["choices"][0]["message"])
        with page.expect_request(CHATS) as sent:
            send(page, question)
        wanted = [{name: one[name] for name in ("role", "content")} for one in messages[:-1]]
        assert sent.value.post_data_json["messages"] == wanted
        expect(page.locator("#prompt")).to_have_value("")
        expect(page.locator(".turn")).to_have_count(len(messages) - 1)
        copied = _copied(page, page.locator(".turn.assistant .foot .copy").last)
        assert copied == answer["choices"][0]["message"]["content"]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_label("Instructions")).to_have_value("Be brief.")


def _copied(page: Page, button: Any) -> str:
    """The text that a button puts on the clipboard."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button.click()
    expect(button).to_have_text("Copied")
    return str(page.evaluate("navigator.clipboard.readText()"))


def test_enter_sends_and_shift_enter_is_a_line(address: str, visit: Open) -> None:
    page = visit(address)
    answers(page, CHATS, delta(content="Yes."), end())
    field = page.locator("#prompt")
    field.press_sequentially("one")
    before = (field.bounding_box() or {})["height"]
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(field).to_have_value("one\ntwo")
    assert (field.bounding_box() or {})["height"] > before  # it grows with its text
    composing = """(field) => field.dispatchEvent(new KeyboardEvent("keydown",
        {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))"""
    assert field.evaluate(composing)  # an input method has it: nobody prevented that
    expect(page.locator(".turn")).to_have_count(0)
    with page.expect_request(CHATS) as sent:
        page.keyboard.press("Enter")
    assert sent.value.post_data_json["messages"][-1]["content"] == "one\ntwo"
    ended(page)
    expect(field).to_have_value("")
    field.fill("  \n ")
    page.keyboard.press("Enter")  # nothing is said
    expect(page.locator(".turn")).to_have_count(2)
    field.fill("three")
    with page.expect_request(CHATS):
        page.keyboard.press("Control+Enter")


@pytest.mark.parametrize("size", [(1280, 500), (320, 480), (640, 256)])
def test_stop_and_the_message_stay_on_the_screen(
    address: str, visit: Open, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """Also on a phone that lies on its side, or at 400 %."""
    page = visit(address, viewport={"width": size[0], "height": size[1]})
    answers(page, CHATS, delta(content="A line.\n\n" * 12), end())
    for _ in range(3):
        send(page, "Go on.")
        assert in_view(page, "#composer") and in_view(page, "#go")
        assert _below(page) < 2  # the end of the answer is what is seen
    page.unroute(CHATS)
    slowly(monkeypatch)
    page.locator("#prompt").fill("Go on.")
    page.keyboard.press("Enter")
    expect(page.locator("#go")).to_have_text("Stop")
    expect(page.locator(".turn.running .prose")).to_have_text(BEGUN)
    assert in_view(page, "#go") and _below(page) < 2
    page.mouse.wheel(0, -200)  # a person reads what was said before
    expect(page.locator("#latest")).to_be_visible()
    length = len(page.locator(".turn").last.text_content() or "")
    while len(page.locator(".turn").last.text_content() or "") < length + 40:
        page.wait_for_timeout(20)
    assert _below(page) > 100  # and is not torn away from it
    assert in_view(page, "#go")
    page.locator("#latest").click()
    assert _below(page) < 2
    expect(page.locator("#latest")).to_be_hidden()
    page.locator("#go").click()
    ended(page)


def _below(page: Page) -> float:
    """Pixels of the page below the window."""
    return float(
        page.evaluate(
            "document.documentElement.scrollHeight - innerHeight - scrollY"  # no scroll bars
        )
    )


def test_a_reload_keeps_the_chat(
    address: str, visit: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit(address)
    greedy(page)
    page.get_by_label("Instructions").fill("Be brief.")
    send(page, "What is os?")
    before = said(page)
    page.locator("#prompt").fill("a draft")
    page.reload()
    expect(page.locator(".turn")).to_have_count(2)
    assert said(page) == before
    expect(page.locator("#prompt")).to_have_value("a draft")
    expect(page.get_by_label("Instructions")).to_have_value("Be brief.")
    expect(page.get_by_label("Longest answer")).to_have_value("12")
    expect(page.locator("#context")).to_be_visible()
    page.get_by_label("Longest answer").fill("300")
    slowly(monkeypatch)
    page.locator("#prompt").fill("And sys?")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.running .prose")).to_have_text(BEGUN)
    page.reload()  # in the middle of an answer: what was asked is not lost
    expect(page.locator(".turn.user .body")).to_have_text(["What is os?", "And sys?"])
    expect(page.locator(".numbers").last).to_have_text("interrupted")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_role("button", name="What is os?", exact=True).click()
    expect(page.locator(".turn")).to_have_count(4)


def test_another_answer_and_an_edited_message_are_branches(address: str, visit: Open) -> None:
    page = visit(address)

    def answered(text: str) -> None:
        answers(page, CHATS, delta(content=text), end())

    answered("One.")
    send(page, "First")
    send(page, "Second")
    answered("Two.")
    with page.expect_request(CHATS) as sent:
        page.get_by_role("button", name="Answer again").last.click()
    asked = [one["content"] for one in sent.value.post_data_json["messages"]]
    assert asked == ["First", "One.", "Second"]
    expect(page.locator(".turn .body").last).to_have_text("Two.")
    assert said(page) == ["First", "One.", "Second", "Two."]
    answered("Three.")
    page.get_by_role("button", name="Edit this message").first.click()
    page.get_by_label("The message, to be edited").fill("Other")
    with page.expect_request(CHATS) as sent:
        page.locator(".edit").get_by_role("button", name="Send").click()
    assert [one["content"] for one in sent.value.post_data_json["messages"]] == ["Other"]
    ended(page)
    assert said(page) == ["Other", "Three."]
    expect(page.locator(".branches")).to_contain_text(["2 of 2"])
    page.get_by_role("button", name="The version before").click()
    assert said(page) == ["First", "One.", "Second", "Two."]
    page.get_by_role("button", name="The version before").last.click()
    assert said(page) == ["First", "One.", "Second", "One."]
    page.reload()
    expect(page.locator(".turn")).to_have_count(4)
    assert said(page) == ["First", "One.", "Second", "One."]
    answered("Four.")
    with page.expect_request(CHATS) as sent:
        send(page, "Third")  # the branch that is shown goes on
    asked = [one["content"] for one in sent.value.post_data_json["messages"]]
    assert asked == ["First", "One.", "Second", "One.", "Third"]


def test_what_a_person_does_meanwhile_stays(
    address: str, visit: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The focus, what is unfolded and what is being edited, while an answer comes and ends."""
    page = visit(address, "status of 400")
    answers(page, CHATS, delta(reasoning_content="Hm."), delta(content="Yes."), end())
    send(page, "First")
    page.locator(".reasoning summary").click()
    page.unroute(CHATS)
    slowly(monkeypatch)
    page.get_by_label("Longest answer").fill("50")
    page.locator("#prompt").fill("Second")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.running .prose")).to_have_text(BEGUN)
    page.locator("#chat-list .delete").focus()
    ended(page)
    expect(page.locator("#chat-list .delete")).to_be_focused()
    expect(page.locator(".thought")).to_be_visible()
    page.get_by_label("Randomness").fill("-1")
    page.get_by_role("button", name="Edit this message").last.click()
    page.get_by_label("The message, to be edited").fill("Third")
    page.keyboard.press("Enter")  # as in the message below
    expect(page.get_by_role("alert")).to_contain_text("temperature")
    expect(page.get_by_label("The message, to be edited")).to_have_value("Third")
    expect(page.locator(".thought")).to_be_visible()


def test_an_answer_goes_on_while_another_chat_is_read(
    address: str, visit: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit(address)
    greedy(page, 60)
    send(page, "First")
    page.get_by_role("button", name="New chat").click()
    slowly(monkeypatch)
    page.locator("#prompt").fill("Second")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.running .prose")).to_have_text(BEGUN)
    page.get_by_role("button", name="First", exact=True).click()
    expect(page.locator(".turn.user")).to_have_text(re.compile("First"))
    expect(page.locator("#go")).to_have_text("Stop")
    page.get_by_role("button", name="Second", exact=True).click()
    expect(page.locator(".turn.running .prose")).to_have_text(BEGUN)
    ended(page)
    expect(page.locator(".numbers")).to_contain_text("60 tokens")
    page.locator("#prompt").fill("Third")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.running .prose")).to_have_text(BEGUN)
    page.get_by_role("button", name="Delete “Second”").click()
    ended(page)
    page.wait_for_timeout(200)  # it is not kept again by what was being written to it
    expect(page.locator("#chat-list .open")).to_have_text(["First"])
    expect(page.locator(".turn")).to_have_count(0)


def test_chats_go_out_and_come_in(address: str, visit: Open, tmp_path: Path) -> None:
    page = visit(address)
    answers(page, CHATS, delta(reasoning_content="Hm."), delta(content="**Yes**"), end())
    for text in ("The first", "The second"):
        page.get_by_role("button", name="New chat").click()
        send(page, text)
    names = page.locator("#chat-list .open")
    expect(names).to_have_text(["The second", "The first"])
    page.get_by_role("button", name="Answer again").click()
    ended(page)
    page.get_by_role("button", name="The version before").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    assert re.fullmatch(r"fastgen-chats-\d{4}-\d\d-\d\d\.json", download.value.suggested_filename)
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    assert [one["title"] for one in json.loads(file.read_text())["conversations"]].sort() == [
        "The first",
        "The second",
    ].sort()
    page.get_by_role("button", name="Delete “The first”").click()
    expect(names).to_have_text(["The second"])
    page.get_by_role("button", name="Undo").click()
    expect(names).to_have_text(["The second", "The first"])
    page.get_by_role("button", name="Delete all").click()
    expect(names).to_have_count(0)
    expect(page.locator(".turn")).to_have_count(0)

    other = visit(address)  # another browser
    other.locator("#file").set_input_files(file)
    names = other.locator("#chat-list .open")
    expect(names).to_have_text(["The second", "The first"])
    names.first.click()
    expect(other.locator(".branches")).to_contain_text(["1 of 2"])
    expect(other.locator(".turn.assistant strong")).to_have_text("Yes")
    expect(other.locator(".reasoning")).to_have_count(1)
    with other.expect_download() as download:
        other.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(file.read_text())
    other.locator("#file").set_input_files(file)  # once more: nothing is there twice
    expect(other.locator("#chats-said")).to_have_text("2 imported.")
    expect(names).to_have_count(2)


def _changed(text: str, *path: Any, value: Any) -> str:
    """JSON with another value at a place; of a conversation's messages, "first" is the first."""
    made = json.loads(text)
    place = made
    for step in path[:-1]:
        place = place[step] if step != "first" else next(iter(place.values()))
    place[path[-1]] = value
    return json.dumps(made)


def test_a_file_that_is_not_right_changes_nothing(
    address: str, visit: Open, tmp_path: Path
) -> None:
    first, second = "0" * 24, "1" * 24
    nodes = {
        first: {"id": first, "parent": None, "role": "user", "content": "Hi", "made": 1},
        second: {"id": second, "parent": first, "role": "assistant", "content": "", "made": 2},
    }
    conversation = {
        "id": "a" * 24, "title": "Hi", "kind": "chat", "system": "", "created": 1, "changed": 2,
        "at": second, "nodes": nodes,
    }  # fmt: skip
    right = json.dumps({"fastgen": 1, "conversations": [conversation]})
    page = visit(address)
    file = tmp_path / "chats.json"
    inside = ("conversations", 0)
    for text, complaint in (
        ("{", "it is no JSON"),
        ("[]", "no file of conversations"),
        ('{"fastgen": 2, "conversations": []}', "no file of conversations"),
        (_changed(right, *inside, "nodes", value=None), "conversation 1: it has no messages"),
        (_changed(right, *inside, "nodes", "first", "content", value=5), "content is no text"),
        (_changed(right, *inside, "nodes", "first", "role", value="system"), "a role is unknown"),
        (_changed(right, *inside, "nodes", "first", "id", value="<img>"), "no id"),
        (_changed(right, *inside, "nodes", "first", "parent", value=second), "its parent"),
        (_changed(right, *inside, "at", value="2" * 24), "its last message is not there"),
        (_changed(right, *inside, "kind", value="other"), "its kind is unknown"),
    ):
        file.write_text(text)
        page.locator("#file").set_input_files(file)
        expect(page.locator("#chats-said")).to_contain_text(complaint)
        expect(page.locator("#chat-list li")).to_have_count(0)
    file.write_text(right)
    page.locator("#file").set_input_files(file)
    expect(page.locator("#chat-list li")).to_have_count(1)


def test_the_newest_chats_are_kept(address: str, visit: Open) -> None:
    page = visit(address)
    left = page.evaluate(
        """async () => {
            const { keep, list } = await import("/page/store.js");
            const { blank, grow } = await import("/page/conversation.js");
            for (let i = 0; i < 105; i += 1) {
                const one = { ...blank("chat"), title: String(i) };
                one.changed = i;
                await keep(one);
            }
            const large = blank("chat");
            grow(large, null, "user", "a".repeat(19.9e6));
            await keep(large);
            const refused = await keep(grow(large, null, "user", "b".repeat(1e6)) && large)
                .catch((error) => error.message);
            return [(await list()).map((row) => row.title.slice(0, 5)), refused];
        }"""
    )
    titles = ["aaaaa", *[str(i) for i in range(104, 5, -1)]]
    assert left == [titles, "the conversation is too large to be kept"]


def test_a_browser_that_keeps_nothing(address: str, visit: Open) -> None:
    page = visit(address)
    page.add_init_script(
        """for (const name of ["indexedDB", "localStorage", "sessionStorage"]) {
            Object.defineProperty(window, name, {get() { throw new DOMException("denied"); }});
        }"""
    )
    page.reload()
    expect(page.locator("#chats-note")).to_contain_text("This browser keeps nothing")
    expect(page.get_by_role("button", name="Export")).to_be_disabled()
    answers(page, CHATS, delta(content="Yes."), end())
    page.get_by_label("Randomness").fill("0.5")
    send(page, "First")
    send(page, "Second")
    assert said(page) == ["First", "Yes.", "Second", "Yes."]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_two_tabs_lose_nothing(address: str, visit: Open) -> None:
    page = visit(address)
    answers(page, CHATS, delta(content="Yes."), end())
    send(page, "Here")
    other = visit(address, beside=page)
    other.get_by_role("button", name="Here", exact=True).click()
    answers(other, CHATS, delta(content="No."), end())
    send(other, "There")
    expect(page.locator(".turn .body")).to_have_text(["Here", "Yes.", "There", "No."])
    send(page, "And here")
    expect(other.locator(".turn .body").last).to_have_text("Yes.")
    assert said(other) == said(page) == ["Here", "Yes.", "There", "No.", "And here", "Yes."]


ATTACKS = """
<script>window.hit = 1</script>

<img src=x onerror="window.hit = 2">

<svg onload="window.hit = 3"><a xlink:href="javascript:window.hit=4">x</a></svg>

<iframe srcdoc="<script>parent.hit = 5</script>"></iframe>

[one](javascript:window.hit=6) [two](JaVaScRiPt&#58;window.hit=7)
[three](data:text/html,<script>window.hit=8</script>) [four](vbscript:x) [five](/v1/models)
[six](https://example.com "a title\\" onclick=\\"window.hit=9")

![picture](https://example.com/x.png) ![p](javascript:window.hit=10)

<math><mtext><table><mglyph><style><img src=x onerror="window.hit=11">

`<b onclick=x>` <a href="javascript:window.hit=12" id=go name=prompt>raw</a>

<form action=/v1/models><input name=innerHTML></form> <style>body { display: none }</style>

```js" onmouseover="window.hit=13
</code></pre><script>window.hit=14</script>
```

[ref]: javascript:window.hit=15 "x"
[ref] [x]: <javascript:window.hit=16> <https://example.com/ok> <javascript:window.hit=17>

| a | b |
|---|---|
| <img src=x onerror=window.hit=18> | [c](<java\tscript:window.hit=19>) |
"""


def test_markdown_is_safe(address: str, visit: Open) -> None:
    """A model says what strangers' texts make it say: none of it is ever run or fetched."""
    page = visit(address, "TrustedHTML")
    answers(page, CHATS, *[delta(content=part) for part in re.split("(?<=\n\n)", ATTACKS)], end())
    send(page, "Attack")
    turn = page.locator(".turn.assistant")
    kinds = turn.locator(".prose *").evaluate_all("all => [...new Set(all.map(e => e.localName))]")
    assert set(kinds) <= {
        "a", "br", "button", "code", "div", "em", "p", "pre", "span", "strong", "table", "tbody",
        "td", "th", "thead", "tr", "ul", "ol", "li",
    }  # fmt: skip
    given = "all => all.flatMap(e => [...e.attributes].map(a => [a.name, a.value]))"
    for name, value in turn.locator(".prose *").evaluate_all(given):
        assert name in {
            "aria-label", "class", "href", "rel", "role", "tabindex", "target", "title", "type",
        }  # fmt: skip
        if name == "href":
            assert value.startswith("https://example.com")
    for link in turn.locator(".prose a").all():
        assert link.get_attribute("rel") == "noopener noreferrer nofollow"
        assert link.get_attribute("target") == "_blank"
    expect(turn.locator(".prose")).to_contain_text("<script>window.hit = 1</script>")  # as a text
    for element in turn.locator(".prose *").all():
        element.dispatch_event("click")
        element.dispatch_event("mouseover")
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.body.checkVisibility()")
    page.reload()  # what is kept is cleaned again
    expect(turn.locator(".prose")).to_contain_text("<script>window.hit = 1</script>")
    assert page.evaluate("window.hit") is None
    forbidden = """() => {
        try {
            document.body.insertAdjacentHTML("beforeend", "<b>x</b>");
        } catch (error) {
            return error.name;
        }
    }"""
    assert page.evaluate(forbidden) == "TypeError"  # and no script of the page could


def test_markdown_reads_well(address: str, visit: Open) -> None:
    page = visit(address)
    code = 'def f(x):\n    return x  # "quoted" & <so>'
    parts = [
        "Some **bold** text,\nin two lines.\n\n```py", "thon\n", code, "\n```\n\n1. one\n2. tw",
        "o\n\n| a | b |\n|---|---|\n| 1 | `2` |\n\n# Head\n\nSee [it](https://example.com).",
    ]  # fmt: skip
    answers(page, CHATS, *[delta(content=part) for part in parts], end())
    send(page, "Write")
    prose = page.locator(".turn.assistant .prose")
    expect(prose.locator("p").first).to_have_text("Some bold text,in two lines.")
    expect(prose.locator("p").first.locator("br")).to_have_count(1)
    expect(prose.locator("ol > li")).to_have_text(["one", "two"])
    expect(prose.locator("td")).to_have_text(["1", "2"])
    expect(prose.locator(".language")).to_have_text("python")
    expect(prose.get_by_role("heading", name="Head")).to_have_attribute("class", "h1")
    assert prose.locator("pre code").text_content() == code + "\n"
    assert _copied(page, prose.get_by_role("button", name="Copy the code (python)")) == code
    font = "e => getComputedStyle(e).fontFamily"
    assert "mono" in prose.locator("pre code").evaluate(font).lower()
    assert "mono" not in prose.locator("p").first.evaluate(font).lower()
    without = "() => delete Navigator.prototype.clipboard"  # as a page of plain HTTP
    page.evaluate(without)
    page.locator(".turn.user .copy").click()
    expect(page.locator(".turn.user .copy")).to_have_text("Copied")
    page.locator("#prompt").focus()
    page.keyboard.press("Control+V")
    expect(page.locator("#prompt")).to_have_value("Write")


def test_any_text_is_shown_soon(address: str, visit: Open) -> None:
    page = visit(address)
    for text in (
        "> " * 5000 + "x", "[" * 20_000, "*" * 20_001 + "a", "| a " * 5000, "a" * 300_000,
    ):  # fmt: skip
        answers(page, CHATS, delta(content=text), end())
        begun = time.monotonic()
        page.get_by_role("button", name="New chat").click()
        send(page, "Hi")
        shown = page.locator(".turn.assistant .prose").text_content() or ""
        assert time.monotonic() - begun < 10
        assert shown.count(text[-1]) == text.count(text[-1])


def test_reasoning_is_folded(address: str, visit: Open) -> None:
    page = visit(address)
    thought = [delta(reasoning_content=part) for part in ("Let me ", "think <b>.")]
    answers(page, CHATS, *thought, delta(content="Yes."), end())
    with page.expect_request(CHATS):
        send(page, "Is it so?")
    expect(page.locator(".reasoning summary")).to_have_text("Thought for a moment")
    expect(page.locator(".thought")).to_be_hidden()
    page.locator(".reasoning summary").click()
    expect(page.locator(".thought")).to_have_text("Let me think <b>.")
    expect(page.locator(".prose")).to_have_text("Yes.")
    answers(page, CHATS, *thought, delta(content="Still"), end("length"))
    with page.expect_request(CHATS) as sent:
        send(page, "Sure?")
    assert [one["content"] for one in sent.value.post_data_json["messages"]] == [
        "Is it so?", "Yes.", "Sure?",
    ]  # fmt: skip
    expect(page.locator(".numbers").last).to_contain_text("reached the longest answer")


def test_tools_are_called_and_answered(address: str, visit: Open) -> None:
    page = visit(address)

    def knobs(route: Route) -> None:
        found = route.fetch().json()
        found["model"]["tools"] = True
        route.fulfill(json=found)

    expect(page.get_by_text("Tools", exact=True)).to_be_hidden()  # this template knows none
    page.route("**/knobs*", knobs)
    page.reload()
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    page.get_by_text("Tools", exact=True).click()
    page.get_by_label("Functions that the model may call").fill(json.dumps([tool]))
    begun = {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather"}}
    grown = [
        {"index": 0, "function": {"arguments": part}} for part in ('{"city":', ' "<Oslo>"}')
    ]  # fmt: skip
    answers(
        page,
        CHATS,
        delta(content="I look."),
        delta(tool_calls=[begun]),
        *[delta(tool_calls=[one]) for one in grown],
        end("tool_calls"),
    )
    with page.expect_request(CHATS) as sent:
        send(page, "How is the weather?")
    assert sent.value.post_data_json["tools"] == [tool]
    expect(page.locator(".call .language")).to_have_text("Calls weather")
    expect(page.locator(".call pre")).to_have_text('{\n  "city": "<Oslo>"\n}')
    answers(page, CHATS, delta(content="It is sunny."), end())
    page.get_by_label("What weather answers").fill("18 degrees")
    with page.expect_request(CHATS) as sent:
        page.get_by_role("button", name="Send back").click()
    function = {"name": "weather", "arguments": '{"city": "<Oslo>"}'}
    assert sent.value.post_data_json["messages"] == [
        {"role": "user", "content": "How is the weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "18 degrees"},
    ]
    expect(page.locator(".prose").last).to_have_text("It is sunny.")
    page.reload()
    expect(page.locator(".call pre")).to_have_text('{\n  "city": "<Oslo>"\n}')
    expect(page.locator(".results")).to_have_count(0)  # it has its answer


def test_a_model_can_be_made_to_call(model: fastgen.CausalLM, visit: Open) -> None:
    """By the service itself: a call that is legal, its answer, and then words."""
    pytest.importorskip("llguidance")
    city = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}}
    schema = {**city, "required": ["city"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    with served(model, plain_tools=True, chunk=64) as address:
        page = visit(address)
        page.get_by_text("Tools", exact=True).click()
        page.get_by_label("Functions that the model may call").fill(json.dumps([tool]))
        page.get_by_label("Has to call one").check()
        page.get_by_label("Longest answer").fill("60")
        send(page, "Hi")
        found = json.loads(page.locator(".call pre").text_content() or "")
        assert found["city"] in ("Oslo", "Rome")
        page.get_by_label("What weather answers").fill("Sunny.")
        with page.expect_request(CHATS) as sent:
            page.get_by_role("button", name="Send back").click()
        ended(page)
        assert sent.value.post_data_json["tools"] == [tool]
        assert "tool_choice" not in sent.value.post_data_json  # or calls would never end
        assert page.locator(".turn").count() == 4


def test_an_answer_has_the_form_of_a_schema(address: str, visit: Open) -> None:
    pytest.importorskip("llguidance")
    page = visit(address)
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["os", "sys"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    page.get_by_text("Form of the answer").click()
    page.get_by_label("JSON schema").fill(json.dumps(schema))
    for kind in ("Chat", "Plain text"):
        page.get_by_role("radio", name=kind).check()
        send(page, "What is os?")
        written = page.locator(".turn.assistant :is(.prose pre code, .written)")
        answer = json.loads(written.text_content() or "")
        assert set(answer) == {"ok", "kind"} and answer["kind"] in ("os", "sys")
        expect(page.locator(".numbers")).not_to_contain_text("longest")
        page.get_by_role("button", name="New chat").click()


@pytest.mark.parametrize("kind", ["Chat", "Plain text"])
def test_a_request_is_shown_as_code_that_runs(address: str, visit: Open, kind: str) -> None:
    page = visit(address)
    greedy(page)
    page.get_by_label("Avoid repetition").fill("1.1")  # no argument of OpenAI's client
    page.get_by_label("Stop at").fill('["zq", "it\'s"]')
    page.get_by_role("radio", name=kind).check()
    if kind == "Chat":
        page.get_by_label("Instructions").fill('Say "no",\nit\'s $HOME \\ `id` ${x} é\U0001f600.')
    page.locator("#prompt").fill("What's os?")
    page.get_by_role("button", name="Show as code").click()
    programs = {}
    for language in ("curl", "Python", "JavaScript"):
        page.get_by_role("radio", name=language).check()
        copied = _copied(page, page.locator("#code-copy"))
        assert copied == page.locator("#program").text_content()
        programs[language] = copied
    page.get_by_role("button", name="Close").click()
    expect(page.locator(".turn")).to_have_count(0)  # it was not sent
    with page.expect_request(CHATS if kind == "Chat" else "**/v1/completions") as sent:
        page.locator("#prompt").focus()
        page.keyboard.press("Enter")
    ended(page)
    path = "/v1/chat/completions" if kind == "Chat" else "/v1/completions"
    body = sent.value.post_data_json
    body = {name: value for name, value in body.items() if not name.startswith("stream")}
    (choice,) = posted(address, path, **body)["choices"]
    wanted = choice["message"]["content"] if kind == "Chat" else choice["text"]
    assert wanted.strip()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(programs["Python"], {})
    assert out.getvalue() == wanted + "\n"
    if shutil.which("curl"):
        made = subprocess.run(["sh", "-c", programs["curl"]], capture_output=True, check=True)
        (choice,) = json.loads(made.stdout)["choices"]
        assert choice.get("text", choice.get("message", {}).get("content")) == wanted
    if shutil.which("node"):
        command = ["node", "--input-type=module", "-e", programs["JavaScript"]]
        made = subprocess.run(command, capture_output=True, check=True)
        assert made.stdout.decode() == wanted + "\n"


def test_a_full_context(address: str, visit: Open) -> None:
    """While nobody has said how long an answer is, the service fits it in."""
    page = visit(address)
    expect(page.get_by_label("Longest answer")).to_have_value("128")  # a quarter of 512
    with page.expect_request(CHATS) as sent:
        send(page, "The os module " * 70)
    assert sent.value.post_data_json["max_tokens"] == 128
    with page.expect_request(CHATS) as sent:
        page.locator("#prompt").fill("Go on.")
        page.keyboard.press("Enter")
        expect(page.locator("#go")).to_have_text("Send")
    assert "max_tokens" not in sent.value.post_data_json
    expect(page.locator("#context-text")).to_contain_text("of 512 tokens")


def test_a_screen_reader_hears_an_answer_once(
    address: str, visit: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit(address)
    greedy(page, 30)
    assert page.locator("#transcript").get_attribute("aria-live") == "off"
    page.evaluate(
        """() => {
            window.heard = [];
            const status = document.getElementById("status");
            new MutationObserver(() => window.heard.push(status.textContent))
                .observe(status, {childList: true, characterData: true, subtree: true});
        }"""
    )
    slowly(monkeypatch, 0.01)
    send(page, "What is os?")
    text = _copied(page, page.locator(".turn.assistant .foot .copy"))
    heard = page.evaluate("window.heard")
    assert heard[:2] == ["Writing", f"Done, 30 tokens. {text}"]
    expect(page.get_by_role("article")).to_have_count(2)
    expect(page.get_by_role("heading", name="You")).to_have_count(1)


def test_nothing_moves_for_who_asks_for_that(address: str, visit: Open) -> None:
    page = visit(address, reduced_motion="reduce")
    page.route(CHATS, lambda route: None)  # it never answers
    page.locator("#prompt").fill("Hi")
    page.keyboard.press("Enter")
    cursor = "e => getComputedStyle(e, '::after')"
    body = page.locator(".turn.running .body")
    assert body.evaluate(f"{cursor}.animationName".replace("e => ", "e => ")) == "none"
    page.keyboard.press("Escape")
    expect(page.locator("#prompt")).to_have_value("Hi")  # nothing came: it can be sent again


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not there: .ci/browser fetches it")
@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (1280, "light")])
def test_no_barriers_are_found(address: str, visit: Open, width: int, scheme: str) -> None:
    size = {"width": width, "height": 800}
    page = visit(address, viewport=size, color_scheme=scheme, bypass_csp=True)
    text = "Text with `code` and [a link](https://example.com).\n\n```python\nx = 1\n```\n\n> q\n"
    answers(page, CHATS, delta(reasoning_content="Hm."), delta(content=text), end())
    page.evaluate(AXE.read_text())

    def checked() -> list[str]:
        tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
        found = page.evaluate(
            "tags => axe.run({runOnly: tags}).then(all => all.violations)", tags
        )  # fmt: skip
        return [f"{one['id']}: {[node['html'] for node in one['nodes']][:3]}" for one in found]

    assert checked() == []
    send(page, "Hello")
    page.locator(".reasoning summary").click()
    assert checked() == []
    if width < 1000:
        page.get_by_role("button", name="Chats").click()
        assert checked() == []
        page.get_by_role("button", name="Settings").click()
    for summary in page.locator("#settings summary:visible").all():
        summary.click()
    page.get_by_label("Show probabilities").check()
    assert checked() == []
    page.get_by_role("button", name="Show as code").click()
    assert checked() == []
