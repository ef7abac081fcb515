// The list of kept conversations: opened, removed, taken out as a file, and brought in again.

import { $, button, make, say } from "./dom.js";
import * as store from "./store.js";

let undo = null; // conversations that were just removed
let open = null; // (id) => opens one
let forget = null; // (ids) => lets go of what still writes to them
let current = () => null; // the id of the one that is open

export function watchChats(actions) {
  ({ open, current, forget } = actions);
  $("export").addEventListener("click", save);
  $("import").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", bring);
  $("remove-all").addEventListener("click", async () => {
    await removed((await store.list()).map(({ id }) => id));
  });
  $("undo").addEventListener("click", async () => {
    for (const conversation of undo) await store.keep(conversation);
    told("");
    await showChats();
    say("They are there again");
  });
}

/** Say what happened to the list, and offer to take it back. */
function told(text, again = null) {
  undo = again;
  $("chats-said").textContent = text;
  $("undo").hidden = !again;
}

/** Draw the list anew. */
export async function showChats() {
  let rows;
  try {
    rows = await store.list();
  } catch {
    $("chats-note").textContent = "This browser keeps nothing: chats last as long as the page.";
    for (const id of ["export", "import", "remove-all"]) $(id).disabled = true;
    return;
  }
  const shown = JSON.stringify([current(), rows.map(({ id, title }) => [id, title])]);
  if (shown === $("chat-list").dataset.shown) return; // a button there may have the focus
  $("chat-list").dataset.shown = shown;
  $("chat-list").replaceChildren(...rows.map((row) => {
    const title = row.title || "Untitled";
    const opener = button(title, () => open(row.id), { className: "open" });
    if (row.id === current()) opener.setAttribute("aria-current", "true");
    return make("li", {}, opener,
      button("×", () => removed([row.id]), { label: `Delete “${title}”`, className: "plain delete" }));
  }));
  $("chats-empty").hidden = rows.length > 0;
  for (const id of ["export", "remove-all"]) $(id).disabled = !rows.length;
}

async function removed(ids) {
  const place = [...$("chat-list").querySelectorAll(".delete")].indexOf(document.activeElement);
  forget(ids);
  const gone = await store.remove(ids);
  told(gone.length === 1 ? "Deleted." : `${gone.length} deleted.`, gone);
  if (ids.includes(current())) open(null);
  await showChats();
  const left = $("chat-list").querySelectorAll(".delete");
  (left[Math.min(place, left.length - 1)] ?? $("undo")).focus();
}

async function save() {
  const text = await store.exported();
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const day = new Date().toISOString().slice(0, 10);
  const link = make("a", { href: address, download: `fastgen-chats-${day}.json` });
  link.click();
  URL.revokeObjectURL(address);
  told("Exported.");
}

async function bring() {
  const [file] = $("file").files;
  $("file").value = ""; // the same file can be chosen again
  if (!file) return;
  try {
    const count = await store.imported(await file.text());
    told(`${count} imported.`);
  } catch (error) {
    told(`${file.name} is not imported: ${error.message}.`);
  }
  await showChats();
}
