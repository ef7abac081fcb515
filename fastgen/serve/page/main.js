// The page of the service: it speaks the same API as every other client.

import { Answer } from "./answer.js";
import { showChats, watchChats } from "./chats.js";
import { programs } from "./code.js";
import { fail, fit, follow, keepUp, setText, watchComposer } from "./composer.js";
import { blank, contextUsed, grow, path, prune, show } from "./conversation.js";
import { $, button, copy, grouped, make, say, size, tab } from "./dom.js";
import { request } from "./request.js";
import { ask, hasKey, useKey } from "./service.js";
import { setKind, showKnobs, showWrong, wantsProbabilities, watchSettings } from "./settings.js";
import * as store from "./store.js";
import { card, watchTokens } from "./tokens.js";
import { transcript } from "./transcript.js";

const OPEN = "fastgen-open"; // the conversation of this tab
const MODEL = "fastgen-model";
const PANELS = ["chats", "settings"];
const OFTEN = 1000; // milliseconds between two times that a growing answer is kept
const EXAMPLES = {
  chat: [
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that reverses a string.",
    "Give me three names for a small boat.",
  ],
  text: ["The capital of France is", "The os module", "def open("],
};

let about = { name: "", has_template: true, has_tokenizer: true };
let conversation = blank("chat");
let wantsText = false; // a person chose that texts are continued
const removed = new WeakSet(); // conversations that were deleted while an answer came
let running = null; // the Answer that is being written
let started = null; // a promise: what the service says of itself has come

// ------------------------------------------------------------------------------- conversations

/** Keep a conversation; a browser that cannot is told about once, in the list. */
async function keep(which) {
  try {
    if (!removed.has(which)) await store.keep(which);
  } catch (error) {
    $("chats-note").textContent = `This chat is not kept: ${error.message}.`;
  }
  await showChats();
}

function draw() {
  const growing = running?.conversation === conversation ? running.nodes[0]?.id : null;
  transcript.draw(conversation, actions, growing);
  $("greeting").hidden = conversation.at !== null;
  $("system").value = conversation.system;
  $("new").disabled = false;
  tab.set(OPEN, conversation.id);
  showKind();
  showContext();
  notes();
}

/** Stop an answer to a conversation that is deleted: it must not be kept again. */
function forget(ids) {
  if (!running || !ids.includes(running.conversation.id)) return;
  removed.add(running.conversation);
  stop();
}

/** Open a conversation; null: a new one. */
async function open(id) {
  const found = id === null ? null : await store.load(id).catch(() => null);
  conversation = found ?? blank(usualKind(), conversation.system);
  if (conversation.id === running?.conversation.id) conversation = running.conversation;
  card.hide();
  fail("");
  draw();
  await showChats();
  panel(null);
  follow();
  if (!found) $("prompt").focus();
}

const usualKind = () => (about.has_template && !wantsText ? "chat" : "text");

function showKind() {
  const { kind } = conversation;
  document.querySelector(`[name="kind"][value="${kind}"]`).checked = true;
  document.body.dataset.kind = kind;
  const ids = about.has_tokenizer ? "Text to continue" : "Token ids to continue: the model has no tokenizer";
  $("prompt-label").textContent = kind === "chat" ? "Message" : ids;
  $("prompt").placeholder = kind === "chat" ? "Ask something" : ids;
  $("chat-only").hidden = kind !== "chat";
  setKind(kind);
  const examples = EXAMPLES[kind].map((text) => button(text, () => {
    setText(text);
    $("prompt").focus();
  }, { className: "example" }));
  $("examples").replaceChildren(...(about.has_tokenizer ? examples : []));
  $("welcome").textContent = kind === "chat" ? `Talk to ${about.name}` : `${about.name} continues a text`;
}

/** Send another kind of request from now on: what was said so far is of the other kind. */
function changeKind() {
  const kind = document.querySelector('[name="kind"]:checked').value;
  wantsText = kind === "text";
  if (conversation.at === null) conversation.kind = kind;
  else conversation = blank(kind, conversation.system);
  draw();
}

function showContext() {
  const used = contextUsed(conversation);
  const most = about.max_length;
  $("context").hidden = !used;
  const share = most ? Math.min(1, used / most) : 0;
  $("context-text").textContent = most
    ? `${grouped(used)} of ${grouped(most)} tokens`
    : `${grouped(used)} tokens`;
  $("context-bar").hidden = !most;
  $("context-bar").firstElementChild.style.width = `${100 * share}%`;
  $("context").classList.toggle("full", share > 0.9);
}

function notes() {
  $("token-note").hidden = !wantsProbabilities();
}

// -------------------------------------------------------------------------------------- a run

/** What can be done with a turn (see transcript.js). */
const actions = {
  showsProbabilities: wantsProbabilities,
  again: (node) => answer(node.parent),
  onward: (node) => answer(node.id),
  async edit(node, text) {
    if (running || !text.trim()) return;
    if (!(await answer(node.parent, [["user", text]]))) transcript.of(node)?.edit(text);
  },
  results(node, texts) {
    answer(node.id, texts.map((text, i) => ["tool", text, { call: node.calls[i].id }]));
  },
  branch(node) {
    if (running?.conversation === conversation) return;
    show(conversation, node);
    draw();
    transcript.of(node)?.element.querySelector(".branches button:not(:disabled)")?.focus();
    keep(conversation);
  },
};

