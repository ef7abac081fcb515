"""SmolLM3: Hermes' form, which its template asks for and shows no call of."""

from __future__ import annotations

import re

from fastgen.serve.tools.format import TOOL
from fastgen.serve.tools.hermes import BEGIN, Hermes
from fastgen.serve.tools.reader import THINK

# What its template calls tools; `tools` itself it does not know.
VARIABLE = "xml_tools"


class SmolLM3(Hermes):
    name = "smollm3"
    reasoning = THINK

    def shown(self, call: str) -> bool:
        return False

    def told(self, tools: str) -> bool:
        asks = re.search(BEGIN + r'\s*\{\s*"name"\s*:\s*<function-name>', tools)
        return asks is not None and "/think" in tools and TOOL in tools
