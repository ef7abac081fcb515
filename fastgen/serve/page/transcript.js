// The conversation on the screen: a turn for each node of the branch that is shown.

import { asksToSend } from "./composer.js";
import { branches, path } from "./conversation.js";
import { $, button, copyButton, grouped, make, round, time } from "./dom.js";
import { Prose } from "./markdown.js";
import { TokenText } from "./tokens.js";

const ENDS = {
  length: "reached the longest answer", stop: "", tool_calls: "", you: "stopped by you",
  error: "ended by an error",
};

const FENCE = "`".repeat(16); // of code that may hold fences itself

// The pieces of answers, {piece, tokens} each, by the node's id: as long as the page, and only where
// tokens came with their probabilities.
const scored = new Map();

/** Remember a piece of an answer and the tokens that came with it. */
export function score(node, piece, tokens) {
  if (!scored.has(node.id)) {
    if (!tokens.length) return;
    const before = node.content.slice(0, node.content.length - piece.length);
    scored.set(node.id, before ? [{ piece: before, tokens: [] }] : []);
  }
  scored.get(node.id).push({ piece, tokens });
}

/** One node on the screen. `actions` are what can be done with it (see main.js). */
class Turn {
  constructor(conversation, node, actions) {
    Object.assign(this, { conversation, node, actions });
    this.raw = conversation.kind === "text";
    const name = { user: this.raw ? "Prompt" : "You", assistant: node.model ?? "Model", tool: "Tool" };
    this.body = make("div", { className: "body" });
    this.foot = make("div", { className: "foot" });
    this.element = make("article", { className: `turn ${node.role}` },
      make("h2", {}, name[node.role]), this.body, this.foot);
    this.element.dataset.node = node.id;
    this.running = false;
    this.draw();
  }

  draw() {
    const { node } = this;
    this.reasoning = this.prose = this.text = this.tokens = this.calls = this.form = null;
    this.body.replaceChildren();
    this.foot.hidden = false;
    if (node.role === "assistant") this.update();
    else if (!this.raw && node.content.includes("```")) new Prose(this.place("prose")).write(node.content);
    else this.place(this.raw || node.role === "tool" ? "raw" : "said").textContent = node.content;
    this.drawFoot();
  }

  /** Show what is around the turn by now: whether it is being written, and what it is a branch of. */
  refresh(running) {
    if (this.running !== running) {
      this.running = running;
      this.element.classList.toggle("running", running);
      this.update();
    }
    if (this.calls) this.showCalls();
    this.drawFoot();
  }

  /** Show what an answer says by now. */
  update() {
    const { node } = this;
    if (node.reasoning) this.showReasoning();
    if (this.actions.showsProbabilities() && scored.has(node.id)) this.showTokens();
    else if (this.raw) this.showRaw();
    else if (node.content) {
      this.prose ??= new Prose(this.place("prose"));
      this.prose.write(node.json ? `${FENCE}json\n${node.content}\n${FENCE}` : node.content);
    }
    if (node.calls?.length) this.showCalls();
  }

  place(className) {
    const element = make("div", { className });
    this.body.append(element);
    return element;
  }

  /** A place for what continues a text, with the prompt before it: they are one text. */
  rawPlace() {
    const prompt = this.conversation.nodes[this.node.parent];
    const written = make("span", { className: "written" });
    const text = make("div", { className: "raw" }, written);
    if (this.raw && prompt?.role === "user") {
      text.prepend(make("span", { className: "echo" }, prompt.content));
    }
    this.body.append(text);
    return written;
  }

  showReasoning() {
    const { node } = this;
    if (!this.reasoning) {
      const summary = make("summary");
      const text = make("div", { className: "thought" });
      this.reasoning = { summary, text };
      this.body.prepend(make("details", { className: "reasoning" }, summary, text));
    }
    const ended = node.content || node.calls?.length || !this.running;
    const long = node.thought < 1 ? " for a moment" : node.thought ? ` for ${round(node.thought)} s` : "";
    this.reasoning.summary.textContent = ended ? `Thought${long}` : "Thinking…";
    this.reasoning.text.textContent = node.reasoning;
  }

  showTokens() {
    const pieces = scored.get(this.node.id);
    if (!this.tokens) {
      this.body.querySelector(":scope > :is(.raw, .prose)")?.remove(); // of before the first token
      this.text = this.prose = null;
      this.tokens = { text: new TokenText(this.rawPlace()), shown: 0 };
    }
    for (const { piece, tokens } of pieces.slice(this.tokens.shown)) this.tokens.text.push(piece, tokens);
    this.tokens.shown = pieces.length;
  }

  showRaw() {
    this.text ??= this.rawPlace();
    this.text.textContent = this.node.content;
  }

  showCalls() {
    this.calls ??= this.place("calls");
    const shown = this.node.calls.map((call) => `${call.name}\n${call.arguments}`).join("\n");
    if (shown !== this.calls.dataset.shown) {
      this.calls.dataset.shown = shown;
      this.calls.replaceChildren(...this.node.calls.map(callBox));
      this.form = null;
    }
    const open = this.node.id === this.conversation.at && !this.running;
    if (open && !this.form) this.calls.append((this.form = this.resultsForm()));
    if (!open) {
      this.form?.remove();
      this.form = null;
    }
  }

