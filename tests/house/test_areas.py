"""The areas of the house: what each holds, and what it may import.

`AREAS` is the plan. docs/architecture.md shows it; `python tests/house/test_areas.py` draws that
picture again after a change.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAP = ROOT / "docs" / "architecture.md"

# From the top to the bottom. Of each area: what it may import, and its modules, a line a floor: a
# module imports those of lower floors, and none beside it.
AREAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "__main__": (
        "commands system",
        (),
    ),
    "commands": (
        "jobs/ray jobs serve serve/tools timing conversation export fastgen first_use engine "
        "sampling store inputs system",
        (
            "batch chat generate score serve tune",
            "bench export info models rows",
            "knobs say",
        ),
    ),
    "jobs/ray": (
        "jobs serve generator first_use engine store inputs system errors",
        (
            "spread",
            "cluster replicas",
            "files node",
        ),
    ),
    "jobs": (
        "serve generator engine store inputs system",
        (
            "generation scoring",
            "job openai request",
            "source window",
            "journal parquet row",
        ),
    ),
    "serve": (
        "serve/tools fastgen generator first_use engine sampling text store inputs system",
        (
            "routes",
            "chats completions decisions knobs messages models responses",
            "talk",
            "response service",
            "front record",
            "run wire_messages wire_responses",
            "door wire",
            "blocks kept limits metrics output_items server",
            "items",
            "answers dialects document engine page_files reasoning rendered",
            "refused",
        ),
    ),
    "serve/tools": (
        "generator sampling text inputs",
        (
            "shown",
            "granite",
            "deepseek glm llama mistral plain qwen_xml smollm3",
            "command_r gemma harmony hermes kimi",
            "choice format",
            "form",
            "typed",
            "json_text whole",
            "reader",
        ),
    ),
    "timing": (
        "fastgen engine sampling store inputs system errors",
        (
            "plot",
            "measure tune",
            "rounds",
        ),
    ),
    "conversation": (
        "generator engine text store inputs system",
        (),
    ),
    "export": (
        "export/gguf export/build export/torch_model export/onnx_folder export/prove "
        "export/trace export/quantize export/source export/rewrite fastgen generator engine "
        "store system errors",
        (
            "pipeline",
            "many_tokens stages",
            "work",
            "opening",
            "demo requirements",
            "bundle manual options progress",
        ),
    ),
    "export/gguf": (
        "export/torch_model export/build export/prove store errors",
        (
            "proved",
            "parts",
            "architectures",
            "tensors vocabulary",
            "file",
        ),
    ),
    "export/build": (
        "export/torch_model export/prove export/quantize export/source export/rewrite "
        "generator engine sampling store errors",
        (
            "proved",
            "origin",
            "families unpacked",
            "families_mixture",
            "families_gemma families_layer_norm families_llama families_post_norm",
            "pieces",
            "configuration",
            "graph rotary",
            "mixture",
            "writer",
            "decoder weights",
        ),
    ),
    "export/torch_model": (
        "export/prove export/trace export/source text store system errors",
        (
            "original",
            "source",
            "adapter text",
        ),
    ),
    "export/onnx_folder": (
        "export/prove export/source export/rewrite store errors",
        (
            "origin",
            "rewrite",
            "rotary",
            "shapes",
            "attention plain prepare",
            "folder signature",
        ),
    ),
    "export/prove": (
        "export/trace export/quantize export/source generator engine text store",
        (
            "check",
            "corpus profile quality",
            "own_text",
            "reader",
        ),
    ),
    "export/trace": (
        "export/source export/rewrite store errors",
        (
            "graph",
            "refuse",
            "hooks",
            "repeat sparse states",
            "attention experts rope stored",
        ),
    ),
    "export/quantize": (
        "export/rewrite store system",
        (
            "recipe",
            "codes experts kv_int8 smooth",
            "follow",
            "passage",
            "calibrate gptq grid prefill_int8 values_apart",
            "kernels",
            "activations rotate",
            "rotate_values",
            "divergence rotation",
            "parts triangle",
            "blas",
        ),
    ),
    "export/source": (
        "store errors",
        ("checkpoint origin quantised vocabulary",),
    ),
    "export/rewrite": (
        "store",
        (
            "mixture trim window",
            "contract edit node onnx_file",
        ),
    ),
    "fastgen": (
        "generator engine text inputs errors",
        (),
    ),
    "generator": (
        "first_use engine sampling text store inputs",
        (),
    ),
    "params": (
        "inputs",
        (),
    ),
    "first_use": (
        "store errors",
        (),
    ),
    "engine": (
        "sampling text store inputs system errors",
        (
            "schedule",
            "prepare",
            "call",
            "run speculative",
            "batch diverse plain",
            "search",
            "hypotheses",
            "alike writer",
            "slots step",
            "request score",
            "guidance memory_estimate",
            "prefill",
            "prompt_reader",
            "model prefix_cache",
            "session",
            "beam cache kv_int8 output plan prefill_int8",
            "cuts",
        ),
    ),
    "sampling": (
        "text inputs system",
        (
            "constraint",
            "processors sampler trial",
            "schema softmax stop trial_process watermark",
        ),
    ),
    "text": (
        "store system errors",
        (
            "chat_template token_healing",
            "message_forms sandbox tokenizer",
        ),
    ),
    "store": (
        "system errors",
        (
            "resolve",
            "hub packed report tuning",
            "model_info",
            "files graph_io jsonfile onnx_folders",
        ),
    ),
    "inputs": (
        "",
        (
            "params prompt",
            "knob",
            "keywords lengths validators",
            "tensors",
        ),
    ),
    "system": (
        "",
        ("cpu extras interrupt memory",),
    ),
    "errors": (
        "",
        (),
    ),
}

# An import to an area above: late, in a function, and only here.
LATE = {("first_use", "export"), ("jobs", "jobs/ray")}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of fastgen by its dotted name."""
    paths = [p for folder in ("fastgen", "export") for p in (ROOT / folder).rglob("*.py")]
    inside = [p for p in paths if p.relative_to(ROOT).parts[:2] != ("fastgen", "export")]
    return {_dotted(path.relative_to(ROOT)): path for path in inside}


