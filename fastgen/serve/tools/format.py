"""The interface of every format of calls; see the package for the formats."""

from __future__ import annotations

from collections.abc import Sequence

from fastgen.serve.tools import form
from fastgen.serve.tools.form import AnswerOptions, GrammarRules
from fastgen.serve.tools.reader import AnswerReader, Marks, ReadingOptions

# What templates are probed with: words that stand in no template.
TOOL, KEY, VALUE = "probe_tool_qx", "probe_key_qx", "probe_value_qx"
THOUGHT, ANSWER = "probe thought qx", "probe answer qx"


class Format:
    """A form in which models write calls.

    Attributes:
        name: the format's.
        reader: what reads it.
        mark: what calls begin with in grammars.
        marks: all texts that the reader has to see, even where they are special tokens.
        between: what stands between two calls that each have the mark.
        repeats: whether they do.
        reasoning: what reasoning stands between, where the template does not say.
        channels: whether a text of this format has to be read even where there are no tools.
    """

    name: str
    reader: type[AnswerReader]
    mark: str
    marks: Sequence[str]
    between: str = ""
    repeats: bool = True
    reasoning: Marks | None = None
    channels: bool = False

    def shown(self, call: str) -> bool:
        """True where a template's rendering of the probe's call is of this format.

        Args:
            call: from where the model's answer would begin.
        """
        raise NotImplementedError

    def told(self, tools: str) -> bool:
        """True where its rendering of the probe's tools asks for calls of this format."""
        return False

    def read(self, asked: ReadingOptions) -> AnswerReader:
        return self.reader(asked)

    def body(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        """The text behind the mark, as an expression of a grammar.

        Raises:
            ValueError: a schema cannot be held to in this format.
        """
        raise NotImplementedError

    def grammar(self, made: GrammarRules, wanted: AnswerOptions) -> str:
        """The grammar of an answer.

        Raises:
            ValueError: a schema cannot be held to in this format.
        """
        body = self.body(made, wanted)
        return form.answer(made, wanted, self.mark, body, self.between, self.repeats)
