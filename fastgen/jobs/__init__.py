"""Many rows: files in, files out, on one machine or a cluster.

row         a row as found, and what it became     source      files -> rows
ask         a row -> a prompt and knobs            parquet     tables in and out
generation  asks -> texts, side by side            scoring     rows -> how likely they are
journal     what is done, whatever happens         job         all of it together
node        a model's directory, once a node       cluster     the same on Ray
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen.jobs.cluster import Generate, Score, deployment

__all__ = ["Generate", "Score", "deployment"]


def __getattr__(name: str) -> Any:
    """What is offered, imported when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'fastgen.jobs' has no attribute {name!r}")
    from fastgen.jobs import cluster

    return getattr(cluster, name)
