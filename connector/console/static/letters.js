// Dead letters: the latest values that named no row of the outbox, read when somebody asks for them.

import { ask, count, element, foreign, grid, moment, name, replace } from "./page.js";
import { openLetters } from "./redrive.js";

export function startLetters() {
  document.getElementById("letters-read").addEventListener("click", read);
}

async function read() {
  const [button, told] = ["letters-read", "letters-told"].map((id) => document.getElementById(id));
  button.disabled = true;
  told.textContent = "Reading…";
  try {
    const { topic, held, looked_at, complete, groups } = await ask("/api/letters");
    const of = looked_at < held ? `the latest ${count(looked_at)} of about ${count(held)}` : `all ${count(held)}`;
    told.replaceChildren(...(held ? [`Looked at ${of} letters in `, foreign(topic), complete ? "." : "; no more within the limits of time and size."]
      : ["There is no letter in ", foreign(topic), "."]));
    replace("letters-groups", ...(groups.length ? shown(groups) : []));
  } catch (error) {
    told.textContent = error.message;
  } finally {
    button.disabled = false;
    button.textContent = "Read again";
  }
}

const sendable = (groups) => groups.flatMap(({ reason, sendable }) => sendable.map((place) => ({ place, reason })));

const redrive = (groups, text) => element("button", { type: "button", class: "danger writes", onclick: () => openLetters(sendable(groups), read) }, text);

function shown(groups) {
  const head = ["Letters", "From topic", "Reason", "Last", "What to do"];
  const rows = groups.map((group) => {
    const list = element("div", {});
    const open = element("button", { type: "button", class: "plain", "aria-expanded": "false", onclick: () => toggle(group, list, open) }, "Show");
    const more = [group.sent_before ? `${count(group.sent_before)} were sent back before.` : "", group.obstacle ? `Not sent back: letters ${group.obstacle}.` : ""];
    return [
      element("td", { class: "number" }, count(group.letters)), name(group.topic),
      element("td", {}, foreign(group.reason || "none told"), ...more.filter(Boolean).map((text) => element("p", { class: "hint" }, foreign(text))), list),
      moment(group.samples[0].at),
      element("div", { class: "row" }, open, ...(group.sendable.length ? [redrive([group], "Redrive…")] : [])),
    ];
  });
  const all = sendable(groups).length;
  return [grid("Dead letters by reason", "The latest by their reason; numbers in it are N", head, rows),
    ...(all ? [element("p", {}, redrive(groups, `Redrive all ${count(all)}…`))] : [])];
}

function toggle(group, list, button) {
  const closed = !list.hasChildNodes();
  list.replaceChildren(...(closed ? [samples(group)] : []));
  button.textContent = closed ? "Hide" : "Show";
  button.setAttribute("aria-expanded", String(closed));
}

function samples(group) {
  const head = ["Lies at", "Was at", "Written", "Key", "Value"];
  return grid("Letters of this group", "The latest of these, each by partition/offset, with the beginning of its value", head, group.samples.map((letter) => [
    `${letter.partition}/${letter.offset}`, foreign(letter.origin), moment(letter.at), letter.key === null ? "none" : name(letter.key),
    element("td", { class: "name" }, letter.value === null ? "none" : foreign(letter.value), element("p", { class: "hint" }, `${count(letter.size)} bytes`)),
  ]));
}
