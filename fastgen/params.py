"""The knobs under their documented name: `fastgen.params.Params`, `fastgen.params.table`."""

from fastgen.inputs.keywords import ARGUMENTS, INERT, UNSUPPORTED
from fastgen.inputs.params import NAMES, Params, table

__all__ = ["ARGUMENTS", "INERT", "NAMES", "UNSUPPORTED", "Params", "table"]
