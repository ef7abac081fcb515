"""Many rows: files in, files out, on one machine or a cluster.

row         a row as found, and its outcome        source      files -> rows
request     a row -> a prompt and knobs            parquet     tables in and out
openai      a line of OpenAI's -> its answer       scoring     rows -> how likely they are
generation  requests -> texts                      journal     rows that are done, on disk
window      rows that are read ahead               job         all of it together
ray         the same on a cluster
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen.jobs.ray.cluster import Generate, Score
    from fastgen.jobs.ray.replicas import deployment

__all__ = ["Generate", "Score", "deployment"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'fastgen.jobs' has no attribute {name!r}")
    from fastgen.jobs.ray import cluster, replicas

    return getattr(replicas if name == "deployment" else cluster, name)
