"""Keys and values of prompts, kept across calls: what two prompts share is computed once.

What is kept are blocks of `BLOCK` tokens of prompts that were read. A block's name is a hash of
the model, of the cache's layout and of every token up to its end, so that the longest common
prefix is a walk from name to name, and prompts that start alike share their blocks.
(nano-vllm's block manager and mlx-lm's prompt cache are the models of this.)

A model that keeps states besides has them only as they were where a prompt was cut into chunks. So
its blocks are whole chunks, each with the states at its end. And where layers see a window, what
they are shown moves by so many tokens: a chunk of more cannot begin anywhere either.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
import zipfile
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.cache import Cache
from fastgen.engine.cuts import ends_alike, groups
from fastgen.store import files, jsonfile
from fastgen.store.graph_io import GRAIN

Block = tuple[int, tuple[NDArray[Any], ...]]  # how many tokens; keys, values and states

BLOCK = 32  # tokens; what is left of a prompt below a block is read again
MAX_BYTES = 256 * 2**20
FORMAT = 2  # of the file


class Sharing(NamedTuple):
    """The blocks of some prompts that are kept or begin several of them.

    Attributes:
        size: tokens of a block.
        first: of each prompt and block, the first prompt that has it; -1 for one that is kept.
    """

    size: int
    first: list[list[int]]

    def known(self, prompt: int, before: int) -> int:
        """The tokens of a prompt that are kept once the prompts before another were read."""
        return self.size * bisect_left(self.first[prompt], before)


class PrefixCache:
    """Keeps keys and values of prompts, up to a number of bytes, for later calls and batches.

    Pass one object to many calls: `model.generate(ids, prefix_cache=cache)`, and so `stream`,
    `complete`, `chat` and `score`, with any search. Each prompt takes over the longest prefix that
    is kept (in whole blocks of 32 tokens, less its last token) and only reads the rest. What was
    used longest ago is dropped when there is no room. Models and precisions may share an object:
    each finds only what is its own. Threads may share it too.

    A hit gives what a fresh prefill gives. Prompts are cut at the same places with and without a
    hit, and a block is only taken where onnxruntime's kernels add up the rest in the same order, so
    that on one machine with one onnxruntime the logits are equal bit for bit, in fp32, int8 and
    int4 (measured on AVX-512). That holds for float32 keys and values: with int8 ones a text that
    was read in other chunks has seen other roundings, and a hit may change a token. For the same
    reason generated tokens are not kept: a step of one token and the reading of many differ in the
    last bits, with int4 by more. Of a conversation, all but the last reply is found, and that is
    kept once it is part of a prompt. A prompt that is read beside others in one batch can differ in
    the last bits from the same prompt alone, with or without this cache.

    Args:
        max_bytes: of keys and values; never exceeded.

    Attributes:
        hits, misses: prompts that found a block, and those that did not.
        tokens_queried, tokens_reused: tokens of these prompts, and those not computed again.

    Raises:
        ValueError: `max_bytes` is not positive.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        self.max_bytes = max_bytes
        self.hits = self.misses = self.tokens_queried = self.tokens_reused = 0
        # Least recently used first. A block is always older than the one before it in a prompt,
        # so the oldest has none that builds on it.
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The tokens that are kept."""
        return sum(tokens for tokens, _ in self._blocks.values())

    def __repr__(self) -> str:
        return f"PrefixCache({len(self)} tokens, {self.nbytes:,} of {self.max_bytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """The bytes of keys and values that are kept."""
        return self._nbytes

    def clear(self) -> None:
        """Drop everything that is kept."""
        with self._lock:
            self._blocks.clear()
            self._nbytes = 0

    def sharing(
        self, model: str, prompts: Sequence[NDArray[np.int64]], cache: Cache, chunk: int
    ) -> Sharing:
        """Find out what `prompts` will find here: of what is kept, and of each other.

        Args:
            model, chunk: as `fetch` takes them.
        """
        size = _size(cache, chunk)
        names = [_names(model, prompt, cache, size) for prompt in prompts]
        with self._lock:
            first = {name: -1 for mine in names for name in mine if name in self._blocks}
        for index, mine in enumerate(names):
            for name in mine:
                first.setdefault(name, index)
        return Sharing(
            size,
            [
                [first[name] for name in mine[: (len(prompt) - 1) // size]]
                for prompt, mine in zip(prompts, names, strict=True)
            ],
        )

    def fetch(
        self,
        model: str,
        prompts: Sequence[NDArray[np.int64]],
        cache: Cache,
        first: int,
        chunk: int,
    ) -> None:
        """Write what is kept of `prompts` into the empty slots from `first` on.

        Args:
            model: its fingerprint.
            prompts: int64 [length] each; of each, one token at least is left to compute. They are
                going to be read together, in pieces that end at multiples of `chunk`.

        Raises:
            ValueError: a block does not fit, which a file can bring about; nothing is written.
        """
        size = _size(cache, chunk)
        names = [_names(model, prompt[:-1], cache, size) for prompt in prompts]
        matches: list[list[Block]] = []
        kind = size, cache.kind(size)
        with self._lock:
            for mine in names:
                count = next((i for i, n in enumerate(mine) if n not in self._blocks), len(mine))
                matches.append([self._blocks[name] for name in mine[:count]])
                if any(_kind(block) != kind for block in matches[-1]):
                    raise ValueError(
                        "prefix_cache holds keys and values of another shape than the model's, "
                        "under its name: the file that it was loaded from is damaged; delete it"
                    )
                self._touch(mine[:count])
            held = _aligned(
                np.array([len(prompt) for prompt in prompts]),
                np.array([size * len(blocks) for blocks in matches]),
                size,
                chunk,
                groups(cache.shapes),
            )
            self.hits += int((held > 0).sum())
            self.misses += int((held == 0).sum())
            self.tokens_queried += sum(map(len, prompts))
            self.tokens_reused += int(held.sum())
        for slot, (blocks, tokens) in enumerate(zip(matches, held.tolist(), strict=True), first):
            for count, parts in blocks[: tokens // size]:
                cache.append(slot, count, parts)

    def keep(
        self,
        model: str,
        prompt: NDArray[np.int64],
        cache: Cache,
        slot: int,
        chunk: int,
        states: Mapping[int, Sequence[NDArray[np.float32]]],
    ) -> None:
        """Keep what `slot` holds of `prompt`, its first blocks if there is no room for all.

        Args:
            chunk: as `fetch` takes it.
            states: of the row after so many tokens, where the model keeps some.
        """
        size = _size(cache, chunk)
        names = _names(model, prompt, cache, size)
        with self._lock:
            nbytes = cache.nbytes(size)
            del names[self.max_bytes // nbytes :]
            missing = [
                i
                for i, name in enumerate(names)
                if name not in self._blocks and (not cache.state_shapes or size * (i + 1) in states)
            ]
            self._touch([name for name in names if name in self._blocks])
            self._shrink(self.max_bytes - nbytes * len(missing))
            for i in missing:
                end = size * (i + 1)
                parts = cache.read(slot, end - size, end)
                self._blocks[names[i]] = size, parts + tuple(states.get(end, ()))
                self._nbytes += nbytes
            self._touch([name for name in names if name in self._blocks])

    def _touch(self, names: Sequence[bytes]) -> None:
        for name in reversed(names):
            self._blocks.move_to_end(name)

    def _shrink(self, max_bytes: int) -> None:
        while self._nbytes > max_bytes:
            _, block = self._blocks.popitem(last=False)
            self._nbytes -= _nbytes(block)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what is kept to a file (numpy's .npz), which appears whole or not at all.

        It is of use where the same model directory is: another export finds nothing in it.

        Raises:
            ValueError: it cannot be written there.
        """
        path = Path(path)
        with self._lock:
            blocks = list(self._blocks.items())
        names = [name.hex() for name, _ in blocks]
        sizes = [tokens for _, (tokens, _) in blocks]
        header = {"format": FORMAT, "block": BLOCK, "names": names, "sizes": sizes}
        arrays = {
            f"{index}.{part}": array
            for index, (_, (_, parts)) in enumerate(blocks)
            for part, array in enumerate(parts)
        }
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        with (
            files.atomic_file("the prefix cache's file", path) as temporary,
            temporary.open("wb") as file,
        ):
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Self:
        """Load what `save` wrote; where there is not room for all, what was used last.

        Raises:
            ValueError: the file is truncated, damaged or of another kind.
        """
        jsonfile.check_fetched(Path(path))
        out = cls(max_bytes)
        with Path(path).open("rb") as file:
            try:
                with zipfile.ZipFile(file) as content:
                    out._fill(content, os.fstat(file.fileno()).st_size)
            except Exception as error:  # whatever zipfile, json and numpy make of the bytes
                raise ValueError(
                    f"{os.fspath(path)} is truncated or is no file of PrefixCache.save: {error}; "
                    "delete it"
                ) from error
        return out

    def _fill(self, content: zipfile.ZipFile, size: int) -> None:
        """Take over what a file of `size` bytes has, newest first."""
        members = {member.filename: member for member in content.infolist()}
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("what it holds is compressed")
        if sum(member.file_size for member in content.infolist()) > size:
            raise ValueError("what it holds is larger than itself")
        header = json.loads(_array(content, "header.npy").tobytes())
        if (header["format"], header["block"]) != (FORMAT, BLOCK):
            raise ValueError(
                f"it has format {header['format']} with blocks of {header['block']} tokens, this "
                f"fastgen reads format {FORMAT} with blocks of {BLOCK}"
            )
        names = [bytes.fromhex(name) for name in header["names"]]
        if len(set(names)) < len(names):
            raise ValueError("it has a block twice")
        sizes = header["sizes"]
        if len(sizes) != len(names) or not all(type(n) is int and n > 0 for n in sizes):
            raise ValueError(f"it has blocks of {sizes} tokens")
        for index, name in reversed(list(enumerate(names))):
            ours = (f"{index}.{part}.npy" for part in itertools.count())
            parts = list(itertools.takewhile(members.__contains__, ours))
            described = [_described(content, part) for part in parts]
            if not parts or not all(dtype in (np.float32, np.int8) for _, dtype in described):
                raise ValueError(f"it has {described} where a block should be")
            size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in described)
            if self._nbytes + size > self.max_bytes:
                break
            arrays = tuple(_array(content, part) for part in parts)
            self._blocks[name] = sizes[index], arrays
            self._blocks.move_to_end(name, last=False)
            self._nbytes += size


