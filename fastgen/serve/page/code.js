// A request as a program: what a person tried here, to be taken elsewhere.

// The fields that OpenAI's client has arguments for; others go into its `extra_body`.
const OPENAI = new Set([
  "model", "messages", "prompt", "max_tokens", "temperature", "top_p", "stop", "seed", "n",
  "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "tools",
  "tool_choice", "parallel_tool_calls", "response_format",
]);
const KEY = "FASTGEN_API_KEY"; // of the environment: a key never stands in a program

const indented = (text, spaces) => text.replace(/\n/g, `\n${" ".repeat(spaces)}`);

/** A value as Python writes it. */
function python(value, deep = 0) {
  const space = " ".repeat(deep + 4);
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return pythonText(value);
  const list = Array.isArray(value);
  const parts = list
    ? value.map((one) => python(one, deep + 4))
    : Object.entries(value).map(([name, one]) => `${pythonText(name)}: ${python(one, deep + 4)}`);
  const [open, close] = list ? "[]" : "{}";
  const short = `${open}${parts.join(", ")}${close}`;
  if (deep + short.length <= 88 && !short.includes("\n")) return short;
  return `${open}\n${parts.map((part) => `${space}${part},\n`).join("")}${" ".repeat(deep)}${close}`;
}

/** JSON's texts and numbers are Python's too, but for halves of surrogate pairs, which JSON escapes. */
const pythonText = (value) => JSON.stringify(value);

export const programs = {
  curl(address, path, body, withKey) {
    const json = JSON.stringify(body, null, 2).replace(/'/g, "'\\''");
    const key = withKey ? ` \\\n  -H "Authorization: Bearer $${KEY}"` : "";
    return `curl -s ${address}${path} \\\n  -H "Content-Type: application/json"${key} \\\n  -d '${json}'`;
  },

  python(address, path, body, withKey) {
    const chat = "messages" in body;
    const call = chat ? "client.chat.completions.create" : "client.completions.create";
    const said = Object.entries(body).filter(([name]) => OPENAI.has(name));
    const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI.has(name)));
    const lines = said.map(([name, value]) => `        ${name}=${python(value, 8)},`);
    if (Object.keys(extra).length) lines.push(`        extra_body=${python(extra, 8)},`);
    return [
      ...(withKey ? ["import os", ""] : []),
      "from openai import OpenAI",
      "",
      `key = ${withKey ? `os.environ["${KEY}"]` : '"none"'}`,
      `with OpenAI(base_url="${address}/v1", api_key=key) as client:`,
      `    answer = ${call}(`,
      ...lines,
      "    )",
      `    print(answer.choices[0].${chat ? "message.content" : "text"})`,
    ].join("\n");
  },

  javascript(address, path, body, withKey) {
    const chat = "messages" in body;
    const key = withKey ? `,\n    Authorization: \`Bearer \${process.env.${KEY}}\`` : "";
    return [
      `const response = await fetch("${address}${path}", {`,
      '  method: "POST",',
      `  headers: {\n    "Content-Type": "application/json"${key},\n  },`,
      `  body: JSON.stringify(${indented(JSON.stringify(body, null, 2), 2)}),`,
      "});",
      "const answer = await response.json();",
      "if (!response.ok) throw new Error(answer.error.message);",
      `console.log(answer.choices[0].${chat ? "message.content" : "text"});`,
    ].join("\n");
  },
};
