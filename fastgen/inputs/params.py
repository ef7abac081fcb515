"""Every generation knob, once: its name, neutral default, help, kind and rule.

The names and meanings are those of transformers' `GenerationConfig`; the merge order of
`resolve` is that of its `_prepare_generation_config`. Flags of the command line are made from
the fields of `Params`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fastgen.inputs import validators
from fastgen.inputs.keywords import ARGUMENTS, BY_DEFAULT, INERT, UNSUPPORTED
from fastgen.inputs.knob import (
    ANY,
    CUTOFF,
    FLAG,
    FRACTION,
    INTEGER,
    INTEGERS,
    NOT_NEGATIVE,
    NUMBER,
    POSITIVE,
    TEXT,
    Kind,
    Rule,
    checked,
    knob,
)

Seed = int | tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class Params:
    """The knobs of one generation, checked. `None` means "not set" wherever it is a default.

    Raises:
        ValueError: a value breaks its rule; the message names the knob, the rule and the value.
    """

    # How long
    max_length: int | None = knob(
        None, "length of prompt and new tokens together", kind=INTEGER, rule=POSITIVE
    )
    max_new_tokens: int | None = knob(
        None, "number of new tokens, at most (default: 20)", kind=INTEGER, rule=POSITIVE
    )
    min_length: int = knob(
        0, "no end of text before this length, prompt included", kind=INTEGER, rule=NOT_NEGATIVE
    )
    min_new_tokens: int | None = knob(
        None, "no end of text before this many new tokens", kind=INTEGER, rule=NOT_NEGATIVE
    )
    early_stopping: bool | str = knob(
        False, "beams: true, false or 'never'", kind=Kind(validators.early_stopping)
    )
    max_time: float | None = knob(
        None, "seconds after which generation stops", kind=NUMBER, rule=NOT_NEGATIVE
    )
    stop_strings: tuple[str, ...] | None = knob(
        None, "texts that end the generation", kind=Kind(validators.strings, repeats=True)
    )

    # Which search
    do_sample: bool = knob(
        False, "draw tokens at random; without it the likeliest is taken", kind=FLAG
    )
    num_beams: int = knob(1, "width of the beam search", kind=INTEGER, rule=POSITIVE)
    num_beam_groups: int = knob(1, "groups of diverse beam search", kind=INTEGER, rule=POSITIVE)
    diversity_penalty: float = knob(
        0.0, "taken off a token for each earlier group that chose it", kind=NUMBER
    )
    length_penalty: float = knob(
        1.0, "beams: a score is divided by length ** length_penalty", kind=NUMBER
    )
    num_return_sequences: int = knob(
        1, "sequences returned for each prompt", kind=INTEGER, rule=POSITIVE
    )
    seed: Seed = knob(
        None, "sampling repeats torch.manual_seed(seed)", kind=Kind(validators.seed), like="fastgen"
    )

    # What the distribution becomes
    temperature: float = knob(1.0, "logits are divided by it before sampling", kind=NUMBER)
    top_k: int = knob(
        50,
        "sample from the k likeliest tokens; 0 for all",
        kind=Kind(validators.whole, "int"),
        rule=NOT_NEGATIVE,
    )
    top_p: float = knob(
        1.0,
        "sample from the smallest set of tokens with this probability",
        kind=NUMBER,
        rule=NOT_NEGATIVE,
    )
    min_p: float | None = knob(
        None, "drop tokens less likely than min_p times the likeliest", kind=NUMBER, rule=FRACTION
    )
    top_h: float | None = knob(
        None,
        "keep tokens up to this share of the entropy",
        kind=NUMBER,
        rule=Rule("above 0, at most 1", lambda value: 0 < value <= 1),
    )
    typical_p: float = knob(
        1.0,
        "sample from the locally typical tokens of this mass",
        kind=NUMBER,
        rule=Rule("above 0", lambda value: value > 0),
    )
    epsilon_cutoff: float = knob(0.0, "drop tokens less likely than this", kind=NUMBER, rule=CUTOFF)
    eta_cutoff: float = knob(
        0.0, "drop tokens less likely than an entropy-dependent bound", kind=NUMBER, rule=CUTOFF
    )
    repetition_penalty: float = knob(
        1.0, "logits of tokens already there are divided by it", kind=NUMBER, rule=POSITIVE
    )
    encoder_repetition_penalty: float = knob(
        1.0, "logits of the prompt's tokens multiplied by it", kind=NUMBER, rule=POSITIVE
    )
    frequency_penalty: float = knob(
        0.0, "taken off a token's logit for each time it was generated", kind=NUMBER, like="OpenAI"
    )
    presence_penalty: float = knob(
        0.0, "taken off a token's logit once it was generated", kind=NUMBER, like="OpenAI"
    )
    logit_bias: tuple[tuple[int, float], ...] | None = knob(
        None, "{token: bias} added to the logits", kind=Kind(validators.logit_bias), like="OpenAI"
    )
    no_repeat_ngram_size: int = knob(
        0, "n-grams of this size occur at most once", kind=INTEGER, rule=NOT_NEGATIVE
    )
    encoder_no_repeat_ngram_size: int = knob(
        0, "n-grams of the prompt do not occur again", kind=INTEGER, rule=NOT_NEGATIVE
    )
    bad_words_ids: tuple[tuple[int, ...], ...] | None = knob(
        None, "sequences never generated", kind=Kind(validators.integer_lists)
    )
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = knob(
        None,
        "[[ids, bias], ...] added where a sequence would be completed",
        kind=Kind(validators.biases),
    )
    renormalize_logits: bool = knob(
        False, "scores are log-probabilities after all processors", kind=FLAG
    )
    forced_bos_token_id: int | None = knob(
        None, "the token that follows a one-token prompt", kind=INTEGER
    )
    forced_eos_token_id: tuple[int, ...] | None = knob(
        None,
        "the token forced at max_length",
        kind=INTEGERS,
        rule=Rule("a token id or several", bool),
    )
    remove_invalid_values: bool = knob(False, "nan and infinite logits become finite", kind=FLAG)
    exponential_decay_length_penalty: tuple[int, float] | None = knob(
        None,
        "[start, factor]: end of text grows likelier after `start` new tokens",
        kind=Kind(validators.decay),
    )
    suppress_tokens: tuple[int, ...] | None = knob(None, "tokens never generated", kind=INTEGERS)
    begin_suppress_tokens: tuple[int, ...] | None = knob(
        None, "tokens not generated first", kind=INTEGERS
    )
    guidance_scale: float | None = knob(None, "classifier-free guidance: its scale", kind=NUMBER)
    watermarking_config: Any = knob(
        None, "a watermark's settings, as transformers writes them", kind=ANY
    )
    token_healing: bool = knob(
        False, "regenerate the prompt's last token so that words can join", kind=FLAG
    )

    # What the text has to be
    json_schema: str | None = knob(
        None,
        "the text is JSON of this schema; {} for any JSON",
        kind=Kind(validators.json_schema, "text"),
        like="fastgen",
    )
    regex: str | None = knob(
        None, "the text is what this expression matches", kind=TEXT, like="fastgen"
    )
    grammar: str | None = knob(
        None, "the text is one of this grammar, in Lark", kind=TEXT, like="fastgen"
    )

    # Guessing several tokens at once
    prompt_lookup_num_tokens: int | None = knob(
        None, "tokens guessed from the text so far", kind=INTEGER, rule=POSITIVE
    )
    max_matching_ngram_size: int | None = knob(
        None, "longest n-gram looked up (default: 2)", kind=INTEGER, rule=POSITIVE
    )
    num_assistant_tokens: int = knob(
        20, "tokens an assistant model guesses", kind=INTEGER, rule=POSITIVE
    )
    num_assistant_tokens_schedule: str = knob(
        "constant",
        "'constant', 'heuristic' or 'heuristic_transient'",
        kind=TEXT,
        rule=Rule(
            "'constant', 'heuristic' or 'heuristic_transient'",
            lambda value: value in ("constant", "heuristic", "heuristic_transient"),
        ),
    )
    assistant_confidence_threshold: float = knob(
        0.4, "the assistant stops below this probability", kind=NUMBER, rule=FRACTION
    )

    # What comes back
    return_dict_in_generate: bool = knob(False, "return a GenerateOutput", kind=FLAG)
    output_scores: bool = knob(False, "keep the processed scores of each step", kind=FLAG)
    output_logits: bool = knob(False, "keep the raw logits of each step", kind=FLAG)
    top_logprobs: int = knob(
        0,
        "log-probabilities of this many likeliest tokens",
        kind=INTEGER,
        rule=NOT_NEGATIVE,
        like="fastgen",
    )

    # Special tokens
    pad_token_id: int | None = knob(None, "fills rows that finish early", kind=INTEGER)
    bos_token_id: int | None = knob(None, "starts the text when there is no prompt", kind=INTEGER)
    eos_token_id: tuple[int, ...] | None = knob(
        None, "ends the text; several are allowed", kind=INTEGERS
    )

    def __post_init__(self) -> None:
        for name, field in FIELDS.items():
            value = getattr(self, name)
            if value is not field.default:  # which is right, and what most knobs are
                object.__setattr__(self, name, checked(field, value))
        _check_together(self)


def _check_together(params: Params) -> None:
    """The rules that tie several knobs."""
    if params.do_sample and not params.temperature > 0:
        raise ValueError(
            f"temperature must be a number above 0 when sampling, got {params.temperature!r}; "
            "for the likeliest token use do_sample=False"
        )
    if params.num_beams == 1 and not params.do_sample and params.num_return_sequences > 1:
        raise ValueError(
            f"num_return_sequences={params.num_return_sequences} needs do_sample=True or "
            "num_beams > 1: greedy search finds one sequence"
        )
    if params.num_beams > 1 and params.num_return_sequences > params.num_beams:
        raise ValueError(
            f"num_return_sequences={params.num_return_sequences} must be at most "
            f"num_beams={params.num_beams}"
        )
    if params.diversity_penalty and params.num_beam_groups == 1:
        raise ValueError(f"diversity_penalty={params.diversity_penalty} needs num_beam_groups > 1")
    _check_form(params)
    suppressed = set(params.suppress_tokens or ())
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = getattr(params, name)
        forced = {forced} if isinstance(forced, int) else set(forced or ())
        if forced and forced <= suppressed:
            raise ValueError(f"{name}={sorted(forced)} is also in suppress_tokens")


def _check_form(params: Params) -> None:
    """The rules of the knobs that say what the text has to be."""
    forms = [name for name in FORMS if getattr(params, name) is not None]
    if len(forms) > 1:
        raise ValueError(f"{forms[0]} cannot be used with {forms[1]}: a text has one form")
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        if forms and getattr(params, name) is not None:
            raise ValueError(
                f"{name}={getattr(params, name)} cannot be used with {forms[0]}, which may not "
                f"allow it: set {name}=None"
            )


FORMS = ("json_schema", "regex", "grammar")  # the knobs that give a text a form
FIELDS = {knob.name: knob for knob in fields(Params)}
NAMES = frozenset(FIELDS)


def resolve(
    model_defaults: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    kwargs: Mapping[str, Any],
) -> Params:
    """Merge as transformers does: keywords, then the passed config, the model's own, the defaults.

    An explicit keyword `None` switches a knob off (`top_k=None`); a `None` in a config means
    "not set there". A default of the model's that the search has no use for is left out, as there.
    The length that nobody set is 20 new tokens (see `stop.length_limit`).

    Args:
        model_defaults: the exported generation_config.json. Models keep notes of their own in it,
            so a name there that is no knob of transformers says nothing, as in transformers; nor
            does what is not supported and changes no token there (see `BY_DEFAULT`).
        config: a GenerationConfig's fields, or None.
        kwargs: the call's own keywords.

    Raises:
        ValueError: a keyword that is unknown, unsupported or set to a bad value.
    """
    own = {name: value for name, value in model_defaults.items() if value is not None}
    given = {
        name: value
        for name, value in (config or {}).items()
        if value is not None and (name in KNOWN or name not in own) and name[0] != "_"
    }
    for name in (*given, *kwargs):
        _check_name(name)
    merged: dict[str, Any] = {**own, **given, **kwargs}
    asked = {name for name in given if given[name] != own.get(name)} | {*kwargs}
    for name in own:
        if name not in asked and _clashes(name, merged):
            del merged[name]
    for name in UNSUPPORTED:
        if _asks(merged.get(name)) and (name in asked or name in BY_DEFAULT):
            whose = "" if name in asked else " (the model's own default)"
            value = validators.shown(merged[name])
            raise ValueError(f"{name}={value}{whose} is not supported: {UNSUPPORTED[name]}")
    knobs = {name: value for name, value in merged.items() if name in NAMES}
    knobs |= {name: _OFF.get(name) for name, value in knobs.items() if value is None}
    try:
        return Params(**knobs)
    except ValueError as error:
        name = str(error).partition(" ")[0].partition("=")[0]
        if name in own and name not in given and name not in kwargs:
            raise ValueError(f"{error} (the model's own default)") from error
        raise


# What says how a token is drawn; and what people get from a model that says nothing of it: at
# temperature 1, from the whole vocabulary, small models babble.
SAMPLING = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff",
    "eta_cutoff",
)  # fmt: skip
SANE = {"temperature": 0.7, "top_p": 0.9}
_ALWAYS = {
    knob.name: knob.default
    for knob in fields(Params)
    if knob.name in ("temperature", "top_k", "top_p")
}


def sampling(
    model_defaults: Mapping[str, Any], knobs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The knobs by which answers to people are drawn, in `fastgen chat` and on the service's page.

    As the model's own generation_config.json has it, where that says anything of it; else at
    `SANE`. Settings without `do_sample` are settings of what is drawn, but with beams, and at a
    temperature of 0, nothing is. (`generate` and the API draw as transformers and OpenAI do.)

    Args:
        model_defaults: the exported generation_config.json.
        knobs: what was set in its place.
    """
    own = {n: model_defaults[n] for n in SAMPLING if model_defaults.get(n) is not None}
    given = {name: value for name, value in (knobs or {}).items() if name in SAMPLING}
    beams = {**model_defaults, **(knobs or {})}.get("num_beams")
    settings = {"do_sample": beams in (None, 1), **_ALWAYS, **(own or SANE), **given}
    if settings["temperature"] == 0 and "do_sample" not in given:
        settings["do_sample"] = False
    return settings


