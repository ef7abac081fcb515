"""`fastgen bench`: what it times, and what it shows."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import fastgen
from fastgen import commands
from fastgen.engine.model import Model
from fastgen.store.hub import DEMO
from fastgen.store.model_info import ModelInfo
from fastgen.system.cpu import cpu_name
from fastgen.timing import measure, plot
from fastgen.timing.measure import Case, CaseOptions, Result

SMALL = ["--prompt", "4,9", "--rows", "1,3", "--beams", "2", "--new", "4", "--threads", "1",
         "--rounds", "2"]  # fmt: skip


def run(*args: str | Path, width: int = 80, charset: str = "utf-8") -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `fastgen bench`, in this process."""
    runner = CliRunner(charset=charset, env={"COLUMNS": str(width)})
    with runner.isolation() as (out, err, _):
        code = commands.run(["bench", *map(str, args)])
        return code, out.getvalue().decode(charset), err.getvalue().decode(charset)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[Path]:
    place = tmp_path_factory.mktemp("models")
    return [shutil.copytree(DEMO, place / name) for name in ("one-int8", "another-fp32")]


@pytest.fixture
def info() -> ModelInfo:
    return ModelInfo.read(DEMO)


# --- what is shown -------------------------------------------------------------------------------


def test_the_demo_model_is_timed_and_shown():
    code, out, err = run(*SMALL)
    assert code == 0, err
    assert err.splitlines() == [
        "fastgen: no DIR given, using the embedded demo model",
        "measuring",
    ]
    machine, _, table = out.partition("\n\n")
    assert machine.startswith(cpu_name()) and f"fastgen {fastgen.__version__}" in machine
    number = r"[\d,.]+"
    row = rf"{number} +{number} ms +\d+%  \S+"
    expected = [
        r"reading a prompt +tokens/s +first token +\+-", rf"  4 tokens +{row}",
        rf"  9 tokens +{row}", "",
        r"new tokens, after 4 +tokens/s +a step +\+-", rf"  1 row +{row}", rf"  3 rows +{row}",
        rf"  2 beams +{row}", "",
        r"\| model \| threads \|  test \| +t/s \|", r"\| -+ \| -+: \| -+: \| -+: \|",
        r"\| demo  \|       1 \| pp511 \| +\d+\.\d\d ± \d+\.\d\d \|",
        r"\| demo  \|       1 \| tg128 \| +\d+\.\d\d ± \d+\.\d\d \|",
    ]  # fmt: skip
    lines = table.splitlines()
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line) and len(line) <= 80, line


def test_all_that_was_measured_is_written(two, tmp_path, monkeypatch):
    monkeypatch.chdir(two[0].parent)
    files = ["--json", tmp_path / "found.json", "--png", tmp_path / "found.png"]
    threads = ["--threads", "1,2"]
    code, out, err = run("one-int8", "another-fp32", *SMALL[:-4], *threads, "--rounds", 2, *files)
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.png"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["processor"] == cpu_name()
    assert {"cores", "onnxruntime", "numpy", "python", "system"} <= found["machine"].keys()
    assert list(found["models"]) == ["one-int8", "another-fp32"]
    assert found["models"]["one-int8"]["parameters"] == ModelInfo.read(DEMO).parameters
    timed = [(one["model"], one["case"]["kind"], one["threads"]) for one in found["results"]]
    for name in found["models"]:
        assert [kind for model, kind, threads in timed if (model, threads) == (name, 2)] == [
            "read",
            "read",
            "rows",
            "rows",
            "beams",
            "pp",
            "tg",
        ]
        assert [k for model, k, threads in timed if (model, threads) == (name, 1)] == [
            "read",
            "rows",
        ]
    for one in found["results"]:
        assert len(one["seconds"]) == 2 and min(one["seconds"]) > 0
        assert one["tokens_per_second"] > 0 and one["milliseconds"] > 0
    shown = re.findall(r"^  (?:[\w ]+ )?((?:one|another)-\w+) +[\d,.]+ +[\d,.]+ ms", out, re.M)
    assert shown == ["one-int8", "another-fp32"] * 9
    assert "9 tokens, by threads" in out and "1 row, by threads" in out
    assert " 1 thread " in out and " 2 threads " in out
    image = (tmp_path / "found.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n") and len(image) > 20_000
    width, height = struct.unpack(">II", image[16:24])
    assert width > 1000 and height > 800


