"""fastgen generate: continue a prompt."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import fastgen
from fastgen.commands.knobs import given, knob_flags
from fastgen.commands.models import load, model_option, run_options
from fastgen.commands.say import clear_errors, in_json
from fastgen.inputs.lengths import default_length
from fastgen.inputs.params import resolve
from fastgen.store import files, jsonfile


@click.command()
@click.argument("prompt", required=False)
@model_option
@click.option("--file", "-f", type=click.Path(path_type=Path), help="read the prompt from a file")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="print one JSON object a sequence; null is what is not finite",
)
@run_options
@click.option(
    "--prefix-cache",
    type=click.Path(path_type=Path),
    help="keep prompts' keys and values in this file: a later prompt that starts alike is faster, "
    "and its text the same (with int8 keys and values a token may change)",
)
@knob_flags
def generate(
    prompt: str | None,
    model: str | None,
    file: Path | None,
    as_json: bool,
    threads: int | None,
    prefill_precision: str | None,
    packed: bool,
    prefix_cache: Path | None,
    **knobs: Any,
) -> None:
    """Continue PROMPT; without one it is read from --file or standard input."""
    with clear_errors():
        text = _prompt(prompt, file)
        with _kept(prefix_cache) as cache:
            loaded = load(model, threads, prefill_precision, packed)
            wanted = given(knobs)
            new = default_length("text", wanted)
            if new is not None:
                wanted = {"max_new_tokens": new} | wanted
            several = _several(loaded, wanted)
            wanted["prefix_cache"] = cache
            if as_json:
                for record in _records(loaded, text, wanted):
                    click.echo(in_json(record))
            elif several:
                texts = loaded.complete(text, **wanted)
                for one in [texts] if isinstance(texts, str) else texts:
                    click.echo(text + one)
            else:
                tokens = loaded.stream(text, **wanted)  # which checks the prompt and the knobs
                click.echo(text, nl=False)
                for token in tokens:
                    click.echo(token.text, nl=False)
                click.echo()


@contextlib.contextmanager
def _kept(file: Path | None) -> Iterator[fastgen.PrefixCache | None]:
    """The prefix cache of a file, if there is one; the file is brought up to date after.

    Raises:
        ValueError: it is no such file, or could not be written afterwards.
    """
    if file is None:
        yield None
        return
    files.check_writable("--prefix-cache", file)
    cache = fastgen.PrefixCache.load(file) if file.exists() else fastgen.PrefixCache()
    yield cache
    cache.save(file)


def _several(loaded: fastgen.CausalLM, knobs: dict[str, Any]) -> bool:
    """True for beams and for several sequences: there is no one text that grows."""
    params = resolve(loaded.generation_config.to_dict(), None, knobs)
    return max(params.num_beams, params.num_beam_groups, params.num_return_sequences) > 1


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ValueError("pass the prompt as an argument or with --file, not both")
    if file is not None:
        jsonfile.check_fetched(file)
        content = file.read_bytes()
    elif prompt is None or prompt == "-":
        if prompt is None and sys.stdin.isatty():
            raise ValueError("no prompt: pass it as an argument, with --file or on standard input")
        content = sys.stdin.buffer.read().rstrip(b"\r\n")
    else:
        content = os.fsencode(prompt)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the prompt is not UTF-8: {error.reason} at byte {error.start}"
        ) from error
    if not text:
        raise ValueError("the prompt is empty")
    return text


def _records(
    loaded: fastgen.CausalLM, text: str, knobs: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    rows: dict[int, list[fastgen.Token]] = {}
    for token in loaded.stream(text, **knobs):
        rows.setdefault(token.row, []).append(token)
    for tokens in rows.values():
        record: dict[str, Any] = {
            "prompt": text,
            "text": "".join(token.text for token in tokens),
            "ids": [token.id for token in tokens],
            "finish_reason": tokens[-1].finish_reason,
        }
        if knobs.get("top_logprobs"):
            record["top_logprobs"] = [token.top_logprobs for token in tokens]
        yield record