def drawn(params: Params) -> dict[str, Any] | None:
    """The knobs by which tokens are drawn, to be shown; None where none are."""
    if not params.do_sample:
        return None
    plain = Params()
    values = {name: getattr(params, name) for name in SAMPLING if name != "do_sample"}
    return {n: v for n, v in values.items() if n in _ALWAYS or v != getattr(plain, n)}


def _clashes(name: str, knobs: Mapping[str, Any]) -> bool:
    """True where the search that is asked for has no use for a default of the model's."""
    beams = _above_one(knobs.get("num_beams"))
    if name == "prompt_lookup_num_tokens":
        return beams or knobs.get("guidance_scale") not in (None, 1)
    if name == "penalty_alpha":  # contrastive search is a kind of greedy search
        return beams or bool(knobs.get("do_sample"))
    if name == "diversity_penalty":
        return not _above_one(knobs.get("num_beam_groups"))
    forms = (knobs.get(form) is not None for form in FORMS)
    return name in ("forced_bos_token_id", "forced_eos_token_id") and any(forms)


def _above_one(value: Any) -> bool:
    return isinstance(value, int | float) and value > 1


KNOWN = NAMES | set(INERT) | set(UNSUPPORTED)

# What an explicit `None` means where the field itself has no None.
_OFF: dict[str, Any] = {
    knob.name: knob.default for knob in fields(Params) if knob.default is not None
} | {"top_k": 0}


def _check_name(name: str) -> None:
    if name in KNOWN:
        return
    import difflib

    near = difflib.get_close_matches(name, sorted(NAMES | set(ARGUMENTS)), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{name} is not a keyword of generate{hint}")


def _asks(value: Any) -> bool:
    """True where an unsupported knob is set to something: off, 0 and None ask for nothing."""
    return value is not None and not (isinstance(value, int | float) and value == 0)


def table() -> str:
    """Every knob as Markdown, then those that change nothing and those left out, and why."""
    lines = ["| knob | default | |", "|---|---|---|"]
    for field in fields(Params):
        whose = "" if field.metadata["like"] == "transformers" else f" ({field.metadata['like']}'s)"
        default = "" if field.default is None else f"`{field.default}`"
        lines.append(f"| `{field.name}` | {default} | {field.metadata['help']}{whose} |")
    for title, reasons in (
        ("Accepted, and nothing changes:", INERT),
        ("Not supported, and an error that says so:", UNSUPPORTED),
    ):
        lines += ["", title, "", "| knob | why |", "|---|---|"]
        lines += [f"| `{name}` | {why} |" for name, why in reasons.items()]
    return "\n".join(lines)
