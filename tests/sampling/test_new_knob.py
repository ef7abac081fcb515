"""The recipe "To add a knob" of docs/architecture.md, followed: two files of a copy are changed."""

import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import fastgen
from fastgen.inputs.knob import checked
from fastgen.inputs.params import Params

PACKAGE = Path(fastgen.__file__).parent
FIELD = """    last_token: int | None = knob(
        None, "no token above this one", kind=INTEGER, rule=NOT_NEGATIVE
    )
"""
STEP = """    if p.last_token is not None:
        over = np.arange(p.last_token + 1, vocab)
        steps += [("last_token", BANS, _with(suppress_tokens, over))]
    return steps


def _warpers("""

# The copy's own answers: its command line, its service, its check, its chain.
ASKED = """
import types
from dataclasses import fields

from click.testing import CliRunner

import fastgen
from fastgen.commands.generate import generate
from fastgen.inputs.params import NAMES, resolve
from fastgen.serve import knobs, wire

assert fastgen.__file__.startswith({root!r})
assert "last_token" in NAMES

options = CliRunner().invoke(generate, ["--help"]).output
flag = options[options.index("--last-token"):].split("\\n")[0]
assert "INTEGER" in flag and "no token above this one" in flag, flag

model = fastgen.load({demo!r})
service = types.SimpleNamespace(
    defaults={{}}, info=model.model.info, name="m", has_template=True, model=model,
    format=None, marks=None, raw=False, shown=types.SimpleNamespace(switches=())
)
(shown,) = [one for one in knobs.described(service)["knobs"] if one["name"] == "last_token"]
assert shown["type"] == "int" and shown["help"] == "no token above this one"
schema = wire.Completion.model_json_schema()["properties"]
assert schema["last_token"]["description"] == "no token above this one"

for value, message in ((-1, "last_token must be zero or more"), ("a", "last_token must be an int")):
    try:
        resolve({{}}, None, {{"last_token": value}})
    except ValueError as error:
        assert str(error).startswith(message), error
    else:
        raise AssertionError(value)

knobs = {{"do_sample": False, "regex": "(one|two) and three", "max_new_tokens": 8}}
call = model.call([[1]], **knobs)
assert call.request.forces  # tokens that are certain are taken without a step
assert not model.call([[1]], **knobs, last_token=9).request.forces
assert model.call([[1]], last_token=9).request.chain.only_bans
assert max(model.generate([[1]], max_new_tokens=8, last_token=9)[0][1:]) <= 9
print("added")
"""


def test_a_knob_is_a_field_and_a_step(tmp_path):
    pytest.importorskip("llguidance")
    copy = tmp_path / "fastgen"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    for name, mark, added in (
        ("inputs/params.py", "    # Which search\n", FIELD + "\n    # Which search\n"),
        ("sampling/processors.py", "    return steps\n\n\ndef _warpers(", STEP),
    ):
        code = (copy / name).read_text(encoding="utf-8")
        assert code.count(mark) == 1
        (copy / name).write_text(code.replace(mark, added), encoding="utf-8")
    script = ASKED.format(root=str(tmp_path), demo=str(PACKAGE / "demo"))
    command = [sys.executable, "-c", script]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert run.stdout == "added\n", run.stderr


def test_every_default_keeps_its_own_rule():
    """`Params` does not check them at each call."""
    for field in fields(Params):
        assert checked(field, field.default) == field.default
