"""A kernel for each matrix: the cheapest that keep the model's output near the original's.

A precision has a ladder of kernels, the cheapest first. Every matrix begins at the bottom. Where
the whole is measured to cost more than it may, each kind of matrix is left in float32 in turn, and
the KL divergence at the model's output that this saves is what the kind costs (its own error says
little of that). Then kinds go up, where most is likely to be saved for what a step costs, until the
whole is expected to be within the target; whoever measures the whole says what it came to, and aims
again. Before any of that is measured, kinds go up that lose most of their own error for next to
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.export.quantize import calibrate, passage, rotate, smooth, values_apart
from fastgen.export.quantize.codes import Codes, FollowedCodes
from fastgen.export.quantize.divergence import beside
from fastgen.export.quantize.kernels import (
    W8A8,
    Choice,
    Floats,
    Kernel,
    Product,
    products,
    quantize,
)
from fastgen.export.quantize.parts import side_by_side
from fastgen.system.memory import trim

if TYPE_CHECKING:
    from fastgen.export.quantize import experts

SAMPLE = 256  # tokens that an error is measured on
COLUMNS = 256  # of its outputs
SENSED = 512  # tokens that kinds of matrices are measured on, about
HALVES = 8  # matrices of a kind from which on early and late ones are told apart
TOLD = 3  # matrices of a kind that tell what a rung leaves of its error
LEAST = 1e-9  # that a kind costs: what seems to cost nothing goes up last, and still may
LITTLE = 0.2  # of a kind's squared error at most is left by a rung that is taken at once
ALIKE = 1.25  # times the cost of the first rung is the most that such a one may cost
SEEN = 1024  # tokens on which inputs are looked at, where codes follow each other, about
FLOAT_BITS = 32
TURNED = 128  # inputs that are turned together, at most
TURNING = 0.8  # cost of a float32 weight of what turns them


@dataclass(frozen=True)
class Rung:
    """A step of a ladder.

    Attributes:
        kernel: None for float32.
        cost: of a weight: the time of a prompt and its bytes, as a share of the first rung's.
    """

    kernel: Kernel | None
    cost: float

    def cost_of(self, product: Product) -> float:
        """The cost of a product's weights, and of the matrix that turns its inputs."""
        rows, columns = product.shape
        kernel = self.kernel and fitting(self.kernel, product)
        return rows * (columns * self.cost + (kernel.turned * TURNING if kernel else 0.0))


@dataclass(frozen=True)
class Recipe:
    """The kernels of a precision.

    Attributes:
        ladder: of the decoder's matrices, the cheapest first.
        head: of `lm_head`, and of the embedding that shares its matrix.
        experts: of the experts of a mixture.
        tokens: of calibration, about.
        bits: of a weight of the decoder's matrices, that may be used whatever the target; None for
            those of the first rung.
    """

    ladder: tuple[Rung, ...]
    head: Kernel
    experts: Kernel
    tokens: int
    bits: float | None = None


# What a kernel costs: see bench/README.md. In blocks of at most 64 (8 bits) or 32 (4 bits) it adds
# up one row as it does several, so that a row says what it says alone. Experts have scales for
# blocks: their kernel quantises its inputs as well then, which is what makes it fast.
RECIPES = {
    "int8": Recipe(
        ladder=(
            Rung(W8A8, 1.0),
            Rung(Kernel(8, turned=TURNED), 1.0),
            Rung(Kernel(8, 32), 1.75),
            Rung(None, 100.0),
        ),
        head=Kernel(8, 64),
        experts=Kernel(8, 128),
        tokens=2048,
    ),
    "int4": Recipe(
        ladder=(
            Rung(Kernel(4, 32, zero_points=True), 1.0),
            Rung(Kernel(4, 32, turned=TURNED, zero_points=True), 1.0),
            Rung(Kernel(8, 32), 1.8),
            Rung(None, 100.0),
        ),
        head=Kernel(8, 64),
        experts=Kernel(4, 128),
        tokens=8192,
        bits=5.0,
    ),
}


@dataclass(frozen=True)
class Made:
    """The form in which a matrix was stored.

    Attributes:
        kernel: how it is stored.
        error: of its output on the calibration text, relative.
        wide: whether it went up the ladder.
    """

    name: str
    kernel: str
    error: float
    wide: bool


