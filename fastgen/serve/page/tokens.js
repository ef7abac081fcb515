// Texts whose tokens are shown with their probabilities.

import { $, make } from "./dom.js";

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
export function tokensOf(choice) {
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
export class TokenText {
  constructor(element) {
    this.element = element;
    this.pending = []; // tokens whose characters are not whole yet
    this.last = null;
  }

  push(piece, tokens) {
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
    this.element.append(added);
    const first = this.element.querySelector(".token");
    if (first && !this.element.querySelector('.token[tabindex="0"]')) first.tabIndex = 0;
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
    return span;
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

/** The card with a token's alternatives. */
export const card = {
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
    const end = $("composer").getBoundingClientRect().top;
    const top = below + own.height > end && over >= 0 ? over : below;
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
export function watchTokens(element) {
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
  $("card").addEventListener("pointerenter", () => clearTimeout(card.timer));
  $("card").addEventListener("pointerleave", () => card.leave());
  window.addEventListener("resize", () => card.hide());
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
