// Small things that every part of the page needs.

export const $ = (id) => document.getElementById(id);

/** An element: `make("p", {className: "quiet"}, "text", child, ...)`. Texts stay texts. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A button with a text; `label` is its name where the text alone says too little. */
export function button(text, pressed, { label = null, className = "plain" } = {}) {
  const made = make("button", { type: "button", className }, text);
  if (label) made.setAttribute("aria-label", label);
  made.addEventListener("click", pressed);
  return made;
}

/** Tell a screen reader something; what is on the screen stays as it is. */
export function say(text) {
  $("status").textContent = text;
}

/** Put a text on the clipboard, also where a page may not write to it by itself (plain HTTP). */
export async function copy(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // It is refused to pages without the focus, or by a setting: the old way may be allowed.
    }
  }
  const before = document.activeElement;
  const field = make("textarea", { value: text, className: "unseen" });
  (document.querySelector("dialog[open]") ?? document.body).append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  before?.focus();
  return done;
}

/** A button that copies what `text()` gives, and says so for a moment. */
export function copyButton(text, label, name = "Copy") {
  const made = button(name, async () => {
    const done = await copy(text());
    made.textContent = done ? "Copied" : "Not allowed";
    say(done ? "Copied" : "The browser does not allow it");
    setTimeout(() => (made.textContent = name), 1500);
  }, { label, className: "plain copy" });
  return made;
}

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
export const size = (number) => compact.format(number);
export const grouped = (number) => number.toLocaleString("en");
export const round = (number) => (number < 10 ? number.toFixed(1) : Math.round(number).toString());
export const time = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

const memory = new Map(); // where a browser keeps nothing

/** What this tab remembers until it is closed; "" is nothing. */
export const tab = {
  get(name) {
    try {
      return sessionStorage.getItem(name) ?? "";
    } catch {
      return memory.get(name) ?? "";
    }
  },
  set(name, value) {
    memory.set(name, value);
    try {
      if (value) sessionStorage.setItem(name, value);
      else sessionStorage.removeItem(name);
    } catch {
      // Storage is off or full: it is remembered as long as the page.
    }
  },
};
