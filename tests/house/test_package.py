"""The package has light imports and complete maps, and installs nothing else."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastgen
from fastgen.system import extras

HOME = Path(fastgen.__file__).parent
ROOT = HOME.parent


def named_in(text: str) -> set[str]:
    """The words of a map, or of a part of one."""
    return set(re.findall(r"\w+", text))


def beside(place: Path) -> set[str]:
    """The modules of a folder, and the folders in it that hold some."""
    inside = {path.parent.name for path in place.glob("*/__init__.py")}
    return ({path.stem for path in place.glob("*.py")} | inside) - {"__init__"}


PACKAGES = sorted(
    path.parent.relative_to(ROOT).as_posix()
    for folder in ("fastgen", "export")
    for path in (ROOT / folder).rglob("__init__.py")
    if path.parent.name != "commands"  # where each file is a command: its docstring says that
)


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_function_of_a_package_is_called_like_a_module_of_it(folder):
    """The module takes the function's place when it is first imported."""
    body = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")).body
    made = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert made & beside(ROOT / folder) == set()


@pytest.mark.parametrize("folder", PACKAGES)
def test_the_map_in_the_docstring_names_every_module(folder):
    place = ROOT / folder
    text = ast.get_docstring(ast.parse((place / "__init__.py").read_text(encoding="utf-8")))
    assert beside(place) - named_in(text or "") == set()


def test_the_names_offered_are_the_names_there():
    assert fastgen.__all__ == sorted(fastgen.__all__)
    assert all(getattr(fastgen, name) for name in fastgen.__all__)  # they come when they are used
    public = {name for name in vars(fastgen) if not name.startswith("_")}
    modules = {p.stem for p in HOME.iterdir()} | {"annotations", "os", "importlib", "export"}
    modules |= {"TYPE_CHECKING", "Any"}
    assert public - modules == set(fastgen.__all__) - modules