@dataclass
class Matrix:
    """A matrix while it is decided about.

    Attributes:
        rung: its place on the ladder.
        may_climb: whether it is on the ladder at all.
    """

    product: Product
    may_climb: bool
    rung: int = 0


@dataclass(frozen=True)
class Step:
    """A kind of matrices that may go up to a rung: KL divergence saved, and what it costs."""

    kind: str
    rung: int
    saves: float
    costs: float


def chosen(steps: Sequence[Step], wanted: float) -> Step:
    """The step that saves most for what it costs, or a cheaper one that saves all that is wanted.

    A dearer one that saves it all, such as float32, does not go before several cheap ones.
    """
    best = max(steps, key=lambda step: step.saves / step.costs)
    enough = [step for step in steps if step.saves >= wanted and step.costs < best.costs]
    return min(enough, key=lambda step: step.costs, default=best)


class Plan:
    """The kernels of the matrices of a graph in float32. See `planned`.

    Attributes:
        smoothed: names of matrices whose inputs were divided.
        reached: which experts the calibration text came to.
        sensed: KL divergence that each kind of matrix costs at the bottom.
        rest: of the whole there, which no kind explains.
    """

    def __init__(
        self,
        model: ir.Model,
        recipe: Recipe,
        inputs: Mapping[ir.Value, calibrate.Input],
        codes: Codes,
        directory: Path,
        kept: calibrate.Shelf,
    ) -> None:
        """
        Args:
            directory: of the file that the graph's weights are in.
            kept: a shelf below it.
        """
        self._model, self._recipe, self._inputs, self._codes = model, recipe, inputs, codes
        self._directory, self._kept = directory, kept
        self._experts = _experts(model.graph)
        self._mixed: dict[str, list[experts.Stored]] = {}
        self._products = products(model.graph)
        self._matrices: dict[str, Matrix] = {}
        self.smoothed: list[str] = []
        self.reached: list[experts.Reached] = []
        self.sensed: dict[str, float] = {}
        self.rest = 0.0
        self._stored: list[tuple[str, experts.Stored]] = []
        self._left: dict[tuple[str, int], float] = {}
        self._aimed = False

    # --- what is measured ------------------------------------------------------------------------

    def prepare(self, rows: Sequence[NDArray[np.int64]], shown: Callable[[int, int], None]) -> None:
        """Smooth what gains by it, and make codes of each matrix at the bottom of its ladder."""
        if self._experts is not None:
            self._mixed, self.reached = self._experts.plan(
                self._model, self._recipe.experts, rows, shown
            )
        self._smooth()
        for product in products(self._model.graph):
            self._matrices[product.name] = Matrix(
                product, not (product.is_head or _is_turned(product))
            )
        self._choose(shown)

    def _smooth(self) -> None:
        """Smooth what gains by it: scales are sought side by side, and folded in order."""
        first, readers = self._recipe.ladder[0].kernel, dict[ir.Value, list[Product]]()
        for product in self._products:
            readers.setdefault(product.input, []).append(product)
        targets = {
            value: target
            for value, those in readers.items()
            if not any(map(_is_turned, those))
            and (target := smooth.fold_target(value, those)) is not None
        }

        def sought(value: ir.Value) -> Floats | None:
            weights = [reader.weight for reader in readers[value]]
            sample = self._inputs[value].sample
            return None if first is None else smooth.best_scales(sample, weights, first)

        for value, scales in zip(targets, side_by_side(sought, list(targets)), strict=True):
            if scales is not None:
                smooth.fold(self._model.graph, targets[value], scales, readers[value])
                self._inputs[value].divide(scales)
                self.smoothed += [product.name for product in readers[value]]

    def _error(self, product: Product, kernel: Kernel | None) -> float:
        """The error of a product's output, on some of its tokens and columns."""
        if kernel is None:
            return 0.0
        x = self._inputs[product.input].sample
        columns = slice(None, None, max(1, product.shape[1] // COLUMNS))
        choice = self._codes.of(product, kernel).of_columns(columns)
        weight = np.ascontiguousarray(product.weight[:, columns])
        return calibrate.output_error(x[:: max(1, len(x) // SAMPLE)], weight, choice)

    def sense(
        self,
        rows: Sequence[NDArray[np.int64]],
        exact: Callable[[NDArray[np.int64]], Floats],
        shown: Callable[[int, int], None],
    ) -> None:
        """Measure what each kind of matrix costs at the model's output: what the whole loses
        less where the kind is in float32.

        All others are as they will be used, so this takes a third of the time of one kind among
        products in float32.

        Args:
            exact: gives the logits of a row, float32 [length, vocab], as they should be.
        """
        every = max(1, round(sum(map(len, rows)) / SENSED))
        rows = rows[::every]
        kinds, names = self._kinds(), self._matrices.keys()
        whole = self._lost(names, rows, exact)
        told = 0.0
        for done, (name, members) in enumerate(kinds.items()):
            shown(done, len(kinds))
            others = names - {matrix.product.name for matrix in members}
            cost = max(LEAST, whole - self._lost(others, rows, exact))
            self.sensed[name] = cost / max(self._share(name, _lowest(members)), LEAST)
            told += cost
        self.rest = max(0.0, whole - told)

    def _lost(
        self,
        names: Collection[str],
        rows: Sequence[NDArray[np.int64]],
        exact: Callable[[NDArray[np.int64]], Floats],
    ) -> float:
        """Mean Kullback-Leibler divergence, in nats, with the named matrices as they are decided,
        and all others in float32.
        """
        said = calibrate.logits(self._quantised(names), rows, self._directory, self._kept)
        pairs = zip(map(exact, rows), said, strict=True)
        total = sum(float(beside(*pair).kl.sum()) for pair in pairs)
        return max(0.0, total / sum(map(len, rows)))

    def _kinds(self) -> dict[str, list[Matrix]]:
        """Matrices on the ladder, of the same shape, that read the same kind of node: early and
        late ones apart.
        """
        by_kind: dict[str, list[Matrix]] = {}
        for matrix in self._matrices.values():
            if not matrix.may_climb:
                continue
            node = matrix.product.input.producer()
            kind = "input" if node is None else node.op_type
            rows, columns = matrix.product.shape
            by_kind.setdefault(f"{kind} {rows} x {columns}", []).append(matrix)
        kinds = {}
        for name, members in by_kind.items():
            if len(members) < HALVES:
                kinds[name] = members
                continue
            half = len(members) // 2
            kinds[f"{name}, early"], kinds[f"{name}, late"] = members[:half], members[half:]
        return kinds

    # --- what is decided -------------------------------------------------------------------------

    @property
    def has_bits(self) -> bool:
        """True if a weight may have more bits than the kernel that its matrix begins with."""
        climbs = any(matrix.may_climb for matrix in self._matrices.values())
        return climbs and self._recipe.bits is not None

    def spend(self) -> None:
        """Send matrices up to the rung of more bits, as long as there are bits for them: those of
        kinds first that save most for theirs.
        """
        bits = [_bits(rung.kernel) for rung in self._recipe.ladder]
        wider = next(rung for rung, more in enumerate(bits) if more > bits[0])
        kinds = self._kinds()
        weights = {name: sum(map(_weights, members)) for name, members in kinds.items()}
        assert self._recipe.bits is not None
        left = (self._recipe.bits - bits[0]) * sum(weights.values())
        for name in sorted(kinds, key=lambda kind: -self.sensed[kind] / weights[kind]):
            for matrix in kinds[name]:
                more = (bits[wider] - bits[0]) * _weights(matrix)
                if more <= left:
                    matrix.rung, left = wider, left - more

    def turn(self) -> bool:
        """Send kinds up that lose most of their own error by a rung that costs about the same:
        those that read a product of two activations, as a rule, which nothing else can mend.

        Returns:
            Whether any went up.
        """
        kinds, moved = self._kinds(), False
        for rung in range(1, len(self._recipe.ladder)):
            some = {
                name: members
                for name, members in kinds.items()
                if _lowest(members) < rung
                and (costs := self._costs(members))[rung] <= ALIKE * costs[0]
            }
            self._tell(some, [rung])
            for name, members in some.items():
                if self._share(name, rung) <= LITTLE * self._share(name, _lowest(members)):
                    for matrix in members:
                        matrix.rung, moved = max(matrix.rung, rung), True
        return moved

    def _costs(self, members: Sequence[Matrix]) -> list[float]:
        """The cost of a kind at each rung."""
        return [
            sum(rung.cost_of(matrix.product) for matrix in members) for rung in self._recipe.ladder
        ]

    def aim(self, measured: float, kl: float) -> bool:
        """Send kinds up until the whole, which costs `measured`, may cost as little as `kl`.

        What goes up first is taken to cost nothing any more: it may save more than its errors say.
        Where it did not, which the next measurement shows, its errors are believed.

        Returns:
            Whether any went up.
        """
        kinds = self._kinds()
        self._tell(kinds, range(1, len(self._recipe.ladder)))
        now = {name: self._expected(name, _lowest(members)) for name, members in kinds.items()}
        share = measured / max(sum(now.values()) + self.rest, 1e-12)
        hoped, moved = dict(now), False
        while share * (sum(hoped.values()) + self.rest) > kl or not moved:
            steps = list(self._steps(kinds, now))
            if not steps:
                break
            step = chosen(steps, sum(now.values()) + self.rest - kl / share)
            now[step.kind] -= step.saves
            hoped[step.kind] = now[step.kind] if self._aimed else 0.0
            for matrix in kinds[step.kind]:
                matrix.rung, moved = max(matrix.rung, step.rung), True
        self._aimed = True
        return moved

    def _steps(
        self, kinds: Mapping[str, Sequence[Matrix]], now: Mapping[str, float]
    ) -> Iterator[Step]:
        """Every step up that is likely to save anything."""
        for name, members in kinds.items():
            first, costs = _lowest(members), self._costs(members)
            for rung in range(first + 1, len(costs)):
                saves = now[name] - self._expected(name, rung)
                if saves > 0:
                    yield Step(name, rung, saves, costs[rung] - costs[first])

    def _tell(self, kinds: Mapping[str, Sequence[Matrix]], rungs: Sequence[int]) -> None:
        """Find out what rungs leave of each kind's error, by its squares."""
        missing = [
            (name, rung) for name in kinds for rung in rungs if (name, rung) not in self._left
        ]

        def left(kind: tuple[str, int]) -> float:
            members = kinds[kind[0]]
            some = members[:: max(1, len(members) // TOLD)]
            first, there = (
                sum(
                    self._error(matrix.product, kernel and fitting(kernel, matrix.product)) ** 2
                    for matrix in some
                )
                for kernel in (self._recipe.ladder[rung].kernel for rung in (0, kind[1]))
            )
            return there / first if first else 1.0  # of no error nothing is saved

        self._left |= zip(missing, side_by_side(left, missing), strict=True)

    def _expected(self, kind: str, rung: int) -> float:
        """The expected cost of a kind there."""
        return self.sensed[kind] * self._share(kind, rung)

    def _share(self, kind: str, rung: int) -> float:
        """The part of a kind's squared error at the bottom that a rung leaves."""
        return self._left[kind, rung] if rung else 1.0

    # --- what is made ----------------------------------------------------------------------------

    def make(self, shown: Callable[[int, int], None]) -> ir.Model:
        """The graph as it is decided."""
        settled = {
            one.product: self._kernel(one) for one in self._matrices.values() if one.may_climb
        }
        self._codes.settle({one: kernel for one, kernel in settled.items() if kernel}, shown)
        self._choose(shown)
        model = self._quantised(self._matrices.keys())
        if self._experts is not None:
            self._stored = list(self._experts.quantize(model, self._mixed))
        return model

    @property
    def weight_bits(self) -> float:
        """Of the matrices on the ladder, scales and zero points included: on average."""
        matrices = [matrix for matrix in self._matrices.values() if matrix.may_climb]
        bits = sum(_weights(matrix) * _bits(self._kernel(matrix)) for matrix in matrices)
        return bits / max(1, sum(map(_weights, matrices)))

    def kernels(self) -> list[str]:
        """The kernel of each matrix."""
        kernels = [self._kernel(matrix) for matrix in self._matrices.values()]
        kernels += [stored.kernel for _, stored in self._stored]
        return ["float32" if kernel is None else str(kernel) for kernel in kernels]

    def made(self) -> list[Made]:
        """The form of each matrix, and its error."""
        return list(side_by_side(self._made, list(self._matrices.values()))) + [
            Made(name, str(stored.kernel), round(stored.error, 6), wide=False)
            for name, stored in self._stored
        ]

    def _made(self, matrix: Matrix) -> Made:
        kernel = self._kernel(matrix)
        name = "float32" if kernel is None else str(kernel)
        error = round(self._error(matrix.product, kernel), 6)
        return Made(matrix.product.name, name, error, matrix.rung > 0)

    def _quantised(self, names: Collection[str]) -> ir.Model:
        """A copy of the graph with the named products as they are decided."""
        model = self._model.clone()

        def choice(product: Product) -> Choice | None:
            matrix = self._matrices[product.name]
            kernel = self._kernel(matrix)
            if kernel is None or product.name not in names:
                return None
            return self._codes.of(matrix.product, kernel)

        quantize(model, choice)
        return model

    def _kernel(self, matrix: Matrix) -> Kernel | None:
        product, recipe = matrix.product, self._recipe
        if _is_turned(product):  # small, and everything passes it
            return None
        kernel = recipe.head if product.is_head else recipe.ladder[matrix.rung].kernel
        return None if kernel is None else fitting(kernel, product)

    def _choose(self, shown: Callable[[int, int], None]) -> None:
        """Make the codes that are missing."""
        kernels = {one.product: self._kernel(one) for one in self._matrices.values()}
        self._codes.make({one: kernel for one, kernel in kernels.items() if kernel}, shown)


@contextmanager
def planned(
    model: ir.Model,
    precision: str,
    rows: Sequence[NDArray[np.int64]],
    shown: Callable[[int, int], None],
) -> Iterator[Plan]:
    """The plan for a trimmed graph in float32, which is smoothed in place.

    Activations and weights are in files, and read a matrix at a time: nothing here is as large as
    the weights.

    Args:
        model: the graph; its weights are in a file.
        precision: "int8" or "int4".
        rows: calibration ids.
        shown: called with the number of matrices done and their total, as they are.
    """
    recipe = RECIPES[precision]
    if recipe.bits is not None:
        values_apart.split(model.graph)
    follows = recipe.bits is not None and passage.can_be_cut(model.graph)
    seen = rows[:: max(1, sum(map(len, rows)) // SEEN)] if follows else rows
    with (
        calibrate.inputs(model, products(model.graph), seen) as inputs,
        calibrate.weights_directory(model) as directory,
        calibrate.named_shelf(directory) as kept,
    ):
        codes = Codes(inputs, kept)
        if follows:
            codes = FollowedCodes(inputs, kept, model, rows)
        plan = Plan(model, recipe, inputs, codes, directory, kept)
        plan.prepare(rows, shown)
        trim()
        yield plan


def _experts(graph: ir.Graph) -> ModuleType | None:
    """The module for mixtures; None for a graph without one."""
    if all(node.op_type not in ("MoE", "Loop") for node in graph):
        return None
    from fastgen.export.quantize import experts

    return experts


def _bits(kernel: Kernel | None) -> float:
    return FLOAT_BITS if kernel is None else kernel.weight_bits


def _weights(matrix: Matrix) -> int:
    return math.prod(matrix.product.shape)


def _lowest(members: Sequence[Matrix]) -> int:
    """The rung of a kind: some of it may be further up."""
    return min(matrix.rung for matrix in members)


def _is_turned(product: Product) -> bool:
    """True if its matrix is one that a rotation leaves in the graph."""
    return product.name.startswith(rotate.PRODUCT)


def fitting(kernel: Kernel, product: Product) -> Kernel:
    """`kernel`, or with smaller blocks where its own would fill the matrix up by over an eighth.

    What is turned together are as many inputs as divide them all, and are a power of two.
    """
    block, size = kernel.block, product.shape[0]
    while block > 32 and -size % block > size / 8:
        block //= 2
    turned = min(kernel.turned, size & -size)
    return replace(kernel, block=block, turned=turned if turned > 1 else 0)
