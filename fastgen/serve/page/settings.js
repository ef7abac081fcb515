// The settings: knobs in words, presets, and what else a request has. Errors stand by their field.

import { $, make, say } from "./dom.js";
import { Failure } from "./service.js";

const KEPT = "fastgen-settings";
const COMMON = [
  "max_new_tokens", "temperature", "top_p", "repetition_penalty", "seed", "stop_strings",
  "num_return_sequences",
];
// What only changes the object that Python's `generate` returns, and what has a field of its own.
const ELSEWHERE = [
  "return_dict_in_generate", "output_scores", "output_logits", "top_logprobs", "json_schema",
];
// In words, where the knob's own help is for those who know it.
const WORDS = {
  max_new_tokens: ["Longest answer", "In tokens: a token is a short word or a part of one."],
  temperature: ["Randomness", "0 always takes the likeliest word; 1 draws as the model learned."],
  top_p: ["Only likely words", "The share of likeliest words that it draws from; 1 for all."],
  repetition_penalty: ["Avoid repetition", "Above 1 it says less that was already said."],
  seed: ["Repeatable", "The same number gives the same answer again."],
  stop_strings: ["Stop at", 'A text that ends the answer, or ["one", "two"].'],
  num_return_sequences: ["Answers", "As many as these at once, as branches."],
  do_sample: ["Draw at random", "Without it the likeliest is taken. Auto: drawn, but not with beams."],
};
// The names of OpenAI's API for what they have one for.
const SENT_AS = { max_new_tokens: "max_tokens", stop_strings: "stop", num_return_sequences: "n" };
// Where the API's defaults are not those of `generate`.
const API_DEFAULTS = { max_new_tokens: "", do_sample: "auto", top_k: 0 };
// A model that takes the likeliest by default draws where a preset says how ("": it is drawn).
const PRESETS = {
  balanced: {}, // as the model's makers, or we, have it
  precise: { do_sample: "", temperature: "0.2", top_p: "0.9" },
  creative: { do_sample: "", temperature: "1", top_p: "0.95" },
};
const OF_PRESETS = ["do_sample", "temperature", "top_p", "top_k", "min_p"];

let knobs = []; // {name, type, ..., input, row, first}
// New tokens: more than the API's, for there is a stop button; in small contexts at most a quarter.
const USUAL = { chat: 512, text: 128 };
let context = Infinity;

// ---------------------------------------------------------------------------------- the fields

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
    const inputMode = knob.type === "int" ? "numeric" : "decimal";
    return make("input", { ...shared, type: "number", step, inputMode, placeholder: unset(knob) });
  }
  if (knob.type === "text") {
    return make("textarea", { ...shared, rows: 2, spellcheck: false, placeholder: unset(knob) });
  }
  return make("input", { ...shared, type: "text", spellcheck: false, placeholder: unset(knob) });
}

/** What its field begins with; "auto" where tokens are drawn, so that beams can be asked for. */
function first(knob, kind) {
  if (knob.name === "max_new_tokens") return String(Math.min(USUAL[kind], Math.floor(context / 4)));
  if (knob.name === "do_sample") return knob.initial ? "" : "false";
  return String(knob.initial ?? "");
}

/** A name that may be broken after each "_". */
const breakable = (name) =>
  name.split(/(?<=_)/).flatMap((part) => [part, make("wbr")]).slice(0, -1);

const sentence = (text) => text[0].toUpperCase() + text.slice(1);

function knobRow(knob, kind) {
  const id = `knob-${knob.name}`;
  const input = control(knob, id);
  const begins = first(knob, kind);
  input.value = begins;
  const [title, more] = WORDS[knob.name] ?? [sentence(knob.help), ""];
  const own = knob.own_default === null || knob.own_default === undefined ? "" : "The model's own default.";
  const name = make("code", { id: `${id}-name` },
    ...breakable(SENT_AS[knob.name] === "stop" ? "stop" : knob.name));
  const note = make("span", { className: "quiet note", id: `${id}-help` }, `${more} ${own}`.trim());
  input.setAttribute("aria-describedby", `${name.id} ${note.id}`);
  const row = make("div", { className: knob.type === "text" ? "knob long" : "knob" },
    make("div", {}, make("label", { htmlFor: id }, title), name), input, note);
  row.dataset.words = `${knob.name} ${title} ${more} ${knob.help}`.toLowerCase();
  knobs.push({ ...knob, input, row, first: begins });
  return row;
}

