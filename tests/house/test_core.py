"""`pytest -m core` needs no torch and no export, and holds what its name promises."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# pytest, where none of these can be imported.
BLOCKED = """
import importlib.abc, sys

import pytest

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        first = name.split(".")[0]
        if first in {"torch", "transformers", "onnx", "onnx_ir"} or name == "fastgen.export":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
"""
AREAS = (  # of what there is a core test
    "test_core_loop", "test_core_beams", "test_core_cache", "test_core_processors", "test_laws",
    "test_schedule",
)  # fmt: skip


def core(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, "-m", "core", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_core_tests_are_found_without_torch():
    found = core("--collect-only")
    files = set(re.findall(r"^tests/\w+/(\w+)\.py::", found, re.M))
    assert files >= set(AREAS)


def test_core_tests_run_without_torch():
    names = "greedy_search_takes or list_of or that_draw or verbs_are_those and float32-states-3"
    said = core("tests/engine", "-k", f"{names}")
    assert int(re.search(r"(\d+) passed", said)[1]) > 5


def test_every_mark_is_told():
    """pyproject.toml declares the marks, CONTRIBUTING.md says what each is for."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    marks = [one.split(":")[0] for one in settings["tool"]["pytest"]["ini_options"]["markers"]]
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {mark for mark in marks if f"| `{mark}` |" not in told} == set()
