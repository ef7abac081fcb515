"""Models that the tests share: each is built and exported once, at most."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # tests that want a hub start one of their own
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import fake_hub
import onnx_ir
import pytest
import tiny
import torch
import transformers
from fastgen.export import graph
from transformers import PreTrainedModel

import fastgen
from fastgen import lookup

torch.set_num_threads(1)  # more only wait for each other on models this small
transformers.logging.set_verbosity_error()

Pair = tuple[PreTrainedModel, fastgen.CausalLM]


Convert = Callable[..., onnx_ir.Model]


@pytest.fixture(scope="session")
def convert_once() -> Convert:
    """`graph.convert` of one model, which takes seconds, is run once; each call has its copy.

    Not for tests that put something else in the place of what it calls.
    """
    real = graph.convert
    made: dict[bytes, onnx_ir.Model] = {}

    def convert(model: PreTrainedModel, kept: graph.Kept, whole: bool = False) -> onnx_ir.Model:
        weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        config = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
        key = hashlib.sha256(repr((config, whole)).encode() + weights).digest()
        if key not in made:
            made[key] = real(copy.deepcopy(model), kept, whole)
        return made[key].clone()

    return convert


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, convert_once: Convert) -> Callable[..., Pair]:
    """`pair(kind, **config changes)`: a tiny transformers model and its export, loaded."""

    @functools.cache
    def make(kind: str, **changes: object) -> Pair:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graph, "convert", convert_once)
            return tiny.exported(kind, tmp_path_factory.mktemp("models") / kind, **changes)

    return make


@pytest.fixture(scope="session")
def both(pair: Callable[..., Pair]) -> Pair:
    """A tiny Llama, there and here."""
    return pair("llama")


@pytest.fixture(scope="session")
def ours(both: Pair) -> fastgen.CausalLM:
    return both[1]


@pytest.fixture
def world(hub: fake_hub.Hub, tmp_path: Path) -> fake_hub.World:
    """Somebody who uses the `hub` of the module."""
    hub.asked.clear()
    return fake_hub.World(hub, tmp_path)


@pytest.fixture
def always_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt lookup guesses at every step but the first, whether that pays or not."""
    monkeypatch.setattr(
        lookup.Payoff, "allowed", lambda self, remaining: remaining if self.plain else 0
    )