/** Make the fields of a model of `length` tokens: knobs as the service lists them, with values. */
export function showKnobs(list, kind, length) {
  context = length ?? Infinity;
  const changed = stored();
  knobs = [];
  const byName = new Map(list.map((knob) => [knob.name, knob]));
  const others = list.filter(({ name }) => !COMMON.includes(name) && !ELSEWHERE.includes(name));
  $("common").replaceChildren(
    ...COMMON.filter((name) => byName.has(name)).map((name) => knobRow(byName.get(name), kind)));
  $("others").replaceChildren(...others.map((knob) => knobRow(knob, kind)));
  for (const knob of knobs) knob.input.value = changed.knobs?.[knob.name] ?? knob.first;
  for (const name of ["schema", "tools"]) $(name).value = changed[name] ?? "";
  $("probabilities").checked = Boolean(changed.probabilities);
  $("reasoning-tokens").value = changed.reasoning ?? "";
  $("think").checked = changed.think ?? true;
  $("has-to-call").checked = Boolean(changed.hasToCall);
  for (const name of ["schema", "tools"]) $(name).closest("details").open ||= Boolean($(name).value);
  search();
  mark();
}

/** Begin with as many new tokens as are usual: chats have longer answers than texts. */
export function setKind(kind) {
  for (const knob of knobs.filter(({ name }) => name === "max_new_tokens")) {
    const same = knob.input.value === knob.first;
    knob.first = first(knob, kind);
    if (same) knob.input.value = knob.first;
  }
  mark();
}

const differs = ({ input, first: begins }) => input.value !== begins || input.validity.badInput;

/** Whether the longest answer is the one that it begins with. */
export const usualLength = () => !knobs.some((knob) => knob.name === "max_new_tokens" && differs(knob));

/** Show what was changed, and keep it in this browser. */
function mark() {
  let changed = 0;
  for (const knob of knobs) {
    knob.row.classList.toggle("changed", differs(knob));
    changed += differs(knob);
  }
  $("reset").hidden = !changed;
  $("reset").textContent = `Reset ${changed} changed`;
  const name = preset();
  for (const radio of document.getElementsByName("preset")) radio.checked = radio.value === name;
}

function changedNow() {
  const values = knobs.filter(differs).map(({ name, input }) => [name, input.value]);
  return {
    knobs: Object.fromEntries(values),
    schema: $("schema").value,
    tools: $("tools").value,
    probabilities: $("probabilities").checked,
    reasoning: $("reasoning-tokens").value,
    think: $("think").checked,
    hasToCall: $("has-to-call").checked,
  };
}

function stored() {
  try {
    const found = JSON.parse(localStorage.getItem(KEPT));
    return typeof found === "object" && found !== null ? found : {};
  } catch {
    return {}; // storage is off, or another program's: the page works without
  }
}

function store() {
  try {
    localStorage.setItem(KEPT, JSON.stringify(changedNow()));
  } catch {
    // Storage is off or full: the settings last as long as the page.
  }
}

function reset() {
  for (const knob of knobs) {
    knob.input.value = knob.first;
    right(knob.input);
  }
  changed();
  $("settings").focus();
  say("The settings are as they were");
}

function search() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of $("others").children) {
    row.hidden = !words.every((word) => row.dataset.words.includes(word));
    shown += !row.hidden;
  }
  $("found").textContent = words.length ? `${shown} of ${$("others").children.length}` : "";
}

// ------------------------------------------------------------------------------------- presets

/** The value that a preset gives to a knob's field. */
const presetValue = (name, knob) => PRESETS[name][knob.name] ?? knob.first;

/** The name of the preset that the fields show; undefined where they show none. */
function preset() {
  const own = knobs.filter(({ name }) => OF_PRESETS.includes(name));
  return Object.keys(PRESETS).find((name) =>
    own.every((knob) => knob.input.value === presetValue(name, knob)));
}

function choose(name) {
  for (const knob of knobs.filter((one) => OF_PRESETS.includes(one.name))) {
    knob.input.value = presetValue(name, knob);
    right(knob.input);
  }
  changed();
}

// -------------------------------------------------------------------------------------- errors

