// Conversations are kept in this browser alone (IndexedDB), the newest of them; and as a file.

const MOST = 100; // conversations
const MOST_BYTES = 20e6; // of all of them, as JSON
const MOST_NODES = 2000; // messages of one that is imported
const FORMAT = 1; // of the file

/** Two stores: "list" has {id, title, changed, bytes} of each, "conversations" has them whole. */
function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("fastgen", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("list", { keyPath: "id" });
      request.result.createObjectStore("conversations", { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

const done = (transaction) => new Promise((resolve, reject) => {
  transaction.oncomplete = resolve;
  transaction.onabort = transaction.onerror = () => reject(transaction.error);
});

const answer = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

let opened = null; // a promise of the database
const others = "BroadcastChannel" in window ? new BroadcastChannel("fastgen") : null;

async function stores(mode) {
  opened ??= open();
  const transaction = (await opened).transaction(["list", "conversations"], mode);
  return {
    transaction,
    names: transaction.objectStore("list"),
    kept: transaction.objectStore("conversations"),
  };
}

/** Run `changed(id)` when another tab has kept a conversation, `changed(null)` when some are gone. */
export function watch(changed) {
  others?.addEventListener("message", ({ data }) => changed(data));
}

/** What is kept, the newest first: {id, title, changed, bytes}. */
export async function list() {
  const { names } = await stores("readonly");
  return newest(await answer(names.getAll()));
}

const newest = (rows) => rows.sort((one, other) => other.changed - one.changed);

export async function load(id) {
  const { kept } = await stores("readonly");
  return (await answer(kept.get(id))) ?? null;
}

/** Keep a conversation; what another tab has added to it stays, and the oldest ones make room. */
export async function keep(conversation) {
  const { transaction, names, kept } = await stores("readwrite");
  const before = await answer(kept.get(conversation.id));
  const whole = { ...conversation, nodes: { ...before?.nodes, ...conversation.nodes } };
  const { id, title, changed } = conversation;
  const bytes = JSON.stringify(whole).length;
  if (bytes > MOST_BYTES) throw new Error("the conversation is too large to be kept");
  kept.put(whole);
  names.put({ id, title, changed, bytes });
  let size = 0;
  newest(await answer(names.getAll())).forEach((row, i) => {
    size += row.bytes;
    if ((i < MOST && size <= MOST_BYTES) || row.id === id) return;
    kept.delete(row.id);
    names.delete(row.id);
  });
  await done(transaction);
  others?.postMessage(id);
}

/** Remove conversations; returns what they were. */
export async function remove(ids) {
  const { transaction, names, kept } = await stores("readwrite");
  const gone = [];
  for (const id of ids) {
    const conversation = await answer(kept.get(id));
    if (conversation) gone.push(conversation);
    kept.delete(id);
    names.delete(id);
  }
  await done(transaction);
  others?.postMessage(null);
  return gone;
}

/** All that is kept, as the text of a file. */
export async function exported() {
  const { kept } = await stores("readonly");
  const conversations = await answer(kept.getAll());
  return JSON.stringify({ fastgen: FORMAT, conversations }, null, 1);
}

/** Keep what a file holds; returns how many conversations that is. All of it is right, or none. */
export async function imported(text) {
  if (text.length > MOST_BYTES) throw new Error(`the file has more than ${MOST_BYTES / 1e6} MB`);
  let file;
  try {
    file = JSON.parse(text);
  } catch (error) {
    throw new Error(`it is no JSON (${error.message})`);
  }
  if (file?.fastgen !== FORMAT || !Array.isArray(file.conversations)) {
    throw new Error("it is no file of conversations that this page has exported");
  }
  if (file.conversations.length > MOST) {
    throw new Error(`it holds ${file.conversations.length} conversations, ${MOST} are kept`);
  }
  const read = file.conversations.map(checked);
  for (const conversation of read) await keep(conversation);
  return read.length;
}

/** A conversation of a file with the fields that are known, each of its kind. */
function checked(given, index) {
  const wrong = (what) => { throw new Error(`conversation ${index + 1}: ${what}`); };
  const text = (value, name) => (typeof value === "string" ? value : wrong(`${name} is no text`));
  const number = (value, name) => (Number.isFinite(value) ? value : wrong(`${name} is no number`));
  const id = (value, name) => (/^[0-9a-f]{24}$/.test(value) ? value : wrong(`${name} is no id`));
  if (typeof given?.nodes !== "object" || given.nodes === null) wrong("it has no messages");
  const nodes = {};
  const all = Object.values(given.nodes);
  if (all.length > MOST_NODES) wrong(`it has ${all.length} messages, ${MOST_NODES} may be`);
  for (const node of all) {
    const known = {
      id: id(node?.id, "the id of a message"),
      parent: node.parent === null ? null : id(node.parent, "the parent of a message"),
      role: ["user", "assistant", "tool"].includes(node.role) ? node.role : wrong("a role is unknown"),
      content: text(node.content, "content"),
      made: number(node.made, "made"),
    };
    for (const name of ["model", "reasoning", "end", "call"]) {
      if (node[name] !== undefined && node[name] !== null) known[name] = text(node[name], name);
    }
    if (node.json) known.json = true;
    if (node.thought !== undefined) known.thought = number(node.thought, "thought");
    if (node.calls !== undefined) {
      if (!Array.isArray(node.calls)) wrong("calls is no list");
      known.calls = node.calls.map((call) => ({
        id: text(call?.id, "the id of a call"),
        name: text(call.name, "the name of a call"),
        arguments: text(call.arguments, "the arguments of a call"),
      }));
    }
    for (const [name, fields] of [["usage", ["prompt", "completion"]], ["pace", ["first", "speed"]]]) {
      if (!node[name]) continue;
      known[name] = Object.fromEntries(fields.map((field) => [field, number(node[name][field], field)]));
    }
    nodes[known.id] = known;
  }
  for (const node of Object.values(nodes)) {
    if (node.parent === null) continue;
    // Children are newer than their parents: so no chain of parents is a ring.
    if (!(nodes[node.parent]?.made < node.made)) wrong("a message does not follow its parent");
  }
  return {
    id: id(given.id, "id"),
    title: text(given.title, "title").slice(0, 200),
    kind: ["chat", "text"].includes(given.kind) ? given.kind : wrong("its kind is unknown"),
    system: text(given.system, "system"),
    created: number(given.created, "created"),
    changed: number(given.changed, "changed"),
    at: given.at === null || nodes[given.at] ? given.at : wrong("its last message is not there"),
    nodes,
  };
}
