// Puts dead messages and dead letters back, after a confirmation that names them and with the token that this needs.

import { ask, count, element, foreign } from "./page.js";

let token = "";
/** What the confirmation is about: where to send which body, how many there are, and what to do and say afterwards. */
let asked = {};

const part = (name) => document.getElementById(`redrive${name ? `-${name}` : ""}`);

export function startRedrive() {
  part("cancel").addEventListener("click", () => part("").close());
  part("form").addEventListener("submit", (event) => {
    event.preventDefault();
    redrive();
  });
}

/** Opens the confirmation for these messages; `done` is called once some were put back. */
export function openRedrive(messages, done) {
  open({ path: "/api/redrive", body: { ids: messages.map(({ id }) => id) }, size: messages.length, left: "were not dead any more", done },
    "message", "Each is put back to pending and published again. Later messages of its key may be stored already: it is then stored behind them. "
    + "Mend the cause first, or they die again.",
    messages.map(({ id, key, error }) => [`#${id} `, foreign(key), ": ", foreign(error || "no error kept")]));
}

/** Opens the confirmation for dead letters, each a place and its reason. */
export function openLetters(letters, done) {
  open({ path: "/api/letters/redrive", body: { letters: letters.map(({ place }) => place) }, size: letters.length, left: "were sent back before, or are gone", done },
    "letter", "Each is sent back to the topic that it came from, once. Install a sink that can read it first, or it comes back as a new letter.",
    letters.map(({ place, reason }) => [`partition ${place[0]}, offset ${place[1]}: `, foreign(reason)]));
}

function open(about, what, hint, lines) {
  asked = about;
  const all = about.size === 1 ? `1 ${what}` : `${count(about.size)} ${what}s`;
  part("what").textContent = `${all} will be put back:`;
  part("hint").textContent = hint;
  part("rows").replaceChildren(...lines.map((line) => element("li", {}, ...line)));
  part("do").textContent = `Redrive ${all}`;
  part("do").disabled = false;
  part("cancel").textContent = "Cancel";
  tell("", false);
  part("token").value = token;
  part("").showModal();
  part("reason").focus();
}

function tell(text, good) {
  part("told").textContent = text;
  part("told").classList.toggle("good", good);
}

async function redrive() {
  token = part("token").value;
  const { path, body, size, left, done } = asked;
  part("do").disabled = true;
  tell("Working…", true);
  try {
    const answer = await ask(path, {
      method: "POST",
      signal: AbortSignal.timeout(120_000),
      headers: { "Content-Type": "application/json", Authorization: `Bearer ${token}` },
      body: JSON.stringify({ ...body, reason: part("reason").value }),
    });
    const others = size - answer.moved;
    tell(`${count(answer.moved)} put back.${others ? ` ${count(others)} ${left}.` : ""}`, true);
    part("cancel").textContent = "Close";
    done();
  } catch (error) {
    tell(error.message, false);
    part("do").disabled = false;
  }
}
