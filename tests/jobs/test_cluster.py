"""Jobs and the service on a real Ray, on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
from click.testing import CliRunner
from pyarrow import parquet

import fastgen
from fastgen import commands
from fastgen.engine.schedule import SHARE
from fastgen.errors import ModelError
from fastgen.jobs import Generate, Score, deployment
from fastgen.jobs.ray import node
from fastgen.jobs.ray.cluster import OfLines
from fastgen.jobs.ray.spread import Spread, run
from fastgen.system.cpu import memory_bytes

# Ray's own: files and sockets that it leaves behind, and what it says of its next release.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore:The minimum number of concurrent actors:UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ACTORS = {"actors": 2, "cpus": 0.5}
STORE = 100 << 20  # bytes of Ray's object store


@pytest.fixture(scope="module")
def model(pair) -> fastgen.CausalLM:
    return pair("llama")[1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray of one node, ended with the module."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        "local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=STORE,
        logging_level="ERROR",
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    yield ray
    ray.shutdown()


def write(path: Path, rows: Sequence[Any]) -> Path:
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read(place: Path) -> list[dict[str, Any]]:
    """The rows of a directory of JSON lines, file by file in the order of their names."""
    return [
        json.loads(line)
        for file in sorted(place.iterdir())
        for line in file.read_bytes().splitlines()
    ]


def dying(base: type, place: Path, steps: int) -> type:
    """`base`, whose first actor that has made so many steps of the model ends, mid-work.

    Each batch that is begun is noted in `place`.
    """

    class Dying(base):  # in a function, so that Ray carries it along
        def __call__(self, batch: Any) -> Any:
            return super().__call__(batch)

        def done(self, rows: Any) -> Any:
            import os

            rows = list(rows)
            with open(os.path.join(place, "begun"), "a") as file:
                file.write(f"{os.getpid()} {len(rows)}\n")
            scheduler, left = self.work.scheduler, [steps]
            step = type(scheduler).step

            def counted() -> Any:
                left[0] -= 1
                if left[0] == 0:
                    try:
                        os.close(os.open(os.path.join(place, "died"), os.O_CREAT | os.O_EXCL))
                    except FileExistsError:
                        pass
                    else:
                        os._exit(1)
                return step(scheduler)

            scheduler.step = counted
            return super().done(rows)

    return Dying


# --- on Ray --------------------------------------------------------------------------------------


def test_an_actor_that_dies_loses_no_row_and_repeats_none(cluster, model, tmp_path):
    """JSON lines over two actors, in order, and every text as it is alone."""
    rows: list[Any] = [
        {"prompt": "The quick", "max_new_tokens": 4 + n % 9, "do_sample": n % 2 == 0, "id": n}
        for n in range(160)
    ]
    rows[50], rows[51], rows[52] = b"{", b"", {"prompt": "The", "temprature": 1}
    source = write(tmp_path / "in.jsonl", rows)
    (tmp_path / "notes").mkdir()
    arguments = {"model": str(model.directory), "seed": 3}
    engine = dying(Generate, tmp_path / "notes", 12)
    spread = Spread("auto", **ACTORS, rows=20, ordered=True)
    found = run(spread, engine, arguments, str(source), str(tmp_path / "out.jsonl"))
    assert found == (159, 2)
    assert (tmp_path / "notes/died").exists()
    begun = [line.split() for line in (tmp_path / "notes/begun").read_text().splitlines()]
    assert sum(int(count) for _, count in begun) >= 159 + 19  # a batch was done again
    assert len({pid for pid, _ in begun}) == 3  # by two actors, and one in place of another
    got = read(tmp_path / "out.jsonl")
    assert [one["row"] for one in got] == [n for n in range(160) if n != 51]

    # A job on this machine says the same, row by row.
    with CliRunner().isolation() as (out, _, _):
        code = commands.run(["batch", str(source), "-", "-m", str(model.directory), "--seed", "3"])
        here = [json.loads(line) for line in out.getvalue().splitlines()]
    assert code == 1 and got == here
    assert os.listdir(tmp_path / "out.jsonl") and len(os.listdir(tmp_path)) == 3


def test_generate_maps_a_dataset(cluster, model, tmp_path):
    """`Dataset.map_batches(Generate, concurrency=2)`, with the threads that Ray gives."""
    import ray

    class Telling(Generate):
        def __call__(self, batch: Any) -> Any:
            made = super().__call__(batch)
            found = [self.model.model.tuning.threads, self.work.scheduler.max_bytes]
            return made | {"given": np.array([found] * len(made["text"]))}

    rows = [{"prompt": f"The {n}", "id": n, "mine": float(n)} for n in range(24)]
    made = ray.data.from_items(rows).map_batches(
        Telling,
        fn_constructor_kwargs={
            "model": str(model.directory),
            "keep": ["mine"],
            "max_new_tokens": 5,
        },
        concurrency=2,
        num_cpus=1,
        batch_size=6,
    )
    found = sorted(made.take_all(), key=lambda row: row["id"])
    assert [row["text"] for row in found] == [
        model.complete(row["prompt"], max_new_tokens=5) for row in rows
    ]
    ((threads, held),) = {tuple(row["given"]) for row in found}
    memory = SHARE * (memory_bytes() or 0)
    assert threads == 1 and held == pytest.approx(memory / (os.cpu_count() or 1), rel=0.01)
    assert not any(row["error"] for row in found)
    assert [row["mine"] for row in found] == [float(n) for n in range(24)]


@pytest.mark.slow
def test_parquet_and_object_stores(cluster, model, tmp_path):
    """Files by their URI, a directory of them, and a model that is fetched from one."""
    (tmp_path / "in").mkdir()
    for part in range(3):
        rows = [
            {"prompt": f"The {part} {n}", "max_new_tokens": 3, "id": 10 * part + n}
            for n in range(10)
        ]
        rows = [{**row, "num_beams": int(row["id"] != 14)} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"in/{part}.parquet")
        write(tmp_path / f"in{part}.jsonl", rows)
    uri = (tmp_path / "in").as_uri()
    arguments = {"model": model.directory.as_uri()}
    out = (tmp_path / "out.parquet").as_uri()
    spread = Spread("auto", **ACTORS, rows=8)
    assert run(spread, Generate, arguments, uri, out, "parquet") == (30, 1)
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert sorted(row["id"] for row in table) == list(range(30))
    texts = {row["id"]: row["text"] for row in table}
    errors = {row["id"]: row["error"] for row in table if row["error"]}
    assert errors == {14: "num_beams must be positive, got 0"} and texts[14] is None
    assert texts[21] == model.complete("The 2 1", max_new_tokens=3)
    # Lines of several files carry the name of theirs.
    lines = tmp_path / "lines"
    lines.mkdir()
    for part in range(3):
        (tmp_path / f"in{part}.jsonl").rename(lines / f"{part}.jsonl")
    spread = Spread("auto", **ACTORS, rows=8, ordered=True)
    assert run(spread, Generate, arguments, str(lines), str(tmp_path / "o.jsonl"), "jsonl")[0] == 30
    found = read(tmp_path / "o.jsonl")
    assert [row["id"] for row in found] == list(range(30))
    assert [Path(row["file"]).name for row in found] == [f"{n // 10}.jsonl" for n in range(30)]
    assert {row["id"]: row.get("text") for row in found} == texts
    parquet.write_table(pyarrow.table({"prompt": ["a"], "mine": [1]}), tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match=r"mine is not a keyword .*--keep mine"):
        run(spread, Generate, arguments, str(tmp_path / "odd.parquet"), str(tmp_path / "x.jsonl"))
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.slow
def test_scores_on_a_cluster(cluster, model, tmp_path):
    texts = [f"The quick {n}" for n in range(30)]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    arguments = {"model": str(model.directory)}
    spread = Spread("auto", **ACTORS, rows=8, ordered=True)
    out = str(tmp_path / "out.jsonl")
    assert run(spread, Score, arguments, str(tmp_path / "in.txt"), out) == (30, 0)
    for text, row in zip(texts, read(tmp_path / "out.jsonl"), strict=True):
        assert row["logprob"] == pytest.approx(float(model.score([text])[0][1:].sum()), abs=1e-4)


@pytest.mark.slow
def test_the_command_line_starts_a_cluster_of_its_own(model, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"prompt": "The", "max_new_tokens": 3}] * 50)
    command = [sys.executable, "-m", "fastgen", "batch", str(source), str(tmp_path / "out.jsonl"),
               "-m", str(model.directory), "--ray", "local", "--actors", "2", "--cpus", "0.5",
               "--at-once", "10", "--ordered"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "50 rows, 0 bad" in done.stderr, done.stderr
    assert [row["row"] for row in read(tmp_path / "out.jsonl")] == list(range(50))
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "out.jsonl is there: name another" in done.stderr
    done = subprocess.run(
        [*command[:7], "no/model", *command[8:], "--restart"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2 and "no/model" in done.stderr.splitlines()[-1]
    assert len(read(tmp_path / "out.jsonl")) == 50  # what was there still is
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


# --- engines, without Ray ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generate(model) -> Generate:
    return Generate(model.directory, keep=["mine"], ids=True, threads=1, max_new_tokens=5)


def test_an_engine_takes_whatever_ray_hands_it(generate, model):
    columns = {"prompt": ["The", None, "value"], "input_ids": [None, [5, 6], None],
               "mine": [1, 2, 3], "max_new_tokens": [2, None, None]}  # fmt: skip
    expected = [model.complete("The", max_new_tokens=2), None,
                model.complete("value", max_new_tokens=5)]  # fmt: skip
    for batch in (
        {name: np.array(values, object) for name, values in columns.items()},
        pandas.DataFrame(columns),
        pyarrow.table(columns),
    ):
        found = generate(batch)
        assert found["text"][[0, 2]].tolist() == [expected[0], expected[2]]
        assert list(found["mine"]) == [1, 2, 3] and found["error"].tolist() == [None] * 3
        assert [5, 6, *found["ids"][1]] == model.generate([[5, 6]], max_new_tokens=5)[0]
        assert found["new_tokens"].tolist() == [2, 5, 5] and "prompt" not in found
    with pytest.raises(ValueError, match="a batch must be columns, a DataFrame or a Table, got"):
        generate([1])


def test_a_bad_row_of_a_table_has_an_error_and_a_bad_column_is_one(generate):
    batch = {"prompt": np.array(["The", "The"], object), "num_beams": np.array([1, 0])}
    found = generate(batch)
    assert found["error"].tolist() == [None, "num_beams must be positive, got 0"]
    assert found["text"][1] is None and found["new_tokens"].tolist() == [5, 0]
    with pytest.raises(ValueError, match="temprature"):
        generate({"prompt": np.array(["The"], object), "temprature": np.array([1.0])})


def test_what_a_row_draws_depends_on_what_it_says_alone(model):
    """Not on the batch that it comes in, since on a cluster that is chance."""
    engine = Generate(model.directory, threads=1, do_sample=True, max_new_tokens=12, seed=4)
    prompts = np.array([f"The {n}" for n in range(6)], object)
    whole = engine({"prompt": prompts})["text"].tolist()
    parts = [engine({"prompt": prompts[n : n + 2]})["text"].tolist() for n in (4, 2, 0)]
    assert [*parts[2], *parts[1], *parts[0]] == whole and len(set(whole)) > 3


def test_lines_of_openai_on_a_cluster(model):
    body = {"model": "x", "prompt": "The", "max_tokens": 3, "temperature": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    engine = OfLines(
        Generate, {"model": model.directory, "threads": 1, "created": 5}, False, True, True
    )
    batch = {"line": np.array([json.dumps(line).encode()], object), "number": np.array([0]),
             "file": np.array(["x"], object)}  # fmt: skip
    made = engine(batch)
    answer = json.loads(made["line"][0])["response"]["body"]
    assert answer["choices"][0]["text"] == model.complete("The", max_new_tokens=3)
    assert answer["created"] == 5 and made["bad"].tolist() == [False]


# --- the model on its node -----------------------------------------------------------------------

FETCH = """
import os, sys, time
from pathlib import Path
from pyarrow import fs
from fastgen.jobs.ray import node
copy = fs.copy_files
def noted(*args, **kwargs):
    with open(sys.argv[2], "a") as file:
        file.write("copied\\n")
    while len(list(here.iterdir())) < 3:  # until the others are there
        time.sleep(0.01)
    copy(*args, **kwargs)
