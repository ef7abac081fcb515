"""`POST /v1/choose`: which of some options follows a prompt, with a probability for each."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastgen.engine.score import Choosing, decision
from fastgen.serve.front import Front
from fastgen.serve.refused import Refused
from fastgen.serve.run import Run


@dataclass
class DecisionAnswer:
    """Decisions that have begun, one for each prompt.

    Attributes:
        jobs: that score the options.
        options: of all prompts, as they were sent.
        run: counts the tokens.
    """

    front: Front
    jobs: Sequence[Choosing]
    options: Sequence[str | list[int]]
    temperature: float
    per_token: bool
    run: Run

    events = None  # there is nothing to stream
    size = 0

    async def whole(self) -> dict[str, Any]:
        """The decisions, when all are made.

        Raises:
            Refused: the service is stopped, or the logits hold nan.
        """
        await self.front.through([(job, None) for job in self.jobs])
        usage = {"prompt_tokens": self.run.prompt_tokens, "total_tokens": self.run.prompt_tokens}
        return {
            "id": f"choose-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": self.front.name,
            "data": [self._told(index, job) for index, job in enumerate(self.jobs)],
            "usage": usage,
        }

    def _told(self, index: int, job: Choosing) -> dict[str, Any]:
        made = decision(self.options, job.option_logprobs, self.temperature, self.per_token)
        return {
            "object": "decision",
            "index": index,
            "choice": made.option,
            "choice_index": made.index,
            "confidence": made.confidence,
            "probabilities": made.probabilities,
            "logprobs": made.logprobs,
        }


async def answer(front: Front, body: Any) -> DecisionAnswer:
    """Begin decisions.

    Raises:
        Refused: what cannot be done.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    if not 0 < temperature < math.inf:
        raise Refused(400, f"temperature must be positive, got {temperature}", param="temperature")
    if (body.prompt is None) == (body.messages is None):
        raise Refused(400, "a decision needs a prompt or messages, and one of them", param="prompt")
    front.limits.check("options", len(body.options), "options")
    options = [
        await front.ids(one, special=False) if isinstance(one, str) else one for one in body.options
    ]
    for ids in options:
        front.known(ids, "options")
    try:
        options = front.model.options(options)
    except ValueError as error:
        raise Refused(400, str(error), param="options") from error
    longest = max(map(len, options))
    if body.messages is None:
        prompts = await front.prompts(body.prompt, longest)
    else:
        messages = [one.model_dump(exclude_unset=True) for one in body.messages]
        ids, _ = await front.conversation(messages, None, body.chat_template_kwargs or {})
        front.room(len(ids), longest, 1)
        prompts = [ids]
    jobs = [front.model.choosing(prompt, options) for prompt in prompts]
    scored = sum(map(len, prompts)) + len(prompts) * sum(map(len, options))
    run = Run([], 1, scored)
    return DecisionAnswer(front, jobs, body.options, temperature, bool(body.per_token), run)
