"""The command line: export, generate, tune, info. Every knob of `Params` is a flag of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

import fastgen
from fastgen import bounds, extras
from fastgen.hub import CACHE_PRECISION, PRECISION, kind
from fastgen.interrupt import QUIET_EXIT, ended_at_once
from fastgen.model import ModelInfo
from fastgen.params import Params, resolve
from fastgen.tune import Workload

MOST = 10**9  # rows, tokens and rounds that `tune` takes for a wish, not a slip


def knob_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` one flag for every knob; those that are not set stay None."""
    for knob in reversed(dataclasses.fields(Params)):
        flag, default = "--" + knob.name.replace("_", "-"), knob.default
        shown = "" if default is None else f" [default: {str(default).lower()}]"
        options: dict[str, Any] = {"default": None, "help": knob.metadata["help"] + shown}
        kind = str(knob.type)
        if kind == "bool":
            flag = f"{flag}/--no-{flag[2:]}"
        elif kind.removesuffix(" | None") in ("int", "float"):
            options["type"] = {"int": int, "float": float}[kind.removesuffix(" | None")]
        elif kind == "tuple[str, ...] | None":
            options["multiple"] = True
            options["default"] = ()
        else:
            options |= {"type": _json, "metavar": "JSON"}
        command = click.option(flag, **options)(command)
    return command


def _json(value: str) -> Any:
    """What a JSON text says; what is not JSON is taken as text."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _as_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: it has no NaN and no Infinity, null stands for them."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _given(knobs: dict[str, Any]) -> dict[str, Any]:
    """The knobs that were set.

    Raises:
        ValueError: a text in one is not Unicode: the arguments were not UTF-8.
    """
    given = {name: value for name, value in knobs.items() if value is not None and value != ()}
    for name, value in given.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not UTF-8, got {value!r}") from error
    return given


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Errors that a user can mend are one line; nothing else is hidden."""
    try:
        yield
    except BrokenPipeError as error:
        raise click.exceptions.Exit(0) from error
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        raise click.UsageError(place + _one_line(error.strerror or error)) from error
    except MemoryError as error:
        raise click.UsageError(_one_line(f"not enough memory: {error}")) from error
    except ValueError as error:
        raise click.UsageError(_one_line(error)) from error


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _say(line: str) -> None:
    """A line on stderr."""
    with contextlib.suppress(OSError):  # nobody can be told; the exit code says it too
        click.echo(line, err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(fastgen.__version__, prog_name="fastgen")
def cli() -> None:
    """Run small language models on a CPU: transformers' generate, without torch."""


@cli.command()
@click.argument("model")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--precision", default=PRECISION, show_default=True, help="fp32, int8 or int4")
@click.option(
    "--cache-precision",
    default=CACHE_PRECISION,
    show_default=True,
    help="of keys and values: fp32, or int8 in a quarter of the memory",
)
@click.option("--force", is_flag=True, help="replace OUT if it is a model directory")
@click.option("--allow-mismatch", is_flag=True, help="keep an export that differs too much")
@click.option("--max-kl", type=float, help="KL divergence allowed [default: by precision]")
@click.option("--min-top1", type=float, help="share of equal likeliest tokens that is asked")
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="text to quantise and measure on"
)
@click.option("--revision", help="branch, tag or commit of a hub repository")
@click.option("--adapter", help="merge this adapter (PEFT) first: a directory or a hub id")
def export(
    model: str, out: Path | None, precision: str, cache_precision: str, force: bool,
    allow_mismatch: bool, max_kl: float | None, min_top1: float | None, calibration: Path | None,
    revision: str | None, adapter: str | None,
) -> None:  # fmt: skip
    """Export MODEL, a hub id or a transformers directory, to the model directory OUT.

    MODEL may be an adapter (PEFT), which is merged into the model that it belongs to.

    Needs torch and transformers (the extra `export`); running the result does not.
    OUT is by default the model's name and its precisions, such as distilgpt2-int8, or
    distilgpt2-int8-kv-int8. What was compared and found is printed as a table, which
    `fastgen info OUT` shows again.
    """
    with _clear_errors():
        try:
            with ended_at_once():
                from fastgen.export import pipeline
        except ImportError as error:
            raise ValueError(
                f"exporting needs torch and transformers: {extras.install('export')} ({error})"
            ) from error
        from fastgen.report import REPORT, table

        name = Path(os.path.abspath(model)).name  # of a directory's path, or the end of a hub id
        made = pipeline.export(
            model,
            out or Path(f"{name}-{kind(precision, cache_precision)}"),
            precision=precision,
            cache_precision=cache_precision,
            force=force,
            allow_mismatch=allow_mismatch,
            revision=revision,
            adapter=adapter,
            calibration=calibration,
            tolerance=pipeline.tolerance(precision, max_kl, min_top1, cache_precision),
        )
        click.echo(table(json.loads((made / REPORT).read_text(encoding="utf-8"))))


