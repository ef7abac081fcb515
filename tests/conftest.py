"""Models that the tests share: each is built and exported once, at most."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # tests that want a hub start one of their own
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import fake_hub
import onnx_ir
import pytest
import tiny
import torch
import transformers
from transformers import PreTrainedModel

import fastgen
from fastgen.engine import speculative
from fastgen.export.trace import graph, stored
from fastgen.system import interrupt

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import real

torch.set_num_threads(1)  # more only wait for each other on models this small
transformers.logging.set_verbosity_error()

Pair = tuple[PreTrainedModel, fastgen.CausalLM]


Convert = Callable[..., onnx_ir.Model]


@pytest.fixture(scope="module", autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    """What a library handles signals with (Ray, from its start) ends with the module's tests."""
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, *interrupt.ENDING)}
    yield
    for number, handler in usual.items():
        if handler is not None:  # None: of a library in C, which Python cannot put back
            signal.signal(number, handler)


TRACED = graph.convert
LARGE = 1 << 20  # weights of a model whose graph is not kept: some tests measure memory


@pytest.fixture(scope="session", autouse=True)
def convert_once() -> Iterator[Convert]:
    """`graph.convert` of one model, which takes ten seconds, is run once; each call has its copy.

    For whoever puts something else in the place of what it calls there is `converted_anew`.
    """
    made: dict[bytes, onnx_ir.Model] = {}

    def convert(model: PreTrainedModel, kept: graph.Kept, whole: bool = False) -> onnx_ir.Model:
        tensors = [*model.parameters(), *model.buffers()]
        in_their_own_type = any(isinstance(one.data, stored.Stored) for one in tensors)
        if in_their_own_type or sum(one.numel() for one in tensors) > LARGE:
            return TRACED(model, kept, whole).clone()  # which files show
        key = hashlib.sha256(repr((_about(model), kept, whole)).encode())
        for one in tensors:
            key.update(one.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        if key.digest() not in made:
            made[key.digest()] = TRACED(copy.deepcopy(model), kept, whole)
        return made[key.digest()].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "convert", convert)
        yield convert


# What a configuration and a model say of where they come from.
NOTES = {
    "_name_or_path",
    "name_or_path",
    "architectures",
    "dtype",
    "transformers_version",
    "_use_kernels",
}


def _about(model: PreTrainedModel) -> list[Any]:
    """What a model's graph depends on but for numbers: plain attributes of all modules."""
    plain = int | float | str | tuple | None
    found: list[Any] = [{k: v for k, v in model.config.to_dict().items() if k not in NOTES}]
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k not in NOTES}
        found.append((name, type(module), own))
    return found


@pytest.fixture
def converted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph is traced, whatever was traced before."""
    monkeypatch.setattr(graph, "convert", TRACED)


# Models that tests share, with the defaults that they had when they were made.
shared: list[tuple[str, PreTrainedModel | fastgen.CausalLM, Any]] = []


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """`pair(kind, **config changes)`: a tiny transformers model and its export, loaded.

    Who sets defaults of theirs loads a model of its own: `fastgen.load(ours.directory)`.
    """

    @functools.cache
    def make(kind: str, **changes: object) -> Pair:
        made = tiny.exported(kind, tmp_path_factory.mktemp("models") / kind, **changes)
        shared.extend((kind, one, copy.deepcopy(one.generation_config)) for one in made)
        return made

    return make


@pytest.fixture(autouse=True)
def what_is_shared_stays_as_it_is() -> Iterator[None]:
    """No test, and nothing that it calls, changes the defaults of a model that others use too."""
    yield
    for kind, model, before in shared:
        if vars(now := model.generation_config) != vars(before):
            model.generation_config = copy.deepcopy(before)
            pytest.fail(f"the defaults of the {type(model).__name__} of {kind} became {now}")


@pytest.fixture(scope="session")
def both(pair: Callable[..., Pair]) -> Pair:
    """A tiny Llama, there and here."""
    return pair("llama")


@pytest.fixture(scope="session")
def ours(both: Pair) -> fastgen.CausalLM:
    return both[1]


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """`real_model(name)`: a directory of weights that others trained; skips where there is none."""

    def find(name: str) -> Path:
        try:
            return real.directory(name)
        except real.Unavailable as error:
            pytest.skip(f"needs a real model. {error}")

    return find


@pytest.fixture
def world(hub: fake_hub.Hub, tmp_path: Path) -> fake_hub.World:
    """Somebody who uses the `hub` of the module."""
    hub.asked.clear()
    return fake_hub.World(hub, tmp_path)


@pytest.fixture
def always_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt lookup guesses at every step but the first, whether that pays or not."""
    monkeypatch.setattr(
        speculative.SpeculationBudget,
        "allowed",
        lambda self, remaining: remaining if self.plain else 0,
    )
