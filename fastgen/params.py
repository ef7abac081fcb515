"""The knobs under their documented name: `fastgen.params.Params`, `fastgen.params.table`."""

from fastgen.inputs.params import ARGUMENTS, INERT, NAMES, UNSUPPORTED, Params, table

__all__ = ["ARGUMENTS", "INERT", "NAMES", "UNSUPPORTED", "Params", "table"]
