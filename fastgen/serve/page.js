// The page of the service: it speaks the same API as every other client.
"use strict";

const $ = (id) => document.getElementById(id);

const COMMON = [
  "max_new_tokens", "do_sample", "temperature", "top_p", "top_k",
  "repetition_penalty", "seed", "num_beams", "stop_strings",
];
// What only changes the object that Python's `generate` returns, and what the page always asks for.
const ELSEWHERE = ["return_dict_in_generate", "output_scores", "output_logits", "top_logprobs"];
// The names of OpenAI's API for what they have one for.
const SENT_AS = { max_new_tokens: "max_tokens", stop_strings: "stop" };
// Where the API's defaults are not those of `generate`.
const API_DEFAULTS = { max_new_tokens: "", do_sample: "auto", top_k: 0 };
const API_NOTES = { do_sample: " (auto: they are drawn, but not with beams)", stop_strings: ': one text, or ["one", "two"]' };
const NEW_TOKENS = "128"; // more than the API's default: there is a stop button
const ALTERNATIVES = 5; // to each token
const KEY = "fastgen-key";

let about = { has_template: true, has_tokenizer: true };
let knobs = [];
let started = null; // a promise: what the service says of itself has come
let running = null; // the AbortController of what runs
let turns = []; // of the chat: {role, content}

/** An element: `make("p", {className: "quiet"}, "text", child, ...)`. Texts stay texts. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function say(text) {
  $("status").textContent = text;
}

function fail(message) {
  $("alert").textContent = message;
  $("alert").hidden = !message;
}

// ---------------------------------------------------------------------------------- the service

class Failure extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** A response that is not an error. */
async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The service does not answer. Is it still running?", 0);
  }
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    message += ": an answer that is no JSON"; // of a proxy, say
  }
  throw new Failure(message, response.status);
}

/** The objects of a stream of server-sent events, in lists of what came together. */
async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    const lines = rest.split(/\r?\n/);
    rest = lines.pop();
    const found = [];
    let ended = false;
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") ended = true;
      else if (data) found.push(JSON.parse(data));
    }
    if (found.length) yield found;
    if (ended) return;
    if (done) throw new Failure("The connection ended before the text did.", 0);
  }
}

// ---------------------------------------------------------------------------------------- knobs

/** What is said of a knob that is not set. */
function unset(knob) {
  if (knob.name === "do_sample") return API_DEFAULTS.do_sample; // whatever the model's own is
  const value = knob.own_default ?? API_DEFAULTS[knob.name] ?? knob.default;
  if (value === null || value === "") return "not set";
  if (typeof value === "boolean") return value ? "on" : "off";
  return typeof value === "string" ? value : JSON.stringify(value);
}

function control(knob, id) {
  const shared = { id, autocomplete: "off" };
  if (knob.type === "bool") {
    return make("select", shared,
      make("option", { value: "" }, unset(knob)),
      make("option", { value: "true" }, "on"),
      make("option", { value: "false" }, "off"));
  }
  if (knob.type === "int" || knob.type === "float") {
    const step = knob.type === "int" ? "1" : "any";
    return make("input", { ...shared, type: "number", step, placeholder: unset(knob) });
  }
  if (knob.type === "text") {
    return make("textarea", { ...shared, rows: 2, spellcheck: false, placeholder: unset(knob) });
  }
  return make("input", { ...shared, type: "text", spellcheck: false, placeholder: unset(knob) });
}

/** What its field begins with; "auto" where tokens are drawn, so that beams can be asked for. */
function initial(knob) {
  if (knob.name === "max_new_tokens") return NEW_TOKENS;
  if (knob.name === "do_sample") return knob.initial ? "" : "false";
  return String(knob.initial ?? "");
}

/** A name that may be broken after each "_". */
function breakable(name) {
  return name.split(/(?<=_)/).flatMap((part) => [part, make("wbr")]).slice(0, -1);
}

