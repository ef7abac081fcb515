// Markdown becomes elements: read by marked, cleaned by DOMPurify (see vendor/). HTML in it is text.

import { Marked } from "./vendor/marked.esm.js";
import "./vendor/purify.min.js";
import { copyButton, make } from "./dom.js";

const MOST = 200_000; // characters; longer texts are shown as they are
const SIGNS = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escaped = (text) => text.replace(/[&<>"']/g, (sign) => SIGNS[sign]);

const markdown = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) =>
      (block ? `<pre><code class="language-html">${escaped(text)}</code></pre>` : escaped(text)),
    // A picture would be fetched from whom the text names: it is a link, which a person may follow.
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || "picture")}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li",
    "ol", "p", "pre", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

/** HTML of marked's as safe elements, with what a page of ours adds to them. */
function elements(html) {
  const part = window.DOMPurify.sanitize(html, ALLOWED);
  for (const link of part.querySelectorAll("a")) {
    if (!link.hasAttribute("href")) link.replaceWith(...link.childNodes);
    else Object.assign(link, { target: "_blank", rel: "noopener noreferrer nofollow" });
  }
  for (const heading of part.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    // Below the heading that each message has, so that the page's outline stays one.
    const level = Math.min(6, Number(heading.localName[1]) + 2);
    heading.replaceWith(make(`h${level}`, { className: heading.localName }, ...heading.childNodes));
  }
  for (const table of part.querySelectorAll("table")) wide(table, "Table");
  for (const code of part.querySelectorAll("pre > code")) framed(code);
  for (const element of part.querySelectorAll("[class]")) {
    if (!/^(h[1-6]|code|plain copy|language|wide)$/.test(element.className)) {
      element.removeAttribute("class");
    }
  }
  return part;
}

/** Let what may be wider than the column scroll by itself, with the keyboard too. */
function wide(element, name) {
  const box = make("div", { className: "wide", tabIndex: 0 });
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", name);
  element.replaceWith(box);
  box.append(element);
}

/** A block of code, with its language and a button that copies it. */
function framed(code) {
  const pre = code.parentElement;
  const language = /^language-([\w+#.-]{1,30})/.exec(code.className)?.[1] ?? "";
  const head = make("div", {}, make("span", { className: "language" }, language),
    copyButton(() => code.textContent.replace(/\n$/, ""), `Copy the code${language && ` (${language})`}`));
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  const box = make("div", { className: "code" });
  pre.replaceWith(box);
  box.append(head, pre);
}

/** A text in Markdown that grows: only its blocks that have changed are drawn again. */
export class Prose {
  constructor(element) {
    this.element = element;
    this.blocks = []; // {raw, parts}
    this.links = "";
  }

  write(text) {
    let tokens;
    try {
      if (text.length > MOST) throw new RangeError("too long");
      tokens = markdown.lexer(text);
    } catch {
      // Too long, or nested so deep that it cannot be read: the text as it is says everything.
      this.blocks = [];
      this.element.replaceChildren(make("div", { className: "raw" }, text));
      return;
    }
    const links = Object.keys(tokens.links).join("\n"); // blocks before may name one that is new
    const found = tokens.filter((token) => token.type !== "space" && token.type !== "def");
    if (!this.blocks.length) this.element.replaceChildren();
    let same = 0;
    if (links === this.links) {
      while (same < this.blocks.length && this.blocks[same].raw === found[same]?.raw) same += 1;
    }
    this.links = links;
    for (const { parts } of this.blocks.splice(same)) parts.forEach((part) => part.remove());
    for (const token of found.slice(same)) {
      const parts = [...elements(markdown.parser([token])).childNodes];
      this.blocks.push({ raw: token.raw, parts });
      this.element.append(...parts);
    }
  }
}
