// A branch of a conversation as a request of the API.

import { contextUsed, messages, textSoFar } from "./conversation.js";
import { Failure } from "./service.js";
import { settings, usualLength, wantsProbabilities } from "./settings.js";

const ALTERNATIVES = 5; // to each token

function promptIds(text) {
  const ids = text.split(/[\s,]+/).filter(Boolean).map(Number);
  if (ids.length && ids.every(Number.isInteger)) return ids;
  throw new Failure("Whole numbers were expected, with spaces or commas between.", { param: "prompt" });
}

/** The path and the body of the request for what follows the node `id`; it is not streamed. */
export function request(conversation, id, about) {
  const { kind } = conversation;
  const fields = settings(kind);
  // Near the end of the context the service fits the answer in, if nobody has said how long it is.
  const left = (about.max_length ?? Infinity) - contextUsed(conversation, id);
  if (kind === "chat" && usualLength() && left < 2 * fields.max_tokens) delete fields.max_tokens;
  // What was called has to be answered in words once, or the calls never end.
  if (conversation.nodes[id]?.role === "tool") delete fields.tool_choice;
  if (kind === "chat") {
    const scores = wantsProbabilities() ? { logprobs: true, top_logprobs: ALTERNATIVES } : {};
    const said = messages(conversation, id);
    return ["/v1/chat/completions", { model: about.name, messages: said, ...fields, ...scores }];
  }
  const text = textSoFar(conversation, id);
  const prompt = about.has_tokenizer ? text : promptIds(text);
  const scores = wantsProbabilities() && about.has_tokenizer ? { logprobs: ALTERNATIVES } : {};
  return ["/v1/completions", { model: about.name, prompt, ...fields, ...scores }];
}

/** A request whose answer comes as it is written. */
export const streamed = (body) => ({ ...body, stream: true, stream_options: { include_usage: true } });
