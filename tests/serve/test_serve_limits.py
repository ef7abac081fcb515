"""No request of a stranger costs more than its share, none is a 5xx, and the document says so."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import schemathesis
from growth import growth
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import checks
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks as of_openapi
from serving import (
    CHATS,
    COMPLETIONS,
    RESPONSES,
    TEMPLATE,
    Watched,
    address,
    asked,
    command,
    counts,
    model,
    served,
    until,
)
from tool_forms import ALONE, EVERY, TOOLS

import fastgen
from fastgen.engine import score
from fastgen.engine.schedule import Scheduler
from fastgen.serve.door import Guard, name_of
from fastgen.serve.limits import RequestLimits
from fastgen.serve.refused import MESSAGES, Refused
from fastgen.serve.rendered import as_json, in_parts
from fastgen.serve.tools.reader import ReadingOptions
from fastgen.serve.tools.whole import WholeAnswer

__all__ = ["TEMPLATE", "address", "model"]  # fixtures, and what they take

QUICK: Any = settings(
    max_examples=6,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
SCORED = {"prompt": [5, 6, 7] * 150, "echo": True, "logprobs": 2, "max_tokens": 0}


# --- scoring is one of the engine's works ---------------------------------------------------------


def test_a_text_is_scored_between_the_steps_of_others(model: fastgen.CausalLM) -> None:
    """At most one chunk of one prompt or text between two steps, however many there are."""
    inner, read = model.model, []
    forward = inner.forward

    def counted(new: Any, *rest: Any) -> Any:
        read.append(max(map(len, new)))
        return forward(new, *rest)

    random = np.random.default_rng(0)
    scheduler = Scheduler(inner, chunk=64)
    running = model.call([[5, 6, 7]], max_new_tokens=60, eos_token_id=None)
    scheduler.submit(running)
    scheduler.step()
    texts = [
        score.Scoring(inner, random.integers(3, 90, size).tolist(), 2) for size in (1, 2, 64, 200)
    ]
    for one in texts:
        scheduler.submit(one)
    scheduler.submit(model.call([random.integers(3, 90, 150).tolist()], max_new_tokens=2))
    assert scheduler.rows == 1 and scheduler.waiting == 5
    inner.forward = counted  # type: ignore[method-assign]
    try:
        while not scheduler.idle:
            read.clear()
            steps = scheduler.step()
            assert sum(size > 1 for size in read) <= 1, read
            assert running.done or any(call is running and events for call, events in steps)
    finally:
        inner.forward = forward  # type: ignore[method-assign]
    for one in texts:
        assert one.done and one.error is None
        alone = model.score([one.ids])[0]
        np.testing.assert_allclose(one.logprobs[1:], alone[1:], atol=1e-5)
        for place, (token, logprob) in enumerate(zip(one.ids, one.logprobs, strict=True)):
            top = dict(one.tops[place] or ())
            assert token not in top or top[token] == logprob  # one number for one token
    assert (scheduler.rows, scheduler.held) == (0, 0)
    scheduler.close()


def leave(address: str, body: Any, watched: Watched) -> None:
    """Ask for something, go away after three steps, and wait until nothing runs any more."""
    host, port = address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    as_json = {"Content-Type": "application/json"}
    connection.request("POST", COMPLETIONS, json.dumps(body), as_json)
    until(lambda: watched.begun > 2)
    assert connection.sock
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    until(lambda: watched.cancelled)
    scheduler = watched.scheduler
    assert scheduler
    until(lambda: scheduler.idle)


def test_scoring_is_counted_checked_and_cancelled(
    model: fastgen.CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(model) as address:
        assert asked(address, COMPLETIONS, SCORED)[0] == 200
        shown = counts(address)
        assert shown["scored_tokens_total"] == 450 and shown["num_rows_running"] == 0
        watched = Watched(monkeypatch, slow=0.05)
        leave(address, {**SCORED, "prompt": [[5, 6, 7] * 150] * 64}, watched)
        assert watched.begun < 64 * 7  # the steps that all of it would have taken
    needed = score.Scoring(model.model, [5] * 400).bytes
    with served(model, max_bytes=needed) as address:
        body = {**SCORED, "logprobs": 0}
        assert asked(address, COMPLETIONS, {**body, "prompt": [5] * 400})[0] == 200
        status, _, found = asked(address, COMPLETIONS, {**body, "prompt": [5] * 410})
        assert status == 400 and "bytes of memory, calls have" in found["error"]["message"]


def test_healing_reads_its_prompt_between_the_steps_of_others(
    model: fastgen.CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any prompt: by the engine, counted, and no longer than its client waits for it."""
    ids = model.tokenizer.encode("a, b and c. " * 60 + "Return a list of the str")
    healed = model.call([ids], token_healing=True, max_new_tokens=4).request.prompts[0]
    assert len(healed) == len(ids) and healed[-1] != ids[-1]
    knobs = {"token_healing": True, "temperature": 0, "max_tokens": 4}
    watched, threads, forward = Watched(monkeypatch), set(), model.model.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        threads.add(threading.current_thread().name)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", noted)
    with served(model, chunk=64) as address:
        threads.clear()  # of the chunk that was measured
        status, _, answer = asked(address, COMPLETIONS, {"prompt": [ids, ids[:3]], **knobs})
        assert status == 200 and threads == {"fastgen-engine"}
        monkeypatch.undo()
        expected = [
            model.complete(model.tokenizer.decode(one), token_healing=True, max_new_tokens=4)
            for one in (ids, ids[:3])
        ]
        assert [choice["text"] for choice in answer["choices"]] == expected
        watched = Watched(monkeypatch, slow=0.05)
        leave(address, {"prompt": [list(reversed(ids[:-1])) + ids[-1:]] * 8, **knobs}, watched)


