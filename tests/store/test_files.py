"""A directory that replaces another: what a kill leaves, and who puts it back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fastgen
from fastgen import first_use
from fastgen.store import files, hub

REPLACE = """
import os, signal, sys
from pathlib import Path
from fastgen.store import files

def rename(*names):
    real(*names)
    os.kill(os.getpid(), signal.SIGKILL)

real, os.rename = os.rename, rename
if sys.argv[1] == "two steps":
    files._exchange = lambda *_: False
new, out = map(Path, sys.argv[2:])
files.replace_directory(new, out)
"""


def replace(how: str, new: Path, out: Path) -> int:
    """The exit code of a process that is killed by the first renaming, if there is one."""
    done = subprocess.run([sys.executable, "-c", REPLACE, how, str(new), str(out)])
    return done.returncode


@pytest.fixture
def out(tmp_path) -> Path:
    return shutil.copytree(hub.DEMO, tmp_path / "place" / "out")


@pytest.fixture
def new(out) -> Path:
    made = shutil.copytree(hub.DEMO, files.temporary_neighbour(out, "new"), dirs_exist_ok=True)
    (made / "mark").write_text("the new one")
    return made


@pytest.fixture
def killed(out, new) -> Path:
    """The place of a model whose replacing was killed between the two renames."""
    assert replace("two steps", new, out) == -signal.SIGKILL
    assert not out.exists()
    return out


@pytest.fixture
def one_step(tmp_path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    if not files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system, or this file system, cannot swap names")


def test_there_is_never_none_where_the_system_swaps_names(one_step, out, new):
    assert replace("one step", new, out) == 0  # it has renamed nothing
    assert (out / "mark").is_file() and not (new / "mark").exists()


def test_who_looks_all_the_time_sees_one_all_the_time(one_step, out, new):
    seen, over = [], threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.append((out / "fastgen.json").is_file())

    thread = threading.Thread(target=look)
    thread.start()
    while len(seen) < 300:
        files.replace_directory(new, out)
    over.set()
    thread.join()
    assert all(seen)


def test_load_puts_back_what_was_being_replaced(killed, monkeypatch):
    monkeypatch.chdir(killed.parent)
    assert fastgen.load("out").generate([[5, 6]], max_new_tokens=2)  # not taken for a hub id
    assert not (killed / "mark").exists()
    (left,) = (place for place in killed.parent.iterdir() if place != killed)
    assert left.name.startswith(".out.new.")
    os.utime(left, (1, 1))
    files.remove_stale(killed)
    assert [place.name for place in killed.parent.iterdir()] == ["out"]


def test_a_link_to_what_was_being_replaced_is_followed(killed, tmp_path):
    (tmp_path / "link").symlink_to(killed)
    assert first_use.directory(tmp_path / "link") == tmp_path / "link"
    assert (killed / "fastgen.json").is_file()


def test_the_last_one_that_was_replaced_is_put_back(killed):
    older = files.temporary_neighbour(killed, "old")
    (older / "model").mkdir()
    os.utime(older, (1, 1))
    assert files.restore(killed) and (killed / "fastgen.json").is_file()


def test_what_cannot_be_put_back_is_said_to_be_where_it_is(killed, monkeypatch):
    (model,) = killed.parent.glob(".out.old.*/model")
    with monkeypatch.context() as without_locks:
        without_locks.setattr(files, "fcntl", None)
        with pytest.raises(fastgen.ModelError, match=f"put back: move {model} there"):
            fastgen.load(killed)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as read_only:
        read_only.setattr(os, "rename", refuse)
        with pytest.raises(fastgen.ModelError, match=f"put back: move {model} there"):
            fastgen.load(killed)
    files.remove_stale(killed)
    assert (model / "fastgen.json").is_file()


def test_who_is_replacing_it_is_waited_for(killed):
    """A process that holds the old one has the new one in place in a moment."""
    (new,) = killed.parent.glob(".out.new.*")
    (old,) = killed.parent.glob(".out.old.*")
    with files.claimed(old) as ours:
        assert ours
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(files.restore(killed)))
        thread.start()
        time.sleep(0.1)
        assert not found
        new.rename(killed)
        shutil.rmtree(old)
    thread.join()
    assert found == [True] and (killed / "mark").is_file()


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_what_fails_between_the_two_renames_is_undone(out, new, monkeypatch, failure):
    real, calls = os.rename, []

    def rename(*names: object) -> None:
        calls.append(names)
        if len(calls) == 2:
            raise failure
        real(*names)

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(type(failure)):
        files.replace_directory(new, out)
    assert not (out / "mark").exists() and (out / "fastgen.json").is_file()
    assert sorted(place.name for place in out.parent.iterdir()) == [new.name, "out"]


def test_only_what_nobody_claims_is_cleaned_up(tmp_path):
    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1, 1))
        return tmp_path / name

    running, killed = make(".out.new.aaaaaaaa"), make(".out.new.bbbbbbbb")
    others = [make(name) for name in (".out.new.cache", ".out2.new.cccccccc", ".outside")]
    only_copy = make(".out.old.dddddddd")
    (only_copy / "model").mkdir()
    os.utime(only_copy, (1, 1))
    with files.claimed(running):
        files.remove_stale(tmp_path / "out")
        assert running.exists() and not killed.exists()
    assert only_copy.exists() and all(other.exists() for other in others)
    (tmp_path / "out").mkdir()
    files.remove_stale(tmp_path / "out")
    assert not only_copy.exists() and not running.exists()
