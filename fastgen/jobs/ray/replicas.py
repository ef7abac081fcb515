"""The service on Ray Serve (extra `ray`): replicas of the same application, behind one address."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fastgen.generator import renamed_prompts
from fastgen.jobs.ray import node
from fastgen.serve import app
from fastgen.system import extras

WAITING = 64  # requests that a replica has at a time, running or waiting; more wait at the proxy


def deployment(
    model: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    *,
    threads: int | None = None,
    prefill_precision: str | None = None,
    options: dict[str, Any] | None = None,
    prompts: str | None = None,
    packed: bool = False,
    **settings: Any,
) -> Any:
    """A Ray Serve application: `serve.run(deployment("SmolLM2-135M-Instruct-int8"))`.

    Each replica is one engine with the CPUs that Ray gives it, and answers as `fastgen serve`
    does. A replica that dies is replaced; one whose engine has failed says so to Ray.

    Args:
        model: a directory, a hub id, or the URI of a directory that pyarrow can read; None for
            the demo model. Or several of these, by the names that clients see: each replica loads
            one when it is first asked for it. What is not on a node is fetched there once.
        threads: of a step; None for the CPUs that Ray gives the replica.
        prefill_precision: see `fastgen.load`.
        options: of `serve.deployment`, such as `{"num_replicas": 4, "ray_actor_options":
            {"num_cpus": 2}}`, besides `max_ongoing_requests=64`.
        prompts: the old name of `prefill_precision`.
        packed: see `fastgen.load`: the replicas of a node share the model's memory.
        settings: of `fastgen.serve.app`, such as `name` or `api_key`.

    Raises:
        ValueError: Ray Serve is not installed, or an option that cannot be.
    """
    prefill_precision = renamed_prompts(prompts, prefill_precision)
    try:
        from fastapi import FastAPI
        from ray import serve
    except ImportError as error:
        raise ValueError(f"replicas need Ray: {extras.install('ray')} ({error})") from error

    class Replica:
        """A replica: it answers Ray's own calls, and the application answers requests."""

        app: Any  # Ray's: what `made` returns

        async def check_health(self) -> None:
            """Raise an error where the engine has failed: Ray replaces the replica."""
            if not self.app.state.models.serving:
                raise RuntimeError("the engine has ended")

    def made() -> FastAPI:
        there: Any = (
            {name: node.directory(one) for name, one in model.items()}
            if isinstance(model, Mapping)
            else node.directory(model)
        )
        run = {"threads": threads or node.threads(), "prefill_precision": prefill_precision}
        run |= {"packed": packed, "max_bytes": node.memory()}
        return app(there, **{**run, **settings})

    wanted = {"max_ongoing_requests": WAITING, **(options or {})}
    return serve.deployment(**wanted)(serve.ingress(made)(Replica)).bind()