def test_sigterm_ends_a_service_that_scores() -> None:
    with command("--grace", "0.2") as (process, address):
        host, port = address.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        body = json.dumps({**SCORED, "prompt": [[5, 6, 7] * 150] * 64})
        connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
        until(lambda: "fastgen_rows_running 0.0" not in asked(address, "/metrics")[2])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        connection.close()


# --- what a request may hold ----------------------------------------------------------------------


def test_limits_are_those_of_the_application(model: fastgen.CausalLM) -> None:
    """A thing has one limit under each of its names."""
    few = RequestLimits(
        copies=2, alternatives=1, stops=1, stop_text=3, prompts=1, text=20, values=40
    )
    with served(model, limits=few) as address:
        for field, most, more in (
            ("n", 2, 3),
            ("best_of", 2, 3),
            ("num_return_sequences", 2, 3),
            ("logprobs", 1, 2),
            ("top_logprobs", 1, 2),
            ("stop", ["a"], ["a", "b"]),
            ("stop_strings", ["a"], ["a"] * 2),
            ("stop", "abc", "abcd"),
            ("stop_strings", "abc", "abcd"),
            ("prompt", ["a"], ["a"] * 2),
            ("prompt", "a" * 20, "a" * 21),
            ("suppress_tokens", [1] * 30, [1] * 50),
        ):
            body = {"prompt": "a", "max_tokens": 1}
            assert asked(address, COMPLETIONS, body | {field: most})[0] == 200, field
            status, _, found = asked(address, COMPLETIONS, body | {field: more})
            assert status == 400, field
            assert found["error"]["param"] == (None if field == "suppress_tokens" else field)
    with pytest.raises(ValueError, match="stops must be a positive integer"):
        RequestLimits(stops=0)


@QUICK
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    ),
    st.integers(1, 30),
)
def test_values_are_counted_wherever_they_are(value: Any, most: int) -> None:
    def count(one: Any) -> int:
        inside = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        return 1 + sum(map(count, inside))

    try:
        RequestLimits(values=most).check_values({"x": value, "prompt": [1] * 99})
        assert count(value) <= most
    except Refused:
        assert count(value) > most
    assert in_parts(value) == as_json(value)
    large = [{"a": [value] * 300}] * 2
    assert in_parts(large) == as_json(large)


