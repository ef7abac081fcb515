"""The process in which a grammar is compiled before it is compiled in ours; `trial` runs it.

It imports llguidance and nothing of ours, holds a vocabulary, and gets one grammar after the other.
Where the system can fork, each has a process of its own, which has an end to time, memory and stack
and leaves the vocabulary behind; elsewhere it is tried here, and who asked starts another process
where this one dies.

In:  pickles on standard input, ("vocabulary", {...}) or ("grammar", text, limits).
Out: a line of JSON on standard output for each grammar: see `Verdict` of `fastgen.sampling.trial`.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import sys
import threading
from typing import Any, BinaryIO

PATIENCE = 4  # seconds by the clock for each of the processor's
STACK = 1 << 20  # bytes; threads of ours have more
SLACK = 1 << 28  # address space that is taken and never used, such as a thread's arena
LOOK = 0.01  # seconds between two looks at the memory
WALKS, STEPS = 3, 24  # texts that are begun, and their tokens
# Of a text that has to come, the bytes that are cut into tokens at once, and how many of them at
# the end are left for the next time: the cut may go through a token.
AT_ONCE, LEFT = 4096, 64


class Spellings:
    """A vocabulary as llguidance wants it, by the bytes of its tokens alone.

    Args:
        tokens: the bytes of each id; the last special one is the end of text.
        special: ids that are no text.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, special[-1]
        self._by_bytes: dict[bytes, int] = {}
        self._longest = 0

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens that write a text. It may not raise: llguidance asks.

        Of a long text they write the beginning: llguidance asks for the rest when that has come. So
        each byte is written once, however much has to come.
        """
        wanted = text.encode() if isinstance(text, str) else text
        if len(wanted) <= AT_ONCE:
            return self.written(wanted)
        ids, left = self.written(wanted[:AT_ONCE].decode(errors="ignore").encode()), 0
        while ids and left < LEFT:
            left += len(self.tokens[ids.pop()])
        return ids

    def written(self, wanted: bytes) -> list[int]:
        """The tokens that write all of a text, the longest first."""
        if not self._by_bytes:
            special = set(self.special_token_ids)
            self._by_bytes = {b: i for i, b in enumerate(self.tokens) if b and i not in special}
            self._longest = max(map(len, self._by_bytes), default=0)
        tokens, at = [], 0
        while at < len(wanted):
            ends = range(min(len(wanted), at + self._longest), at, -1)
            end = next(end for end in ends if wanted[at:end] in self._by_bytes)
            tokens.append(self._by_bytes[wanted[at:end]])
            at = end
        return tokens


def tried(tokenizer: Any, grammar: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Compile a grammar and begin some texts of it, as a call would; returns what went wrong."""
    import llguidance

    limits = llguidance.LLParserLimits(**settings)
    start = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if start.get_error():
        return {"error": start.get_error()}
    choice = random.Random(0)
    for _ in range(WALKS):
        matcher = start.deep_copy()
        for _ in range(STEPS):
            token = _allowed(matcher.compute_bitmask(), choice)
            # What comes to a limit of llguidance's here does so in a call too, as an error of it.
            if token is None or matcher.is_error() or matcher.try_consume_tokens([token]) == 0:
                break
    return {}


def _allowed(mask: bytes, choice: random.Random) -> int | None:
    """A token of those whose bits are set; None where none is."""
    start = choice.randrange(len(mask)) if mask else 0
    rest = mask[start:].lstrip(b"\0")
    offset = len(mask) - len(rest)
    if not rest:
        rest = mask.lstrip(b"\0")
        offset = len(mask) - len(rest)
    if not rest:
        return None
    return 8 * offset + choice.choice([bit for bit in range(8) if rest[0] >> bit & 1])


def watched(tokenizer: Any, grammar: str, limits: dict[str, Any]) -> dict[str, Any]:
    """Try a grammar on a small stack, with an eye on the memory; ends the process beyond it."""
    outcome: dict[str, Any] = {}
    before = _resident()

    def run() -> None:
        try:
            outcome.update(tried(tokenizer, grammar, limits["llguidance"]))
        except BaseException as error:  # a panic of Rust's is no Exception
            outcome["error"] = f"{type(error).__name__}: {error}"

    threading.stack_size(STACK)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK)
        if _resident() - before > limits["bytes"]:
            _tell({"over": "memory", "ended": os.getpid()})
            os._exit(0)
    return {**outcome, "grown": max(0, _resident() - before)}


def _resident() -> int:
    """The memory that this process has (off Linux: has had), in bytes; 0 where nothing says."""
    try:
        import resource
    except ImportError:
        return 0
    if sys.platform == "linux":  # whose `ru_maxrss` begins with that of who started it
        return _pages()[1] * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _pages() -> list[int]:
    """Of Linux: this process's pages, all and those in memory first."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return [*map(int, file.read().split())]


def forked(tokenizer: Any, grammar: str, limits: dict[str, Any]) -> None:
    """Try a grammar in a process of its own, and tell what became of it."""
    child = os.fork()
    if child == 0:
        try:
            _restrict(limits)
            _tell(watched(tokenizer, grammar, limits))
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status in (-signal.SIGPROF, -signal.SIGALRM):
        _tell({"over": "time"})
    elif status == -signal.SIGABRT:  # Rust's end where it gets no memory
        _tell({"over": "memory"})
    elif status in (-signal.SIGSEGV, -signal.SIGBUS):
        _tell({"over": "stack"})
    elif status != 0:
        _tell({"over": "life"})


def _restrict(limits: dict[str, Any]) -> None:
    """Let the system end this process beyond its time, and give it no more than its memory."""
    import resource

    for name in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(name, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, limits["seconds"])
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * limits["seconds"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        size = _pages()[0] * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        wanted = size + limits["bytes"] + SLACK
        soft = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_AS, (soft, most))


_OUT: list[BinaryIO] = []


def _tell(verdict: dict[str, Any]) -> None:
    _OUT[0].write(json.dumps(verdict).encode() + b"\n")
    _OUT[0].flush()


def main() -> None:
    """Answer until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks
    _OUT.append(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what llguidance prints is no answer
    tokenizer: Any = None
    while True:
        try:
            kind, *rest = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if kind == "vocabulary":
            (given,) = rest
            sys.path[:] = given["path"]
            import llguidance

            spelt: Any = Spellings(given["tokens"], given["special"])
            tokenizer = llguidance.LLTokenizer(spelt)
            spelt(b"")
        elif hasattr(os, "fork"):
            forked(tokenizer, *rest)
        else:
            _tell(watched(tokenizer, *rest))


if __name__ == "__main__":
    main()
