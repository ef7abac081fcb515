"""Several models behind one service: the request chooses, each is loaded when it is asked for."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner
from serving import CHATS, COMPLETIONS, WAIT, asked, command, counts, until
from serving import served as served_with

import fastgen
from fastgen.commands import cli
from fastgen.engine.prefix_cache import MAX_BYTES
from fastgen.engine.schedule import Scheduler, memory_shares
from fastgen.generator import CausalLM
from fastgen.serve import app, models
from fastgen.serve.engine import Engine
from fastgen.store import hub
from fastgen.store.model_info import GENERATION_CONFIG, INFO

PROMPT = "The os module"
MINUTE = 60.0
served = functools.partial(served_with, chunk=64)  # without measuring which is best


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models: the demo, and one of other defaults, so that its greedy texts differ."""
    first, second = (tmp_path_factory.mktemp("models") / name for name in ("docs", "other"))
    for place in (first, second):
        shutil.copytree(hub.DEMO, place)
    config = second / GENERATION_CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"repetition_penalty": 2.0}))
    info = json.loads((second / INFO).read_text())
    digest = hashlib.sha256(config.read_bytes()).hexdigest()
    info["files"][GENERATION_CONFIG] = {"bytes": config.stat().st_size, "sha256": digest}
    (second / INFO).write_text(json.dumps(info))
    return {"docs": first, "other": second}


@pytest.fixture(scope="module")
def texts(places: dict[str, Path]) -> dict[str, str]:
    """The text that each of them writes alone."""
    found = {
        name: fastgen.load(place).complete(PROMPT, max_new_tokens=12)
        for name, place in places.items()
    }
    assert found["docs"] != found["other"]
    return found


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories' names, as they are loaded by a service."""
    out: list[str] = []

    init = CausalLM.__init__

    def noted(model: CausalLM, directory: Any, *rest: Any, **more: Any) -> None:
        out.append(Path(directory).name)
        init(model, directory, *rest, **more)

    monkeypatch.setattr(CausalLM, "__init__", noted)
    return out


def complete(address: str, model: str | None, **more: Any) -> tuple[int, Any]:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **more}
    status, _, found = asked(
        address, COMPLETIONS, body if model is None else {"model": model, **body}
    )
    return status, found


def loaded(address: str) -> dict[str, bool]:
    found: dict[str, bool] = asked(address, "/health")[2]["loaded"]
    return found


def test_the_request_chooses_and_each_is_loaded_when_asked_for(
    places: dict[str, Path], texts: dict[str, str], loads: list[str]
) -> None:
    with served(places) as address:
        assert loads == ["docs"] and loaded(address) == {"docs": True, "other": False}
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            assert [one.id for one in client.models.list()] == ["docs", "other"]
            assert client.models.retrieve("other").model_extra == {"max_model_len": 512}
            assert loads == ["docs"]  # nothing but a request for its work loads a model
            for name in ("other", "docs", "other"):
                answer = client.completions.create(
                    model=name, prompt=PROMPT, max_tokens=12, temperature=0
                )
                assert answer.model == name and answer.choices[0].text == texts[name]
            assert loads == ["docs", "other"]
            with pytest.raises(openai.NotFoundError) as error:
                client.completions.create(model="gpt-9", prompt=PROMPT)
            assert error.value.code == "model_not_found" and error.value.param == "model"
            assert "'gpt-9', only 'docs', 'other'" in error.value.message
        assert complete(address, None)[1]["choices"][0]["text"] == texts["docs"]  # the default
        assert complete(address, "")[0] == 404
        for path, body in (
            (CHATS, {"messages": [{"role": "user", "content": "a"}]}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [5]}),
        ):
            status, _, found = asked(address, path, {"model": "gpt-9", **body})
            assert status == 404 and found["error"]["code"] == "model_not_found", path
        assert asked(address, "/tokenize", {"model": "other", "prompt": "a"})[0] == 200
        own = asked(address, "/knobs?model=other")[2]
        assert own["model"]["name"] == "other"
        penalty = next(knob for knob in own["knobs"] if knob["name"] == "repetition_penalty")
        assert penalty["own_default"] == 2.0
        assert asked(address, "/knobs?model=gpt-9")[0] == 404
        assert counts(address, "docs")["generation_tokens_total"] == 24
        assert counts(address, "other")["generation_tokens_total"] == 24


def test_another_default(places: dict[str, Path], texts: dict[str, str], loads: list[str]) -> None:
    with served(places, default="other") as address:
        assert loads == ["other"] and asked(address, "/health")[2]["model"] == "other"
        assert complete(address, None)[1]["choices"][0]["text"] == texts["other"]
    with pytest.raises(ValueError, match="default must be one of 'docs', 'other', got 'x'"):
        app(places, default="x")
    with pytest.raises(ValueError, match="name='x' is for one model"):
        app(places, name="x")
    with pytest.raises(ValueError, match="needs a model"):
        app({})


def test_who_comes_while_it_is_loaded_waits_for_the_same(
    places: dict[str, Path], texts: dict[str, str], loads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    go_on, make = threading.Event(), models.Models._service

    def slow(self: models.Models, model: models.ServedModel) -> Any:
        if model.name == "other":
            assert go_on.wait(WAIT)
        return make(self, model)

    monkeypatch.setattr(models.Models, "_service", slow)
    with served(places) as address, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(complete, address, "other") for _ in range(3)]
        # The other model answers meanwhile.
        assert complete(address, "docs")[1]["choices"][0]["text"] == texts["docs"]
        assert loaded(address) == {"docs": True, "other": False}
        go_on.set()
        for one in waiting:
            assert one.result(WAIT)[1]["choices"][0]["text"] == texts["other"]
    assert loads == ["docs", "other"]


