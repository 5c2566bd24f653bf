// The last comparison of outbox and history, and a new one on request.

import { linkTo } from "./messages.js";
import { ask, count, duration, element, moment, replace } from "./page.js";

export function startProof() {
  document.getElementById("prove").addEventListener("click", prove);
  ask("/api/proof").then(({ proof }) => show(proof), (error) => tell(error.message));
}

function tell(text) {
  document.getElementById("proof-told").textContent = text;
}

async function prove() {
  const button = document.getElementById("prove");
  button.disabled = true;
  tell("Comparing…");
  try {
    const headers = { "Content-Type": "application/json" };
    show((await ask("/api/proof", { method: "POST", headers, body: "{}" })).proof);
  } catch (error) {
    tell(error.message);
  } finally {
    button.disabled = false;
  }
}

function show(proof) {
  if (!proof) {
    tell("Nothing was compared since the console started.");
    return;
  }
  tell(proof.damaged ? `Not proved: ${count(proof.damaged)} messages do not agree.` : "Outbox and history agree.");
  replace("proof-shown",
    element("p", {}, moment(proof.at), ` · messages #${proof.first_id} to #${proof.last_id}, ${count(proof.unsettled)} of them on their way · took ${duration(proof.seconds)}`),
    proof.samples.length ? element("ul", {}, ...proof.samples.map(({ id, why }) => element("li", {}, linkTo(id), ` ${why}`))) : "");
}
