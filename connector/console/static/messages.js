// Finding messages, and telling the whole life of one.

import { ask, count, element, foreign, moment, replace, status } from "./page.js";
import { openRedrive } from "./redrive.js";

let asked = 0;

export function startSearch() {
  document.getElementById("search").addEventListener("submit", (event) => {
    event.preventDefault();
    find(document.getElementById("what").value.trim());
  });
  addEventListener("hashchange", followAddress);
  followAddress();
}

function followAddress() {
  const found = location.hash.match(/^#message\/(\d{1,19})$/);
  if (found) showLife(found[1]);
}

export const linkTo = (id) => element("a", { href: `#message/${id}` }, `#${id}`);

async function find(what) {
  if (!what) return;
  const turn = ++asked;
  document.getElementById("message").hidden = true;
  replace("found", element("p", {}, "Looking…"));
  const told = [];
  if (/^#?\d{1,19}$/.test(what)) {
    try {
      const id = what.replace("#", "");
      await ask(`/api/messages/${id}`);
      if (turn !== asked) return;
      replace("found");
      if (location.hash === `#message/${id}`) showLife(id);
      else location.hash = `message/${id}`;
      return;
    } catch (error) {
      told.push(error.message);
    }
  }
  await ofKey(what, null, [], told, turn);
}

async function ofKey(key, before, shown, told, turn) {
  try {
    const page = await ask(`/api/messages?key=${encodeURIComponent(key)}${before === null ? "" : `&before=${before}`}`);
    if (turn !== asked) return;
    const all = [...shown, ...page.messages];
    const parts = told.map((text) => element("p", {}, text));
    parts.push(all.length ? table(`Messages with the key “${key}”, the latest first`, all)
      : element("p", {}, "No message with the key ", foreign(key), " was found."));
    if (page.further_id !== null) {
      const further = element("button", { type: "button", class: "plain", onclick: () => ofKey(key, page.further_id, all, told, turn) }, "Look further back");
      parts.push(element("p", {}, `Looked at the messages from #${page.further_id} on, and at those that wait or are dead. `, further));
    }
    replace("found", ...parts);
  } catch (error) {
    if (turn === asked) replace("found", element("p", { class: "told" }, error.message));
  }
}

export function table(caption, messages) {
  const head = ["Message", "Status", "Key", "Kind", "Created", "Error"];
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Messages" },
    element("table", {},
      element("caption", {}, foreign(caption)),
      element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, ...messages.map((message) => element("tr", {},
        element("td", {}, linkTo(message.id)),
        element("td", {}, status(message.status)),
        element("td", { class: "name" }, foreign(message.key)),
        element("td", { class: "name" }, foreign(message.biz_type)),
        element("td", {}, moment(message.created_at)),
        element("td", {}, message.error ? foreign(message.error) : ""))))));
}

async function showLife(id) {
  const turn = ++asked;
  const article = document.getElementById("message");
  article.hidden = false;
  article.replaceChildren(element("h3", { id: "message-title" }, `Message #${id}`), element("p", {}, "Looking…"));
  try {
    const life = await ask(`/api/messages/${id}`);
    if (turn !== asked) return;
    draw(article, life, null);
    article.scrollIntoView();
    article.focus({ preventScroll: true });
    const copies = await ask(`/api/messages/${id}/copies`).catch((error) => ({ error: error.message }));
    if (turn === asked) draw(article, life, copies);
  } catch (error) {
    if (turn === asked) article.replaceChildren(element("h3", { id: "message-title" }, `Message #${id}`), element("p", { class: "told" }, error.message));
  }
}

function step(time, text, ...more) {
  return { at: time, shown: element("li", {}, moment(time), text, ...more.map((part) => element("div", {}, part))) };
}

function draw(article, life, copies) {
  const message = life.message;
  const steps = [step(message.created_at, "created in the outbox")];
  for (const copy of copies?.copies ?? []) {
    const text = `published as attempt ${copy.attempt} to `;
    steps.push({ at: copy.at, shown: element("li", {}, moment(copy.at), text, foreign(message.topic), ` partition ${copy.partition}, offset ${copy.offset}`) });
  }
  if (message.published_at && !copies?.copies?.length) steps.push(step(message.published_at, "marked published"));
  for (const redrive of [...life.redrives].reverse()) {
    steps.push(step(redrive.at, `put back from ${redrive.was}, as attempt ${redrive.attempt}, by `, foreign(redrive.by), redrive.reason ? foreign(redrive.reason) : null));
  }
  if (message.consumed_at) steps.push(step(message.consumed_at, "stored and marked consumed"));
  for (const row of life.history) {
    steps.push(step(row.created_at, `row ${row.id} of history: conversation `, foreign(row.chat_id), `user ${row.user_id}, role ${row.role}`,
      row.content === null ? null : foreign(cut(row.content, row.content_length), "pre")));
  }
  if (message.status === "dead") steps.push(step(message.updated_at, "given up: dead"));
  const attempts = [];
  if (message.retry_count || message.last_error) {
    attempts.push(element("h4", {}, `${count(message.retry_count)} failed attempts, at most ${count(message.max_retry)}; the last error`),
      foreign(message.last_error || "none kept", "pre"));
  }
  if (message.next_retry_at && message.status === "pending") attempts.push(element("p", {}, "Next attempt: ", moment(message.next_retry_at)));
  if (life.waits_for) {
    attempts.push(element("p", {}, "Behind ", linkTo(life.waits_for.id), " of its key, which is being retried: with strict ordering it waits for that one."));
  }
  article.replaceChildren(
    element("h3", { id: "message-title" }, `Message #${message.id} `, status(message.status)),
    element("dl", { class: "facts" },
      ...[["Key", message.key], ["Kind", message.biz_type], ["Topic", message.topic]].map(([name, text]) =>
        element("div", {}, element("dt", {}, name), element("dd", {}, foreign(text))))),
    ...attempts,
    message.status === "dead" ? element("p", {}, element("button", { type: "button", class: "danger writes",
      onclick: () => openRedrive([{ ...message, error: message.last_error }], () => showLife(message.id)) }, "Redrive this message…")) : "",
    element("h4", {}, "Life"),
    element("ol", { class: "life" }, ...inOrder(steps)),
    element("p", { class: "hint" }, inKafka(copies)),
    ...life.untold.map((text) => element("p", { class: "hint" }, `Not told: ${text}`)),
    element("h4", {}, "Payload"), foreign(cut(message.payload, message.payload_length), "pre"),
    ...(message.headers ? [element("h4", {}, "Headers"), foreign(message.headers, "pre")] : []));
}

function inOrder(steps) {
  const time = (at) => (typeof at === "number" ? at * 1000 : Date.parse(String(at).replace(" ", "T").replace(/\+00$/, "Z")));
  return steps.map((each, place) => [time(each.at) || 0, place, each.shown])
    .sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([, , shown]) => shown);
}

function inKafka(copies) {
  if (copies === null) return "Looking for its copies in Kafka…";
  if (copies.error) return `Its copies in Kafka could not be looked for: ${copies.error}`;
  const looked = `looked at ${count(copies.looked_at)} messages around the times in its row`;
  if (!copies.copies.length) return copies.complete ? `No copy is in Kafka now (${looked}).` : `No copy was found; ${looked}, and there are more.`;
  return `In Kafka: ${looked}${copies.complete ? "" : ", and there are more"}. Late attempts may lie elsewhere.`;
}

function cut(text, length) {
  return text.length < length ? `${text}… (${count(length)} characters)` : text;
}
