"""An engine's own continuous batching, without HTTP: the other side of `bench/serve.py`.

    python bench/serve_worker.py ENGINE DIRECTORY THREADS

Runs in the engine's environment. A JSON request a line comes in, a JSON answer goes out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from peers.worker import rest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
STREAM = 150  # tokens of the streams that run while a long prompt is read
SLOTS = 40  # requests that run together, at most
POSITIONS = 1152  # tokens of a request, prompt included


class Engine(Protocol):
    """Requests join between steps."""

    def add(self, name: int, prompt: list[int], new: int) -> None:
        """Let a request begin: greedy, `new` tokens exactly."""

    def step(self) -> list[tuple[int, int]]:
        """Go on; the requests that got tokens, and how many."""


class OpenVino:
    """ContinuousBatchingPipeline, its scheduler as it comes; 8-bit keys and values by default."""

    def __init__(self, directory: Path, threads: int) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_seqs = SLOTS
        settings = {"INFERENCE_NUM_THREADS": threads}
        self.genai = genai
        self.pipeline = genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", settings)
        self.handles: dict[int, Any] = {}
        self.number = 0

    def add(self, name: int, prompt: list[int], new: int) -> None:
        import numpy as np
        import openvino

        settings = self.genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos = new, True
        settings.apply_chat_template = False
        ids = openvino.Tensor(np.array([prompt], np.int64))
        self.number += 1
        self.handles[name] = self.pipeline.add_request(self.number, ids, settings)

    def step(self) -> list[tuple[int, int]]:
        self.pipeline.step()
        out = []
        for name, handle in list(self.handles.items()):
            count = 0
            while handle.can_read():
                count += sum(len(one.generated_ids) for one in handle.read().values())
            if count:
                out.append((name, count))
            if handle.get_status() == self.genai.GenerationStatus.FINISHED:
                del self.handles[name]
        return out


class Llama:
    """llama.cpp as its server has it: a slot a request, prompts and steps in one batch."""

    def __init__(self, directory: Path, threads: int) -> None:
        import llama_cpp
        from peers.engines import llama

        self.cpp, self.adapter = llama_cpp, llama.Adapter()
        self.adapter.load(directory, "int8", threads)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = POSITIONS * SLOTS, SLOTS
        settings.n_batch = 2048
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = self.adapter.cache_type
        self.context = llama_cpp.llama_init_from_model(self.adapter.model, settings)
        vocabulary = llama_cpp.llama_model_get_vocab(self.adapter.model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)
        self.free = list(range(SLOTS))
        # Of each request its slot, tokens that are to be read, how many are held, how many to come.
        self.running: dict[int, list[Any]] = {}

    def add(self, name: int, prompt: list[int], new: int) -> None:
        self.running[name] = [self.free.pop(), prompt, 0, new]

    def step(self) -> list[tuple[int, int]]:
        import numpy as np

        place, last = 0, {}
        for name, one in self.running.items():
            slot, fresh, held, _ = one
            part = fresh[: 2048 - place]
            for offset, token in enumerate(part):
                self.batch.token[place] = token
                self.batch.pos[place] = held + offset
                self.batch.n_seq_id[place] = 1
                self.batch.seq_id[place][0] = slot
                self.batch.logits[place] = offset + 1 == len(fresh)
                place += 1
            one[1], one[2] = fresh[len(part) :], held + len(part)
            if part and not one[1]:
                last[name] = place - 1
        self.batch.n_tokens = place
        if code := self.cpp.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode gave {code}")
        for name, where in last.items():
            logits = self.cpp.llama_get_logits_ith(self.context, where)
            one = self.running[name]
            one[1] = [int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())]
            one[3] -= 1
            if not one[3]:
                memory = self.cpp.llama_get_memory(self.context)
                self.cpp.llama_memory_seq_rm(memory, one[0], -1, -1)
                self.free.append(one[0])
                del self.running[name]
        return [(name, 1) for name in last]


class Ours:
    """fastgen's scheduler, as the service's thread runs it."""

    def __init__(self, directory: Path, threads: int) -> None:
        import fastgen
        from fastgen.engine import schedule

        self.model = fastgen.load(None if directory == Path("demo") else directory, threads=threads)
        self.scheduler = schedule.Scheduler(self.model.model)
        self.names: dict[int, int] = {}

    def add(self, name: int, prompt: list[int], new: int) -> None:
        call = self.model.call([prompt], max_new_tokens=new, do_sample=False, eos_token_id=None)
        self.names[id(call)] = name
        self.scheduler.submit(call)

    def step(self) -> list[tuple[int, int]]:
        return [(self.names[id(call)], len(events)) for call, events in self.scheduler.step()]


ENGINES = {"openvino_llm": OpenVino, "llama": Llama, "ours": Ours}


def loop(
    engine: Engine, prompts: Sequence[list[int]], new: Sequence[int], clients: int
) -> dict[str, Any]:
    """So many clients, each with the next request as soon as its last one has ended."""
    waiting = deque(range(len(prompts)))
    left: dict[int, int] = {}
    start = time.perf_counter()
    while waiting or left:
        while waiting and len(left) < clients:
            name = waiting.popleft()
            left[name] = new[name]
            engine.add(name, prompts[name], new[name])
        for name, count in engine.step():
            left[name] -= count
            assert left[name] >= 0
            if not left[name]:
                del left[name]
    return {"seconds": time.perf_counter() - start, "tokens": sum(new)}


def stall(
    engine: Engine, running: Sequence[list[int]], long: list[int], short: list[int]
) -> dict[str, Any]:
    """Measure the wait of running rows, and of a short prompt, behind a long prompt.

    Returns:
        `usual` and `longest`: seconds between two tokens of a stream, before it and meanwhile;
        `first` and `first_of_long`: seconds to the first token of the short one and the long one.
    """
    total, count = STREAM, len(running)
    got, latest = [0] * (count + 2), [0.0] * (count + 2)
    before: list[float] = []
    meanwhile: list[float] = []
    for name, prompt in enumerate(running):
        engine.add(name, prompt, total)
    began, first = None, {}
    while len(first) < 2:
        if began is None and min(got[:count]) >= 20:
            began = time.perf_counter()
            engine.add(count, long, 2)
            engine.add(count + 1, short, 2)
        told = engine.step()
        now = time.perf_counter()
        for name, new in told:
            if name >= count and name not in first and began is not None:
                first[name] = now - began
            elif name < count and got[name] > 5:
                (before if began is None else meanwhile).append(now - latest[name])
            got[name], latest[name] = got[name] + new, now
    ended = {count: 2, count + 1: 2}
    while any(got[n] < ended.get(n, total) for n in range(count + 2)):
        for name, new in engine.step():
            got[name] += new
    return {
        "usual": sorted(before)[len(before) // 2],
        "longest": max(meanwhile),
        "first": first[count + 1],
        "first_of_long": first[count],
    }


def main() -> None:
    name, directory, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines write to stdout
    engine = ENGINES[name](Path(directory), int(threads))
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        what = {"loop": loop, "stall": stall}[request.pop("do")]
        answer = what(engine, **request)
        rest()  # or its threads, waiting for more, would slow the next engine down
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
