"""Output of every command in one way: errors in a line, JSON that every reader takes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import click

from fastgen.store import jsonfile


def in_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: it has no NaN and no Infinity, null stands for them."""
    return json.dumps(jsonfile.finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Errors that a user can mend are one line; nothing else is hidden."""
    try:
        yield
    except BrokenPipeError as error:
        raise click.exceptions.Exit(0) from error
    except OSError as error:
        prefix = f"{error.filename}: " if error.filename is not None else ""
        raise click.UsageError(prefix + one_line(error.strerror or error)) from error
    except MemoryError as error:
        raise click.UsageError(one_line(f"not enough memory: {error}")) from error
    except ValueError as error:
        raise click.UsageError(one_line(error)) from error


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def say(line: str) -> None:
    """A line on stderr."""
    with contextlib.suppress(OSError):  # nobody can be told; the exit code says it too
        click.echo(line, err=True)
