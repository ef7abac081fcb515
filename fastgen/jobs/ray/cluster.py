"""The same on Ray (extra `ray`): an engine in each actor, rows from and to what Ray Data takes."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.schedule import MAX_ROWS
from fastgen.generator import CausalLM
from fastgen.inputs import params
from fastgen.jobs.generation import GenerationWork
from fastgen.jobs.ray import node
from fastgen.jobs.request import RowReader
from fastgen.jobs.row import Done, InputRow, as_json
from fastgen.jobs.scoring import ScoringWork
from fastgen.jobs.source import of_line

Columns = dict[str, NDArray[Any]]
NAN = float("nan")
# Columns of numbers, and what they are of a row that came to nothing.
NUMBERS = {"prompt_tokens": 0, "new_tokens": 0, "tokens": 0, "logprob": NAN, "perplexity": NAN}


class RowActor:
    """One engine, and batches of rows that go through it: what Ray Data calls in an actor.

    Attributes:
        model: the loaded model.
        work: what it does with rows.
        given: the columns that it makes, besides "error".
    """

    model: CausalLM
    work: GenerationWork | ScoringWork
    given: list[str]

    def __call__(self, batch: Any) -> Columns:
        """Do the work on a batch.

        Args:
            batch: columns {name: array}, a pandas DataFrame or a pyarrow Table. A row has the
                fields that a line has in `fastgen batch` (or `fastgen score`); one that is None
                or nan it does not have.

        Returns:
            {name: array}, a value for each row, in order: the columns that are kept, as they are,
            and new ones. "error" says why a row came to nothing; else it is None.

        Raises:
            ValueError: a column that means nothing here and is not to be kept.
        """
        table = _columns(batch)
        self.work.check(table)
        kept = {name: values for name, values in table.items() if self.work.is_kept(name)}
        return kept | self.new_columns(self.done(_rows(table)))

    def done(self, rows: Iterable[InputRow]) -> list[Done]:
        """Each row with its outcome, in order."""
        return sorted(self.work.run(rows), key=lambda done: done.row.number)

    def new_columns(self, finished: list[Done]) -> Columns:
        """The outputs as columns."""
        out = {}
        for name in self.given:
            values = [done.output.get(name) for done in finished]
            if name in NUMBERS:
                out[name] = np.array([NUMBERS[name] if v is None else v for v in values])
            else:
                out[name] = _objects(values)
        return out | {"error": _objects([done.bad for done in finished])}


class Generate(RowActor):
    """`fastgen batch` for Ray Data, or for a loop of one's own.

        dataset.map_batches(
            Generate,
            fn_constructor_kwargs={"model": "SmolLM2-135M-Instruct-int8", "max_new_tokens": 32},
            concurrency=4, num_cpus=2, batch_size=256,
        )

    Called with a batch, it adds the columns "text", "finish_reason", "prompt_tokens",
    "new_tokens", "warnings" (None, mostly) and "error"; lists where a row asks for several
    sequences.

    Args:
        model: a directory, a hub id, or the URI of a directory that pyarrow can read; None for
            the demo model. What is not on a node is fetched there once.
        keep: columns to give back besides id, custom_id and metadata; "*" for all that mean
            nothing here.
        seed: of rows that sample and have none of their own: each draws from one that is made of
            this and of what the row says, so that neither its place nor its neighbours matter.
        ids: whether there is a column "ids" of the new tokens.
        max_rows: rows that run together.
        threads: of a step; None for the CPUs that Ray gives the actor, or the physical cores.
        prefill_precision: see `fastgen.load`.
        created: what OpenAI's answers say of when they were made (Unix seconds); None for now.
        prompts: the old name of `prefill_precision`.
        packed: see `fastgen.load`: the actors of a node share the model's memory.
        knobs: the keywords of `generate`, for rows that say nothing else.

    Raises:
        ValueError: an argument, or the model (see `fastgen.load`).
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        keep: Collection[str] = (),
        seed: int = 0,
        ids: bool = False,
        max_rows: int = MAX_ROWS,
        threads: int | None = None,
        prefill_precision: str | None = None,
        created: int | None = None,
        prompts: str | None = None,
        packed: bool = False,
        **knobs: Any,
    ) -> None:
        self.model = CausalLM(
            node.directory(model),
            threads or node.threads(),
            prefill_precision=prefill_precision,
            prompts=prompts,
            packed=packed,
        )
        resolved = params.resolve(self.model.generation_config.to_dict(), None, knobs)
        reader = RowReader(self.model, knobs, keep, seed, ids, created)
        self.work = GenerationWork(reader, max_rows, node.memory())
        self.given = ["text"] if self.model.has_tokenizer else []
        self.given += ["ids"] if ids or not self.model.has_tokenizer else []
        self.given += ["finish_reason", "prompt_tokens", "new_tokens", "warnings"]
        self.given += ["top_logprobs"] if resolved.top_logprobs else []


