"""Request ids, and the line in the log that each request has: what it says, and that it waits for
nobody."""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import threading
from typing import Any

import openai
import pytest
from serving import (
    CHATS,
    COMPLETIONS,
    TEMPLATE,
    WAIT,
    Watched,
    address,
    asked,
    model,
    served,
    until,
)

import fastgen
from fastgen.serve import chats, record
from fastgen.serve.record import Log, RequestRecord

__all__ = ["TEMPLATE", "address", "model"]  # fixtures, and what they take

PROMPT = "The os module is a module. " * 20
GREEDY = {"max_tokens": 9, "temperature": 0, "ignore_eos": True}


def test_an_id_goes_out_with_every_answer(address: str, model: fastgen.CausalLM) -> None:
    for path, body in (("/health", None), ("/nothing", None), (COMPLETIONS, b"{")):
        _, headers, _ = asked(address, path, body)
        assert re.fullmatch("req_[0-9a-f]{24}", headers["x-request-id"]), path
        _, headers, _ = asked(address, path, body, **{"X-Request-Id": "mine-1"})
        assert headers["x-request-id"] == "mine-1"
    for bad in ("two words", "é", "x" * 129, ""):
        _, headers, _ = asked(address, "/health", **{"X-Request-Id": bad})
        assert headers["x-request-id"].startswith("req_")
    with served(model, api_key="key", cors="*") as strict:
        status, headers, _ = asked(strict, "/v1/models", Origin="http://a.example")
        assert status == 401 and headers["x-request-id"].startswith("req_")
        assert headers["access-control-expose-headers"] == "x-request-id"
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model="any", prompt="a", max_tokens=1)
        assert answer._request_id and answer._request_id.startswith("req_")


def test_an_error_that_nobody_expected_has_one_too(
    model: fastgen.CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[RequestRecord] = []

    async def broken(*_: Any) -> Any:
        raise KeyError("inside")

    monkeypatch.setattr(chats, "answer", broken)
    with served(model, log=told.append) as here:
        body = {"messages": [{"role": "user", "content": "a"}]}
        status, headers, found = asked(here, CHATS, body, **{"X-Request-Id": "mine"})
    assert status == 500 and headers["x-request-id"] == "mine"
    assert found["error"]["code"] == "internal_error"
    (one,) = told
    assert one.fields()["status"] == 500 and one.error == "KeyError('inside')"


def test_a_line_says_what_a_request_came_to(model: fastgen.CausalLM) -> None:
    told: list[RequestRecord] = []
    with served(model, name="docs", log=told.append) as here:
        length = len(model.tokenizer.encode(PROMPT))
        for stream in (False, True):
            body = {"prompt": PROMPT, "stream": stream, **GREEDY}
            asked(here, COMPLETIONS, body, **{"X-Request-Id": f"s-{stream}"})
        asked(here, COMPLETIONS, {"prompt": [[5, 6], [7]], "n": 2, "num_beams": 2, **GREEDY})
        asked(here, COMPLETIONS, {"prompt": "a", "max_tokens": -1})
        asked(here, CHATS, b"{")
        for path in ("/health", "/metrics", "/v1/models", "/"):
            asked(here, path)  # says nothing
        asked(here, "/no%0Asuch")
        until(lambda: len(told) == 6)
    first, second, beams, negative, no_json, nowhere = (one.fields() for one in told)
    assert first["id"] == "s-False" and second["id"] == "s-True"
    for found, known in ((first, 0), (second, (length - 1) // 32 * 32)):
        assert (found["route"], found["status"], found["model"]) == (COMPLETIONS, 200, "docs")
        assert (found["prompt_tokens"], found["cached_tokens"]) == (length, known)
        assert (found["completion_tokens"], found["finish_reason"]) == (9, "length")
        assert 0 < found["first_token_seconds"] < found["seconds"]
        pace = 8 / (found["seconds"] - found["first_token_seconds"])
        assert found["tokens_per_second"] == pytest.approx(pace)
        assert found["client_gone"] is False and found["error"] is None
    assert (beams["prompt_tokens"], beams["completion_tokens"]) == (3, 36)
    assert negative["status"] == no_json["status"] == 400 and nowhere["status"] == 404
    assert "max_tokens" in negative["error"] and negative["completion_tokens"] is None
    assert nowhere["route"] == "other" and nowhere["model"] is None
    # As lines: one for each, whatever a client wrote.
    for one in told:
        text = record.as_text(one)
        assert "\n" not in text and f" {one.id} " in text and f" {one.status} " in text
        line = record.as_json(one)
        assert json.loads(line).items() >= {"id": one.id, "status": one.status}.items()
        assert "\n" not in line
    text = record.as_text(told[1])
    assert f"model=docs in={length} cached={second['cached_tokens']} out=9 first=" in text
    assert re.search(r"pace=[\d.]+/s total=[\d.]+s finish=length$", text)


def test_a_client_that_goes_away_is_told_of(
    model: fastgen.CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, told = Watched(monkeypatch), []
    with served(model, log=told.append) as here:
        host, port = here.removeprefix("http://").split(":")
        for stream in (True, False):
            connection = http.client.HTTPConnection(host, int(port), timeout=WAIT)
            body = {**GREEDY, "prompt": "a", "max_tokens": 400, "stream": stream}
            as_json = {"Content-Type": "application/json"}
            connection.request("POST", COMPLETIONS, json.dumps(body), as_json)
            begun = watched.begun
            until(lambda begun=begun: watched.begun > begun + 4)
            assert connection.sock
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            until(lambda stream=stream: len(told) == 1 + (not stream))
    for one in told:
        found = one.fields()
        assert found["client_gone"] and found["finish_reason"] is None
        assert record.as_text(one).endswith("client gone")
    assert [one.status for one in told] == [200, 499]


def test_a_log_that_nobody_reads_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    read = threading.Event()

    class Stopped(io.StringIO):
        def write(self, text: str) -> int:
            assert read.wait(WAIT)
            return super().write(text)

    monkeypatch.setattr(record, "MOST_LINES", 5)
    place = Stopped()
    log = Log("json", place)
    for index in range(20):
        log(RequestRecord(f"r{index}", "GET"))
    read.set()
    until(lambda: place.getvalue().count("\n") >= 5)
    log(RequestRecord("last", "GET"))
    log.close()
    lines = place.getvalue().splitlines()
    ids = [json.loads(line)["id"] for line in lines if line.startswith("{")]
    assert ids[:5] == [f"r{index}" for index in range(5)] and ids[-1] == "last"
    lost = sum(int(n) for n in re.findall(r"fastgen: (\d+) lines were left out", place.getvalue()))
    assert lost == 20 - (len(ids) - 1)
    with Stopped() as shut:
        gone = Log("text", shut)
    gone(RequestRecord("x", "GET"))
    gone.close()