def _described(content: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array in a file, as its header says, if as much is stored.

    Raises:
        ValueError: the header is no header of `save`, or is at odds with what is stored.
    """
    with content.open(name) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is written by another numpy")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
        stored = content.getinfo(name).file_size - file.tell()
    if by_column or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != stored:
        raise ValueError(f"{name} says that it is {dtype} {shape}, and has {stored:,} bytes")
    return shape, dtype


def _array(content: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """The array itself; its memory cannot be written."""
    shape, dtype = _described(content, name)
    data = content.read(name)  # whole, so that its checksum is compared
    start = len(data) - math.prod(shape) * dtype.itemsize
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def _kind(block: Block) -> Any:
    """The tokens, types and shapes that blocks of one layout have in common."""
    tokens, parts = block
    return tokens, [(part.dtype, part.shape) for part in parts]


def _nbytes(block: Block) -> int:
    return sum(array.nbytes for array in block[1])


def _size(cache: Cache, chunk: int) -> int:
    """Tokens of a block."""
    return chunk if cache.state_shapes or (cache.windows and GRAIN % chunk) else BLOCK


def _names(model: str, prompt: NDArray[np.int64], cache: Cache, size: int) -> list[bytes]:
    """The name of each whole block of a prompt."""
    name = f"{model} {cache.layout} {size}".encode()
    names = []
    for end in range(size, len(prompt) + 1, size):
        tokens = prompt[end - size : end].astype("<i8").tobytes()
        name = blake2b(name + tokens, digest_size=16).digest()
        names.append(name)
    return names


def _aligned(
    lengths: NDArray[np.int64],
    held: NDArray[np.int64],
    block: int,
    chunk: int,
    sizes: Collection[int],
) -> NDArray[np.int64]:
    """The tokens of each prompt to take over, so that the rest is computed as without that.

    So prompts that are in one chunk start at one token, and there end as in a fresh prefill (see
    `cuts.ends_alike`).

    Args:
        lengths: int64 [rows], of the prompts, shortest first.
        held: int64 [rows], multiples of `block`: what is kept of them.
        sizes: of groups, whichever it may be.
    """
    held = held.copy()
    for start in np.unique(held // chunk * chunk).tolist():
        active = (held < start + chunk) & (lengths > start)
        ends = np.minimum(lengths[active], start + chunk).tolist()
        low = int(held[active].min())
        while low > start and not all(ends_alike(end, start, low, sizes) for end in ends):
            low -= block
        held[active] = np.minimum(held[active], max(low, start) // block * block)
    return held


def check(value: Any) -> None:
    """Raise a ValueError for what is no `PrefixCache` (None is none, and right)."""
    if value is not None and not isinstance(value, PrefixCache):
        raise ValueError(f"prefix_cache must be a fastgen.PrefixCache, got {type(value).__name__}")
