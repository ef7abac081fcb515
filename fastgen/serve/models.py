"""The models of a service: each with an engine of its own, loaded when it is first asked for."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastgen import first_use
from fastgen.engine.prefix_cache import MAX_BYTES, PrefixCache
from fastgen.engine.schedule import memory_shares
from fastgen.generator import CausalLM
from fastgen.sampling import trial
from fastgen.serve.limits import RequestLimits
from fastgen.serve.metrics import Metrics, ModelMetrics
from fastgen.serve.refused import Refused, Stopping, refusal
from fastgen.serve.service import Service
from fastgen.store.model_info import ModelInfo
from fastgen.system import memory

Source = CausalLM | str | os.PathLike[str]
LOOKS = 8  # at what is idle, in the time after which that is unloaded


class ServedModel:
    """One of the models, loaded or not.

    Args:
        name: that clients see.
        source: the model, which then stays loaded, or what names it (see `fastgen.load`): it is
            fetched, and exported if need be, at once, and loaded when it is asked for.
        metrics: its counts, and what is kept of prompts while it is loaded.
        make: opens it.

    Attributes:
        source: the model, or its directory.
        info: what its directory says of it.
        service: while it is loaded, else None.
        users: requests that use it, or wait until it is loaded.

    Raises:
        ModelError: there is no usable model of that name.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        metrics: ModelMetrics,
        make: Callable[[ServedModel], Service],
    ) -> None:
        self.name, self.metrics = name, metrics
        self.source: CausalLM | Path
        if isinstance(source, CausalLM):
            self.source, self.info = source, source.model.info
        else:
            self.source = first_use.directory(source)
            self.info = ModelInfo.read(self.source)
        self.service: Service | None = None
        self.users = 0
        self._make = make
        self._used = time.monotonic()
        self._loading: asyncio.Task[Service] | None = None

    def open(self) -> None:
        """Load it, here and now; its engine is not started yet.

        Raises:
            ModelError: it cannot be loaded.
            ValueError: a setting that cannot be.
        """
        self.service = self._make(self)

    async def loaded(self) -> Service:
        """Its service; whoever comes while it is being loaded waits for the same.

        Raises:
            Refused: it cannot be loaded. The next request tries again.
        """
        if self.service is not None:
            return self.service
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
            self._loading.add_done_callback(_seen)  # perhaps nobody waits for it any more
        return await asyncio.shield(self._loading)

    async def _load(self) -> Service:
        try:
            service = await asyncio.to_thread(self._make, self)
            await service.start()
        except Exception as error:  # of the files, of onnxruntime, or no memory
            self.metrics.watch(None)
            raise Refused(
                500, f"{self.name} cannot be loaded: {error}", code="model_load_failed"
            ) from error
        finally:
            self._loading = None
        self.service = service
        return service

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Keep it loaded as long as this lasts."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            self._used = time.monotonic()

    def is_idle(self, seconds: float) -> bool:
        """True if it can be unloaded, and nobody has used it for so long."""
        there = self.service is not None and not self.users
        stays = isinstance(self.source, CausalLM)
        return there and not stays and time.monotonic() - self._used >= seconds

    async def unload(self) -> None:
        """Give its memory back. A request that comes meanwhile loads it again."""
        service, self.service = self.service, None
        if service is None:
            return
        self.metrics.watch(None)
        await service.close(0)
        del service
        self.metrics.prefix_cache.clear()
        await asyncio.to_thread(_collect)

    async def drain(self, grace: float) -> None:
        """End it, once what runs is done or `grace` seconds are over."""
        if self._loading is not None:
            await asyncio.wait([self._loading])
        if self.service is not None:
            await self.service.close(grace)