function knobRow(knob) {
  const id = `knob-${knob.name}`;
  const input = control(knob, id);
  input.value = initial(knob);
  const name = SENT_AS[knob.name] === "stop" ? "stop" : knob.name;
  let help = knob.help.replace(/ \(default: 20\)$/, "") + (API_NOTES[knob.name] ?? "");
  if (knob.own_default !== null && knob.own_default !== undefined) help += " (the model's own default)";
  const note = make("span", { className: "quiet", id: `${id}-help` }, help);
  input.setAttribute("aria-describedby", note.id);
  const row = make("div", { className: knob.type === "text" ? "knob long" : "knob" },
    make("label", { htmlFor: id }, ...breakable(name)), input, note);
  row.dataset.name = `${name} ${knob.name} ${knob.help}`.toLowerCase();
  knobs.push({ ...knob, input, row });
  return row;
}

function showKnobs(list) {
  knobs = [];
  const byName = new Map(list.map((knob) => [knob.name, knob]));
  const others = list.filter(({ name }) => !COMMON.includes(name) && !ELSEWHERE.includes(name));
  $("common").replaceChildren(
    ...COMMON.filter((name) => byName.has(name)).map((name) => knobRow(byName.get(name))));
  $("others").replaceChildren(...others.map(knobRow));
  $("more").hidden = false;
  search();
  mark();
}

/** A knob's value as the API takes it; undefined where it is not set. */
function value(knob) {
  const { input, type, name } = knob;
  const wrong = (what) => {
    input.setAttribute("aria-invalid", "true");
    $("more").open ||= $("others").contains(input);
    knob.row.hidden = false;
    input.focus();
    throw new Failure(`${name}: ${what}`, 0);
  };
  input.removeAttribute("aria-invalid");
  if (input.validity.badInput) wrong("a number was expected");
  const text = input.value;
  if (text === "") return undefined;
  if (type === "bool") return text === "true";
  if (type === "int" && !Number.isInteger(Number(text))) wrong(`a whole number was expected, got ${text}`);
  if (type === "int" || type === "float") return Number(text);
  if (type === "text") return text;
  const structured = /^\s*[[{"]/.test(text);
  if (name === "stop_strings" && !structured) return text;
  try {
    return JSON.parse(text);
  } catch (error) {
    return structured ? wrong(`no JSON (${error.message})`) : text;
  }
}

function settings() {
  const out = {};
  for (const knob of knobs) {
    const found = value(knob);
    if (found !== undefined) out[SENT_AS[knob.name] ?? knob.name] = found;
  }
  return out;
}

function mark() {
  let changed = 0;
  for (const knob of knobs) {
    const { input, row } = knob;
    const differs = input.value !== initial(knob) || input.validity.badInput;
    row.classList.toggle("changed", differs);
    changed += differs;
  }
  $("reset").hidden = !changed;
  $("reset").textContent = `Reset ${changed} changed`;
}

function reset() {
  for (const knob of knobs) {
    knob.input.value = initial(knob);
    knob.input.removeAttribute("aria-invalid");
  }
  mark();
  $("settings").focus();
  say("The settings are as they were");
}

function search() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of $("others").children) {
    row.hidden = !words.every((word) => row.dataset.name.includes(word));
    shown += !row.hidden;
  }
  $("found").textContent = words.length ? `${shown} of ${$("others").children.length}` : "";
}

// --------------------------------------------------------------------------------------- tokens

const percent = (logprob) => {
  if (logprob === null || logprob === undefined) return "0 %";
  const share = 100 * Math.exp(logprob);
  if (share < 0.01) return "< 0.01 %";
  return `${share.toFixed(share < 1 ? 2 : 1)} %`;
};

/** Spaces and line ends that would not be seen are written as signs. */
function visible(text) {
  if (text === "") return "(empty)";
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "␣");
}

/** A chunk's tokens, in one form for both routes. */
function tokensOf(choice) {
  const found = choice.logprobs;
  if (found?.content) {
    return found.content.map(({ token, logprob, top_logprobs: top }) => ({
      spelling: token, logprob, top: top.map((one) => [one.token, one.logprob]),
    }));
  }
  if (found?.tokens) {
    return found.tokens.map((spelling, i) => ({
      spelling, logprob: found.token_logprobs[i], top: Object.entries(found.top_logprobs?.[i] ?? {}),
    }));
  }
  return [];
}

