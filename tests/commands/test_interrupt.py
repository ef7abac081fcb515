"""SIGTERM and SIGHUP leave nothing behind, and the exit code that shells know."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from fastgen.store import files
from fastgen.system import interrupt

ENDING = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


@pytest.fixture
def nobody_handles():
    """The signals as a process has them at its start, whatever the tests were started by."""
    usual = {number: signal.signal(number, signal.SIG_DFL) for number in interrupt.ENDING}
    yield
    for number, handler in usual.items():
        signal.signal(number, handler)


# Each makes its way to where something temporary is there, says so, and waits.
WRITERS = {
    "a directory": """
from fastgen.store import files
with files.atomic_directory(Path(sys.argv[1])) as new:
    (new / "half").write_text("half")
    ready()
""",
    "a directory that replaces one": """
from fastgen.store import files
Path(sys.argv[1]).mkdir()
with files.atomic_directory(Path(sys.argv[1])) as new:
    (new / "half").write_text("half")
    ready()
""",
    "a file": """
from fastgen.store import files
with files.atomic_file("it", Path(sys.argv[1])) as made:
    made.write_text("half")
    ready()
""",
    "a prefix cache": """
import numpy as np, fastgen
def half(file, **_):
    file.write(b"half")
    ready()
np.savez = half
fastgen.PrefixCache().save(sys.argv[1])
""",
    "an export": """
from contextlib import nullcontext
from types import SimpleNamespace
from fastgen.export import pipeline
from fastgen.export.opening import Opening
from fastgen.store import hub
from fastgen.store.model_info import ModelInfo
def slowly(graph, whole):
    graph.work.working.mkdir()
    (graph.work.working / "model.onnx").write_text("half")
    ready()
pipeline.stages.Graph._convert = slowly
info = ModelInfo.parse(hub.DEMO)
origin = SimpleNamespace(
    about=list, evaluating=nullcontext, parameters=1, describe=lambda: info, probes=list
)
pipeline.opening = lambda *_: Opening("it", "fp32", "fp32", "fp32", False, lambda _: origin)
pipeline.export("it", sys.argv[1], progress=None)
""",
}
BEGIN = """
import sys, time
from pathlib import Path
def ready():
    print("ready", flush=True)
    time.sleep(60)
"""


CASES = [(what, signal.SIGTERM) for what in WRITERS] + [("a directory", one) for one in ENDING[1:]]


@pytest.mark.parametrize(("what", "number"), CASES)
def test_nothing_is_left_behind(what, number, tmp_path):
    program = BEGIN + WRITERS[what]
    place = tmp_path / "not there yet" if what == "an export" else tmp_path
    with subprocess.Popen(
        [sys.executable, "-c", program, str(place / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert list(tmp_path.iterdir())  # something half made
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    if number is signal.SIGINT:
        assert process.returncode in (-signal.SIGINT, interrupt.QUIET_EXIT)
    else:
        assert (process.returncode, said) == (128 + number, "")
    left = [path.name for path in tmp_path.iterdir()]
    assert left == (["out"] if "replaces" in what else [])
    assert not list((tmp_path / "out").glob("*"))


def test_what_others_handle_or_ignore_is_left_to_them(tmp_path):
    came: list[int] = []
    for handler in (signal.SIG_IGN, lambda number, _: came.append(number)):
        usual = signal.signal(signal.SIGTERM, handler)
        try:
            with files.atomic_directory(tmp_path / "out") as new:
                signal.raise_signal(signal.SIGTERM)
                assert new.is_dir() and signal.getsignal(signal.SIGTERM) is handler
            assert (tmp_path / "out").is_dir()
        finally:
            signal.signal(signal.SIGTERM, usual)
    assert came == [signal.SIGTERM]


def test_handlers_are_put_back_and_other_threads_have_none(nobody_handles):
    before = [signal.getsignal(number) for number in interrupt.ENDING]
    with interrupt.raised():
        with interrupt.raised(), pytest.raises(SystemExit) as end:
            signal.raise_signal(signal.SIGTERM)
        assert end.value.code == 128 + signal.SIGTERM
        with pytest.raises(SystemExit):  # the inner one was not the one to put them back
            signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in interrupt.ENDING] == before
    found: list[bool] = []

    def elsewhere() -> None:
        with interrupt.raised(), interrupt.held_back():
            found.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [True]


def test_what_must_not_stop_half_way_is_done_first(nobody_handles):
    done = []
    with pytest.raises(SystemExit), interrupt.raised(), interrupt.held_back():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            time.sleep(0.01)
        done.append(True)
    with pytest.raises(KeyboardInterrupt), interrupt.held_back():
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done == [True, True]