async function send() {
  await started; // the knobs are there, or the service has said why not
  const text = $("prompt").value;
  if (running || !text.trim()) return;
  if (await answer(conversation.at, [["user", text]], () => setText(""))) return;
  if (!$("prompt").value) setText(text); // nothing came of it: it can be sent again
}

/**
 * Let the model answer the node `id`, after `said` (nodes that are added first). `taken` is called
 * once what was said is on the screen. False where nothing came: then all is as it was before.
 */
async function answer(id, said = [], taken = () => {}) {
  if (running) return false;
  card.hide();
  fail("");
  if (conversation.kind === "chat" && !about.has_template) {
    fail(`${about.name} has no chat template. “New chat” begins a text, which it continues.`);
    return false;
  }
  const mine = conversation;
  const before = mine.at;
  const added = [];
  for (const [role, content, more] of said) {
    added.push(grow(mine, added.at(-1)?.id ?? id, role, content, more));
  }
  let kept = 0; // when it was kept last; 0 while there is nothing to keep
  const isShown = () => conversation === mine;
  const soon = drawer((node) => {
    if (isShown()) transcript.of(node)?.update();
    if (performance.now() - kept > OFTEN) {
      kept = performance.now();
      keep(mine);
    }
  });
  const began = () => {
    kept = performance.now();
    keep(mine);
  };
  try {
    running = new Answer(mine, added.at(-1)?.id ?? id, about, { changed: soon, began });
  } catch (error) {
    takeBack(mine, added, before);
    told(error);
    return false;
  }
  setRunning(true);
  panel(null);
  taken();
  say("Writing");
  let failed = null;
  const run = running.run();
  draw();
  follow();
  try {
    await run;
  } catch (error) {
    failed = error;
  }
  soon.cancel();
  const { nodes, empty, controller, written } = running;
  running = null;
  setRunning(false);
  if (empty && !kept) takeBack(mine, [...added, ...nodes], before);
  else if (empty && failed) takeBack(mine, nodes, added.at(-1)?.id ?? before);
  if (isShown()) {
    draw();
    keepUp();
  }
  if (kept) await keep(mine);
  const text = nodes[0].content.slice(0, 1000); // read out once, when it is whole
  if (failed) say("");
  else if (controller.signal.aborted) say(`Stopped after ${written} tokens`);
  else say(`Done, ${written} tokens. ${text}`);
  if (failed) told(failed);
  return !(empty && !kept);
}

/** Take nodes back, the last first, and show the branch that was shown before. */
function takeBack(which, nodes, before) {
  for (const node of [...nodes].reverse()) prune(which, node);
  which.at = before;
  if (!Object.keys(which.nodes).length) which.title = "";
}

/** Call `work` with the newest argument, once a frame at most; less often where it takes long. */
function drawer(work) {
  let frame = 0;
  let next = 0;
  const waiting = new Set();
  const later = (node) => {
    waiting.add(node);
    frame ||= requestAnimationFrame(run);
  };
  const run = (now) => {
    frame = 0;
    if (now < next) {
      frame = requestAnimationFrame(run);
      return;
    }
    const begun = performance.now();
    for (const node of waiting) work(node);
    waiting.clear();
    next = now + 4 * (performance.now() - begun);
  };
  later.cancel = () => cancelAnimationFrame(frame);
  return later;
}

function setRunning(now) {
  document.body.classList.toggle("busy", now);
  $("go").classList.toggle("stop", now);
  $("go").textContent = now ? "Stop" : "Send";
  for (const one of document.querySelectorAll('[name="kind"], #models')) {
    one.disabled = now || (one.value === "chat" && !about.has_template);
  }
}

const stop = () => running?.stop();

/** Show an error where it belongs: by its field, or over the message. */
function told(error) {
  if (error.status === 401) showKey();
  const full = error.code === "context_length_exceeded" ? ". A new chat, or a shorter answer, has room" : "";
  if (full || !showWrong(error)) fail(`${error.message}${full}`);
}

// ------------------------------------------------------------------------------------ programs

async function showCode() {
  await started;
  fail("");
  const draft = $("prompt").value;
  const which = { ...conversation, nodes: { ...conversation.nodes } };
  if (draft.trim()) grow(which, which.at, "user", draft);
  else which.at = path(which).reverse().find((node) => node.role !== "assistant")?.id ?? null;
  if (which.at === null) grow(which, null, "user", EXAMPLES[which.kind][0]);
  try {
    const [address, body] = request(which, which.at, about);
    const language = document.querySelector('[name="language"]:checked').value;
    $("program").textContent = programs[language](location.origin, address, body, hasKey());
  } catch (error) {
    $("code").close();
    told(error);
    return;
  }
  if (!$("code").open) $("code").showModal();
}