/** A text that grows: every character of it is in the span of the token that it came with. */
class Text {
  constructor(element) {
    this.element = element;
    this.content = "";
    this.tokens = 0;
    this.pending = []; // tokens whose characters are not whole yet
    this.last = null;
  }

  /** A piece of it; a thought is shown, and no part of what was said. */
  push(piece, tokens, isThought = false) {
    if (!isThought) this.content += piece;
    this.tokens += tokens.length;
    const added = document.createDocumentFragment();
    let rest = piece;
    tokens.forEach((token, i) => {
      const at = rest.indexOf(token.spelling);
      if (this.pending.length && at > 0) { // what is before it is of those that wait
        added.append(this.span(rest.slice(0, at)));
        rest = rest.slice(at);
      }
      const part = this.part(rest, token.spelling, i === tokens.length - 1);
      this.pending.push(token);
      if (part === "") return;
      added.append(this.span(part));
      rest = rest.slice(part.length);
    });
    if (rest) { // what a stop text held back of the token before
      const home = added.lastChild ?? this.last;
      if (home) home.append(rest);
      else added.append(rest);
    }
    this.last = added.lastChild?.tokens ? added.lastChild : this.last;
    if (isThought) for (const part of added.children) part.classList.add("thought");
    this.element.append(added);
  }

  /** The beginning of `rest` that belongs to a token. */
  part(rest, spelling, isLast) {
    if (isLast) return rest;
    if (rest.startsWith(spelling)) return spelling;
    const bare = spelling.trimStart(); // a text's first token may lose its space
    return bare && rest.startsWith(bare) ? bare : "";
  }

  span(text) {
    const span = make("span", { className: "token", tabIndex: -1 }, text);
    span.tokens = this.pending;
    this.pending = [];
    const likelihood = Math.exp(Math.min(...span.tokens.map((token) => token.logprob ?? -99)));
    const doubt = likelihood < 0.02 ? 3 : likelihood < 0.1 ? 2 : likelihood < 0.3 ? 1 : 0;
    if (doubt) span.classList.add(`doubt-${doubt}`);
    if (text.startsWith("\n")) span.classList.add("line");
    return span;
  }

  get spans() {
    return this.element.querySelectorAll(".token");
  }
}

function alternatives(token) {
  const rows = token.top.map(([spelling, logprob]) => [spelling, logprob, spelling === token.spelling]);
  if (!rows.some(([, , chosen]) => chosen)) rows.push([token.spelling, token.logprob, true]);
  return make("table", {}, make("tbody", {}, ...rows.map(([spelling, logprob, chosen]) => {
    const bar = make("i");
    bar.style.width = `${100 * Math.exp(logprob ?? -99)}%`;
    return make("tr", { className: chosen ? "chosen" : "" },
      make("th", { scope: "row", title: spelling }, visible(spelling)),
      make("td", { ariaHidden: "true" }, make("span", { className: "bar" }, bar)),
      make("td", {}, percent(logprob)));
  })));
}

const card = {
  of: null,
  timer: 0,

  show(span) {
    clearTimeout(this.timer);
    if (this.of === span) return;
    this.of?.classList.remove("shown");
    this.of = span;
    span.classList.add("shown");
    $("card").replaceChildren(...span.tokens.map(alternatives));
    $("card").hidden = false;
    this.place(span);
  },

  /** Under the token, or over it where there is no room; never out of the window's sides. */
  place(span) {
    const boxes = span.getClientRects();
    const box = boxes[boxes.length - 1];
    const own = $("card").getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(box.left, width - own.width - 8));
    const below = box.bottom + 6;
    const over = box.top - own.height - 6;
    const top = below + own.height > window.innerHeight && over >= 0 ? over : below;
    $("card").style.left = `${left + window.scrollX}px`;
    $("card").style.top = `${top + window.scrollY}px`;
  },

  hide() {
    clearTimeout(this.timer);
    this.of?.classList.remove("shown");
    this.of = null;
    $("card").hidden = true;
  },

  /** Leave it for a moment, so that the pointer can go over to it. */
  leave() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.hide(), 150);
  },
};