def _dotted(path: Path) -> str:
    parts = [*(("fastgen",) if path.parts[0] == "export" else ()), *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def area_of(module: str) -> str:
    """The longest name of an area that a module is in; "fastgen" itself is the face."""
    parts = module.split(".")[1:]
    names = ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in AREAS), "fastgen")


@functools.cache
def imports_of(module: str, late: bool = True) -> frozenset[str]:
    """The modules of fastgen that one imports: anywhere in it, or as it is imported itself."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    inner = {id(node) for outer in ast.walk(tree) if _is_late(outer) for node in ast.walk(outer)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not [a.name for a in node.names if a.name.startswith("fastgen.")], module
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and (late or id(node) not in inner):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else node.module or "" for name in names}
    return frozenset(found & modules().keys() - {module})


def _is_late(node: ast.AST) -> bool:
    """A function, or what is for the checker of types only."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def arrows(late: bool = True) -> set[tuple[str, str]]:
    """(area, area that it imports)."""
    pairs = {(area_of(m), area_of(one)) for m in modules() for one in imports_of(m, late)}
    return {(above, below) for above, below in pairs if above != below}


@pytest.mark.parametrize("area", AREAS)
def test_an_area_imports_what_the_plan_says(area):
    found = {below for above, below in arrows() if above == area}
    late = {below for above, below in LATE if above == area}
    assert found - late == set(AREAS[area][0].split())


def test_a_walk_names_what_is_there():
    """The walks of docs/architecture.md name modules, files, and classes or functions of theirs."""
    walks = MAP.read_text(encoding="utf-8").partition("## The walk of a prompt")[2]
    walks = walks.partition("## To add a knob")[0]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in modules().values())
    stems = {module.rpartition(".")[2] for module in modules()}
    for name in re.findall(r"`([^`\n]+)`", walks):
        last = name.rpartition(".")[2]
        named = re.search(rf"\b(class|def) {re.escape(last)}\b", sources) or last in stems
        path = any((ROOT / place / name).exists() for place in ("", "export", "fastgen"))
        dotted = name.replace("/", ".")
        inner = any(module.endswith(f".{dotted}") for module in modules())
        kept = re.search(rf"\b{re.escape(name)}\b", sources)  # a field, a file that is written
        assert named or path or inner or kept, name


def test_areas_import_downwards():
    """But for what is late: a command exports a model, and the export runs what it made."""
    height = {name: -number for number, name in enumerate(AREAS)}
    upwards = {(a, b) for a, b in arrows() if height[b] >= height[a]}
    assert upwards == LATE
    assert not arrows(late=False) & LATE


@pytest.mark.parametrize("area", AREAS)
def test_modules_of_an_area_import_downwards_too(area):
    floors = [line.split() for line in AREAS[area][1]]
    own = {m.rpartition(".")[2]: m for m in modules() if area_of(m) == area}
    own.pop(area.rpartition("/")[2], None)  # its __init__, or the module that is the area
    assert sorted(name for names in floors for name in names) == sorted(own)
    height = {name: -number for number, names in enumerate(floors) for name in names}
    upwards = {
        (name, other)
        for name, module in own.items()
        for other, there in own.items()
        if there in imports_of(module) and height[other] >= height[name]
    }
    assert upwards == set()


def floors() -> dict[str, int]:
    """The floor of each area: one above the highest that it imports."""
    found: dict[str, int] = {}
    for name, (below, _) in reversed(AREAS.items()):
        found[name] = 1 + max((found[one] for one in below.split()), default=0)
    return found


def _summary(area: str) -> str:
    """The first sentence of an area's own docstring."""
    module = "fastgen" if area == "fastgen" else f"fastgen.{area.replace('/', '.')}"
    text = ast.get_docstring(ast.parse(modules()[module].read_text(encoding="utf-8"))) or ""
    return re.split(r"[.:;](?:\s|$)", text, maxsplit=1)[0].replace("\n", " ")


def drawn() -> str:
    """The plan as the docs show it: the house by floors, and a table of all that is in it."""
    floor = floors()
    lines = [""]
    for name in sorted(AREAS, key=lambda name: -floor[name]):
        lines.append(f"    {floor[name]:2}  {name:20} {_summary(name)}")
    lines += ["", "| area | modules, from the top to the bottom | imports |", "|---|---|---|"]
    for name, (below, rows) in AREAS.items():
        inside = " / ".join(" ".join(f"`{one}`" for one in line.split()) for line in rows)
        lines.append(f"| **{name}** | {inside} | {', '.join(below.split())} |")
    return "\n".join(lines) + "\n"


def _with_picture(text: str) -> str:
    return re.sub(r"(?<=<!-- areas -->\n).*?(?=<!-- end -->)", lambda _: drawn(), text, flags=re.S)


def test_the_docs_show_the_plan_as_it_is():
    text = MAP.read_text(encoding="utf-8")
    assert text == _with_picture(text) and drawn() in text


if __name__ == "__main__":
    MAP.write_text(_with_picture(MAP.read_text(encoding="utf-8")), encoding="utf-8")
