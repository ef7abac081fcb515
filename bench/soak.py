"""A service under many clients, rude ones among them: nothing lost, nothing wrong, nothing kept.

    python bench/soak.py
    python bench/soak.py --requests 200 --clients 20 --model DIRECTORY

`fastgen serve` runs as a process. Each client sends one request after another, drawn by chance:

- completions, whole or streamed, of every kind of search; prompts that have much in common;
- streams that are read slowly, and streams whose client goes away in the middle;
- broken JSON, fields of wrong types, prompts that are too long: each must be told so.

Then every text is compared with that of the same call alone (of a client that went away: with its
beginning), the service's own counts with what the clients saw, and what the process holds at the
beginning, in the middle and at the end: memory, open files, threads.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

import fastgen

TEXTS = (
    "The os module provides a portable way of using operating system dependent functionality. ",
    "Return a list containing the names of the entries in the directory given by path. ",
    "class Thread(group=None, target=None, name=None, args=(), kwargs={}, *, daemon=None)\n",
    "This module defines a base class for writing network servers, e.g. naïve ☃ ones. ",
)
SEARCHES: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.9},
    {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.2},
    {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
    {"do_sample": True, "frequency_penalty": 0.7, "stop_strings": ["\n\n", "the"]},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": False, "prompt_lookup_num_tokens": 4},
    {"do_sample": True, "json_schema": {"type": "array", "items": {"type": "integer"}}},
)
# What a client does wrong, and the status that it must get.
WRONGS: tuple[tuple[bytes, int], ...] = (
    (b'{"prompt": "a', 400),
    (b"\xff\xfe", 400),
    (b"[]", 400),
    (b'{"prompt": {"a": 1}}', 400),
    (b'{"prompt": "a", "max_tokens": "many"}', 400),
    (b'{"prompt": "a", "temperature": []}', 400),
    (b'{"prompt": "a", "num_beams": 1e9}', 400),
    (b'{"prompt": "a", "stop": {"x": 1}}', 400),
    (b'{"prompt": [1, 2, 99999999]}', 400),
    (b'{"prompt": "a", "no_such_field": 1}', 400),
    (json.dumps({"prompt": "too long " * 2000}).encode(), 400),
    (b'{"prompt": "' + b"a" * (3 << 20) + b'"}', 413),
)
KINDS = {"whole": 0.3, "stream": 0.28, "slow": 0.08, "leave": 0.18, "wrong": 0.16}


@dataclass
class Wish:
    """One request and what came of it."""

    kind: str
    prompt: str = ""
    knobs: dict[str, Any] = field(default_factory=dict)
    wrong: tuple[bytes, int] | None = None
    texts: list[str] = field(default_factory=list)
    ended: bool = False
    again: int = 0  # times that it was told to come later


def wishes(count: int, longest: int, seed: int) -> list[Wish]:
    """Requests of all kinds, by chance."""
    random = np.random.default_rng(seed)
    kinds = random.choice(list(KINDS), count, p=list(KINDS.values()))
    made = []
    for kind in kinds.tolist():
        if kind == "wrong":
            made.append(Wish(kind, wrong=WRONGS[int(random.integers(len(WRONGS)))]))
            continue
        text = TEXTS[int(random.integers(len(TEXTS)))]
        prompt = text * int(random.choice([1, 1, 1, 2, 4])) + str(random.integers(20))
        knobs = {
            **SEARCHES[int(random.integers(len(SEARCHES)))],
            "max_new_tokens": int(random.integers(1, longest)),
        }
        if knobs.get("do_sample"):
            knobs["seed"] = int(random.integers(1000))
        made.append(Wish(kind, prompt, knobs))
    return made


# --- the clients ----------------------------------------------------------------------------------


class Client:
    """Speaks HTTP over one socket a request, as rudely as it is told."""

    def __init__(self, port: int, random: np.random.Generator) -> None:
        self.port, self.random = port, random

    async def run(self, wish: Wish) -> None:
        """Send a request until it is taken, and note its texts."""
        while not wish.ended:
            if await self._once(wish):
                wish.ended = True
            else:  # 429: later
                wish.again += 1
                await asyncio.sleep(0.2)

    async def _once(self, wish: Wish) -> bool:
        streamed = wish.kind != "whole"
        body = (
            wish.wrong[0]
            if wish.wrong
            else json.dumps(
                {"prompt": wish.prompt, "stream": streamed, "top_k": 0, **wish.knobs}
            ).encode()
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        try:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            with contextlib.suppress(ConnectionError):  # 413 may come before all is sent
                writer.write(head.encode() + body)
                await writer.drain()
            status = int((await reader.readline()).split()[1])
            while (await reader.readline()).strip():
                pass
            if status == 429:
                return False
            if wish.wrong:
                content = await reader.read()
                assert status == wish.wrong[1], (status, wish.wrong[0][:60], content[:300])
                assert set(json.loads(content[content.index(b"{") :])["error"]) >= {"message"}
                return True
            assert status == 200, (status, wish, await reader.read())
            copies = int(wish.knobs.get("num_return_sequences", 1))
            wish.texts = [""] * copies
            if not streamed:
                found = json.loads(await reader.read())
                wish.texts = [choice["text"] for choice in found["choices"]]
                return True
            await self._follow(wish, reader)
            return True
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _follow(self, wish: Wish, reader: asyncio.StreamReader) -> None:
        leave = int(self.random.integers(0, 20)) if wish.kind == "leave" else None
        place = 0
        async for event in events(reader):
            if event == "[DONE]":
                return
            if place == leave:
                return
            (choice,) = json.loads(event)["choices"]
            wish.texts[choice["index"]] += choice["text"]
            place += 1
            if wish.kind == "slow":
                await asyncio.sleep(0.03)
        raise AssertionError(f"a stream without an end: {wish}")


async def events(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """The events of a chunked answer: its chunks are whole lines."""
    while line := await reader.readline():
        if line.startswith(b"data: "):
            yield line[6:].decode().rstrip()


async def soak(port: int, made: list[Wish], clients: int, seed: int, each: Any) -> None:
    """Run all requests, with so many clients at a time."""
    waiting = iter(enumerate(made))

    async def one(place: int) -> None:
        client = Client(port, np.random.default_rng([seed, place]))
        for number, wish in waiting:
            each(number)
            await asyncio.wait_for(client.run(wish), 600)

    await asyncio.gather(*(one(place) for place in range(clients)))


# --- the service ----------------------------------------------------------------------------------


@contextlib.contextmanager
def service(model: str | None, *flags: str) -> Iterator[tuple[int, int]]:
    """`fastgen serve` as a process: its port and its id."""
    words = [sys.executable, "-m", "fastgen", "serve", *([model] if model else []), "--port", "0"]
    words += ["--log-format", "none"]
    with subprocess.Popen([*words, *flags], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            for line in process.stderr:
                if found := re.search(r"serving at http://.*:(\d+)", line):
                    break
            else:
                raise SystemExit("the service did not start")
            yield int(found[1]), process.pid
            process.terminate()
            assert process.wait(60) == 0, process.returncode
            rest = process.stderr.read()
            assert not rest, rest
        finally:
            process.kill()


def held(process: int) -> dict[str, float]:
    """MB resident, open files and threads of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "MB": int(fields["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir(f"/proc/{process}/fd")),
        "threads": int(fields["Threads"]),
    }


async def metrics(port: int) -> dict[str, float]:
    """The service's own counts."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    pairs = (line.rpartition(" ") for line in text.splitlines() if line.startswith("fastgen:"))
    return {name.partition("{")[0]: float(value) for name, _, value in pairs}


async def at_rest(port: int) -> dict[str, float]:
    """The counts once nothing runs any more."""
    for _ in range(600):
        found = await metrics(port)
        if not found["fastgen:num_rows_running"] and not found["fastgen:num_requests_waiting"]:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"rows run that nobody reads: {found}")


# --- what must hold ------------------------------------------------------------------------------


def check(model: fastgen.CausalLM, made: list[Wish]) -> int:
    """Compare every text with the one generated alone; how many texts there are."""
    known: dict[str, list[str]] = {}
    count = 0
    for wish in made:
        assert wish.ended, f"lost: {wish}"
        if wish.wrong:
            continue
        name = json.dumps([wish.prompt, wish.knobs], sort_keys=True)
        if name not in known:
            found = model.complete(wish.prompt, **{"top_k": 0, **wish.knobs})
            texts = [found] if isinstance(found, str) else found
            stops = wish.knobs.get("stop_strings", ())
            known[name] = [cut(text, stops) for text in texts]
        for text, whole in zip(wish.texts, known[name], strict=True):
            same = whole.startswith(text) if wish.kind == "leave" else text == whole
            assert same, f"wrong: {wish}\nalone: {whole!r}"
            count += 1
    return count


def cut(text: str, stops: Any) -> str:
    """A text before the first of these."""
    return text[: min((text.find(one) for one in stops if one in text), default=len(text))]


def run(args: argparse.Namespace) -> None:
    made = wishes(args.requests, args.longest, args.seed)
    accounts: list[tuple[str, dict[str, float]]] = []
    limits = "--queue", str(args.queue), "--rows", str(args.rows)
    with service(args.model, *limits) as (port, process):

        async def all_of_it() -> dict[str, float]:
            # What a process takes once: code that is loaded late, prefixes, slots of keys and
            # values as far as a row has ever reached, and what the allocator keeps of what was
            # freed. After some hundred requests it has all of that.
            await soak(port, wishes(args.warm, args.longest, args.seed + 1), args.clients, 1, _none)
            await at_rest(port)
            accounts.append(("before", held(process)))
            marks = {len(made) * part // 4: f"{part}/4" for part in (1, 2, 3)}

            def note(number: int) -> None:
                if number in marks:
                    accounts.append((marks[number], held(process)))

            await soak(port, made, args.clients, args.seed, note)
            counts = await at_rest(port)
            accounts.append(("after", held(process)))
            return counts

        start = time.perf_counter()
        counts = asyncio.run(all_of_it())
        seconds = time.perf_counter() - start
    for when, account in accounts:
        shown = ", ".join(f"{value:,.0f} {name}" for name, value in account.items())
        print(f"{when:>7}: {shown}", flush=True)
    first, last = accounts[0][1], accounts[-1][1]
    assert last["files"] <= first["files"], "files are left open"
    assert last["threads"] <= first["threads"] + 1, "threads are left"
    assert last["MB"] <= first["MB"] + args.growth, "memory grows"
    model = fastgen.load(args.model) if args.model else fastgen.load()
    texts = check(model, made)
    kinds = Counter(wish.kind for wish in made)
    print(
        f"{len(made)} requests of {args.clients} clients in {seconds:.0f} s "
        f"({', '.join(f'{count} {kind}' for kind, count in kinds.items())}), "
        f"{sum(wish.again for wish in made)} times told 429: none lost, "
        f"{texts} texts equal to those alone, {counts['fastgen:generation_tokens_total']:,.0f} "
        f"tokens, {counts['fastgen:prefix_cache_hits_total']:,.0f} of prompts known"
    )


def _none(number: int) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--warm", type=int, default=1000, help="requests before it is looked at")
    parser.add_argument("--growth", type=float, default=32, help="MB that are no growth")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--longest", type=int, default=60, help="new tokens of a request, at most")
    parser.add_argument("--queue", type=int, default=12, help="the service's; more are told 429")
    parser.add_argument("--rows", type=int, default=24, help="the service's; others wait")
    parser.add_argument("--model", help="a directory; the demo model if none")
    parser.add_argument("--seed", type=int, default=0)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