/** Tokens are one stop of the Tab key; arrows go from one to the next. */
function watchTokens(element) {
  const tokenAt = (event) => event.target.closest?.(".token");
  element.addEventListener("pointerover", (event) => tokenAt(event) && card.show(tokenAt(event)));
  element.addEventListener("pointerout", (event) => tokenAt(event) && card.leave());
  element.addEventListener("click", (event) => tokenAt(event)?.focus());
  element.addEventListener("focusin", (event) => {
    const token = tokenAt(event);
    if (!token) return;
    for (const other of token.parentElement.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    token.tabIndex = 0;
    card.show(token);
  });
  element.addEventListener("focusout", (event) => tokenAt(event) && card.leave());
  element.addEventListener("keydown", (event) => {
    const token = tokenAt(event);
    if (!token || event.ctrlKey || event.altKey || event.metaKey) return;
    const all = [...token.parentElement.querySelectorAll(".token")];
    const at = all.indexOf(token);
    const to = {
      ArrowRight: () => all[at + 1],
      ArrowLeft: () => all[at - 1],
      ArrowDown: () => neighbour(all, at, 1),
      ArrowUp: () => neighbour(all, at, -1),
      Home: () => all[0],
      End: () => all[all.length - 1],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    to()?.focus();
  });
}

/** The token on the next line (or the one before) that is closest from left to right. */
function neighbour(all, at, way) {
  const start = all[at].getBoundingClientRect();
  let best;
  for (let i = at + way, line = null; all[i]; i += way) {
    const box = all[i].getBoundingClientRect();
    if (Math.abs(box.top - start.top) < 4) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) >= 4) break;
    const away = Math.abs(box.left - start.left);
    if (!best || away < best.away) best = { token: all[i], away };
  }
  return best?.token;
}

// ---------------------------------------------------------------------------------------- a run

const mode = () => document.querySelector('[name="mode"]:checked').value;

function promptIds(text) {
  const ids = text.split(/[\s,]+/).filter(Boolean).map(Number);
  if (ids.length && ids.every(Number.isInteger)) return ids;
  throw new Failure("The prompt: whole numbers were expected, with spaces or commas between", 0);
}

function request(text) {
  const shared = { ...settings(), stream: true, stream_options: { include_usage: true } };
  if (mode() === "prompt") {
    const prompt = about.has_tokenizer ? text : promptIds(text);
    const wanted = about.has_tokenizer ? { logprobs: ALTERNATIVES } : {};
    return ["/v1/completions", { prompt, ...shared, ...wanted }];
  }
  const system = $("system").value.trim();
  const before = system ? [{ role: "system", content: system }] : [];
  const messages = [...before, ...turns, { role: "user", content: text }];
  return ["/v1/chat/completions",
    { messages, ...shared, logprobs: true, top_logprobs: ALTERNATIVES }];
}

/** Where each sequence of an answer is written. */
class Screen {
  constructor(text) {
    this.chat = mode() === "chat";
    this.place = this.chat ? $("log") : $("output");
    this.answers = [];
    this.texts = [];
    this.prompt = text;
    $("output").replaceChildren();
    if (this.chat) {
      this.question = turn("user", text);
      this.place.append(this.question);
    }
    this.text(0);
  }

  text(index) {
    while (this.texts.length <= index) {
      const box = make("div", { className: "text" });
      const written = make("span", { className: "written" });
      if (!this.chat && about.has_tokenizer) {
        box.append(make("span", { className: "echo" }, this.prompt));
      }
      box.append(written);
      const answer = this.chat ? turn("assistant", box) : make("div", {}, box);
      answer.classList.add("running");
      this.place.append(answer);
      this.answers.push(answer);
      this.texts.push(new Text(written));
    }
    return this.texts[index];
  }

