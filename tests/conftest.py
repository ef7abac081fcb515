"""Models that the tests share: each is built and exported once, at most."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"  # tests that want a hub start one of their own
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import tiny
import torch
import transformers
from transformers import PreTrainedModel

import fastgen
from fastgen import lookup

torch.set_num_threads(1)  # more only wait for each other on models this small
transformers.logging.set_verbosity_error()

Pair = tuple[PreTrainedModel, fastgen.CausalLM]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """`pair(kind, **config changes)`: a tiny transformers model and its export, loaded."""

    @functools.cache
    def make(kind: str, **changes: object) -> Pair:
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
def always_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt lookup guesses at every step but the first, whether that pays or not."""
    monkeypatch.setattr(
        lookup.Payoff, "allowed", lambda self, remaining: remaining if self.plain else 0
    )