class Models:
    """The models of a service by their names.

    Args:
        sources: by the names that clients see: models, or what names models that are loaded when
            they are first asked for (see `ServedModel`).
        default: the name of the one that is meant where a request names none, and that is loaded
            at once; None for the first.
        unload_after: minutes without a request after which a model is unloaded; None for never.
        threads, prefill_precision, packed: of those that are loaded here (see `fastgen.load`).
        limits: what one request may ask for; None for the defaults.
        grammars: what a new schema, regular expression or grammar may take until it is compiled.
        max_bytes: that the calls of all models may come to hold, an equal share of it each; None
            for a quarter of the machine's memory. What is kept of prompts is divided alike.
        settings: see `Service`.

    Attributes:
        metrics: the counts of all.
        stopping: whether new requests are refused.

    Raises:
        ModelError: there is no usable model of a name, or the default cannot be loaded.
        ValueError: a setting that cannot be.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        default: str | None = None,
        unload_after: float | None = None,
        threads: int | None = None,
        prefill_precision: str | None = None,
        packed: bool = False,
        limits: RequestLimits | None = None,
        grammars: trial.Limits | None = None,
        max_bytes: int | None = None,
        **settings: Any,
    ) -> None:
        if not sources:
            raise ValueError("a service needs a model: none was given")
        if default is not None and default not in sources:
            raise ValueError(f"default must be one of {_listed(sources)}, got {default!r}")
        if unload_after is not None and not 0 < unload_after < float("inf"):
            raise ValueError(f"unload_after must be a number of minutes, got {unload_after}")
        self.limits, self.metrics = limits or RequestLimits(), Metrics()
        self.stopping = False
        self._idle = None if unload_after is None else 60 * unload_after
        self._looking: asyncio.Task[None] | None = None
        self._threads, self._packed = threads, packed
        self._prefill_precision = prefill_precision
        most, buffers = memory_shares(len(sources), max_bytes)
        self._settings = {"max_bytes": most, "max_buffers": buffers, **settings}
        self._settings |= {"limits": self.limits, "grammars": grammars}
        kept = MAX_BYTES // len(sources)
        self._models = {
            name: ServedModel(name, source, self.metrics.of(name, PrefixCache(kept)), self._service)
            for name, source in sources.items()
        }
        self.default = self._models[default or next(iter(sources))]
        self.default.open()

    def _service(self, served: ServedModel) -> Service:
        """Open a model: it is loaded, unless it is there already."""
        model = served.source
        if not isinstance(model, CausalLM):
            model = CausalLM(
                model,
                self._threads,
                prefill_precision=self._prefill_precision,
                packed=self._packed,
            )
        return Service(
            model,
            served.name,
            metrics=served.metrics,
            **self._settings,
        )

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def named(self, name: str | None, exactly: bool = False) -> ServedModel:
        """The model of that name. Where there is only one, requests may call it as they like.

        Args:
            name: None for the default.
            exactly: whether the name counts even where there is only one.

        Raises:
            Refused: there is none of that name.
        """
        found = self.default if name is None else self._models.get(name)
        if found is None and (exactly or len(self._models) > 1):
            raise Refused(
                404,
                f"there is no model {name!r}, only {_listed(self._models)}",
                param="model",
                code="model_not_found",
            )
        return found or self.default

    async def use(self, name: str | None, hold: contextlib.ExitStack) -> Service:
        """The service of a model, loaded if need be; it stays so until `hold` is closed.

        Raises:
            Refused: there is no such model, it cannot be loaded, or the service is being stopped.
        """
        served = self.named(name)
        if self.stopping:
            raise refusal(Stopping())
        hold.enter_context(served.used())
        return await served.loaded()

    @property
    def serving(self) -> bool:
        """True while requests are taken and no engine has failed."""
        loaded = [served.service for served in self if served.service is not None]
        return not self.stopping and all(service.engine.serving for service in loaded)

    async def start(self) -> None:
        """Start the engine of the default; called in the event loop."""
        assert self.default.service is not None
        await self.default.service.start()
        if self._idle is not None:
            self._looking = asyncio.create_task(self._unload_idle(self._idle))

    async def drain(self, grace: float) -> None:
        """Take nothing new; end when all is done, or after `grace` seconds with what is not."""
        self.stopping = True
        if self._looking is not None:
            self._looking.cancel()
        await asyncio.gather(*(served.drain(grace) for served in self))

    async def _unload_idle(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds / LOOKS)
            for served in self:
                if served.is_idle(seconds):
                    await served.unload()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _seen(task: asyncio.Task[Any]) -> None:
    """Look at the error of a task that nobody may wait for."""
    if not task.cancelled():
        task.exception()


def _collect() -> None:
    """Free what was dropped: some of it holds itself, and the allocator keeps most of it."""
    gc.collect()
    memory.trim()