// ------------------------------------------------------------------------------------- the page

/** Show a panel where there is room for one alone: "chats", "settings", or null for the talk. */
function panel(name) {
  const before = document.body.dataset.panel;
  if (name) document.body.dataset.panel = name;
  else delete document.body.dataset.panel;
  for (const one of PANELS) $(`${one}-toggle`).setAttribute("aria-expanded", String(one === name));
  if (name && name !== before) window.scrollTo(0, 0);
  fit();
}

function showKey() {
  $("key-form").hidden = false;
  $("key-toggle").hidden = false;
  $("key-toggle").setAttribute("aria-expanded", "true");
  $("key").focus();
}

function toggleKey() {
  if ($("key-form").hidden) return showKey();
  $("key-form").hidden = true;
  $("key-toggle").setAttribute("aria-expanded", "false");
}

async function takeKey(event) {
  event.preventDefault();
  useKey($("key").value.trim());
  $("key").value = "";
  await (started = start());
  if ($("alert").hidden) {
    toggleKey();
    $("prompt").focus();
  }
}

function showModel(names) {
  const { type, weights, precision, max_length: length } = about;
  const facts = [type, weights && `${size(weights)} weights`, precision,
    length && `${grouped(length)} tokens of context`];
  $("facts").textContent = facts.filter(Boolean).join(" · ");
  $("models").replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  $("models").value = about.name;
  $("models").hidden = names.length < 2;
  $("model").hidden = names.length > 1;
  $("model").textContent = about.name;
  document.title = `${about.name} · fastgen`;
  document.querySelector('[name="kind"][value="chat"]').disabled = !about.has_template;
  $("kind-note").textContent = about.has_template ? "" : "No chat: this model has no chat template.";
  $("tools-field").hidden = !about.tools;
  $("reasoning-field").hidden = !about.reasoning;
  $("think-field").hidden = !about.thinking_switch;
}

/** Ask the service for its models, and for the knobs of the one that is chosen. */
async function start() {
  fail("");
  try {
    const names = (await (await ask("/v1/models")).json()).data.map(({ id }) => id);
    const chosen = tab.get(MODEL);
    const query = names.includes(chosen) && names.length > 1 ? `?model=${encodeURIComponent(chosen)}` : "";
    const found = await (await ask(`/knobs${query}`)).json();
    about = found.model;
    showModel(names);
    if (hasKey()) $("key-toggle").hidden = false;
    if (conversation.at === null) conversation.kind = usualKind();
    showKnobs(found.knobs, conversation.kind, about.max_length);
    draw();
  } catch (error) {
    told(error);
  }
}

/** Open what this tab had open before it was loaded again. */
async function reopened() {
  const id = tab.get(OPEN);
  const found = id && (await store.load(id).catch(() => null));
  if (found) conversation = found;
  await showChats();
}

function keys(event) {
  if (event.key !== "Escape" || event.defaultPrevented) return;
  if (!$("card").hidden) card.hide();
  else if (running) stop();
  else if (document.body.dataset.panel) {
    const name = document.body.dataset.panel;
    panel(null);
    $(`${name}-toggle`).focus();
  }
}

function watch() {
  watchComposer({ send, stop });
  watchSettings();
  watchTokens($("transcript"));
  watchChats({ open, current: () => conversation.id, forget });
  store.watch(async (id) => {
    if (id === conversation.id && running?.conversation !== conversation) {
      conversation = (await store.load(id)) ?? conversation; // another tab went on with it
      draw();
    }
    await showChats();
  });
  $("key-form").addEventListener("submit", takeKey);
  $("key-toggle").addEventListener("click", toggleKey);
  $("new").addEventListener("click", () => {
    open(null);
    say("A new chat");
  });
  $("system").addEventListener("input", () => {
    conversation.system = $("system").value;
    if (conversation.at !== null) keep(conversation);
  });
  $("probabilities").addEventListener("change", draw);
  $("models").addEventListener("change", async () => {
    tab.set(MODEL, $("models").value);
    await (started = start());
  });
  for (const radio of document.getElementsByName("kind")) radio.addEventListener("change", changeKind);
  for (const radio of document.getElementsByName("language")) radio.addEventListener("change", showCode);
  $("code-open").addEventListener("click", showCode);
  $("code-close").addEventListener("click", () => $("code").close());
  $("code-copy").addEventListener("click", async () => {
    $("code-copy").textContent = (await copy($("program").textContent)) ? "Copied" : "Not allowed";
    setTimeout(() => ($("code-copy").textContent = "Copy"), 1500);
  });
  for (const name of PANELS) {
    $(`${name}-toggle`).addEventListener("click", () => {
      panel(document.body.dataset.panel === name ? null : name);
    });
  }
  document.addEventListener("needed", () => panel("settings"));
  document.addEventListener("keydown", keys);
  for (const link of document.querySelectorAll(".skip")) {
    link.addEventListener("click", () => link.hash === "#settings" && panel("settings"));
  }
}

watch();
started = reopened().then(start);