RESULTS = [
    Result(name, case, threads, [seconds * factor, 1.1 * seconds * factor])
    for name, factor in (("a-model", 1), ("another-model-with-a-long-name-int8", 2))
    for case, threads, seconds in (
        (Case("read", 64, 1), 2, 0.05),
        (Case("read", 512, 1), 2, 0.4),
        (Case("rows", 64, 9), 2, 0.08),
        (Case("rows", 64, 9, rows=8), 2, 0.16),
        (Case("beams", 64, 9, beams=4), 2, 4000.0),
        (Case("read", 512, 1), 1, 0.8),
        (Case("rows", 64, 9), 1, 0.16),
    )
]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp437", "no-such"])
@pytest.mark.parametrize("width", [40, 64, 80, 100, 200])
def test_the_table_fits_the_terminal_and_its_encoding(width, encoding):
    lines = list(plot.lines(RESULTS, width, encoding))
    blocks = encoding == "utf-8"
    if encoding != "no-such":
        "\n".join(lines).encode(encoding)
    assert ("█" in "".join(lines)) == (blocks and width >= 80)
    assert ("#" in "".join(lines)) == (not blocks and width >= 80)
    assert max(map(len, lines)) <= max(width, 76)
    if width >= 80:
        assert max(map(len, lines)) == width  # the longest bar


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "no-such"])
def test_what_llama_bench_measures_is_shown_as_it_shows_it(encoding):
    """The mean of the rounds' tokens a second and their standard deviation, not the median."""
    tests = [
        Result("a-model", Case("pp", 512, 1), 2, [0.5, 0.25, 0.5]),
        Result("a-model", Case("tg", 1, 128), 2, [1.0, 2.0, 4.0]),
    ]
    lines = list(plot.lines([*RESULTS, *tests], 80, encoding))
    sign = "±" if encoding == "utf-8" else "+-"
    assert [line.split("|")[1].strip() for line in lines[-4:]] == [
        "model",
        "-------",
        *["a-model"] * 2,
    ]
    assert f" pp512 | 1365.33 {sign} 591.21 |" in lines[-2]  # 1024, 2048, 1024
    assert re.search(rf" tg128 \| +74\.67 {re.escape(sign)} 48\.88 \|$", lines[-1])  # 128, 64, 32
    assert len({len(line) for line in lines[-4:]}) == 1
    once = [replace(one, seconds=one.seconds[:1]) for one in tests]
    assert list(plot.lines([*RESULTS, *once], 80, encoding))[-1].endswith(f"128.00 {sign} 0.00 |")
    narrow = [replace(one, model="a-model-with-a-long-name" * 3) for one in tests]
    assert max(map(len, list(plot.lines([*RESULTS, *narrow], 60, encoding))[-4:])) <= 60


def test_bars_are_as_long_as_what_they_show():
    lines = list(plot.lines(RESULTS, 200, "ascii"))
    bars = [line.count("#") for line in lines if "row" in line and "model" in line]
    assert bars[0] * 4 == pytest.approx(bars[1], abs=4)  # 1 row, then 8 in twice the time
    first = next(line for line in lines if line.startswith("  64 tokens"))
    assert re.search(r" 1,219 +52\.5 ms +5%  ", first)
    beams = next(line for line in lines if line.startswith("  4 beams"))
    assert re.search(r" 0\.00190 +525 s +5%  #$", beams)


def test_two_models_of_one_name_are_told_apart():
    assert measure.labels(["x/m", "y/n/", "me/hub"]) == ["m", "n", "hub"]
    assert measure.labels(["x/m", "y/m"]) == ["x/m", "y/m"]


def test_results_of_one_round_have_no_spread():
    once = [replace(one, seconds=one.seconds[:1]) for one in RESULTS]
    assert not any("%" in line for line in plot.lines(once, 100, "utf-8"))