  /** Fields for what the tools answered: the page has none that it could run. */
  resultsForm() {
    const fields = this.node.calls.map((call, i) => {
      const id = `result-${this.node.id}-${i}`;
      return [make("label", { htmlFor: id }, `What ${call.name} answers`), make("textarea", { id, rows: 2 })];
    });
    const form = make("form", { className: "results" }, ...fields.flat(),
      make("button", { type: "submit" }, "Send back"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.actions.results(this.node, fields.map(([, field]) => field.value));
    });
    return form;
  }

  drawFoot() {
    const { node, actions } = this;
    const isLast = node.id === this.conversation.at;
    const numbers = node.role === "assistant" ? this.numbers() : "";
    const all = branches(this.conversation, node);
    // What is as it was stays: a button may have the focus.
    const shown = [this.running, isLast, numbers, all.length, all.indexOf(node)].join();
    if (shown === this.foot.dataset.shown) return;
    this.foot.dataset.shown = shown;
    const parts = [];
    if (!this.running) {
      parts.push(this.branches(all));
      if (node.content) parts.push(copyButton(() => node.content, "Copy this message"));
      if (node.role === "user") parts.push(button("Edit", () => this.edit(), { label: "Edit this message" }));
      if (node.role === "assistant") {
        parts.push(button("Again", () => actions.again(node), { label: "Answer again" }));
        if (this.raw && isLast) {
          parts.push(button("Continue", () => actions.onward(node), { label: "Continue this text" }));
        }
      }
    }
    if (numbers) parts.push(make("span", { className: "numbers" }, numbers));
    this.foot.replaceChildren(...parts);
  }

  /** Which of the branches here is shown, and the way to the others. */
  branches(all) {
    if (all.length < 2) return "";
    const at = all.indexOf(this.node);
    const to = (which, sign, label) => {
      const made = button(sign, () => this.actions.branch(all[which]), { label });
      made.disabled = !all[which];
      return made;
    };
    return make("span", { className: "branches" }, to(at - 1, "‹", "The version before"),
      make("span", {}, `${at + 1} of ${all.length}`), to(at + 1, "›", "The next version"));
  }

  numbers() {
    const { usage, pace, end } = this.node;
    return [
      usage && `${grouped(usage.completion)} tokens`,
      pace && `${round(pace.speed)} a second`,
      pace && `first after ${time(pace.first)}`,
      ENDS[end] ?? (end ? `ended by ${end}` : this.running ? "" : "interrupted"),
    ].filter(Boolean).join(" · ");
  }

  /** Let the message be edited, from `text` on. */
  edit(text = this.node.content) {
    const field = make("textarea", { value: text, rows: 3 });
    field.setAttribute("aria-label", "The message, to be edited");
    const leave = () => {
      this.draw();
      this.foot.querySelector('[aria-label^="Edit"]')?.focus();
    };
    const form = make("form", { className: "edit" }, field, make("div", {},
      make("button", { type: "submit", className: "main" }, "Send"),
      button("Cancel", leave, { className: "" })));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.actions.edit(this.node, field.value);
    });
    field.addEventListener("keydown", (event) => {
      if (asksToSend(event)) {
        event.preventDefault();
        form.requestSubmit();
      }
      if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      }
    });
    this.body.replaceChildren(form);
    this.foot.hidden = true;
    field.focus();
  }
}

/** A call of a tool, with its arguments. */
function callBox(call) {
  const shown = pretty(call.arguments);
  return make("div", { className: "code call" },
    make("div", {}, make("span", { className: "language" }, "Calls ", make("b", {}, call.name)),
      copyButton(() => shown, `Copy the arguments of ${call.name}`)),
    make("pre", { tabIndex: 0 }, make("code", {}, shown)));
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // it is still being written
  }
}

/** The turns on the screen. */
export const transcript = {
  turns: new Map(), // by the node's id
  conversation: null,
  probabilities: false, // whether they are shown

  /** Draw a conversation; `running` is the id of the node that is being written, if one is. */
  draw(conversation, actions, running = null) {
    const probabilities = actions.showsProbabilities();
    const same = conversation === this.conversation && probabilities === this.probabilities;
    const before = same ? this.turns : new Map();
    Object.assign(this, { conversation, probabilities });
    this.turns = new Map(path(conversation).map((node) =>
      [node.id, before.get(node.id) ?? new Turn(conversation, node, actions)]));
    for (const [id, turn] of this.turns) turn.refresh(id === running);
    // Turns that stay are not touched: a person may have selected something there.
    const shown = [...this.turns.values()].map((turn) => turn.element);
    const place = $("transcript");
    for (const element of [...place.children]) if (!shown.includes(element)) element.remove();
    place.append(...shown.slice(place.children.length));
  },

  /** The turn of a node; undefined where it is not on the screen. */
  of(node) {
    return this.turns.get(node.id);
  },
};