class Score(RowActor):
    """`fastgen score` for Ray Data, as `Generate` is `fastgen batch`.

    Called with a batch, it adds the columns "logprob", "tokens", "perplexity" and "error".

    Args:
        model, keep, threads, prefill_precision, prompts, packed: see `Generate`.
        tokens: whether there is a column "logprobs" of each token's.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        keep: Collection[str] = (),
        tokens: bool = False,
        threads: int | None = None,
        prefill_precision: str | None = None,
        prompts: str | None = None,
        packed: bool = False,
    ) -> None:
        self.model = CausalLM(
            node.directory(model),
            threads or node.threads(),
            prefill_precision=prefill_precision,
            prompts=prompts,
            packed=packed,
        )
        self.work = ScoringWork(self.model, keep, tokens)
        self.given = ["logprob", "tokens", "perplexity", *(["logprobs"] if tokens else [])]


class OfLines:
    """Lines, or rows of a table, to lines or columns: what `fastgen batch --ray` runs.

    Args:
        engine: `Generate` or `Score`, made with `arguments`.
        text: whether a line is a prompt, and no JSON.
        to_lines: whether an output is a line of JSON, rather than columns.
        is_alone: whether there is one file, so that a row is named by its number.
    """

    def __init__(
        self,
        engine: type[RowActor],
        arguments: Mapping[str, Any],
        text: bool,
        to_lines: bool,
        is_alone: bool,
    ) -> None:
        self.engine = engine(**arguments)
        self.text, self.to_lines, self.is_alone = text, to_lines, is_alone

    def __call__(self, batch: Columns) -> Any:
        """The batch has "line" (bytes), "number" and "file", or the columns of a table.

        Returns:
            "line" (bytes) and "bad" (bool); or a pyarrow Table.

        Raises:
            ValueError: a column that means nothing here and is not to be kept.
        """
        if "line" in batch:
            lines = zip(batch["number"], batch["line"], batch["file"], strict=True)
            rows = [
                of_line(int(at), line, self.text, None if self.is_alone else str(file))
                for at, line, file in lines
            ]
            finished = self.engine.done(row for row in rows if row is not None)
        else:
            table = _columns(batch)
            self.engine.work.check(table)
            finished = self.engine.done(_rows(table))
        if self.to_lines:
            bad = np.array([done.bad is not None for done in finished], np.bool_)
            return {"line": _objects([done.line for done in finished]), "bad": bad}
        names = {name for done in finished for name in done.output} - {"error"}
        kept = sorted(names - set(self.engine.given))
        return _table(
            {name: [done.output.get(name) for done in finished] for name in kept}
            | {name: list(values) for name, values in self.engine.new_columns(finished).items()}
        )


def _table(columns: Mapping[str, list[Any]]) -> Any:
    """A pyarrow Table whose columns have their types though all of a batch are null.

    Raises:
        ValueError: a field has types in different rows that no column can have.
    """
    import pyarrow

    texts = pyarrow.string()
    usual = {
        "text": texts,
        "finish_reason": texts,
        "error": texts,
        "warnings": pyarrow.list_(texts),
    }
    arrays = {}
    for name, values in columns.items():
        try:
            column = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise ValueError(
                f"{name} does not fit into one column ({error}): write .jsonl"
            ) from error
        is_null = pyarrow.types.is_null(column.type)
        arrays[name] = column.cast(usual[name]) if is_null and name in usual else column
    return pyarrow.table(arrays)


def _columns(batch: Any) -> Columns:
    """{name: array} of whatever Ray Data hands to a function."""
    if isinstance(batch, Mapping):
        return {str(name): np.asarray(values) for name, values in batch.items()}
    if hasattr(batch, "column_names"):  # pyarrow
        return {name: _objects(values) for name, values in batch.to_pydict().items()}
    if hasattr(batch, "to_numpy") and hasattr(batch, "columns"):  # pandas
        return {str(name): batch[name].to_numpy() for name in batch.columns}
    raise ValueError(f"a batch must be columns, a DataFrame or a Table, got {type(batch).__name__}")


def _rows(table: Columns) -> list[InputRow]:
    """The rows of columns, as lines of JSON."""
    names = list(table)
    lists = [_whole(values).tolist() for values in table.values()]
    return [
        InputRow(
            number,
            as_json(dict(zip(names, row, strict=True))).encode("utf-8", "surrogatepass"),
            is_numbered=False,
        )
        for number, row in enumerate(zip(*lists, strict=True))
    ]


def _whole(values: NDArray[Any]) -> NDArray[Any]:
    """Integers that numpy and pandas have as floats, since some are missing."""
    if values.dtype.kind != "f" or values.ndim != 1:
        return values
    there = ~np.isnan(values)
    if there.all() or not (values[there] % 1 == 0).all():
        return values
    return _objects([int(v) if known else None for v, known in zip(values, there, strict=True)])


def _objects(values: list[Any]) -> NDArray[Any]:
    """An array of one dimension, whatever its values are."""
    out = np.empty(len(values), object)
    for index, value in enumerate(values):
        out[index] = value
    return out
