"""The common part of `batch` and `score`: a job's flags, its bar, the line at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from fastgen.commands.say import say
from fastgen.system import extras
from fastgen.system.interrupt import QUIET_EXIT

if TYPE_CHECKING:
    from fastgen.jobs.job import RowJob, Work
    from fastgen.jobs.row import Done

SPREAD = ("address", "actors", "cpus", "at_once", "ordered")  # what the flags of a cluster set
SOME_BAD = 1  # the exit code when all is done, and some rows came to nothing


def job_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the flags of a job."""
    for option in reversed(
        (
            click.argument("source", metavar="IN"),
            click.argument("out", metavar="OUT"),
            click.option(
                "--format",
                "kind",
                type=click.Choice(["jsonl", "text", "parquet"]),
                help="of IN [default: by its ending]",
            ),
            click.option(
                "--keep",
                multiple=True,
                metavar="NAME",
                help="a field of IN that OUT has too; '*' for all that mean nothing here",
            ),
            click.option(
                "--restart",
                is_flag=True,
                help="begin anew: replace OUT, and what an earlier job left beside it",
            ),
            click.option("--quiet", is_flag=True, help="no bar, and no count at the end"),
        )
    ):
        command = option(command)
    return command


def spread_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the flags of a cluster."""
    for option in reversed(
        (
            click.option(
                "--ray",
                "address",
                metavar="ADDRESS",
                help="run on a cluster: local, auto or ray://HOST:PORT",
            ),
            click.option(
                "--actors",
                type=click.IntRange(1),
                help="engines on the cluster [default: one on each node]",
            ),
            click.option(
                "--cpus",
                type=click.FloatRange(0, min_open=True),
                help="CPUs, which are threads, of each [default: a node's but one]",
            ),
            click.option(
                "--at-once",
                type=click.IntRange(1),
                help="rows that an engine on the cluster takes at a time [default: 256]",
            ),
            click.option(
                "--ordered",
                is_flag=True,
                help="keep the order on a cluster too (elsewhere it always is)",
            ),
        )
    ):
        command = option(command)
    return command


def on_a_cluster(
    engine: str,
    arguments: dict[str, Any],
    source: str,
    out: str,
    kind: str | None,
    restart: bool,
    quiet: bool,
    flags: dict[str, Any],
) -> None:
    """Run a job on Ray, and say how it went; the exit code is 1 if a row came to nothing."""
    try:
        from fastgen.jobs.ray import cluster, spread
    except ImportError as error:
        raise ValueError(f"--ray needs Ray: {extras.install('ray')} ({error})") from error
    rows = flags.pop("at_once")
    how = spread.Spread(**flags, **({} if rows is None else {"rows": rows}))
    silent = quiet or not sys.stderr.isatty()
    actor = getattr(cluster, engine)
    count, bad = spread.run(how, actor, arguments, source, out, kind, restart, silent)
    if not quiet:
        say(f"fastgen: {count:,} rows, {bad:,} bad")
    if bad:
        raise click.exceptions.Exit(SOME_BAD)


def only_on_a_cluster(flags: dict[str, Any]) -> None:
    """Raise a ValueError for flags of a cluster where there is none."""
    for name, value in flags.items():
        if name != "address" and value not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} needs --ray")


def do(job: RowJob, work: Work, quiet: bool) -> None:
    """Run a job, and say how it went; the exit code is 1 if a row came to nothing."""
    start = time.monotonic()
    rows = tokens = 0
    first: Done | None = None
    try:
        for done in _with_bar(job, job.run(work), quiet):
            rows, tokens = rows + 1, tokens + done.tokens
            if done.bad is not None and first is None:
                first = done
    except KeyboardInterrupt:
        if job.journal is not None:
            say(f"fastgen: stopped; {job.journal.path} has what is done: the same command goes on")
        raise click.exceptions.Exit(QUIET_EXIT) from None
    bad = job.bad
    if not quiet:
        seconds = max(time.monotonic() - start, 1e-9)
        before = f" ({job.skipped:,} of them before)" if job.skipped else ""
        say(
            f"fastgen: {job.skipped + rows:,} rows{before}, {bad:,} bad; {tokens:,} tokens in "
            f"{seconds:.1f} s, {tokens / seconds:,.0f} a second"
        )
    if first is not None:
        say(f"fastgen: the first bad row: {first.row.number}: {first.bad}")
    if bad:
        raise click.exceptions.Exit(SOME_BAD)


def _with_bar(job: RowJob, rows: Iterator[Done], quiet: bool) -> Iterator[Done]:
    """The rows, with a bar on stderr where somebody looks."""
    if quiet or not sys.stderr.isatty():
        yield from rows
        return
    start, tokens = time.monotonic(), 0

    def speed(_: object) -> str:
        return f"{tokens / max(time.monotonic() - start, 1e-9):,.0f} tokens a second"

    left = None if job.total is None else job.total - job.skipped
    with click.progressbar(
        rows, length=left, file=sys.stderr, show_pos=True, item_show_func=speed
    ) as bar:
        for done in bar:
            tokens += done.tokens
            yield done
