"""The service with many clients: what it makes a second, and how long its clients wait.

    python bench/serve.py
    python bench/serve.py --home DIR --shapes demo distilgpt2 smollm-135m --peers
    python bench/serve.py --home DIR --shapes smollm-135m --parts stall --rounds 5

In interleaved rounds, with new prompts each: the same requests one after another, and by 8 and 32
clients at a time, each of them with the next request as soon as its last one has ended. Streams,
greedy, 16 to 64 tokens of prompt and 32 to 64 new ones, the end of text switched off. The sides:

- service: `fastgen serve` as a process, its clients over HTTP, on the same processor;
- fastgen, OpenVINO GenAI (ContinuousBatchingPipeline), llama.cpp (a slot a request through its C
  API, prompts and steps in one batch, as its server does): the engines' own batching, in a process,
  without HTTP (`bench/serve_worker.py`). llama-cpp-python's own server answers one at a time.

`stall`: eight streams run, a prompt of 1,000 tokens comes (480 for the demo model) and right after
it one of 16: the longest time between two tokens of a stream until both have their first token, and
how long those two took.

`--home` keeps models and the peers' environments, as `bench/peers` does; see there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import shapes
import soak
from peers.home import OFFLINE, Home, Unavailable
from serve_worker import STREAM

from fastgen.timing.rounds import in_rounds

CLIENTS = (8, 32)
DEMO = "demo"
PEERS = {"openvino_llm": "OpenVINO GenAI", "llama": "llama.cpp"}
WORKER = Path(__file__).with_name("serve_worker.py")
VOCABULARY = {DEMO: 2048, "distilgpt2": 50257}

Answers = dict[str, Any]
Side = Callable[..., Answers]  # asked `do=`, with the arguments of the worker's functions


# --- the service's clients ------------------------------------------------------------------------


async def follow(
    port: int, prompt: list[int], new: int, told: Callable[[], object] = lambda: None
) -> None:
    """One request to its end; `told` is called at each event with tokens."""
    body = json.dumps(
        {
            "prompt": prompt,
            "max_tokens": new,
            "stream": True,
            "temperature": 0,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    before = last = ""
    async for event in soak.events(reader):
        before, last = last, event
        told()
    writer.close()
    await writer.wait_closed()
    found = json.loads(before)["usage"]["completion_tokens"] if last == "[DONE]" else last
    assert found == new, (found, new)


async def looped(port: int, prompts: list[list[int]], new: list[int], clients: int) -> Answers:
    """As `serve_worker.loop`, over HTTP."""
    waiting = iter(zip(prompts, new, strict=True))

    async def one() -> None:
        for prompt, count in waiting:
            await follow(port, prompt, count)

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return {"seconds": time.perf_counter() - start, "tokens": sum(new)}


async def stalled(
    port: int, running: list[list[int]], long: list[int], short: list[int]
) -> Answers:
    """As `serve_worker.stall`, over HTTP."""
    latest = [0.0] * len(running)
    got = [0] * len(running)
    before: list[float] = []
    meanwhile: list[float] = []
    into = before
    ready, over = asyncio.Event(), [False]

    def told(name: int) -> None:
        now = time.perf_counter()
        if got[name] > 5 and not over[0]:
            into.append(now - latest[name])
        got[name], latest[name] = got[name] + 1, now
        if min(got) >= 20:
            ready.set()

    streams = [
        asyncio.create_task(follow(port, prompt, STREAM, lambda n=name: told(n)))
        for name, prompt in enumerate(running)
    ]
    await ready.wait()
    into, began = meanwhile, time.perf_counter()
    first: dict[str, float] = {}

    async def timed(name: str, prompt: list[int]) -> None:
        await follow(port, prompt, 2, lambda: first.setdefault(name, time.perf_counter() - began))

    pair = asyncio.create_task(timed("long", long)), asyncio.create_task(timed("short", short))
    await asyncio.gather(*pair)
    over[0] = True
    await asyncio.gather(*streams)
    return {
        "usual": statistics.median(before),
        "longest": max(meanwhile),
        "first": first["short"],
        "first_of_long": first["long"],
    }


@contextlib.contextmanager
def service(directory: Path | None, threads: int) -> Iterator[Side]:
    model = None if directory is None else str(directory)
    with soak.service(model, "--threads", str(threads)) as (port, _):
        yield lambda do, **request: asyncio.run(
            {"loop": looped, "stall": stalled}[do](port, **request)
        )


@contextlib.contextmanager
def worker(python: Path, engine: str, directory: Path, threads: int, log: Path) -> Iterator[Side]:
    """An engine in its environment."""
    env = os.environ | OFFLINE | {"OMP_NUM_THREADS": str(threads)}
    words = [str(python), str(WORKER), engine, str(directory), str(threads)]
    with (
        log.open("a") as out,
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True, env=env
        ) as process,
    ):
        assert process.stdin and process.stdout

        def said() -> str:
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{engine} ended: see {log}")
            return line

        def ask(**request: Any) -> Answers:
            assert process.stdin
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(said())  # type: ignore[no-any-return]

        said()  # it is ready: what it measures of itself is not measured while others load

        try:
            yield ask
        finally:
            process.stdin.close()


# --- rounds ---------------------------------------------------------------------------------------


def sides(
    args: argparse.Namespace, home: Home, shape: str, stack: contextlib.ExitStack
) -> dict[str, Side]:
    """Start the sides that are compared."""
    directory = None if shape == DEMO else exported(home, shape)
    log = home.log(f"serve-{shape}")
    found = {"service": stack.enter_context(service(directory, args.threads))}
    ours = worker(Path(sys.executable), "ours", directory or Path(DEMO), args.threads, log)
    found["fastgen"] = stack.enter_context(ours)
    for name in PEERS if args.peers and shape != DEMO else ():
        try:
            python, converted = home.python(name), home.converted(shape, name, "int8")
        except Unavailable as error:
            print(f"{PEERS[name]} is left out: {error}", file=sys.stderr)
            continue
        found[PEERS[name]] = stack.enter_context(worker(python, name, converted, args.threads, log))
    return found


def exported(home: Home, shape: str) -> Path:
    """Our int8 model of the source that the peers convert, kept until it is deleted."""
    from fastgen.export import export

    path = home.path / "serve" / f"{shape}-int8"
    if not path.exists():
        export(str(home.source(shape)), path, precision="int8", allow_mismatch=True)
    return path


def ids(source: random.Random, shape: str, length: int) -> list[int]:
    vocabulary = VOCABULARY.get(shape) or shapes.SHAPES[shape][1]["vocab_size"]
    return [source.randrange(300, vocabulary - 100) for _ in range(length)]


def throughput(args: argparse.Namespace, shape: str, all_: dict[str, Side]) -> None:
    """Tokens a second of each side, alone and with many clients."""

    def rate(turn: int, side: Side, clients: int) -> float:
        source = random.Random(f"{turn} {clients}")
        count = args.alone if clients == 1 else args.requests * clients
        new = [source.randrange(32, 65) for _ in range(count)]
        prompts = [ids(source, shape, source.randrange(16, 65)) for _ in new]
        answer = side(do="loop", prompts=prompts, new=new, clients=clients)
        return float(answer["tokens"] / answer["seconds"])

    calls = {
        (name, clients): partial(rate, side=side, clients=clients)
        for clients in (1, *CLIENTS)
        for name, side in all_.items()
    }
    rates = in_rounds(calls, args.rounds)
    for name in all_:
        alone = rates[name, 1]
        cells = [f"{statistics.median(alone):,.0f}"]
        for clients in CLIENTS:
            many = rates[name, clients]
            times = statistics.median(b / a for a, b in zip(alone, many, strict=True))
            cells.append(f"{statistics.median(many):,.0f} ({times:.2f})")
        print(f"| {shape} | {name} | {' | '.join(cells)} |", flush=True)


def stalls(args: argparse.Namespace, shape: str, all_: dict[str, Side]) -> None:
    """Measure how long clients wait while a long prompt is read."""
    long = 480 if shape == DEMO else 1000

    def stall(turn: int, side: Side) -> Answers:
        source = random.Random(100 + turn)
        running = [ids(source, shape, 16) for _ in range(8)]
        prompts = {"long": ids(source, shape, long), "short": ids(source, shape, 16)}
        return side(do="stall", running=running, **prompts)

    calls = {name: partial(stall, side=side) for name, side in all_.items()}
    for name, answers in in_rounds(calls, args.rounds).items():
        medians = [
            1e3 * statistics.median(one[key] for one in answers)
            for key in ("usual", "longest", "first", "first_of_long")
        ]
        print(f"| {shape} | {name} | {' | '.join(f'{ms:,.0f}' for ms in medians)} |", flush=True)


PARTS = {
    "throughput": (throughput, "one by one | 8 clients | 32 clients"),
    "stall": (stalls, "a token, ms | longest gap | first token, short | long"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=[DEMO, *shapes.SHAPES], default=[DEMO])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--peers", action="store_true", help="beside OpenVINO GenAI and llama.cpp")
    parser.add_argument("--requests", type=int, default=3, help="of each of many clients")
    parser.add_argument("--alone", type=int, default=12, help="requests one after another")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--home",
        type=Path,
        default=os.environ.get("FASTGEN_BENCH_HOME"),
        help="keeps environments and models; else temporary",
    )
    args = parser.parse_args()
    print(f"{shapes.machine(args.threads)}\n", flush=True)
    with contextlib.ExitStack() as kept:
        place = args.home or kept.enter_context(tempfile.TemporaryDirectory())
        home = kept.enter_context(contextlib.closing(Home(Path(place))))
        for part in args.parts:
            print(f"| | {part}: | {PARTS[part][1]} |\n|---|---|{'---|' * 4}")
            for shape in args.shapes:
                with contextlib.ExitStack() as stack:
                    PARTS[part][0](args, shape, sides(args, home, shape, stack))
            print()


if __name__ == "__main__":
    main()
