"use strict";
// Asks every model of this server the same question. What a model writes is only ever text (textContent), never HTML.

const element = (id) => document.getElementById(id);
let columns = [];
let running = null;

function made(tag, kind, text = "") {
  const node = document.createElement(tag);
  node.className = kind;
  node.textContent = text;
  return node;
}

function headers() {
  const key = element("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function say(problem) {
  element("problem").textContent = problem;
  element("problem").hidden = !problem;
}

async function problemOf(response) {
  try {
    const { message, code } = (await response.json()).error;
    return { message, code };
  } catch {
    return { message: `the server answered ${response.status}`, code: null };
  }
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    element("key-label").hidden = false;
    document.querySelector("details").open = true;
    say("This server wants an API key: enter it in the settings.");
    return;
  }
  if (!response.ok) {
    say((await problemOf(response)).message);
    return;
  }
  const found = await response.json();
  say("");
  if (found.title) element("title").textContent = `Ask the models of ${found.title}`;
  columns = found.data.map(column);
  element("models").replaceChildren(...columns.map((one) => one.node));
}

function column(model) {
  const node = made("section", "model");
  const heading = made("h2", "", `${model.id} `);
  heading.append(made("small", "", [model.kind, `${model.max_model_len} tokens`].filter(Boolean).join(", ")));
  const turns = made("div", "turns");
  node.append(heading, turns);
  return { id: model.id, node, turns, messages: [], talk: 0 };
}

function show(one, node) {
  one.turns.append(node);
  one.turns.scrollTop = one.turns.scrollHeight;
}

// Yields the objects of a stream of server-sent events, until [DONE] or the end.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function settings() {
  const wanted = { temperature: Number(element("temperature").value), max_tokens: Number(element("length").value) };
  if (element("seed").value !== "") wanted.seed = Number(element("seed").value);
  return wanted;
}

// The response to a question. Where the wished length does not fit into a small model's context, the answer may fill it.
async function answered(body, signal) {
  const send = (asked) =>
    fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(asked), signal });
  let response = await send(body);
  if (response.ok) return response;
  let problem = await problemOf(response);
  if (problem.code === "context_length_exceeded") {
    const { max_tokens, ...rest } = body;
    response = await send(rest);
    if (response.ok) return response;
    problem = await problemOf(response);
  }
  throw new Error(problem.message);
}

async function ask(one, question, signal) {
  const system = element("system").value.trim();
  const earlier = one.messages.slice();
  const talk = one.talk;
  const messages = [
    ...(system ? [{ role: "system", content: system }] : []),
    ...earlier,
    { role: "user", content: question },
  ];
  show(one, made("p", "turn user", question));
  const answer = made("p", "turn assistant");
  show(one, answer);
  const begin = performance.now();
  let first = null;
  let usage = null;
  let reason = "";
  let text = "";
  try {
    const body = { model: one.id, messages, stream: true, stream_options: { include_usage: true }, ...settings() };
    for await (const event of events(await answered(body, signal))) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.delta.content) {
        first ??= performance.now();
        text += choice.delta.content;
        answer.textContent = text;
        one.turns.scrollTop = one.turns.scrollHeight;
      }
      reason = choice.finish_reason || reason;
    }
    if (one.talk !== talk) return; // a new conversation has begun
    show(one, made("p", "measured", measured(begin, first, usage, reason)));
  } catch (error) {
    if (one.talk !== talk) return;
    const stopped = error.name === "AbortError";
    show(one, made("p", stopped ? "measured" : "failed", stopped ? "stopped" : error.message));
    if (!stopped && !text) return; // the question was not answered, so it is no part of the conversation
  }
  one.messages = [...earlier, { role: "user", content: question }, { role: "assistant", content: text }];
}

function measured(begin, first, usage, reason) {
  const end = performance.now();
  const words = [];
  if (first !== null) words.push(`first word after ${((first - begin) / 1000).toFixed(2)} s`);
  if (usage) {
    const seconds = (end - (first ?? begin)) / 1000;
    words.push(`${usage.completion_tokens} tokens`);
    if (seconds > 0 && usage.completion_tokens > 1) words.push(`${((usage.completion_tokens - 1) / seconds).toFixed(1)} a second`);
  }
  if (reason === "length") words.push("cut at its longest");
  return words.join(", ");
}

async function submitted(event) {
  event.preventDefault();
  const question = element("question").value.trim();
  if (!question || running || !columns.length) return;
  element("question").value = "";
  running = new AbortController();
  element("send").disabled = true;
  element("stop").disabled = false;
  await Promise.all(columns.map((one) => ask(one, question, running.signal)));
  running = null;
  element("send").disabled = false;
  element("stop").disabled = true;
  element("question").focus();
}

function reset() {
  if (running) running.abort();
  for (const one of columns) {
    one.messages = [];
    one.talk += 1;
    one.turns.replaceChildren();
  }
}

element("ask").addEventListener("submit", submitted);
element("stop").addEventListener("click", () => running && running.abort());
element("reset").addEventListener("click", reset);
element("key").addEventListener("change", loadModels);
element("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    element("ask").requestSubmit();
  }
});
loadModels();
