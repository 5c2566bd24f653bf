// The last proofs, whoever made them, and a comparison of outbox and history on request.

import { linkTo } from "./messages.js";
import { ask, count, duration, element, foreign, moment, replace, say } from "./page.js";

const LOOK_SECONDS = 15;
const PROVERS = {
  reconcile: ["reconcile", "outbox, Kafka and history agree"],
  sink: ["the sinks", "outbox and history agree"],
  console: ["this console", "outbox and history agree"],
};

let drawn = "";

export async function startProof() {
  document.getElementById("prove").addEventListener("click", prove);
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((resolve) => setTimeout(resolve, LOOK_SECONDS * 1000));
  }
}

async function look() {
  try {
    show(await ask("/api/proof"));
  } catch (error) {
    tell(error.message);
  }
}

function tell(text) {
  say(document.getElementById("proof-told"), text);
}

async function prove() {
  const button = document.getElementById("prove");
  button.disabled = true;
  tell("Comparing…");
  try {
    const headers = { "Content-Type": "application/json" };
    await ask("/api/proof", { method: "POST", headers, body: "{}" });
    await look();
  } catch (error) {
    tell(error.message);
  } finally {
    button.disabled = false;
  }
}

function show({ proof, recorded }) {
  const own = proof && { ...proof, prover: "console", kinds: {},
    covers: `messages #${proof.first_id} to #${proof.last_id}, but for ${count(proof.unsettled)} that are on their way` };
  const proofs = [...recorded, ...(own ? [own] : [])].sort((a, b) => b.at - a.at);
  const worst = proofs.find((each) => each.damaged) || proofs[0];
  tell(worst ? `${worst.damaged ? "Not proved" : "Proved"} by ${PROVERS[worst.prover][0]}: ${verdict(worst)}.` : "Nothing has been compared yet.");
  const text = JSON.stringify(proofs);
  if (text === drawn) return;
  drawn = text;
  replace("proof-shown", ...proofs.map(shown));
}

function verdict({ prover, damaged, kinds }) {
  if (!damaged) return PROVERS[prover][1];
  const named = Object.entries(kinds).map(([kind, messages]) => `${count(messages)} ${kind}`);
  return `${count(damaged)} messages do not agree${named.length ? ` (${named.join(", ")})` : ""}`;
}

function shown(proof) {
  const about = [foreign(proof.covers), `took ${duration(proof.seconds)}`, ...(proof.by ? [foreign(proof.by)] : [])];
  return element("div", {},
    element("h3", {}, `By ${PROVERS[proof.prover][0]}: ${verdict(proof)}`),
    element("p", {}, moment(proof.at), ...about.flatMap((part) => [" · ", part])),
    proof.samples.length ? element("ul", {}, ...proof.samples.map(({ id, why }) => element("li", {}, linkTo(id), " ", foreign(why)))) : "");
}