  get empty() {
    return this.texts.every((text) => text.content === "");
  }

  /** Let a chat know its answer; what failed before its first token leaves. */
  end() {
    for (const { spans } of this.texts) if (spans[0]) spans[0].tabIndex = 0;
    for (const answer of this.answers) {
      answer.classList.remove("running");
      if (this.empty) answer.remove();
    }
    if (!this.chat) return;
    if (this.empty) {
      this.question.remove();
      if (!$("prompt").value) $("prompt").value = this.prompt;
      return;
    }
    turns.push({ role: "user", content: this.prompt });
    turns.push({ role: "assistant", content: this.texts[0].content });
    $("clear").hidden = false;
  }
}

function turn(role, content) {
  const name = role === "user" ? "You" : "Model";
  const text = typeof content === "string" ? make("div", { className: "text" }, content) : content;
  return make("article", { className: `turn ${role}` }, make("h3", {}, name), text);
}

/** The numbers of a run, drawn once a frame at most. */
class Numbers {
  constructor() {
    this.start = performance.now();
    this.first = this.last = null;
    this.tokens = this.atFirst = 0;
    this.reasons = new Set();
    this.usage = null;
    this.frame = 0;
    $("numbers").hidden = false;
    this.draw();
  }

  take(tokens) {
    if (tokens) {
      this.tokens += tokens;
      this.last = performance.now();
      if (this.first === null) {
        this.first = this.last;
        this.atFirst = this.tokens;
      }
    }
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  /** Tokens a second after the first ones; of all of them where they came about at once. */
  get speed() {
    if (this.first === null) return null;
    const streamed = this.last - this.first > 50;
    const [tokens, since] = streamed ? [this.tokens - this.atFirst, this.first] : [this.tokens, this.start];
    return (1000 * tokens) / Math.max(1, this.last - since);
  }

  draw() {
    this.frame = 0;
    const { speed, first, usage } = this;
    $("first").textContent = first === null ? "–" : time(first - this.start);
    $("speed").textContent = speed === null ? "–" : `${round(speed)} tokens/s`;
    const read = usage ? `${usage.prompt_tokens} read, ` : "";
    $("count").textContent = `${read}${usage?.completion_tokens ?? this.tokens} written`;
    $("reason").textContent = [...this.reasons].join(", ") || "–";
  }
}

const round = (number) => (number < 10 ? number.toFixed(1) : Math.round(number).toString());
const time = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);
const ENDS = { length: "its length", stop: "its end" };

async function read(response, screen, numbers) {
  for await (const chunks of events(response)) {
    const inView = screen.chat && $("go").getBoundingClientRect().bottom <= window.innerHeight;
    let came = 0;
    for (const chunk of chunks) {
      if (chunk.error) throw new Failure(chunk.error.message, 0);
      if (chunk.usage) numbers.usage = chunk.usage;
      for (const choice of chunk.choices) {
        const ids = choice.token_ids ?? []; // of a model without a tokenizer
        const thought = choice.delta?.reasoning_content;
        const said = choice.text || choice.delta?.content || ids.map((id) => `${id} `).join("");
        const tokens = tokensOf(choice);
        screen.text(choice.index).push(thought ?? said, tokens, thought !== undefined);
        came += tokens.length || ids.length;
        const reason = choice.finish_reason;
        if (reason) numbers.reasons.add(ENDS[reason] ?? reason);
      }
    }
    numbers.take(came);
    if (inView) $("go").scrollIntoView({ block: "nearest" }); // a growing chat pushes it down
  }
}

function setRunning(controller) {
  running = controller;
  document.body.classList.toggle("busy", Boolean(controller));
  $("go").classList.toggle("stop", Boolean(controller));
  $("go").textContent = controller ? "Stop" : mode() === "chat" ? "Send" : "Generate";
  for (const radio of document.getElementsByName("mode")) {
    radio.disabled = Boolean(controller) || (radio.value === "chat" && !about.has_template);
  }
  $("clear").disabled = Boolean(controller);
}