def test_a_load_that_fails_is_its_requests_error_and_is_tried_again(
    places: dict[str, Path], texts: dict[str, str], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(places["other"], damaged)
    with served({"docs": places["docs"], "other": damaged}) as address:
        graph = (damaged / "model.onnx").read_bytes()
        (damaged / "model.onnx").write_bytes(graph[:-7])
        status, found = complete(address, "other")
        assert status == 500 and found["error"]["code"] == "model_load_failed"
        assert found["error"]["message"].startswith("other cannot be loaded: ")
        assert "model.onnx" in found["error"]["message"]
        assert complete(address, "docs")[0] == asked(address, "/health")[0] == 200
        (damaged / "model.onnx").write_bytes(graph)
        assert complete(address, "other")[1]["choices"][0]["text"] == texts["other"]
    with pytest.raises(fastgen.ModelError, match="no/such"):
        app({"docs": places["docs"], "other": "no/such/place"})


def test_what_is_idle_is_unloaded_and_loaded_again(
    places: dict[str, Path], texts: dict[str, str], loads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made: list[weakref.ref[Any]] = []
    start = Engine.start

    def noted(engine: Engine) -> None:
        made.append(weakref.ref(engine.scheduler.model))
        start(engine)

    monkeypatch.setattr(Engine, "start", noted)
    with served(places, unload_after=0.4 / MINUTE) as address:
        form = {"regex": "a[bc]"}  # what a grammar keeps of a tokenizer goes as well
        assert complete(address, "other", **form)[0] == complete(address, "other")[0] == 200
        until(lambda: not any(loaded(address).values()))
        until(lambda: gc.collect() >= 0 and not any(one() for one in made))
        assert counts(address, "other")["model_loaded"] == 0
        assert counts(address, "other")["prefix_cache_bytes"] == 0
        before = counts(address, "other")["generation_tokens_total"]
        assert before > 12 and asked(address, "/health")[0] == 200
        assert complete(address, "other")[1]["choices"][0]["text"] == texts["other"]
        assert counts(address, "other")["generation_tokens_total"] == before + 12
        assert loads == ["docs", "other", "other"]
        assert loaded(address) == {"docs": False, "other": True}


def test_nothing_is_unloaded_under_a_request(
    places: dict[str, Path], loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Scheduler.step

    def slow(scheduler: Scheduler) -> Any:
        time.sleep(0.02)
        return plain(scheduler)

    monkeypatch.setattr(Scheduler, "step", slow)
    with served(places, unload_after=0.2 / MINUTE) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(
                model="other", prompt=PROMPT, max_tokens=40, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            chunks = [chunk.choices[0].finish_reason for chunk in stream]
        assert chunks[-1] == "length" and loads.count("other") == 1
        until(lambda: not loaded(address)["other"])


def test_a_model_that_was_given_loaded_stays(places: dict[str, Path], loads: list[str]) -> None:
    mine = fastgen.load(places["docs"])
    with served({"docs": mine, "other": places["other"]}, unload_after=0.2 / MINUTE) as address:
        assert complete(address, "other")[0] == 200
        until(lambda: loaded(address) == {"docs": True, "other": False})
    assert loads == ["docs", "other"]


def test_memory_is_shared_out(places: dict[str, Path]) -> None:
    made = app(places, max_bytes=10**9).state.models
    service = made.default.service
    assert service.engine.scheduler.max_bytes == 5 * 10**8
    assert service.engine.prefix_cache.max_bytes == MAX_BYTES // 2
    usual, buffers = memory_shares()
    half = memory_shares(2)
    assert half == (usual // 2, buffers // 2)
    alone = app({"docs": places["docs"]}).state.models.default.service
    assert alone.engine.scheduler.max_bytes == usual
    assert alone.engine.prefix_cache.max_bytes == MAX_BYTES


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(places: dict[str, Path]) -> Iterator[str]:
    flags = ["--default", "other", "--unload-after", "10", "--log-format", "none"]
    given = [str(places["docs"]), f"other={places['other']}"]
    with command(*given, *flags) as (_, found):
        yield found


def test_the_command_serves_several(address: str, texts: dict[str, str]) -> None:
    assert loaded(address) == {"docs": False, "other": True}
    assert complete(address, None)[1]["choices"][0]["text"] == texts["other"]
    assert complete(address, "docs")[1]["choices"][0]["text"] == texts["docs"]
    assert complete(address, "any")[0] == 404


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["{docs}", "{docs}"], "both called docs: write NAME=MODEL"),
        (["x={docs}", "x={other}"], "both called x"),
        (["{docs}", "docs={other}"], "both called docs"),
        (["={docs}"], "should be NAME=MODEL"),
        (["x="], "should be NAME=MODEL"),
        (["{docs}", "{other}", "--name", "x"], "--name is for one model"),
        (["y={docs}", "--name", "x"], "both name the model"),
        (
            ["{docs}", "{other}", "--default", "x"],
            "default must be one of 'docs', 'other', got 'x'",
        ),
        (["{docs}", "--unload-after", "0"], "--unload-after must be a number of minutes"),
        (["{docs}", "no/such/directory"], "no/such/directory"),
    ],
)
def test_names_are_checked_at_the_door(
    places: dict[str, Path], flags: list[str], words: str
) -> None:
    given = [flag.format(**places) for flag in flags]
    found = CliRunner().invoke(cli, ["serve", "--port", "0", *given])
    assert found.exit_code == 2 and words in " ".join(found.output.split())
