"""Checkpoints whose weights are quantised: the methods whose numbers can be read, and all others.

Read are the matrices that transformers makes of them on a processor: MXFP4 (blocks of 32 numbers
of 4 bits with a power of two, as gpt-oss is published) and FP8 (numbers of 8 bits with a scale for
each block of a matrix, as DeepSeek and Qwen publish them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastgen.errors import UnsupportedModel

FIELD = "quantization_config"  # of config.json
MXFP4, FP8 = "mxfp4", "fp8"
ANY = object()  # which matrices a method left alone shows in the tensors
LEFT_ALONE = dict.fromkeys(("modules_to_not_convert", "ignored_layers", "dequantize"), ANY)
# By method, the fields that are known, and what they may say.
READ: dict[str, dict[str, Any]] = {
    MXFP4: LEFT_ALONE,
    FP8: LEFT_ALONE | {"activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "float",
                       "weight_block_size": ANY},
}  # fmt: skip


class Unreadable(UnsupportedModel):
    """Weights in a form that is not read, with torch or without."""


def method(said: Mapping[str, Any] | None) -> str | None:
    """The method that a `quantization_config` names, one of `READ`; None where there is none.

    Raises:
        Unreadable: it is another, or it is used in a way that is not known.
    """
    if not said:
        return None
    name = said.get("quant_method") or "an unknown method"
    name = str(getattr(name, "value", name))
    if name not in READ:
        raise Unreadable(
            f"its weights are quantised already ({name}), which is not read: export the model that "
            "it was made from, or a GGUF file of it"
        )
    known = READ[name] | {"quant_method": ANY}
    odd = {
        field: value
        for field, value in said.items()
        if value is not None and known.get(field, None) not in (ANY, value)
    }
    if odd:
        fields = ", ".join(f"{field} = {str(value)[:40]}" for field, value in odd.items())
        raise Unreadable(
            f"its weights are quantised already ({name}) in a way that is not read ({fields}): "
            "export the model that it was made from, or a GGUF file of it"
        )
    return name
