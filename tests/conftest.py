"""Models that the tests share: each is built and exported once, at most."""

from __future__ import annotations

import copy
import fcntl
import functools
import hashlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # tests that want a hub start one of their own
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import fake_hub
import numpy_model
import pytest
import tiny

import fastgen
from fastgen.engine import speculative
from fastgen.store.hub import DEMO
from fastgen.system import interrupt

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import real

if TYPE_CHECKING:  # the core tests do without
    import onnx_ir
    from transformers import PreTrainedModel

Pair = tuple[Any, fastgen.CausalLM]  # of transformers' model and ours
Convert = Callable[..., "onnx_ir.Model"]
CORE = "core"  # the mark of tests that import no torch, no transformers and no export
WORKERS, FEW = 2, 8  # processes; files that one of them runs sooner than two have started
# Files that take longest: they are run first, so that the workers end together.
LONGEST = (
    "test_real", "test_requirements", "test_export", "test_onnx_folder", "test_quantize",
    "test_states", "test_attention", "test_build", "test_experts", "test_cluster", "test_window",
    "test_beam", "test_generate", "test_cli", "test_rope", "test_prefix_cache", "test_repeat",
    "test_parity", "test_architectures", "test_serve_api", "test_serve_page", "test_doors",
    "test_docs", "test_hub", "test_text", "test_properties", "test_chat_command", "test_jobs",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The workers of `-n auto`, which is the default: none where few files are run."""
    paths = (config.invocation_params.dir / argument.split("::")[0] for argument in config.args)
    files = [
        file for path in paths for file in (path.rglob("test_*.py") if path.is_dir() else [path])
    ]
    return WORKERS if len(files) > FEW and config.option.markexpr != CORE else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files without a core test where only these are run: others import torch."""
    if config.option.markexpr != CORE or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text(encoding="utf-8")
    return re.search(r"\bmark\.core\b|\bcore\(", text) is None or None


@pytest.fixture(scope="module", autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    """Put back the signal handlers that a library (Ray) has replaced in a module's tests."""
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, *interrupt.ENDING)}
    yield
    for number, handler in usual.items():
        if handler is not None:  # None: of a library in C, which Python cannot put back
            signal.signal(number, handler)


LARGE = 1 << 20  # weights of a model whose graph is not kept: some tests measure memory


@pytest.fixture(scope="session")
def traced() -> Convert:
    """`graph.convert` as it is."""
    from fastgen.export.trace import graph

    return graph.convert


@pytest.fixture(scope="session", autouse=True)
def convert_once(request: pytest.FixtureRequest) -> Iterator[Convert | None]:
    """`graph.convert` of one model, which takes ten seconds, is run once; each call has its copy.

    `converted_anew` is for tests that put something else in the place of what it calls. Where no
    test file has imported torch and only core tests ask for a `pair`, nothing is exported.
    """
    others = (item for item in request.session.items if not item.get_closest_marker(CORE))
    if "torch" not in sys.modules and not any("pair" in item.fixturenames for item in others):
        yield None
        return
    import torch
    import transformers

    from fastgen.export.trace import graph, stored

    torch.set_num_threads(1)  # more only wait for each other on models this small
    transformers.logging.set_verbosity_error()
    traced: Convert = request.getfixturevalue("traced")
    made: dict[bytes, onnx_ir.Model] = {}

    def convert(model: PreTrainedModel, kept: graph.Kept, whole: bool = False) -> onnx_ir.Model:
        tensors = [*model.parameters(), *model.buffers()]
        in_their_own_type = any(isinstance(one.data, stored.Stored) for one in tensors)
        if in_their_own_type or sum(one.numel() for one in tensors) > LARGE:
            return traced(model, kept, whole).clone()  # which files show
        key = hashlib.sha256(repr((_about(model), kept, whole)).encode())
        for one in tensors:
            key.update(one.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        if key.digest() not in made:
            made[key.digest()] = traced(copy.deepcopy(model), kept, whole)
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
    """The plain attributes of all modules: what a model's graph depends on but for numbers."""
    plain = int | float | str | tuple | None
    found: list[Any] = [{k: v for k, v in model.config.to_dict().items() if k not in NOTES}]
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k not in NOTES}
        found.append((name, type(module), own))
    return found


@pytest.fixture
def converted_anew(traced: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph is traced, whatever was traced before."""
    from fastgen.export.trace import graph

    monkeypatch.setattr(graph, "convert", traced)


# Models that tests share, with the defaults that they had when they were made.
shared: list[tuple[str, Any, Any]] = []


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """`pair(kind, **config changes)`: a tiny transformers model and its export, loaded.

    Kinds of `numpy_model`, and "demo", have no transformers model: they are for core tests. A test
    that sets defaults loads a model of its own: `fastgen.load(ours.directory)`.
    """

    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # the workers share what one of them has exported

    @functools.cache
    def make(kind: str, **changes: Any) -> Pair:
        if kind in numpy_model.KINDS:
            return None, numpy_model.NumpyLM(**numpy_model.KINDS[kind], **changes)
        if kind == "demo":
            return None, fastgen.load(DEMO)
        name = hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:8]
        directory = place / "models" / name / kind
        directory.parent.mkdir(parents=True, exist_ok=True)
        with directory.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            made = tiny.exported(kind, directory, **changes)
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


@pytest.fixture(scope="session")
def real_gguf() -> Callable[[str], Path]:
    """`real_gguf(name)`: a GGUF file of weights that others trained; skips where there is none."""

    def find(name: str) -> Path:
        try:
            return real.gguf_file(name)
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