BLOCKED = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {"torch", "transformers", "jinja2", "onnx", "click"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
before = set(sys.modules)
import fastgen
assert "numpy" not in sys.modules  # so that the command line can say first what Ctrl-C does
fastgen.load
new = {name.split(".")[0] for name in set(sys.modules) - before}
allowed = {"fastgen", "numpy", "onnxruntime", "tokenizers"} | set(sys.stdlib_module_names)
extra = sorted(name for name in new - allowed if not name.startswith("_"))
assert not extra, extra
model = fastgen.load(sys.argv[1])
print(model.generate([[5, 6, 7], [8]], max_new_tokens=3))
print(model.complete("The quick", max_new_tokens=3, do_sample=True, seed=1))
"""


def test_import_and_generation_without_torch(pair):
    _, model = pair("gpt2")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(model.directory)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(model.generate([[5, 6, 7], [8]], max_new_tokens=3))


def test_a_command_starts_without_what_others_need():
    """The forms of calls take longer to import than the rest of the command line."""
    program = "import sys, fastgen.commands; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "fastgen.commands.chat" in loaded
    assert not loaded & {"fastgen.serve.tools", "fastapi", "jinja2", "llguidance", "onnx", "ray"}


def test_telemetry_is_off_unless_the_user_says_otherwise():
    program = "import os, fastgen; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for given, expected in ((None, "1"), ("0", "0")):
        settings = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
        settings |= {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
        done = subprocess.run(
            [sys.executable, "-c", program], env=settings, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected


def test_the_wheel_installs_fastgen_alone(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in (
        "fastgen",
        "export",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "NOTICE",
    ):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 10_000_000
    held = zipfile.ZipFile(wheel)
    names = held.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastgen"}
    parts = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("export/**/*.py")}
    assert {"export/onnx_folder/folder.py", "export/build/families.py"} <= parts
    assert {f"fastgen/{part}" for part in parts} <= set(names)
    assert "fastgen/demo/fastgen.json" in names
    assert "fastgen/py.typed" in names
    page = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fastgen/serve/page/**/*.*")}
    assert {"fastgen/serve/page/page.html", "fastgen/serve/page/vendor/purify.min.js"} <= page
    assert page <= set(names)
    assert {"LICENSE", "NOTICE"} <= {name.split("/")[-1] for name in names}
    (metadata,) = (held.read(name).decode() for name in names if name.endswith("/METADATA"))
    described = metadata.partition("\n\n")[2]
    assert described.startswith("# fastgen") and "Five lines of Python" in described
    assert not re.findall(r"\]\((?!https://)", described)  # an index has no files to link to


RIDDLE = re.compile(
    r"(what|who|whom|whose|how|whether|where|when|which|why|whatever|whoever|wherever)\b", re.I
)


@pytest.mark.parametrize("folder", ["fastgen", "export", "tests", "bench"])
def test_docstrings_begin_with_a_verb_or_the_thing(folder):
    """None begins with a question word: "Clear unused slots.", not "What clears unused slots"."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and RIDDLE.match(text):
                found.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert found == []


def texts() -> dict[str, bytes]:
    """The repository's files by name: git's, where there is one."""
    asked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = asked.stdout.split("\0") if asked.returncode == 0 else []
    paths = [ROOT / name for name in names] or list(ROOT.rglob("*"))
    return {str(path.relative_to(ROOT)): path.read_bytes() for path in paths if path.is_file()}


def test_nobody_is_told_to_install_the_stranger_of_our_name():
    """The index's `fastgen` is another program: what people install is `extras.DISTRIBUTION`."""
    wrong = re.compile(rb"\bfastgen\[|\b(install|add)( +-\S+)* +[\"'`]?fastgen\b(?!-onnx)")
    found = {name: wrong.search(text) for name, text in texts().items()}
    assert {name: match[0] for name, match in found.items() if match} == {}
    for told in ("pip install {}", "pip install -q '{}'", "uv add {}", "{}[chat]"):
        assert wrong.search(told.format("fastgen").encode())
        assert not wrong.search(told.format(extras.DISTRIBUTION).encode())


def test_the_distribution_has_the_name_and_the_version_that_we_say():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == extras.DISTRIBUTION and project["version"] == fastgen.__version__
    assert "chat" in project["optional-dependencies"]
    assert extras.install("chat") == f"pip install '{project['name']}[chat]'"


# Imported late, with an error that names the extra.
OF_EXTRAS = {
    "fastapi", "jinja2", "llguidance", "matplotlib", "prometheus_client", "pyarrow", "pydantic",
    "pydantic_core", "ray", "starlette", "uvicorn",
}  # fmt: skip


def test_what_is_imported_is_declared():
    """Each import of no extra is declared, with a lowest version that `.ci/lowest` tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[<>=!~ ]", one)[0] for one in project["dependencies"]}
    imported = set()
    for path in [p for p in HOME.rglob("*.py") if "export" not in p.relative_to(HOME).parts[:1]]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    imported -= {"fastgen", "torch", "transformers", *OF_EXTRAS, *sys.stdlib_module_names}
    assert imported == declared
    passed = (ROOT / ".ci" / "lowest.txt").read_text().split()
    extras = project["optional-dependencies"]
    tested = [extras[name] for name in ("chat", "onnx", "serve", "structured", "batch", "bench")]
    for one in {*project["dependencies"], *(one for some in tested for one in some)}:
        assert one.startswith("fastgen") or one.partition(";")[0].replace(">=", "==") in passed


def test_no_core_spins_while_nothing_is_generated(pair):
    """The process's CPU time soon stands still once a call has returned.

    Threads that go on spinning, for a second say, would take as much of each core.
    """
    program = """
import sys, time, fastgen
model = fastgen.load(sys.argv[1], threads=2)
model.generate([5, 6, 7], max_new_tokens=30, eos_token_id=None)
start = before = time.process_time()
while True:
    time.sleep(0.1)
    if time.process_time() - before < 0.01:
        break
    before = time.process_time()
print(time.process_time() - start)
"""
    _, model = pair("gpt2")
    done = subprocess.run(
        [sys.executable, "-c", program, str(model.directory)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert float(done.stdout) < 0.5, done