async function run() {
  await started; // the knobs are there, or the service has said why not
  if (running) return;
  const text = $("prompt").value;
  card.hide();
  fail("");
  let path, body;
  try {
    [path, body] = request(text);
  } catch (error) {
    fail(error.message);
    return;
  }
  const controller = new AbortController();
  const screen = new Screen(text);
  const numbers = new Numbers();
  setRunning(controller);
  if (screen.chat) $("prompt").value = "";
  say("Writing");
  try {
    const response = await ask(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: controller.signal,
    });
    await read(response, screen, numbers);
    say(`Done: ${numbers.tokens} tokens`);
  } catch (error) {
    if (controller.signal.aborted) {
      numbers.reasons = new Set(["you"]);
      say(`Stopped after ${numbers.tokens} tokens`);
    } else {
      controller.abort(); // nothing more is wanted of it
      numbers.reasons = new Set(["an error"]);
      say("");
      fail(error.message);
      if (error.status === 401) showKey();
    }
  } finally {
    screen.end();
    cancelAnimationFrame(numbers.frame);
    numbers.draw();
    $("numbers").hidden = numbers.first === null;
    $("token-note").hidden = !document.querySelector(".token");
    setRunning(null);
  }
}

// ------------------------------------------------------------------------------------- the page

function showKey() {
  $("key-form").hidden = false;
  $("key-toggle").setAttribute("aria-expanded", "true");
  $("key").focus();
}

function toggleKey() {
  if ($("key-form").hidden) return showKey();
  $("key-form").hidden = true;
  $("key-toggle").setAttribute("aria-expanded", "false");
}

async function useKey(event) {
  event.preventDefault();
  const key = $("key").value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  await (started = start());
  if ($("alert").hidden) {
    toggleKey();
    $("prompt").focus();
  }
}

function setMode() {
  const chat = mode() === "chat";
  $("system-field").hidden = $("log").hidden = !chat;
  $("clear").hidden = !chat || !turns.length;
  const ids = about.has_tokenizer ? "Prompt" : "Prompt (token ids: this model has no tokenizer)";
  $("prompt-label").textContent = chat ? "Message" : ids;
  $("output").replaceChildren();
  $("numbers").hidden = $("token-note").hidden = true;
  fail("");
  setRunning(null);
}

function clear() {
  turns = [];
  $("log").replaceChildren();
  setMode();
  $("prompt").focus();
  say("A new chat");
}

function showModel() {
  const { name, type, weights, precision, max_length: length } = about;
  const size = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  const facts = [type, weights && `${size.format(weights)} weights`, precision,
    length && `up to ${length.toLocaleString("en")} tokens`];
  $("model").replaceChildren(make("b", {}, name), ` · ${facts.filter(Boolean).join(" · ")}`);
  document.title = `${name} · fastgen`;
  $("mode-note").textContent = about.has_template ? "" : "No chat: this model has no chat template.";
}

async function start() {
  fail("");
  try {
    const found = await (await ask("/knobs")).json();
    about = found.model;
    showModel();
    showKnobs(found.knobs);
    setMode();
  } catch (error) {
    fail(error.message);
    if (error.status === 401) showKey();
  }
}

function keys(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (!$("key-form").contains(event.target)) run();
  }
  if (event.key === "Escape") {
    if (!$("card").hidden) card.hide();
    running?.abort();
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else run();
});
$("key-form").addEventListener("submit", useKey);
$("key-toggle").addEventListener("click", toggleKey);
$("clear").addEventListener("click", clear);
$("reset").addEventListener("click", reset);
$("search").addEventListener("input", search);
$("settings").addEventListener("input", mark);
for (const radio of document.getElementsByName("mode")) radio.addEventListener("change", setMode);
$("card").addEventListener("pointerenter", () => clearTimeout(card.timer));
$("card").addEventListener("pointerleave", () => card.leave());
window.addEventListener("resize", () => card.hide());
document.addEventListener("keydown", keys);
watchTokens($("output"));
watchTokens($("log"));
started = start();
