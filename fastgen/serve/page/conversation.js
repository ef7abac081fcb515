// A conversation is a tree: an edited message or another answer is a branch beside the first.
//
//   {id, title, kind, system, created, changed, at, nodes: {id: node}}
//
// `kind` is "chat", or "text" where a model continues texts. `at` is the last node of the branch
// that is shown. A node:
//
//   {id, parent, role, content, made}                 role: "user", "assistant" or "tool"
//   of an answer, what is known of it:                model, reasoning, thought (seconds), calls
//                                                     ([{id, name, arguments}]), json (whether it
//                                                     has a schema), end, usage, pace
//   of a tool's result:                               call (the id of the call)

export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function blank(kind, system = "") {
  const now = Date.now();
  return { id: newId(), title: "", kind, system, created: now, changed: now, at: null, nodes: {} };
}

/** Add a node below `parent` (null: a first one), and show its branch. */
export function grow(conversation, parent, role, content, more = {}) {
  const newest = Math.max(0, ...Object.values(conversation.nodes).map((node) => node.made));
  const made = Math.max(Date.now(), newest + 1); // siblings have an order
  const node = { id: newId(), parent, role, content, made, ...more };
  conversation.nodes[node.id] = node;
  conversation.at = node.id;
  conversation.changed = Date.now();
  if (!conversation.title && role === "user") conversation.title = titled(content);
  return node;
}

const titled = (text) => text.trim().replace(/\s+/g, " ").slice(0, 60);

/** The nodes from the first to `id`, which is the last that is shown unless another is named. */
export function path(conversation, id = conversation.at) {
  const out = [];
  for (let node = conversation.nodes[id]; node; node = conversation.nodes[node.parent]) out.push(node);
  return out.reverse();
}

const ordered = (nodes) => nodes.sort((one, other) => one.made - other.made);

const below = (conversation, id) =>
  ordered(Object.values(conversation.nodes).filter((node) => node.parent === id));

/** The branches that a node is one of: itself among them, the oldest first. */
export function branches(conversation, node) {
  return below(conversation, node.parent).filter((other) => other.role === node.role);
}

/** Show the branch of a node, down to its newest end. */
export function show(conversation, node) {
  let last = node;
  for (let next = below(conversation, last.id); next.length; next = below(conversation, last.id)) {
    last = next[next.length - 1];
  }
  conversation.at = last.id;
}

/** Take back a node that nothing is below of. */
export function prune(conversation, node) {
  delete conversation.nodes[node.id];
  if (conversation.at === node.id) conversation.at = node.parent;
}

/** The text that a model is to continue: from the last prompt up to `id`. */
export function textSoFar(conversation, id) {
  const nodes = path(conversation, id);
  const from = nodes.findLastIndex((node) => node.role === "user");
  return nodes.slice(from).map((node) => node.content).join("");
}

/** The messages of a chat up to `id`, as the API takes them. */
export function messages(conversation, id) {
  const system = conversation.system.trim();
  const before = system ? [{ role: "system", content: system }] : [];
  return [...before, ...path(conversation, id).map(message)];
}

function message(node) {
  if (node.role === "tool") return { role: "tool", tool_call_id: node.call, content: node.content };
  if (node.role === "user") return { role: "user", content: node.content };
  const out = { role: "assistant", content: node.content };
  if (node.calls?.length) {
    out.tool_calls = node.calls.map(({ id, name, arguments: given }) =>
      ({ id, type: "function", function: { name, arguments: given } }));
    if (node.reasoning) out.reasoning_content = node.reasoning; // templates want it back then
  }
  return out;
}

/** The tokens of the context that were used when the last answer up to `id` had come. */
export function contextUsed(conversation, id = conversation.at) {
  const last = path(conversation, id).findLast((node) => node.usage);
  return last ? last.usage.prompt + last.usage.completion : 0;
}
