"""Tool calls of real models, read: `python bench/tools.py DIRECTORY`.

DIRECTORY holds the fixtures of canitoolcall (github.com/redd34/canitoolcall; its package has them
under `canitoolcall/_data/fixtures`): a folder a family, a JSON object a line. Each output is read
whole, a character at a time, and in random pieces; all have to agree, and to be what is expected.

With `--model MODEL`, an exported directory, it says besides what the grammar of a request with
tools costs while the model writes no call, in microseconds a token.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastgen
from fastgen.inputs.params import Params
from fastgen.sampling import constraint
from fastgen.sampling.processors import Context
from fastgen.serve.reasoning import inside
from fastgen.serve.service import Service
from fastgen.serve.tools.deepseek import DeepSeek, DeepSeek3, Dsml, Dsml4, Dsml41
from fastgen.serve.tools.form import AnswerOptions, GrammarRules
from fastgen.serve.tools.format import Format
from fastgen.serve.tools.gemma import Gemma
from fastgen.serve.tools.glm import Glm, Glm47
from fastgen.serve.tools.harmony import Harmony
from fastgen.serve.tools.hermes import Hermes
from fastgen.serve.tools.kimi import Kimi, Kimi3
from fastgen.serve.tools.llama import Llama, Pythonic
from fastgen.serve.tools.mistral import Mistral, Mistral11
from fastgen.serve.tools.qwen_xml import QwenXml
from fastgen.serve.tools.reader import THINK, ReadingOptions
from fastgen.serve.tools.whole import WholeAnswer

# The format of a model, by a part of its name: what its chat template shows.
FORMATS: dict[str, Format] = {
    "DeepSeek-V4.1": Dsml41(), "DeepSeek-V4": Dsml4(), "DeepSeek-V3.2": Dsml(),
    "DeepSeek-V3.1": DeepSeek(), "DeepSeek": DeepSeek3(), "gemma": Gemma(), "GLM-4.5": Glm(),
    "GLM": Glm47(), "gpt-oss": Harmony(), "Kimi-K3": Kimi3(), "Kimi": Kimi(),
    "Llama-4": Pythonic(), "Llama": Llama(), "Mistral-7B": Mistral(), "istral": Mistral11(),
    "Devstral": Mistral11(), "Qwen3-Coder": QwenXml(), "Qwen3.": QwenXml(), "Qwen3-": Hermes(),
}  # fmt: skip


def asked(case: dict[str, Any], prompt: str, made: Format) -> ReadingOptions:
    functions = [one.get("function", one) for one in case["tools"]]
    tools = {one["name"]: one.get("parameters", True) for one in functions}
    marks = made.reasoning or THINK
    if "<think>" in case["raw_output"] and "istral" in made.name:
        marks = THINK
    return ReadingOptions(tools, marks, inside(prompt, marks))


def pieces(text: str, seed: int) -> Iterator[str]:
    """A text cut anywhere; whole for 0, into characters for 1."""
    chance, at = random.Random(seed), 0
    while at < len(text):
        size = len(text) if seed == 0 else 1 if seed == 1 else chance.randint(1, 8)
        yield text[at : at + size]
        at += size


def read(made: Format, case: dict[str, Any], prompt: str, seed: int) -> WholeAnswer:
    cut = "truncated" in case["tags"]
    reader, whole = made.read(asked(case, prompt, made)), WholeAnswer()
    for piece in pieces(case["raw_output"], seed):
        whole.take(reader.push(piece))
    whole.take(reader.end(cut))
    return whole


def said(whole: WholeAnswer) -> dict[str, Any]:
    calls = [{"name": one.name, "arguments": json.loads(one.arguments)} for one in whole.calls]
    return {"content": whole.content, "reasoning_content": whole.reasoning, "tool_calls": calls}


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """Without the space around texts, in which engines differ and which nobody sees."""
    texts = {name: (found.get(name) or "").strip() for name in ("content", "reasoning_content")}
    return {**texts, "tool_calls": found.get("tool_calls") or []}


def wrong(case: dict[str, Any], prompt: str) -> str:
    """The fault in the reading of a case; an empty string if it is right."""
    made = next(one for name, one in FORMATS.items() if name in case["models"][0])
    found = [said(read(made, case, prompt, seed)) for seed in range(6)]
    if any(one != found[0] for one in found):
        return "pieces differ"
    if "expected" in case:
        want = plain(case["expected"])
        return "" if plain(found[0]) == want else f"want {want}\n     got {plain(found[0])}"
    if found[0]["tool_calls"]:
        return f"calls {found[0]['tool_calls']}, expected none: {case['expected_error']['reason']}"
    accepted = case["expected_error"]["accept"]
    through = found[0]["content"].strip() == case["raw_output"].strip()
    return "" if "no_tool_calls" in accepted or through else f"got {found[0]}, accepted {accepted}"


def cases(directory: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each case with the prompt's end."""
    for family in sorted(directory.glob("*/family.json")):
        models = json.loads(family.read_text())["reference_models"]
        prompts = {one["repo"]: one["default_generation_prompt"] for one in models}
        for path in sorted(family.parent.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                case = json.loads(line)
                yield case, case.get("generation_prompt") or prompts.get(case["models"][0], "")


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}},
    "required": ["city"],
}
TEXT = "The weather in Paris is nice today; people walk along the river < and talk of a+b.\n"


def cost(directory: Path) -> None:
    """Measure the cost a token of a grammar that waits for a call, without the model."""
    model = fastgen.load(directory)
    names, size = Service(model).specials, model.model.info.vocab_size
    ids = np.array(model.tokenizer.encode(TEXT * 10, add_special_tokens=False), np.int64)
    for count in (1, 20):
        wanted = AnswerOptions({f"get_{n}": WEATHER for n in range(count)}, False, True)
        params = Params(grammar=Hermes().grammar(GrammarRules(names), wanted), eos_token_id=[0])
        start = time.perf_counter()
        held = constraint.build(params, model.tokenizer, size, 1)
        built = time.perf_counter() - start
        assert held is not None
        taken = []
        for length in range(len(ids)):
            scores = np.zeros((1, size), np.float32)
            start = time.perf_counter()
            held(_context(ids[:length]), scores)
            taken.append((time.perf_counter() - start) * 1e6)
        median, mean = statistics.median(taken), statistics.mean(taken)
        print(f"{count:2} tools: {median:.0f} us a token (mean {mean:.0f}); built in {built:.2f} s")


def _context(generated: NDArray[np.int64]) -> Context:
    one = np.ones(1, np.int64)
    return Context([generated], 0 * one, 0 * one, 0 * one, one * len(generated), 0 * one)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", type=Path, help="what a grammar costs this model")
    parser.add_argument("--show", action="store_true", help="what is wrong with each")
    given = parser.parse_args(arguments)
    right, all_ = Counter[str](), Counter[str]()
    for case, prompt in cases(given.directory):
        failed = wrong(case, prompt)
        all_[case["family"]] += 1
        right[case["family"]] += not failed
        if failed and given.show:
            print(case["id"], repr(case["raw_output"])[:400], failed, "", sep="\n     ")
    if not all_:
        raise SystemExit(f"{given.directory} has no cases: a folder with family.json is expected")
    for family in all_:
        print(f"{family:14} {right[family]:4} of {all_[family]:4}")
    print(f"{'all':14} {right.total():4} of {all_.total():4}")
    if given.model is not None:
        cost(given.model)


if __name__ == "__main__":
    main()
