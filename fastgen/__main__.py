"""The command line: export, generate, chat, info. Every knob of `Params` is a flag of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

import fastgen
from fastgen.hub import PRECISION
from fastgen.params import Params, resolve

QUIET_EXIT = 130  # Ctrl-C, as shells count it


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
            options["type"] = JSON
        command = click.option(flag, **options)(command)
    return command


class _Json(click.ParamType[Any]):
    """A JSON value; what is not JSON is taken as text."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError:
            return value


JSON = _Json()


def _given(knobs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in knobs.items() if value is not None and value != ()}


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Errors that a user can mend are one line; nothing else is hidden."""
    try:
        yield
    except BrokenPipeError as error:
        _drop_output()
        raise click.exceptions.Exit(0) from error
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        raise click.UsageError(place + _one_line(error.strerror or error)) from error
    except ValueError as error:
        raise click.UsageError(_one_line(error)) from error


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _drop_output() -> None:
    """Nobody reads any more: what is still buffered would raise again while Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    default="fp32",
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
def export(
    model: str, out: Path | None, precision: str, cache_precision: str, force: bool,
    allow_mismatch: bool, max_kl: float | None, min_top1: float | None, calibration: Path | None,
    revision: str | None,
) -> None:  # fmt: skip
    """Export MODEL, a hub id or a transformers directory, to the model directory OUT.

    Needs torch and transformers (pip install 'fastgen[export]'); running the result does not.
    OUT is by default the model's name and its precisions, such as distilgpt2-fp32, or
    distilgpt2-fp32-kv-int8.
    """
    with _clear_errors():
        try:
            from fastgen.export import pipeline
        except ImportError as error:
            raise ValueError(
                f"exporting needs torch and transformers: pip install 'fastgen[export]' ({error})"
            ) from error
        name = Path(os.path.abspath(model)).name  # of a directory's path, or the end of a hub id
        cache = "" if cache_precision == "fp32" else f"-kv-{cache_precision}"
        pipeline.export(
            model,
            out or Path(f"{name}-{precision}{cache}"),
            precision=precision,
            cache_precision=cache_precision,
            force=force,
            allow_mismatch=allow_mismatch,
            revision=revision,
            calibration=calibration,
            tolerance=pipeline.tolerance(precision, max_kl, min_top1, cache_precision),
        )


@cli.command()
@click.argument("prompt", required=False)
@click.option("--model", "-m", help="model directory or hub id [default: the embedded demo model]")
@click.option("--file", "-f", type=click.Path(path_type=Path), help="read the prompt from a file")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object a sequence")
@click.option("--threads", type=int, help="threads of a step [default: physical cores]")
@knob_flags
def generate(
    prompt: str | None, model: str | None, file: Path | None, as_json: bool, threads: int | None,
    **knobs: Any,
) -> None:  # fmt: skip
    """Continue PROMPT; without one it is read from --file or standard input."""
    with _clear_errors():
        text = _prompt(prompt, file)
        loaded = _load(model, threads)
        knobs = {"max_new_tokens": 64} | _given(knobs) if _open_ended(knobs) else _given(knobs)
        if as_json:
            for line in _records(loaded, text, knobs):
                click.echo(json.dumps(line, ensure_ascii=False))
        elif _several(loaded, knobs):
            texts = loaded.complete(text, **knobs)
            for one in [texts] if isinstance(texts, str) else texts:
                click.echo(text + one)
        else:
            click.echo(text, nl=False)
            for token in loaded.stream(text, **knobs):
                click.echo(token.text, nl=False)
                sys.stdout.flush()
            click.echo()


def _open_ended(knobs: dict[str, Any]) -> bool:
    return knobs.get("max_new_tokens") is None and knobs.get("max_length") is None


def _several(loaded: fastgen.CausalLM, knobs: dict[str, Any]) -> bool:
    """Whether there is no one text that grows: beams, or more sequences than one."""
    params = resolve(loaded.generation_config.to_dict(), None, knobs)
    return params.num_beams > 1 or params.num_return_sequences > 1


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
        click.echo("fastgen: no --model given, using the embedded demo model", err=True)
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
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def info(directory: Path | None, as_json: bool) -> None:
    """Say what a model DIRECTORY holds and what its export found (default: the demo model)."""
    from fastgen import hub
    from fastgen.model import INFO, ModelInfo

    with _clear_errors():
        place = hub.directory(directory)
        found = ModelInfo.read(place)
        said = json.loads((place / INFO).read_text(encoding="utf-8"))
        report = place / "report.json"
        checked = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
        if as_json:
            click.echo(json.dumps(said | {"report": checked}, ensure_ascii=False, indent=2))
            return
        size = sum(found.files.values())
        limit = found.max_length or "any number of"
        lines = {
            "model": f"{said.get('name', place.name)} ({found.model_type})",
            "weights": f"{said.get('parameters', 0):,}",
            "precision": found.precision,
            "size": f"{size / 1e6:,.1f} MB in {len(found.files)} files",
            "vocabulary": f"{found.vocab_size:,} tokens",
            "context": f"{limit} positions",
            "layers": f"{len(found.layers)} with keys and values",
            "cache": f"{found.cache_dtype}, {found.cache_bytes:,} bytes a token",
            "tokenizer": "yes" if (place / "tokenizer.json").is_file() else "no (ids only)",
            "exported by": f"fastgen {said.get('fastgen', '?')}",
        } | _checked(checked)
        for name, value in lines.items():
            click.echo(f"{name:<12} {value}")


def _checked(report: dict[str, Any]) -> dict[str, str]:
    if not report:
        return {"report": "none"}
    logits, greedy = report["logits"], report["greedy"]
    found = {
        "logits": f"max difference {logits['max_difference']:.1e} of the largest, "
        f"KL {logits['kl']:.1e}, top-1 {logits['top1']:.2%}",
        "greedy": f"{greedy['same']} of {greedy['tokens']} tokens as the original",
    }
    if "quality" in report:  # what a quantised model costs, on text
        found["text"] = _quality(report["quality"])
    if "cache" in report and report["precision"] != "fp32":  # what the cache's part of that is
        found["cache alone"] = _quality(report["cache"]["quality"])
    return found | {"mismatch": "; ".join(report["mismatch"]) or "none"}


def _quality(text: dict[str, Any]) -> str:
    return (
        f"perplexity {text['perplexity']:.3f} against {text['reference_perplexity']:.3f}, "
        f"KL {text['kl']:.1e}, top-1 {text['top1']:.2%}"
    )


def main() -> None:
    """Run the command line; a broken pipe and Ctrl-C end it quietly."""
    try:
        code = cli.main(standalone_mode=False, prog_name="fastgen")
        sys.stdout.flush()
    except click.exceptions.Abort:
        sys.exit(QUIET_EXIT)
    except KeyboardInterrupt:
        sys.exit(QUIET_EXIT)
    except BrokenPipeError:
        _drop_output()
        sys.exit(0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"fastgen: {error.format_message()}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
