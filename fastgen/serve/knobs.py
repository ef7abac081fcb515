"""The knobs as data, for the page: made from the one list."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fastgen.inputs.knob import kind_of
from fastgen.inputs.params import Params, sampling

if TYPE_CHECKING:
    from fastgen.serve.front import Front


def described(front: Front) -> dict[str, Any]:
    """Every knob, and the model in a few words.

    A knob has its default, the model's own, and the value that the page's field begins with.
    """
    own, info = front.defaults, front.info
    first = sampling(own)
    return {
        "knobs": [
            {
                "name": knob.name,
                "type": kind_of(knob).notation,
                "default": knob.default,
                "own_default": own.get(knob.name),
                "initial": first.get(knob.name),
                "help": knob.metadata["help"],
            }
            for knob in fields(Params)
        ],
        "model": {
            "name": front.name,
            "type": info.model_type,
            "weights": info.parameters,
            "precision": info.precision,
            "max_length": info.max_length,
            "has_template": front.has_template,
            "has_tokenizer": front.model.has_tokenizer,
            "tools": front.format is not None,
            "reasoning": front.marks is not None and not front.raw,
            "thinking_switch": bool(front.shown.switches),
        },
    }
