// Finding messages, and telling the whole life of one.

import { ask, count, element, foreign, grid, moment, name, replace, status } from "./page.js";
import { openRedrive } from "./redrive.js";

// Which search, and which life, was asked for last: answers to others come too late.
let [searched, opened] = [0, 0];

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

/** The address may name the message already, and then does not change. */
export const linkTo = (id) => element("a", { href: `#message/${id}`, onclick: () => location.hash === `#message/${id}` && showLife(id) }, `#${id}`);

async function find(what) {
  if (!what) return;
  const turn = ++searched;
  opened++;
  document.getElementById("message").hidden = true;
  replace("found", element("p", {}, "Looking…"));
  if (!/^#?\d{1,19}$/.test(what)) return ofText(what);
  const id = what.replace("#", "");
  try {
    await ask(`/api/messages/${id}`);
    if (turn !== searched) return;
    replace("found", plain("Look for it as a key and a conversation too", () => ofText(what)));
    if (location.hash === `#message/${id}`) showLife(id);
    else location.hash = `message/${id}`;
  } catch (error) {
    if (turn === searched) ofText(what, element("p", {}, error.message));
  }
}

const plain = (text, onclick) => element("button", { type: "button", class: "plain", onclick }, text);

/** Looks for a text as a key in the outbox, and as a conversation in history. */
function ofText(what, ...told) {
  const turn = ++searched;
  const [inOutbox, inHistory] = [element("div", {}, "Looking…"), element("div", {})];
  replace("found", ...told, inOutbox, inHistory);
  ofKey(inOutbox, what, null, [], turn);
  ofConversation(inHistory, what, null, [], [], turn);
}

/** Fills one part of what is found, unless something else was searched for meanwhile. */
async function fill(place, turn, path, before, parts) {
  let shown;
  try {
    shown = parts(await ask(before === null ? path : `${path}&before=${before}`));
  } catch (error) {
    shown = [element("p", { class: "told" }, error.message)];
  }
  if (turn === searched) place.replaceChildren(...shown);
}

function ofKey(place, key, before, earlier, turn) {
  return fill(place, turn, `/api/messages?key=${encodeURIComponent(key)}`, before, (page) => {
    const all = [...earlier, ...page.messages];
    const parts = [all.length ? table(`Messages with the key “${key}”, the latest first`, all)
      : element("p", {}, "No message with the key ", foreign(key), " was found.")];
    if (page.further_id === null) return parts;
    return [...parts, element("p", {}, `Looked at the messages from #${page.further_id} on, and at those that wait or are dead. `,
      plain("Look further back", () => ofKey(place, key, page.further_id, all, turn)))];
  });
}

function ofConversation(place, chat, before, earlier, waiting, turn) {
  return fill(place, turn, `/api/conversations?chat_id=${encodeURIComponent(chat)}`, before, (page) => {
    const all = [...earlier, ...page.stored];
    waiting = [...waiting, ...page.waiting];
    const parts = [all.length ? stored(`History of the conversation “${chat}”, the latest first`, all)
      : element("p", {}, "No row of history with the conversation ", foreign(chat), " was found.")];
    if (waiting.length) parts.unshift(table(`Not stored, of the conversation “${chat}” under another key`, waiting));
    if (page.further_id === null) return parts;
    return [...parts, element("p", {}, `Looked at history from its row ${page.further_id} on. `,
      plain("Look further back in history", () => ofConversation(place, chat, page.further_id, all, waiting, turn)))];
  });
}

export function table(caption, messages) {
  return grid("Messages", foreign(caption), ["Message", "Status", "Key", "Kind", "Created", "Error"], messages.map((message) => [
    linkTo(message.id), status(message.status), name(message.key), name(message.biz_type), moment(message.created_at),
    message.error ? foreign(message.error) : ""]));
}

function stored(caption, rows) {
  return grid("History", foreign(caption), ["Message", "Status", "Key", "Row", "Role", "Created", "Content"], rows.map((row) => [
    row.outbox_id === null ? "none" : linkTo(row.outbox_id), row.status === null ? "row gone" : status(row.status),
    row.key === null ? "" : name(row.key), row.id, foreign(row.role ?? ""), moment(row.created_at), foreign(row.content ?? "")]));
}

async function showLife(id) {
  const turn = ++opened;
  const article = document.getElementById("message");
  article.hidden = false;
  article.replaceChildren(element("h3", { id: "message-title" }, `Message #${id}`), element("p", {}, "Looking…"));
  try {
    const life = await ask(`/api/messages/${id}`);
    if (turn !== opened) return;
    draw(article, id, life, null);
    article.scrollIntoView();
    article.focus({ preventScroll: true });
    if (!life.message) return;
    const copies = await ask(`/api/messages/${id}/copies`).catch((error) => ({ error: error.message }));
    if (turn === opened) draw(article, id, life, copies);
  } catch (error) {
    if (turn === opened) article.replaceChildren(element("h3", { id: "message-title" }, `Message #${id}`), element("p", { class: "told" }, error.message));
  }
}

function step(time, text, ...more) {
  return { at: time, shown: element("li", {}, moment(time), text, ...more.map((part) => element("div", {}, part))) };
}

function draw(article, id, life, copies) {
  const { message } = life;
  if (!message) {
    article.replaceChildren(
      element("h3", { id: "message-title" }, `Message #${id}`),
      element("p", {}, "Its row is gone from the outbox, and its payload with it",
        BigInt(life.pruned_through_id ?? 0) >= BigInt(id) ? `: prune has removed settled rows up to #${life.pruned_through_id}.` : "."),
      ...lived(life, stepsOf(life)));
    return;
  }
  const steps = [step(message.created_at, "created in the outbox")];
  for (const copy of copies?.copies ?? []) {
    const text = `published as attempt ${copy.attempt} to `;
    steps.push({ at: copy.at, shown: element("li", {}, moment(copy.at), text, foreign(message.topic), ` partition ${copy.partition}, offset ${copy.offset}`) });
  }
  if (message.published_at && !copies?.copies?.length) steps.push(step(message.published_at, "marked published"));
  if (message.consumed_at) steps.push(step(message.consumed_at, "stored and marked consumed"));
  steps.push(...stepsOf(life));
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
    ...lived(life, steps, message.retry_count > 1 ? "Of each life the last error is kept; those of the attempts before it are in the sinks' logs." : null, inKafka(copies)),
    element("h4", {}, "Payload"), foreign(cut(message.payload, message.payload_length), "pre"),
    ...(message.headers ? [element("h4", {}, "Headers"), foreign(message.headers, "pre")] : []));
}

/** What a message has lived through that stands elsewhere than in its row. */
function stepsOf(life) {
  const steps = [];
  for (const redrive of [...life.redrives].reverse()) {
    if (redrive.error) steps.push(step(redrive.at, `until then ${redrive.was}, with the error`, foreign(redrive.error, "pre")));
    steps.push(step(redrive.at, `put back from ${redrive.was}, as attempt ${redrive.attempt}, by `, foreign(redrive.by), redrive.reason ? foreign(redrive.reason) : null));
  }
  for (const row of life.history) {
    steps.push(step(row.created_at, `row ${row.id} of history: conversation `, foreign(row.chat_id), `user ${row.user_id}, role ${row.role}`,
      row.content === null ? null : foreign(cut(row.content, row.content_length), "pre")));
  }
  return steps;
}

function lived(life, steps, ...hints) {
  return [element("h4", {}, "Life"), element("ol", { class: "life" }, ...inOrder(steps)),
    ...[...hints, ...life.untold.map((text) => `Not told: ${text}`)].filter(Boolean).map((text) => element("p", { class: "hint" }, text))];
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