@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_picture_of_any_number_of_models_is_drawn(count, tmp_path):
    """Every warning of matplotlib's (a layout that does not fit, a missing glyph) is an error."""
    found = [
        replace(one, model=f"model {n}")
        for n in range(count)
        for one in RESULTS[: len(RESULTS) // 2]
    ]
    plot.png(found, measure.machine(), 2, tmp_path / "out")
    assert (tmp_path / "out").read_bytes().startswith(b"\x89PNG")
    plot.png([one for one in found if one.threads == 2], measure.machine(), 1, tmp_path / "out")


# --- what is timed -------------------------------------------------------------------------------


def test_each_case_runs_the_call_that_it_says(monkeypatch):
    """As many steps of the model as there are tokens, whichever tokens they are."""
    model = Model(DEMO, 1)
    seen: list[tuple[int, int]] = []
    forward = Model.forward

    def counted(self, new, *args, **kwargs):
        seen.append((len(new), max(map(len, new))))
        return forward(self, new, *args, **kwargs)

    monkeypatch.setattr(Model, "forward", counted)
    for case, steps in (
        (Case("read", 300, 1), [(1, 256), (1, 44)]),
        (Case("rows", 5, 4), [(1, 5), (1, 1), (1, 1), (1, 1)]),
        (Case("rows", 5, 3, rows=3), [(3, 5), (3, 1), (3, 1)]),
        (Case("beams", 5, 3, beams=2), [(1, 5), (2, 1), (2, 1)]),
        (Case("pp", 300, 1), [(1, 256), (1, 44)]),
        (Case("tg", 1, 4), [(1, 1)] * 4),
    ):
        seen.clear()
        assert measure.run(model, case) > 0
        assert seen == steps


def test_seconds_are_those_of_the_steps_that_count(monkeypatch):
    """With a clock that only a step of the model moves: reading takes 100, a step 1."""
    model, now = Model(DEMO, 1), [0.0]
    forward = Model.forward

    def slow(self, new, *args, **kwargs):
        now[0] += 100 if max(map(len, new)) > 1 else 1
        return forward(self, new, *args, **kwargs)

    monkeypatch.setattr(Model, "forward", slow)
    for case, seconds in (
        (Case("read", 20, 1), 100),
        (Case("read", 300, 1), 200),
        (Case("rows", 300, 5), 4),
        (Case("rows", 20, 5, rows=3), 4),
        (Case("beams", 300, 5, beams=3), 4),
        (Case("pp", 300, 1), 200),
        (Case("tg", 1, 4), 4),
    ):
        assert measure.run(model, case, clock=lambda: now[0]) == seconds, case
        result = Result("x", case, 1, [seconds])
        assert result.milliseconds == pytest.approx(
            1000 if case.kind not in ("read", "pp") else seconds * 1e3
        )
    assert Result("x", Case("rows", 20, 5, rows=3), 1, [4]).rate == 3
    assert Result("x", Case("read", 20, 1), 1, [2, 1, 9]).rate == 10
    assert Result("x", Case("pp", 512, 1), 1, [2]).rate == 256
    assert Result("x", Case("tg", 1, 128), 1, [2]).rate == 64


def test_models_take_turns(two, monkeypatch):
    models = {place.name: place for place in two}
    infos = {name: ModelInfo.read(place) for name, place in models.items()}
    timed, _ = measure.cases(infos, CaseOptions((4,), (1, 2), (2,), None, 3))
    loads = measure.planned(models, timed, (1, 2))
    ran: list[tuple[str, int]] = []
    monkeypatch.setattr(measure, "Model", lambda place, threads: (place.name, threads))
    monkeypatch.setattr(measure, "run", lambda model, case: ran.append(model) or float(len(ran)))
    ticks: list[int] = []
    measure.measure(models, loads, 3, lambda: ticks.append(1))
    found = [one for load in loads for one in load]
    assert len(ticks) == 3 * len(found) and all(len(one.seconds) == 3 for one in found)
    turns = [one for one, before in zip(ran, [None, *ran], strict=False) if one != before]
    once = [("one-int8", 2), ("another-fp32", 2), ("one-int8", 1), ("another-fp32", 1)]
    assert turns == once * 3


def test_threads_are_those_that_were_tuned_if_none_are_asked_for(two, monkeypatch):
    monkeypatch.setattr(measure, "physical_cores", lambda: 6)
    monkeypatch.setattr(measure, "read", lambda place: measure.Tuning(threads=4))
    assert measure.thread_counts() == [1, 2, 4, 6]
    timed = [Case("read", 8, 1), Case("read", 9, 1), Case("rows", 8, 3, rows=2), Case("rows", 8, 3)]
    (first, *others) = measure.planned({"x": two[0]}, timed, None)
    assert [one.threads for one in first] == [4] * 4
    assert [[(one.threads, one.case) for one in load] for load in others] == [
        [(n, timed[1]), (n, timed[3])] for n in (1, 2, 6)
    ]


# --- what fits -----------------------------------------------------------------------------------


def test_usual_prompts_are_cut_to_what_every_model_takes(info):
    endless = replace(info, max_length=None)
    for limit, prompts, tests in (
        (None, [64, 512], ["pp512", "tg128"]),
        (544, [64, 512], ["pp512", "tg128"]),
        (512, [64, 480], ["pp511", "tg128"]),
        (60, [28], ["pp59", "tg59"]),
    ):
        infos = {"a": endless, "b": replace(info, max_length=limit)}
        timed, notes = measure.cases(infos, CaseOptions())
        assert [case.prompt for case in timed if case.kind == "read"] == prompts
        steps = [case for case in timed if case.kind in ("rows", "beams")]
        assert {case.prompt for case in steps} == {prompts[0]}
        assert [measure.title(case) for case in timed[-2:]] == tests
        assert notes == []
    with pytest.raises(ValueError, match="b takes 30 positions, --new 32 leaves none"):
        measure.cases({"b": replace(info, max_length=30)}, CaseOptions())


def test_what_memory_cannot_hold_is_left_out_or_refused(info):
    memory = 1536 * info.cache_bytes
    timed, notes = measure.cases({"a": info}, CaseOptions(memory=memory))
    assert [case.rows for case in timed if case.kind == "rows"] == [1, 8]
    (note,) = notes
    assert note.startswith("left out: 32 rows: this needs up to")
    with pytest.raises(ValueError, match="GB of memory"):
        measure.cases({"a": info}, CaseOptions(rows=(1, 32), memory=memory))
    with pytest.raises(ValueError, match="this needs up to"):
        measure.cases({"a": info}, CaseOptions(memory=1024))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["{tmp}"], "is not a fastgen model directory"),
        (["{tmp}/nothing"], "nothing is not a directory"),
        (["--rows", "many"], "'many' is no list of numbers such as 1,8,32"),
        (["--rows", "1,,2"], "is no list of numbers"),
        (["--rows", "0"], "0 is not from 1 to 1,000,000"),
        (["--rows", "9" * 400], "is no list of numbers"),
        (["--beams", "-2"], "is no list of numbers"),
        (["--rows", "1000000"], "GB of memory"),
        (["--threads", "9999"], "threads must be at most"),
        (["--new", "1"], "1 is not in the range"),
        (["--rounds", "0"], "0 is not in the range"),
        (["--prompt", "600"], "demo takes 512 positions, which --prompt 600 and --new 4 exceed"),
        (["--new", "512"], "demo takes 512 positions, --new 512 leaves none"),
        (["--png", "{tmp}"], "--png must be a file"),
        (["--json", "{tmp}/no/such"], "no/such cannot be written: No such file or directory"),
    ],
)
def test_an_error_is_one_line(args, words, tmp_path):
    code, out, err = run(*SMALL, *(arg.format(tmp=tmp_path) for arg in args))
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1] and err.splitlines()[-1].startswith("fastgen: ")
    assert len(err) < 1000 and not any(tmp_path.iterdir())


def test_without_matplotlib_the_error_names_the_extra_before_anything_is_timed(tmp_path):
    program = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "from fastgen import commands; sys.exit(commands.run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "bench", "--png", str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastgen: a PNG needs matplotlib: pip install 'fastgen-onnx[bench]'\n"