/** Say by a field what is wrong with it, and bring it into view. */
export function wrong(input, message) {
  right(input);
  input.setAttribute("aria-invalid", "true");
  const note = make("p", { className: "wrong", id: `${input.id}-wrong` }, message);
  note.setAttribute("role", "alert");
  input.dataset.described = input.getAttribute("aria-describedby") ?? "";
  input.setAttribute("aria-describedby", `${note.id} ${input.dataset.described}`.trim());
  input.after(note);
  const row = input.closest(".knob");
  if (row) row.hidden = false;
  for (let box = input.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  input.dispatchEvent(new CustomEvent("needed", { bubbles: true })); // its panel opens
  input.focus({ preventScroll: true });
  input.scrollIntoView({ block: "center" });
}

function right(input) {
  if (!input.hasAttribute("aria-invalid")) return;
  input.removeAttribute("aria-invalid");
  input.setAttribute("aria-describedby", input.dataset.described);
  $(`${input.id}-wrong`)?.remove();
}

/** The field of a request's parameter; null where the settings have none. */
function fieldOf(param) {
  if (param === "response_format" || param === "json_schema") return $("schema");
  if (param === "tools" || param === "tool_choice") return $("tools");
  if (param === "max_reasoning_tokens") return $("reasoning-tokens");
  const known = (knob) => knob.name === param || SENT_AS[knob.name] === param;
  return knobs.find(known)?.input ?? null;
}

/** Show an error by the field that it is about; false where that is none of the settings. */
export function showWrong(error) {
  const input = error.field ?? fieldOf(error.param);
  if (!input) return false;
  wrong(input, error.message);
  return true;
}

// -------------------------------------------------------------------------------------- values

/** A failure that belongs to a field. */
const refused = (input, message) => Object.assign(new Failure(message), { field: input });

/** A knob's value as the API takes it; undefined where it is not set. */
function value({ input, type, name }) {
  right(input);
  if (input.validity.badInput) throw refused(input, "A number was expected.");
  const text = input.value;
  if (text === "") return undefined;
  if (type === "bool") return text === "true";
  if (type === "int" && !Number.isInteger(Number(text))) {
    throw refused(input, `A whole number was expected, got ${text}.`);
  }
  if (type === "int" || type === "float") return Number(text);
  if (type === "text") return text;
  const structured = /^\s*[[{"]/.test(text);
  if (name === "stop_strings" && !structured) return text;
  try {
    return JSON.parse(text);
  } catch (error) {
    if (structured) throw refused(input, `This is no JSON (${error.message}).`);
    return text;
  }
}

/** The JSON of a field; undefined where it is empty. */
function json(input, kind, isRight) {
  right(input);
  const text = input.value.trim();
  if (!text) return undefined;
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw refused(input, `This is no JSON (${error.message}).`);
  }
  if (!isRight(found)) throw refused(input, `${kind} was expected.`);
  return found;
}

/** The fields of a request that the settings say; `kind` is "chat" or "text". */
export function settings(kind) {
  const out = {};
  for (const knob of knobs) {
    const found = value(knob);
    if (found !== undefined) out[SENT_AS[knob.name] ?? knob.name] = found;
  }
  const isObject = (one) => typeof one === "object" && one !== null && !Array.isArray(one);
  const schema = json($("schema"), "A schema, such as {}, ", isObject);
  if (kind === "text") {
    if (schema) out.json_schema = JSON.stringify(schema);
    return out;
  }
  if (schema) {
    out.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  }
  const tools = $("tools-field").hidden ? undefined : json($("tools"), "A list of tools", Array.isArray);
  if (tools?.length) {
    out.tools = tools;
    // One call: a small model would repeat it until the longest answer is reached.
    if ($("has-to-call").checked) Object.assign(out, { tool_choice: "required", parallel_tool_calls: false });
  }
  if (!$("reasoning-field").hidden) {
    right($("reasoning-tokens"));
    const most = $("reasoning-tokens").value;
    if (most !== "") out.max_reasoning_tokens = Number(most);
    if (!$("think-field").hidden && !$("think").checked) {
      out.chat_template_kwargs = { enable_thinking: false };
    }
  }
  return out;
}

export const wantsProbabilities = () => $("probabilities").checked;

// --------------------------------------------------------------------------------- what changes

function changed() {
  mark();
  store();
}

export function watchSettings() {
  $("settings").addEventListener("input", (event) => {
    if (event.target.name === "preset") choose(event.target.value);
    if (event.target === $("search")) search();
    right(event.target);
    changed();
  });
  $("reset").addEventListener("click", reset);
}
