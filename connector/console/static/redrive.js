// Puts dead messages back, after a confirmation that names them and with the token that this needs.

import { ask, count, element, foreign } from "./page.js";

let token = "";
let ids = [];
let whenDone = () => {};

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
  ids = messages.map((message) => message.id);
  whenDone = done;
  const all = ids.length === 1 ? "1 message" : `${count(ids.length)} messages`;
  part("what").textContent = `${all} will be put back:`;
  part("rows").replaceChildren(...messages.map((message) =>
    element("li", {}, `#${message.id} `, foreign(message.key), ": ", foreign(message.error || "no error kept"))));
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
  part("do").disabled = true;
  tell("Working…", true);
  try {
    const answer = await ask("/api/redrive", {
      method: "POST",
      headers: { "Content-Type": "application/json", Authorization: `Bearer ${token}` },
      body: JSON.stringify({ ids, reason: part("reason").value }),
    });
    const left = ids.length - answer.moved;
    tell(`${count(answer.moved)} put back.${left ? ` ${count(left)} were not dead any more.` : ""}`, true);
    part("cancel").textContent = "Close";
    whenDone();
  } catch (error) {
    tell(error.message, false);
    part("do").disabled = false;
  }
}