@cli.command()
@click.argument("prompt", required=False)
@click.option("--model", "-m", help="model directory or hub id [default: the embedded demo model]")
@click.option("--file", "-f", type=click.Path(path_type=Path), help="read the prompt from a file")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="print one JSON object a sequence; null is what is not finite",
)
@click.option("--threads", type=int, help="threads of a step [default: physical cores]")
@click.option(
    "--prefix-cache", type=click.Path(path_type=Path),
    help="keep prompts' keys and values in this file: a later prompt that starts alike is faster",
)  # fmt: skip
@knob_flags
def generate(
    prompt: str | None, model: str | None, file: Path | None, as_json: bool, threads: int | None,
    prefix_cache: Path | None, **knobs: Any,
) -> None:  # fmt: skip
    """Continue PROMPT; without one it is read from --file or standard input."""
    with _clear_errors():
        text = _prompt(prompt, file)
        with _kept(prefix_cache) as cache:
            loaded = _load(model, threads)
            wanted = _given(knobs)
            if _open_ended(wanted):
                wanted["max_new_tokens"] = 64
            several = _several(loaded, wanted)
            wanted["prefix_cache"] = cache
            if as_json:
                for record in _records(loaded, text, wanted):
                    click.echo(_as_json(record))
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
    """What a file keeps of earlier prompts, if there is one; it is brought up to date after.

    Raises:
        ValueError: it is no such file, or could not be written afterwards.
    """
    if file is None:
        yield None
        return
    if file.exists() and not file.is_file():
        raise ValueError(f"--prefix-cache must be a file, {file} is something else")
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        reason = _one_line(error.strerror or error)
        raise ValueError(f"--prefix-cache {file} cannot be written: {reason}") from error
    cache = fastgen.PrefixCache.load(file) if file.exists() else fastgen.PrefixCache()
    yield cache
    cache.save(file)


def _open_ended(knobs: dict[str, Any]) -> bool:
    return knobs.get("max_new_tokens") is None and knobs.get("max_length") is None


def _several(loaded: fastgen.CausalLM, knobs: dict[str, Any]) -> bool:
    """Whether there is no one text that grows: beams, or more sequences than one."""
    params = resolve(loaded.generation_config.to_dict(), None, knobs)
    return max(params.num_beams, params.num_beam_groups, params.num_return_sequences) > 1


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ValueError("pass the prompt as an argument or with --file, not both")
    if file is not None:
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


def _load(model: str | None, threads: int | None) -> fastgen.CausalLM:
    if model is None:
        _say("fastgen: no --model given, using the embedded demo model")
    return fastgen.load(model, threads=threads)


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


@cli.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print JSON; null is what is not finite")
@click.option("--verify", is_flag=True, help="compare every file, weights too, with its digest")
def info(directory: Path | None, as_json: bool, verify: bool) -> None:
    """Say what a model DIRECTORY holds and what its export found (default: the demo model)."""
    from fastgen import hub, jsonfile
    from fastgen.model import INFO, ModelInfo
    from fastgen.report import REPORT, table
    from fastgen.tuning import Tuning, read

    with _clear_errors():
        place = hub.directory(directory)
        found = ModelInfo.verify(place) if verify else ModelInfo.read(place)
        report = jsonfile.read(place / REPORT)
        if as_json:
            click.echo(_as_json(jsonfile.read(place / INFO) | {"report": report}, indent=2))
            return
        compared = f"\nbeside the original:\n{table(report)}" if report else "report       none"
        size = sum(found.files.values())
        tuned = read(place)
        limit = found.max_length or "any number of"
        lines = {
            "model": f"{found.name or place.name} ({found.model_type})",
            "weights": f"{found.parameters:,}",
            "precision": found.precision,
            "size": f"{size / 1e6:,.1f} MB in {len(found.files)} files",
            "vocabulary": f"{found.vocab_size:,} tokens",
            "context": f"{limit} positions",
            "layers": f"{len(found.layers)} with keys and values",
            "cache": f"{found.cache_dtype}, {found.cache_bytes:,} bytes a token",
            "tokenizer": "yes" if (place / "tokenizer.json").is_file() else "no (ids only)",
            "runs with": str(tuned) if tuned else f"{Tuning()} (not tuned)",
            "exported by": f"fastgen {found.exporter}",
        }
        if found.states:
            lines["states"] = f"{len(found.states)} besides, {found.state_bytes:,} bytes a row"
        if verify:
            lines["verified"] = "every file has the bytes that were exported"
        for name, value in lines.items():
            click.echo(f"{name:<12} {value}")
        click.echo(compared)