fs.copy_files = noted
here = Path(sys.argv[3])
(here / str(os.getpid())).touch()
print(node.directory(sys.argv[1]))
"""


def test_a_model_is_fetched_once_a_node(model, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    store = tmp_path / "a store" / "model"
    shutil.copytree(model.directory, store)
    command = [sys.executable, "-c", FETCH, store.as_uri(), str(tmp_path / "log")]
    (tmp_path / "here").mkdir()
    command.append(str(tmp_path / "here"))
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    places = {child.communicate(timeout=60)[0].strip() for child in children}
    assert (tmp_path / "log").read_text() == "copied\n"
    (place,) = map(Path, places)
    assert place.is_relative_to(tmp_path / "cache")
    fetched = fastgen.CausalLM(place)
    assert fetched.complete("The", max_new_tokens=4) == model.complete("The", max_new_tokens=4)
    assert node.directory(model.directory) == model.directory  # what is here stays where it is

    # Another model of that name takes its place; one that is gone says so.
    info = json.loads((store / "fastgen.json").read_text())
    (store / "fastgen.json").write_text(json.dumps(info | {"name": "another"}))
    assert fastgen.CausalLM(node.directory(store.as_uri())).model.info.name == "another"
    shutil.rmtree(store)
    with pytest.raises(ModelError, match="cannot be had"):
        node.directory(store.as_uri())
    assert len(list((tmp_path / "cache" / "fetched").glob("*"))) == 2  # it, and its lock


def test_what_cannot_be_is_said_before_ray_starts(model, tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", [{"prompt": "The"}])
    out = tmp_path / "out.jsonl"
    for given, made, why in (
        (tmp_path / "gone.jsonl", out, "gone.jsonl is not there"),
        (source, tmp_path / "out.txt", "out.txt must end in .jsonl or .parquet"),
        (source, source, "in.jsonl is there: name another"),
        (tmp_path, out, "must end in"),
        ("what://ever.jsonl", out, "what://ever.jsonl cannot be read"),
    ):
        with pytest.raises(ValueError, match=why):
            run(Spread("local"), Generate, {}, str(given), str(made))
    with pytest.raises(ValueError, match="is a file, expected a directory"):
        run(Spread("local"), Generate, {}, str(source), str(source), restart=True)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--ray needs Ray: pip install 'fastgen-onnx\[ray\]'"):
        run(Spread("local"), Generate, {}, str(source), str(out))
    with pytest.raises(ValueError, match=r"replicas need Ray: pip install 'fastgen-onnx\[ray\]'"):
        deployment(model.directory)


# --- the service ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_replicas_answer_through_ray_serve(cluster, model):
    import openai
    from ray import serve

    made = deployment(
        {"tiny": str(model.directory), "again": model.directory},
        default="tiny",
        options={"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": 18764})
    try:
        serve.run(made, name="fastgen", route_prefix="/")
        client = openai.OpenAI(base_url="http://127.0.0.1:18764/v1", api_key="x")
        expected = model.complete("The quick", max_new_tokens=6)
        for _ in range(8):
            found = client.completions.create(
                model="tiny", prompt="The quick", max_tokens=6, temperature=0
            )
            assert found.choices[0].text == expected
        stream = client.completions.create(
            model="tiny", prompt="The quick", max_tokens=6, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == expected
        assert [one.id for one in client.models.list()] == ["tiny", "again"]
        for _ in range(4):  # each replica loads it when it is asked for it
            found = client.completions.create(
                model="again", prompt="The quick", max_tokens=6, temperature=0
            )
            assert (found.model, found.choices[0].text) == ("again", expected)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="none", prompt="The quick")
        with pytest.raises(openai.BadRequestError, match="context"):
            client.completions.create(model="tiny", prompt="The", max_tokens=1000)
        status = serve.status().applications["fastgen"].deployments
        (replicas,) = [one.replica_states for one in status.values()]
        assert replicas == {"RUNNING": 2}
    finally:
        serve.shutdown()
