// Where a message is written; the column follows what is written into it while it is at its end.

import { $, tab } from "./dom.js";

const NEAR = 64; // pixels from the end that count as there
const DRAFT = "fastgen-draft";

// With a finger there is no Shift+Enter: Enter is a new line there, and the button sends.
const byFinger = matchMedia("(hover: none) and (pointer: coarse)");

let following = true;
let lastTop = 0;

/** Whether a key that was pressed in a message sends it. */
export function asksToSend(event) {
  // While an input method composes a character, Enter chooses that (229: Safari's last one).
  if (event.key !== "Enter" || event.isComposing || event.keyCode === 229) return false;
  return event.ctrlKey || event.metaKey || !(event.shiftKey || event.altKey || byFinger.matches);
}

function atEnd() {
  const { scrollHeight, clientHeight } = document.documentElement;
  return window.scrollY + clientHeight >= scrollHeight - NEAR;
}

/** Go to the end, and stay there. */
export function follow() {
  following = true;
  window.scrollTo(0, document.documentElement.scrollHeight);
}

/** Go on being at the end, if that is where the person is. */
export function keepUp() {
  if (following) follow();
}

function scrolled() {
  if (atEnd()) following = true;
  else if (window.scrollY < lastTop) following = false; // a person went up; growing does not
  lastTop = window.scrollY;
  $("latest").hidden = following || document.body.dataset.panel !== undefined;
}

/** As high as its text, up to a third of the window. */
export function fit() {
  const field = $("prompt");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, Math.max(44, window.innerHeight / 3))}px`;
}

export function setText(text) {
  $("prompt").value = text;
  tab.set(DRAFT, text);
  fit();
}

/** An error that belongs to no field of the settings: over the message, which is always in view. */
export function fail(message) {
  $("alert").textContent = message;
  $("alert").hidden = !message;
}

export function watchComposer({ send, stop }) {
  const field = $("prompt");
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if ($("go").classList.contains("stop")) stop();
    else send();
  });
  field.addEventListener("keydown", (event) => {
    if (!asksToSend(event)) return;
    event.preventDefault();
    send();
  });
  field.addEventListener("input", () => setText(field.value));
  $("latest").addEventListener("click", follow);
  window.addEventListener("scroll", scrolled, { passive: true });
  window.addEventListener("resize", fit);
  new ResizeObserver(() => {
    const height = $("composer").offsetHeight;
    document.documentElement.style.setProperty("--composer", `${height}px`); // what scrolls stays over it
    if (document.body.classList.contains("busy")) keepUp();
    scrolled();
  }).observe($("column"));
  setText(tab.get(DRAFT));
  $("keys").hidden = byFinger.matches;
}
