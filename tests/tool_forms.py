"""Each format of calls: a template of ours that writes it, and an answer in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastgen.serve.tools.format import Format
from fastgen.serve.tools.plain import Plain
from fastgen.serve.tools.shown import FORMATS

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["c", "f"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = {"weather": PARAMETERS, "now": NOTHING}
OFFERED = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": one}}
    for name, one in TOOLS.items()
]


def template(call: str, begin: str = "<|assistant|>", around: str = "{}") -> str:
    """A template that shows tools, messages and calls; an assistant's turn begins with `begin`."""
    calls = around.format(
        "{% for c in m.tool_calls %}{% set f = c.function %}" + call + "{% endfor %}"
    )
    return (
        "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.reasoning_content %}THOUGHT{% endif %}{{ m.content }}"
        "{% if m.tool_calls %}" + calls + "{% endif %}\n{% endfor %}" + begin
    )


OBJECT = '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}'
PAIRS = "{% for k, v in f.arguments.items() %}"


def dsml(section: str, space: str = "") -> tuple[str, str]:
    """The template and the answer of DeepSeek's tags."""
    word = f"\uff5cDSML\uff5c{space}"
    call = (
        f'<{word}invoke name="{{{{ f.name }}}}">\n{PAIRS}<{word}parameter name="{{{{ k }}}}" '
        f'string="true">{{{{ v }}}}</{word}parameter>\n{{% endfor %}}</{word}invoke>\n'
    )
    outer = f"\uff5cDSML\uff5c{section}"
    answer = (
        f'Well.\n\n<{outer}>\n<{word}invoke name="weather">\n'
        f'<{word}parameter name="city" string="true">Zürich</{word}parameter>\n'
        f'<{word}parameter name="days" string="false">3</{word}parameter>\n</{word}invoke>\n'
        f'<{word}invoke name="now">\n</{word}invoke>\n</{outer}>'
    )
    return template(call, around=f"\n\n<{outer}>\n{{}}</{outer}>"), answer


ALL, END = "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"
ONE, OVER = "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>"
THEN = "<\uff5ctool\u2581sep\uff5c>"
K2 = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
K2_CALL = "<|tool_call_begin|>functions.{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
K3 = '<|open|>call tool="{}" index="{}"<|sep|>{}<|close|>call<|sep|>'
K3_ARGUMENT = '<|open|>argument key="{}" type="{}"<|sep|>{}<|close|>argument<|sep|>'
WEATHER, NOW = '{"city": "Zürich", "days": 3}', "{}"
XML = "<function={}>\n{}</function>"

