"""Time fastgen beside transformers' eager `generate`, in interleaved rounds.

    python bench/generate.py --shape distilgpt2 --rows 1 4 8

Every case is run by every engine in turn, in each round; the tables give the median over the
rounds, and the median of each round's ratio to transformers. Lengths are forced.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import shapes

from fastgen.timing.rounds import in_rounds, ratio, seconds


def cases(args: argparse.Namespace) -> dict[str, tuple[int, int, int, int]]:
    """Name -> rows, beams, prompt tokens, new tokens."""
    out = {}
    for rows in args.rows:
        prompt = args.prompt if rows < 8 else max(args.prompt, 64)
        out[f"{rows} rows, {prompt} -> {args.new}"] = (rows, 1, prompt, args.new)
    for beams in args.beams:
        out[f"{beams} beams, {args.prompt} -> {args.new}"] = (1, beams, args.prompt, args.new)
    for prompt in args.prefill:
        out[f"first token after {prompt}"] = (1, 1, prompt, 1)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser)
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--cache-precision", nargs="+", default=["fp32"], help="fp32 int8")
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 4])
    parser.add_argument("--beams", nargs="*", type=int, default=[])
    parser.add_argument("--prefill", nargs="*", type=int, default=[])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()

    import torch

    import fastgen

    torch.set_num_threads(args.threads)
    theirs = shapes.build(args.shape)
    with shapes.exported(args.shape, args.precision, args.keep, args.cache_precision) as paths:
        engines: dict[str, Callable[..., Any]] = {"transformers eager fp32": transformers(theirs)}
        for precision, path in paths.items():
            model = fastgen.load(path, threads=args.threads)
            engines[f"fastgen {precision}"] = ours(model)
        print(f"{args.shape}; {shapes.machine(args.threads)}\n")
        for case, settings in cases(args).items():
            report(case, settings, measure(engines, settings, args.rounds, theirs.config))


def transformers(model: Any) -> Callable[..., Any]:
    import torch

    def run(ids: Any, **knobs: Any) -> Any:
        tensor = torch.from_numpy(ids)
        return model.generate(tensor, attention_mask=torch.ones_like(tensor), **knobs)

    return run


def ours(model: Any) -> Callable[..., Any]:
    return lambda ids, **knobs: model.generate(ids, **knobs)


def measure(
    engines: dict[str, Callable[..., Any]],
    settings: tuple[int, int, int, int],
    rounds: int,
    config: Any,
) -> dict[str, list[float]]:
    """Seconds of a call, by engine and round. Each call has a new random prompt."""
    rows, beams, prompt, new = settings
    random = np.random.default_rng(0)
    prompts = random.integers(0, config.vocab_size, (1 + rounds, rows, prompt))
    knobs = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "num_beams": beams}

    def timed(run: Callable[..., Any]) -> Callable[[int], float]:
        return lambda turn: seconds(lambda: run(prompts[turn], **knobs))

    return in_rounds({name: timed(run) for name, run in engines.items()}, rounds)


def report(case: str, settings: tuple[int, int, int, int], times: dict[str, list[float]]) -> None:
    rows, _, _, new = settings
    base = next(iter(times.values()))
    print(f"| {case} | ms a {'step' if new > 1 else 'call'} | tokens/s | times transformers |")
    print("|---|---|---|---|")
    for name, took in times.items():
        median, times_as_fast = statistics.median(took), ratio(base, took)
        rate = f"{rows * new / median:.0f} | {times_as_fast:.2f}"
        print(f"| {name} | {1e3 * median / new:.2f} | {rate} |")
    print()


if __name__ == "__main__":
    main()
