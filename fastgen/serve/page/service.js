// The service: it is asked as every other client asks it.

import { tab } from "./dom.js";

const KEY = "fastgen-key"; // kept in this tab alone

/** What went wrong: `status` is HTTP's, 0 where there was no answer; `param` the field, if known. */
export class Failure extends Error {
  constructor(message, { status = 0, param = null, code = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

export const hasKey = () => Boolean(tab.get(KEY));

export function useKey(key) {
  tab.set(KEY, key);
}

/** A response that is not an error. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = tab.get(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The service does not answer. Is it still running?");
  }
  if (response.ok) return response;
  let said;
  try {
    said = (await response.json()).error;
  } catch {
    // An answer that is no JSON: of a proxy, say.
  }
  const { status, statusText } = response;
  const message = said?.message ?? `${`${status} ${statusText}`.trim()}: an answer that is no JSON`;
  throw new Failure(message, { ...said, status });
}

/** The response to a body that is sent as JSON. */
export function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** The objects of a stream of server-sent events, in lists of what came together. */
export async function* events(response) {
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
    if (done) throw new Failure("The connection ended before the text did.");
  }
}