def test_long_texts_are_cut_one_after_another_and_leave_the_loop_alone(
    model: fastgen.CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most = 0, 0
    encode = type(model.tokenizer).encode

    def watched(tokenizer: Any, text: str, add_special_tokens: bool = True) -> Any:
        nonlocal at_once, most
        at_once += len(text) > 1000
        most = max(most, at_once)
        time.sleep(0.05)
        out = encode(tokenizer, text[:50], add_special_tokens)
        at_once -= len(text) > 1000
        return out

    monkeypatch.setattr(type(model.tokenizer), "encode", watched)
    with served(model) as address:

        async def together() -> None:
            bodies = [{"prompt": "word " * 10_000}] * 4 + [{"prompt": "a"}] * 2
            calls = (asyncio.to_thread(asked, address, "/tokenize", body) for body in bodies)
            assert [status for status, _, _ in await asyncio.gather(*calls)] == [200] * 6

        asyncio.run(together())
    assert most == 1


@pytest.mark.parametrize("name", EVERY)
def test_whatever_a_model_writes_is_read_in_time_that_grows_with_it(name: str) -> None:
    """Also what is nested deeper than JSON is read, which is content."""
    made = EVERY[name]
    begin = made.mark if name not in ALONE else ""
    arguments = '{"name": "weather", "arguments": {"x": '
    texts = {
        "deep": lambda size: begin + arguments + "[" * size + "]" * size + "}}",
        "blank": lambda size: begin + " " * 6 * size,
        "many": lambda size: (begin or "{") * (3 * size // 5),
        "open": lambda size: begin + "[" * (2 * size - 1),
    }
    for kind, text_of in texts.items():

        def read_whole(size: int, text_of: Callable[[int], str] = text_of) -> None:
            text = text_of(size)
            reader, whole = made.read(ReadingOptions(TOOLS)), WholeAnswer()
            whole.take([*reader.push(text), *reader.end()])
            assert not whole.calls and (made.channels or text.startswith(whole.content))

        # Ten times as long. A square takes a hundred times as long.
        assert growth(read_whole, 5_000, 50_000, enough=30) <= 30, kind


# --- the door -------------------------------------------------------------------------------------


def raw(address: str, request: bytes, more: bytes = b"", times: int = 0) -> bytes:
    """The reply to plain bytes, after which the connection is not closed by us."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request)
        for _ in range(times):
            connection.sendall(more)
        return connection.recv(1 << 16)


def test_what_is_too_long_is_refused_before_it_is_there(address: str) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    found = raw(address, head + b"Content-Length: 1000000000\r\n\r\n{")
    assert found.startswith(b"HTTP/1.1 413")
    found = raw(address, head + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{")
    assert found[:12] in (b"HTTP/1.1 413", b"HTTP/1.1 400")
    for start in (b"GET / HTTP/1.1\r\nX: ", b"GET /"):
        assert raw(address, start, b"a" * (1 << 20), 30).startswith(b"HTTP/1.1 431")
    many = b"".join(b"X-%d: a\r\n" % i for i in range(20_000))
    assert raw(address, b"GET / HTTP/1.1\r\n" + many + b"\r\n").startswith(b"HTTP/1.1 431")
    trailed = head + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: "
    assert raw(address, trailed, b"a" * (1 << 20), 2).startswith(b"HTTP/1.1 431")
    assert asked(address, "/health", **{"X-Long": "a" * 60_000})[0] == 200
    body = json.dumps({"prompt": "a", "max_tokens": 1, "user": "a" * 1_000_000})
    assert asked(address, COMPLETIONS, body.encode())[0] == 200


def test_the_key_comes_before_the_body(model: fastgen.CausalLM) -> None:
    """The body of somebody without it is not waited for."""
    with served(model, api_key="s3cret") as address:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n{"
        assert raw(address, head).startswith(b"HTTP/1.1 401")
    asked_for = []

    async def receive() -> Any:
        asked_for.append(1)
        return {"type": "http.request", "body": b"", "more_body": True}

    async def send(message: Any) -> None:
        asked_for.append(message.get("status", 0))

    scope: Any = {"type": "http", "path": "/metrics", "headers": [], "method": "GET"}
    asyncio.run(Guard(None, "s3cret")(scope, receive, send))  # type: ignore[arg-type]
    assert asked_for == [401, 0]


def test_a_page_of_anybodys_cannot_reach_a_service_without_a_key() -> None:
    with command("--allowed-host", "box.example") as (_, address):
        port = address.rpartition(":")[2]
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "BOX.example"):
            assert asked(address, "/metrics", Host=host)[0] == 200, host
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[", ""):
            for path in ("/metrics", "/health", "/"):
                assert asked(address, path, Host=host)[0] == 403, host
        body = {"prompt": "a", "max_tokens": 1}
        for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example"):
            assert asked(address, COMPLETIONS, body, Origin=origin)[0] == 403
        assert asked(address, COMPLETIONS, body, Origin=address)[0] == 200
    assert name_of("//[::1]:80") == "[::1]" and name_of("null") is None


# --- nothing is a 5xx, and nothing is undeclared --------------------------------------------------

LAW = [
    checks.not_a_server_error,
    of_openapi.status_code_conformance,
    of_openapi.content_type_conformance,
    of_openapi.response_schema_conformance,
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_answer_is_a_5xx_or_undeclared(address: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(address + "/openapi.json")
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        seen.add(operation.path)
        if mode == GenerationMode.NEGATIVE and operation.method in ("get", "delete"):
            continue  # nothing about it can be wrong

        @QUICK
        @given(operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            case.call_and_validate(checks=LAW)

        check()
    assert {COMPLETIONS, CHATS, RESPONSES, MESSAGES, "/tokenize", "/metrics", "/health"} <= seen


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4)
    | st.sampled_from([-850, 2**70, 2**31, 1e308]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)


def test_a_field_of_any_value_is_answered_or_refused(address: str) -> None:
    """Each field of every request, with whatever JSON can hold."""
    described = asked(address, "/openapi.json")[2]["components"]["schemas"]
    bases = {
        COMPLETIONS: {"prompt": [5, 6, 7], "max_tokens": 2},
        CHATS: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        RESPONSES: {"input": "a", "max_output_tokens": 2},
        MESSAGES: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    }
    names = {
        COMPLETIONS: [*described["Completion"]["properties"], "prompt"],
        CHATS: [*described["ChatCompletion"]["properties"]],
        RESPONSES: [*described["CreateResponse"]["properties"]],
        MESSAGES: [*described["CreateMessage"]["properties"]],
    }

    @settings(QUICK, max_examples=120)
    @given(st.sampled_from([(path, n) for path in names for n in names[path]]), JSON, st.booleans())
    def check(where: tuple[str, str], value: Any, echo: bool) -> None:
        path, name = where
        body = {**bases[path], **({"echo": True, "logprobs": 1} if echo and path == COMPLETIONS
                                  else {}), name: value}  # fmt: skip
        if name == "max_time" or (name == "stream" and value is True):
            return
        status, _, found = asked(address, path, body)
        assert status in (200, 400, 404), (body, found)
        assert status == 200 or found["error"]["message"]

    check()
