// An answer as it comes: what a stream says goes into the nodes of a conversation.

import { grow, newId } from "./conversation.js";
import { request, streamed } from "./request.js";
import { events, Failure, post } from "./service.js";
import { tokensOf } from "./tokens.js";
import { score } from "./transcript.js";

/** The answers to one request: more than one where several were asked for. */
export class Answer {
  /**
   * `id` is the node that is answered. `changed(node)` is called when a node says more, `began()`
   * once the service has taken the request.
   */
  constructor(conversation, id, about, { changed, began }) {
    Object.assign(this, { conversation, id, about, changed, began });
    this.controller = new AbortController();
    this.nodes = []; // by the index of the choice
    this.start = performance.now();
    this.first = this.last = null;
    this.written = this.atFirst = 0;
    // What is asked is fixed now: a setting that is wrong is told before anything is sent.
    [this.path, this.body] = request(conversation, id, about);
  }

  stop() {
    this.controller.abort();
  }

  get empty() {
    return this.nodes.every((node) => !node.content && !node.reasoning && !node.calls?.length);
  }

  /** Take the whole answer. Errors are raised; what came before them is in the nodes. */
  async run() {
    let response;
    this.node(0);
    try {
      response = await post(this.path, streamed(this.body), this.controller.signal);
      this.began();
      for await (const chunks of events(response)) for (const chunk of chunks) this.take(chunk);
    } catch (error) {
      const end = this.controller.signal.aborted ? "you" : "error";
      for (const node of this.nodes) node.end ??= end;
      if (end === "error") {
        this.controller.abort(); // nothing more is wanted of it
        throw error;
      }
    } finally {
      this.measure();
    }
  }

  node(index) {
    while (this.nodes.length <= index) {
      const { at } = this.conversation;
      const json = this.body.response_format ? { json: true } : {};
      const more = { model: this.about.name, ...json };
      const node = grow(this.conversation, this.id, "assistant", "", more);
      if (this.nodes.length) this.conversation.at = at; // the first of them is shown
      this.nodes.push(node);
    }
    return this.nodes[index];
  }

  take(chunk) {
    if (chunk.error) throw new Failure(chunk.error.message, chunk.error);
    if (chunk.usage) this.usage = chunk.usage;
    for (const choice of chunk.choices) {
      const node = this.node(choice.index);
      const ids = choice.token_ids ?? []; // of a model without a tokenizer
      const thought = choice.delta?.reasoning_content;
      const said = choice.text || choice.delta?.content || ids.map((id) => `${id} `).join("");
      const calls = choice.delta?.tool_calls ?? [];
      const tokens = tokensOf(choice);
      if (thought) this.think(node, thought);
      if (said && node.reasoning && !node.content) node.thought ??= this.seconds();
      node.content += said;
      for (const call of calls) this.call(node, call);
      if (!thought) score(node, said, tokens);
      if (thought || said || calls.length) this.count(tokens.length || ids.length || 1);
      if (choice.finish_reason) node.end = choice.finish_reason;
      this.changed(node);
    }
  }

  think(node, thought) {
    this.thinking ??= performance.now();
    node.reasoning = (node.reasoning ?? "") + thought;
  }

  seconds() {
    return (performance.now() - this.thinking) / 1000;
  }

  /** A piece of a call: its name first, then its arguments as they grow. */
  call(node, { index, id, function: { name, arguments: given } = {} }) {
    node.calls ??= [];
    const call = (node.calls[index] ??= { id: id ?? newId(), name: name ?? "", arguments: "" });
    call.arguments += given ?? "";
  }

  count(tokens) {
    this.written += tokens;
    this.last = performance.now();
    if (this.first === null) {
      this.first = this.last;
      this.atFirst = this.written;
    }
  }

  /** Tokens a second after the first ones; of all of them where they came about at once. */
  get speed() {
    const written = this.usage?.completion_tokens ?? this.written;
    const streamed = this.last - this.first > 50 && written > this.atFirst;
    const [tokens, since] = streamed ? [written - this.atFirst, this.first] : [written, this.start];
    return (1000 * tokens) / Math.max(1, this.last - since);
  }

  /** Write down how it went. */
  measure() {
    if (this.first === null) return;
    const completion = this.usage?.completion_tokens ?? this.written;
    const usage = { prompt: this.usage?.prompt_tokens ?? 0, completion };
    for (const node of this.nodes) {
      if (node.reasoning) node.thought ??= this.seconds();
      if (this.nodes.length === 1) node.usage = usage; // of several together it would mislead
      node.pace = { first: this.first - this.start, speed: this.speed };
    }
  }
}