@cli.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--rows", default=1, show_default=True, help="rows that are generated together")
@click.option("--prompt", default=64, show_default=True, help="tokens of the prompt")
@click.option("--new", default=32, show_default=True, help="tokens that are generated")
@click.option("--rounds", default=5, show_default=True, help="how often each is timed")
@click.option("--max-kl", default=0.02, show_default=True, help="KL divergence allowed")
@click.option("--min-top1", default=0.9, show_default=True, help="equal likeliest tokens asked")
def tune(
    directories: tuple[Path, ...], rows: int, prompt: int, new: int, rounds: int, max_kl: float,
    min_top1: float,
) -> None:  # fmt: skip
    """Measure what is fastest on this machine: threads, kernels, and which of DIRECTORIES.

    What is best for a model directory is saved in it and used from then on, on this machine only.
    Given several exports of one model, say fp32, int8 and int4, the fastest is named whose report
    keeps the accuracy budget (--max-kl, --min-top1).
    """
    from fastgen import tune, tuning

    with _clear_errors():
        for name, value in {"rows": rows, "prompt": prompt, "new": new, "rounds": rounds}.items():
            if value < 1:
                raise ValueError(f"--{name} must be positive, got {value}")
            if value > MOST:
                raise ValueError(f"--{name} must be at most {MOST:,}, got {value}")
        work = Workload(rows, prompt, new)
        for place in directories:
            _check_room(place, work)
        every = {place: tune.candidates(place) for place in dict.fromkeys(directories)}
        allowed = [place for place in every if tune.within(place, max_kl, min_top1)]
        found = [one for place in every for one in every[place]]
        steps = rounds * len(found)
        with click.progressbar(length=steps, label="measuring", file=sys.stderr) as bar:
            tune.measure(found, work, rounds, lambda: bar.update(1))
        chosen = [tune.best(ones, new) for ones in every.values()]
        for one in chosen:
            tuning.write(one.directory, one.tuning)
        for line in tune.table(found, chosen, new):
            click.echo(line)
        if len(every) > 1:
            fastest = [one for one in chosen if one.directory in allowed]
            if not fastest:
                raise ValueError(f"no model has a KL divergence within {max_kl}: allow more")
            one = min(fastest, key=lambda one: one.seconds(new))
            click.echo(f"fastest within the budget: {one.directory} ({one.tuning})")


def _check_room(directory: Path, work: Workload) -> None:
    """Raise a ValueError if what is timed cannot be in this machine's memory."""
    info = ModelInfo.read(directory)
    tokens = work.prompt + work.new
    tokens = tokens if info.max_length is None else min(tokens, info.max_length)
    parts = {
        "keys and values": work.rows * tokens * info.cache_bytes,
        "ids": work.rows * tokens * 8,
        "logits": work.rows * info.vocab_size * 2 * bounds.FLOAT,
    }
    bounds.check(parts, f"lower --rows {work.rows}, --prompt {work.prompt} or --new {work.new}")


def run(arguments: list[str]) -> int:
    """Run a command line; returns the exit code. What went wrong is one line on stderr."""
    try:
        code = cli.main(arguments, standalone_mode=False, prog_name="fastgen")
    except click.exceptions.Abort:  # which click makes of Ctrl-C
        return QUIET_EXIT
    except click.exceptions.NoArgsIsHelpError as error:
        _say(error.format_message())
        return 2
    except click.ClickException as error:
        _say(f"fastgen: {_one_line(error.format_message())}")
        return 2
    return code if isinstance(code, int) else 0
