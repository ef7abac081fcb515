"""The benchmark beside other engines: cases, the protocol of its workers, and its tables."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

import real  # noqa: E402
import shapes  # noqa: E402
from peers import cases, faith, home, report, worker  # noqa: E402
from peers.engines import BASE, NAMES, OURS, PRECISIONS, Engine, adapter, left_padded  # noqa: E402
from peers.home import Home, Unavailable  # noqa: E402

from fastgen.store import hub  # noqa: E402
from fastgen.store.model_info import MANY_TOKENS, MANY_TOKENS_UINT8, UNPACK, ModelInfo  # noqa: E402


class Counting(Engine):
    """A fake engine: a token is the one before it plus one."""

    title = "counting"
    precisions: ClassVar = {"fp32": "exact"}

    def load(self, directory: Path, precision: str, threads: int) -> None:
        self.loaded = (directory, precision, threads)

    def generate(self, prompts: list[list[int]], new: int, beams: int) -> list[list[int]]:
        if beams > 1:
            raise NotImplementedError("no beams")
        self.first = time.perf_counter()
        return [[prompt[-1] + i + 1 for i in range(new)] for prompt in prompts]

    def logits(self, row: list[int]) -> np.ndarray:
        return np.eye(12, dtype=np.float64)[np.array(row) + 1]


def asked(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    answers = io.StringIO()
    worker.serve(Counting(), map(json.dumps, requests), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_worker_answers_every_request_with_one_line() -> None:
    load = {"do": "load", "directory": "somewhere", "precision": "fp32", "threads": 2}
    go = {"do": "generate", "prompts": [[5, 6], [9]], "new": 3, "beams": 1}
    loaded, generated, held = asked(load, go, {"do": "memory"})
    assert loaded == {}
    assert generated["ids"] == [[7, 8, 9], [10, 11, 12]]
    assert generated["seconds"] >= generated["first"] > 0 and generated["spun"] >= 0
    assert held["peak"] > 0


def test_a_worker_goes_on_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    go = {"do": "generate", "prompts": [[5]], "new": 1}
    answers = asked(go | {"beams": 4}, {"do": "dance"}, go | {"beams": 1})
    assert answers[0] == {"error": "NotImplementedError: no beams"}
    assert "dance" in answers[1]["error"]
    assert answers[2]["ids"] == [[6]]
    assert "no beams" in capsys.readouterr().err


def test_a_worker_writes_the_logits_after_each_id_of_a_row(tmp_path: Path) -> None:
    file = tmp_path / "logits.npy"
    (answer,) = asked({"do": "logits", "ids": [3, 9, 0], "file": str(file)})
    assert answer == {"shape": [3, 12]}
    found = np.load(file)
    assert found.dtype == np.float32 and found.argmax(1).tolist() == [4, 10, 1]


def test_what_an_engine_loses_is_what_fastgen_measures_of_an_export() -> None:
    """The sums of a row, against the sums of the formulas in torch; padding is cut off."""
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    expected = random.standard_normal((70, 50), np.float32) * 3
    logits = expected + random.standard_normal((70, 50), np.float32)
    ids = random.integers(0, 50, 70).tolist()
    padded = np.concatenate([logits, np.full((70, 14), 99, np.float32)], axis=1)
    sums = faith.compared(ids, expected, padded)
    p, q = (
        torch.tensor(one[:-1], dtype=torch.float64).log_softmax(1) for one in (expected, logits)
    )
    targets = torch.tensor(ids[1:])
    divergence = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    assert sums["tokens"] == 69
    assert sums["kl"] == pytest.approx(float(divergence)) and sums["kl"] > 1
    loss, reference_loss = (
        float(torch.nn.functional.nll_loss(one, targets, reduction="sum")) for one in (q, p)
    )
    assert sums["loss"] == pytest.approx(loss)
    assert sums["reference_loss"] == pytest.approx(reference_loss)
    assert sums["same"] == int((p.argmax(1) == q.argmax(1)).sum()) < 69
    assert faith.compared(ids, expected, expected)["kl"] == 0
    for wrong in (logits[:-1], logits[:, :-1], logits[None]):
        with pytest.raises(ValueError, match=r"logits must be \[70, 50\]"):
            faith.compared(ids, expected, wrong)


def test_a_model_is_as_large_as_its_graph_and_weights(tmp_path: Path) -> None:
    (tmp_path / "fp32").mkdir()
    names = ["model.onnx", "model.onnx.data", "openvino_tokenizer.bin", "tokenizer.json"]
    for name in [*names, "fp32/model.onnx"]:
        (tmp_path / name).write_bytes(b"x" * 500_000)
    assert faith.megabytes(tmp_path) == 1.0


def test_prompts_are_the_same_for_all_and_new_each_round() -> None:
    case = cases.CASES["ragged-8"]
    first = cases.prompts(case, 1000, 1)
    assert first == cases.prompts(case, 1000, 1) != cases.prompts(case, 1000, 2)
    assert tuple(map(len, first)) == case.lengths and case.ragged
    assert all(cases.UNUSED <= i < 1000 - cases.UNUSED for row in first for i in row)


def test_cases_are_chosen_by_pattern() -> None:
    assert cases.chosen(["*"]) == [*cases.CASES, cases.COLD]
    assert cases.chosen(["cold", "greedy-*"]) == ["greedy-16", "greedy-256", "cold"]
    assert len(cases.chosen(["beams-*"])) == 20
    assert cases.chosen(["long-*"]) == [name for name in cases.CASES if name not in cases.USUAL]
    with pytest.raises(ValueError, match="no case matches 'nothing'"):
        cases.chosen(["nothing"])


def test_every_engine_has_its_files() -> None:
    for name in NAMES:
        engine = adapter(name)
        needed = {engine.environment or name, *map(engine.converter, shapes.SHAPES)} - {None}
        for requirements in needed:
            text = (BENCH / "peers" / "requirements" / f"{requirements}.txt").read_text()
            pins = [line for line in text.splitlines() if line and not line.startswith("#")]
            assert pins and all("==" in pin and "/" not in pin for pin in pins), requirements
        assert engine.precisions.keys() <= PRECISIONS.keys()


@pytest.mark.skipif(sys.platform == "win32", reason="no such lock there")
def test_a_home_is_for_one_run_at_a_time(tmp_path: Path) -> None:
    first = Home(tmp_path)
    with pytest.raises(BlockingIOError, match="another run uses"):
        Home(tmp_path)
    first.close()
    Home(tmp_path).close()


def test_what_is_made_is_kept_until_its_source_changes(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    home, made = Home(tmp_path), []
    request.addfinalizer(home.close)

    def make(path: Path) -> None:
        path.mkdir()
        made.append(path)

    for source in ("one", "one", "two"):
        assert home.kept(tmp_path / "thing", source, make) == tmp_path / "thing"
    assert len(made) == 2

    def fail(path: Path) -> None:
        raise Unavailable("no network")

    for _ in range(2):
        with pytest.raises(Unavailable, match="no network"):
            home.kept(tmp_path / "other", "one", fail)
    assert not (tmp_path / "other").exists()
    home.lock.close()


def test_exports_are_made_again_for_what_they_depend_on_alone() -> None:
    whole, exporter = home.package_text(), home.package_text(home.BESIDE)
    service = (BENCH.parent / "fastgen" / "commands" / "bench.py").read_text()
    pipeline = (BENCH.parent / "export" / "pipeline.py").read_text()
    assert service in whole and service not in exporter
    assert pipeline in whole and pipeline in exporter
    for area in home.BESIDE:
        assert (BENCH.parent / "fastgen" / area).is_dir()


def test_ragged_prompts_are_padded_on_the_left() -> None:
    assert left_padded([[1, 2], [3]]) == ([[1, 2], [0, 3]], [[1, 1], [0, 1]])


LINES: list[dict[str, Any]] = [
    {"kind": "machine", "text": "a machine", "commit": "abc", "rounds": 3},
    *(
        {"kind": "time", "shape": "tiny", "engine": engine, "precision": precision,
         "case": "greedy-16", "round": turn, "seconds": seconds * drift, "tokens": 64,
         "equal": equal, "spun": 0.0}
        for engine, precision, seconds, equal in [
            (BASE, "fp32", 6.4, 1.0), ("ours", "fp32", 1.6, 1.0), ("ct2", "fp32", 3.2, 0.5),
            ("ours", "int8", 0.8, 0.9),
        ]
        for turn, drift in enumerate([1.0, 2.0, 1.0], 1)
    ),
    *(
        {"kind": "time", "shape": "tiny", "engine": engine, "precision": "int8", "case": "chat",
         "round": turn, "seconds": 2.0 + turn, "first": first, "tokens": 128, "equal": None,
         "spun": 0.0}
        for engine, first in [("ours", 0.46), ("ours_int8_keys", 0.73), ("ct2", None)]
        for turn in (1, 2, 3)
    ),
    {"kind": "check", "shape": "tiny", "engine": "ours", "precision": "int8", "equal": 0.5,
     "equal_first": 0.875},
    {"kind": "absent", "shape": "tiny", "engine": "llama", "precision": "int4", "case": "*",
     "reason": "cannot be installed"},
    {"kind": "cold", "shape": "tiny", "engine": "ours", "precision": "int8", "round": 1,
     "seconds": 0.25, "resident": 145.2, "peak": 200.4},
    {"kind": "installed", "engine": "ours", "megabytes": 180.0},
]  # fmt: skip


def test_tables_show_medians_ratios_and_reasons() -> None:
    text = report.markdown(LINES)
    assert "a machine; commit abc" in text
    assert "| transformers float32 | 100.0 |" in text
    assert "| fastgen fp32 | **25.0** (4.00) |" in text
    assert "| CTranslate2 float32 | 50.0 (2.00) |" in text
    assert "| fastgen int8 | **12.5** (8.00) |" in text
    assert "|  | fastgen fp32 | fastgen int8 | fastgen int8, 8-bit keys |" in text
    assert "| 16 -> 64 | 2.00 (CTranslate2) | - | - |" in text
    assert "| chat turn, 512 -> 128 | - | 1.00 (CTranslate2) | 1.00 (CTranslate2) |" in text
    assert "| fastgen int8 | 0.25 | 145 | 200 | 180 |" in text
    assert "that are transformers': fastgen int8 88%" in text
    assert "- llama.cpp Q4_0: cannot be installed" in text
    assert "- CTranslate2 float32, greedy-16: 50.0% of transformers' tokens" in text


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Error: /some/home/converted/it-int8/model.onnx is bad", "Error: model.onnx is bad"),
        ("in '/a/b c/d.py', line 3: (/x/y/z/)", "in 'b c/d.py', line 3: (z)"),
        (r"File C:\home\it\model.bin: no", "File model.bin: no"),
        ("see https://host.org/a/b.html, and/or 3/4 of /health", None),
        ("pip failed: a/b==1.0 of [rows/new/heads]", None),
    ],
)
def test_tables_name_no_place_of_the_machine_that_measured(said: str, shown: str | None) -> None:
    absent = {"kind": "absent", "shape": "tiny", "engine": "llama", "precision": "int4",
              "case": "*", "reason": said}  # fmt: skip
    assert f"- llama.cpp Q4_0: {shown or said}\n" in report.markdown([*LINES, absent])


def test_an_engine_has_no_line_of_a_model_without_what_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fastgen's second form, of directories that have one."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # whose first the program changes
    peers = importlib.import_module("peers.__main__")
    lines = peers.Lines(None)
    args = argparse.Namespace(engines=["ours", "ours_many"], precisions=["int8", "int4"], threads=1)

    class Made(Home):
        def __init__(self) -> None:
            self.path = tmp_path

        def python(self, name: str | None) -> Path:
            return Path(sys.executable)

        def converted(self, shape: str, name: str, precision: str) -> Path:
            place = tmp_path / precision
            shutil.copytree(hub.DEMO, place, dirs_exist_ok=True)
            if precision == "int4":
                info = ModelInfo.parse(place)
                files = info.files | dict.fromkeys((MANY_TOKENS, MANY_TOKENS_UINT8, UNPACK), 1)
                dataclasses.replace(info, files=files).write(place)
            return place

    workers = list(peers.ready(args, Made(), "tiny", lines))
    found = [(one.name, one.precision) for one in workers]
    assert found == [("ours", "int8"), ("ours", "int4"), ("ours_many", "int4")]
    assert not lines.all


def test_tables_tell_the_wait_for_the_first_token_from_the_pace_after_it() -> None:
    text = report.markdown(LINES)
    assert "|  | 512 -> 128: first, s | then ms a token |" in text
    assert "| fastgen int8 | 0.46 | 27.9 |" in text  # 4 s but 0.46, over 127 tokens
    assert "| fastgen int8, 8-bit keys | 0.73 | 25.7 |" in text
    assert "| CTranslate2 int8 | - | - |" in text


def test_only_fastgen_reads_the_longest_prompts() -> None:
    longest = cases.LONG[-1]
    able = {name for name in NAMES if not adapter(name).refuses(longest)}
    assert able == set(OURS)
    assert not any(adapter(name).refuses(cases.LONG[0]) for name in NAMES)
    assert "beam" in adapter("llama").refuses(cases.CASES["beams-2-new-4"])


def test_tables_of_a_partial_run_need_no_transformers() -> None:
    lines = [line for line in LINES if line.get("engine") != BASE]
    assert "| fastgen fp32 | **25.0** |" in report.markdown(lines)


def loss(kl: float, other: float = 2.0) -> dict[str, dict[str, float]]:
    """Of a line of a real model: two kinds of text, whose perplexity is 3 times too large."""
    told = {"loss": 100 * (1 + np.log(3)), "reference_loss": 100.0, "same": 90}
    return {
        kind: {"tokens": 100, "kl": 100 * one, **told}
        for kind, one in (("several kinds", kl), ("documentation", other * kl))
    }


REAL: list[dict[str, Any]] = [
    {"kind": "machine", "text": "a machine", "commit": "abc", "rounds": 3,
     "command": "python bench/peers --home DIR --shapes smollm2"},
    *(
        {"kind": kind, "shape": "smollm2", "engine": engine, "precision": precision, **told}
        for engine, precision, kl, seconds in [
            (BASE, "fp32", 0.0, 6.4), ("ours", "int8", 0.004, 0.8), ("llama", "int8", 0.002, 1.6),
            ("openvino_llm", "int8", 0.4, 0.4), ("llama", "int4-k", 0.1, 3.2),
            ("ours", "int4", 0.2, 0.64), ("ours_many", "int4", 0.01, 0.64),
        ]
        for kind, told in [
            ("faith", {"megabytes": 144.4, "kinds": loss(kl)}),
            ("time", {"case": "greedy-16", "round": 1, "seconds": seconds, "tokens": 64,
                      "equal": None, "spun": 0.0}),
            ("time", {"case": "prefill-512", "round": 1, "seconds": seconds, "tokens": 1,
                      "equal": None, "spun": 0.0}),
        ]
    ),
]  # fmt: skip


def test_faithfulness_stands_beside_speed() -> None:
    text = report.page(REAL, "plane.png")
    assert text.startswith("# Beside the peers: speed and faithfulness\n")
    assert "\n    python bench/peers --home DIR --shapes smollm2\n" in text
    assert "](plane.png)" in text and "## SmolLM2-135M-Instruct" in text
    heads = "|  | MB | KL | KL, several kinds | KL, documentation | top-1 | perplexity | 16 -> 64 |"
    assert f"{heads} first token after 512, ms |" in text
    told = "0.0060 | 0.0040 | 0.0080 | 90.0% | +200.00%"
    assert f"| fastgen int8 | 144 | {told} | 80 | 800 |" in text
    assert "| OpenVINO GenAI int8 | 144 | 0.60 | 0.40 | 0.80 | 90.0% | +200.00% | **160** |" in text
    assert "| fastgen int4 | 144 | 0.30 |" in text and "| **100** | **640** |" in text
    assert "| transformers float32 | 144 | 0 | 0 | 0 |" in text


def test_speed_is_compared_with_peers_that_are_as_faithful() -> None:
    text = report.markdown(REAL)
    assert "| fastgen int8 | 2.00 (llama.cpp Q8_0) |" in text
    assert "| the same bits | 0.50 (OpenVINO GenAI int8) |" in text
    assert "| fastgen int4 | 2.50 (llama.cpp Q8_0) |" in text
    assert "| the same bits | 5.00 (llama.cpp Q4_K_M) |" in text
    assert "ahead or level in 5 of 5 cells that have such a peer; behind in: none." in text
    slower = [line | {"seconds": 4.0} if line.get("engine") == "ours" else line for line in REAL]
    told = "behind in: fastgen int8 16 -> 64 0.40 (llama.cpp Q8_0); fastgen int8 first token after"
    assert "in 1 of 5 cells" in report.markdown(slower) and told in report.markdown(slower)


@pytest.mark.parametrize("lines", [REAL, REAL[:7]])
def test_the_plane_is_drawn(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.picture(lines, tmp_path / "plane.png")
    assert (tmp_path / "plane.png").read_bytes().startswith(b"\x89PNG")


def test_real_models_have_all_that_a_page_says_of_them() -> None:
    assert report.REAL.keys() == report.ABOUT.keys() == real.MODELS.keys()
    assert not real.MODELS.keys() & shapes.SHAPES.keys()
    for name in NAMES:
        assert adapter(name).logits is not Engine.logits


def test_the_picture_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        report.picture(LINES, tmp_path / "picture.png")