# The template's text and an answer: "Well.", then both calls, where the format has several.
FORMS: dict[str, tuple[str, str]] = {
    "hermes": (
        template(f"<tool_call>\n{OBJECT}\n</tool_call>"),
        'Well.\n<tool_call>\n{"name": "weather", "arguments": ' + WEATHER + "}\n</tool_call>\n"
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    "smollm3": (
        "{% if xml_tools %}/think {{ xml_tools[0].function.name }} <tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>{% endif %}'
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>",
        'Well.\n<tool_call>\n{"name": "weather", "arguments": ' + WEATHER + "}\n</tool_call>\n"
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    "qwen_xml": (
        template(
            f"<tool_call>\n<function={{{{ f.name }}}}>\n{PAIRS}<parameter={{{{ k }}}}>\n"
            "{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
        ),
        "Well.\n<tool_call>\n<function=weather>\n<parameter=city>\nZürich\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    "glm": (
        template(
            f"<tool_call>{{{{ f.name }}}}\n{PAIRS}<arg_key>{{{{ k }}}}</arg_key>\n"
            "<arg_value>{{ v }}</arg_value>\n{% endfor %}</tool_call>"
        ),
        "Well.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Zürich</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n"
        "<tool_call>now\n</tool_call>",
    ),
    "glm47": (
        template(
            f"<tool_call>{{{{ f.name }}}}{PAIRS}<arg_key>{{{{ k }}}}</arg_key>"
            "<arg_value>{{ v }}</arg_value>{% endfor %}</tool_call>"
        ),
        "Well.<tool_call>weather<arg_key>city</arg_key><arg_value>Zürich</arg_value>"
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call><tool_call>now</tool_call>",
    ),
    "llama": (
        template('{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'),
        '{"name": "weather", "parameters": ' + WEATHER + '}; {"name": "now", "parameters": {}}',
    ),
    "pythonic": (
        template(f"{{{{ f.name }}}}({PAIRS}{{{{ k }}}}={{{{ v | tojson }}}}{{% endfor %}})",
                 around="[{}]"),
        "[weather(city='Zürich', days=3), now()]",
    ),
    "mistral": (
        template(OBJECT, around="[TOOL_CALLS] [{}]"),
        'Well.[TOOL_CALLS] [{"name": "weather", "arguments": ' + WEATHER + '}, '
        '{"arguments": {}, "name": "now", "id": "abcdefghi"}]',
    ),
    "mistral11": (
        template("[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}"),
        f"Well.[TOOL_CALLS]weather[ARGS]{WEATHER}[TOOL_CALLS]now[ARGS]{{}}",
    ),
    "deepseek": (
        template(
            f"{ONE}function{THEN}{{{{ f.name }}}}\n```json\n{{{{ f.arguments | tojson }}}}\n```"
            f"{OVER}", around=f"{ALL}{{}}{END}",
        ),
        f"Well.{ALL}{ONE}function{THEN}weather\n```json\n{WEATHER}\n```{OVER}\n"
        f"{ONE}function{THEN}now\n```json\n{{}}\n```{OVER}{END}",
    ),
    "deepseek31": (
        template(f"{ONE}{{{{ f.name }}}}{THEN}{{{{ f.arguments | tojson }}}}{OVER}",
                 around=f"{ALL}{{}}{END}"),
        f"Well.{ALL}{ONE}weather{THEN}{WEATHER}{OVER}{ONE}now{THEN}{{}}{OVER}{END}",
    ),
    "deepseek32": dsml("function_calls"),
    "deepseek4": dsml("tool_calls"),
    "deepseek41": dsml(" calls", " "),
    "harmony": (
        template(
            "<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary "
            "<|constrain|>json<|message|>{{ f.arguments | tojson }}<|call|>",
            begin="<|start|>assistant",
        ),
        "<|channel|>commentary<|message|>Well.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.weather <|constrain|>json<|message|>{WEATHER}<|call|><|start|>assistant "
        "to=functions.now<|channel|>commentary<|message|>{}",
    ),
    "kimi": (
        template("<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>"
                 "{{ f.arguments | tojson }}<|tool_call_end|>", around="{}".join(K2)),
        "Well." + (K2_CALL.format("weather:0", WEATHER) + K2_CALL.format("now:1", NOW)).join(K2),
    ),
    "kimi3": (
        template(
            '<|open|>call tool="{{ f.name }}" index="1"<|sep|>' + PAIRS + '<|open|>argument '
            'key="{{ k }}" type="string"<|sep|>{{ v }}<|close|>argument<|sep|>{% endfor %}'
            "<|close|>call<|sep|>", around="<|open|>tools<|sep|>{}<|close|>tools<|sep|>",
        ),
        "<|open|>response<|sep|>Well.<|close|>response<|sep|><|open|>tools<|sep|>"
        + K3.format("weather", 1, K3_ARGUMENT.format("city", "string", "Zürich")
                    + K3_ARGUMENT.format("days", "number", 3))
        + K3.format("now", 2, "") + "<|close|>tools<|sep|><|close|>message<|sep|>",
    ),
    "gemma": (
        template("<|tool_call>call:{{ f.name }}{{ '{' }}" + PAIRS +
                 '{{ k }}:<|"|>{{ v }}<|"|>{% endfor %}' + "}<tool_call|>"),
        'Well.<|tool_call>call:weather{city:<|"|>Zürich<|"|>,days:3}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>",
    ),
    "functiongemma": (
        template("<start_function_call>call:{{ f.name }}{{ '{' }}" + PAIRS +
                 "{{ k }}:<escape>{{ v }}<escape>{% endfor %}" + "}<end_function_call>"),
        "Well.<start_function_call>call:weather{city:<escape>Zürich<escape>,days:3}"
        "<end_function_call><start_function_call>call:now{}<end_function_call>",
    ),
    "granite": (
        template(OBJECT, around="<|tool_call|>[{}]"),
        'Well.<|tool_call|>[{"name": "weather", "arguments": ' + WEATHER + '}, '
        '{"name": "now", "arguments": {}}]',
    ),
    "command_r": (
        template('{"tool_call_id": "0", "tool_name": "{{ f.name }}", '
                 '"parameters": {{ f.arguments | tojson }}}',
                 around="<|START_ACTION|>[{}]<|END_ACTION|>"),
        '<|START_RESPONSE|>Well.<|END_RESPONSE|><|START_ACTION|>[\n    {"tool_call_id": "0", '
        '"tool_name": "weather", "parameters": ' + WEATHER + '},\n    {"tool_call_id": "1", '
        '"tool_name": "now", "parameters": {}}\n]<|END_ACTION|>',
    ),
}  # fmt: skip
KNOWN: dict[str, Format] = {one.name: one for one in FORMATS}
EVERY: dict[str, Format] = {**KNOWN, "plain": Plain()}
ANSWERS = {**{name: answer for name, (_, answer) in FORMS.items()}, "plain": FORMS["hermes"][1]}
EXPECTED = [("weather", {"city": "Zürich", "days": 3}), ("now", {})]
ALONE = {"llama", "pythonic"}  # an answer is calls and nothing else


@dataclass
class Thinking:
    """A template that thinks, and how its answers do.

    Attributes:
        template: shows thoughts, or the generation prompt.
        marks: what stands around them.
    """

    template: str
    marks: tuple[str, str]
    variables: dict[str, Any] = field(default_factory=dict)


def thinking(begin: str, end: str, prompt: str = "<|assistant|>") -> str:
    """A template that shows thoughts between marks."""
    return template("", prompt).replace("THOUGHT", f"{begin}{{{{ m.reasoning_content }}}}{end}")
