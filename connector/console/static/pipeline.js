// The live part of the page: the line from the outbox to history, the charts, and what is wrong.

import { Chart } from "./charts.js";
import { ask, bytes, count, duration, element, foreign, rate, replace, say } from "./page.js";

let points = [];
let latest = 0;
let charts = null;
let silentSince = null;

export async function follow() {
  let interval = 2;
  for (;;) {
    if (!document.hidden) {
      try {
        const answer = await ask(`/api/pipeline?after=${latest}`, { signal: AbortSignal.timeout(10_000) });
        interval = answer.interval;
        silentSince = null;
        show(answer);
      } catch (error) {
        silentSince ??= new Date();
        problems([`${error.message} Silent since ${silentSince.toLocaleTimeString()}.`]);
      }
    }
    await new Promise((resolve) => setTimeout(resolve, interval * 1000));
  }
}

function show(answer) {
  say(document.getElementById("mode"), answer.writable ? "changes need the token" : "read-only");
  document.documentElement.dataset.writable = answer.writable;
  if (answer.number < latest) points = [];
  latest = answer.number;
  points = [...points, ...answer.points];
  const until = points.length ? points[points.length - 1][0] : 0;
  points = points.filter((point) => point[0] > until - answer.kept);
  if (!answer.now) {
    problems(["The console has only just started and has not looked yet."]);
    return;
  }
  problems(answer.now.problems);
  stages(answer.now);
  facts(answer.now);
  backlog(answer.now);
  charts ??= makeCharts(answer.kept);
  for (const chart of charts) chart.draw(points);
}

function problems(texts) {
  const shown = document.getElementById("problems");
  const text = texts.join("\n");
  if (shown.dataset.text === text) return;
  shown.dataset.text = text;
  shown.replaceChildren(...texts.map((line) => element("p", {}, foreign(line))));
  shown.hidden = texts.length === 0;
}

function makeCharts(kept) {
  const made = [
    new Chart("Rate", [["enqueued", 1], ["published", 2], ["stored", 3]], rate, kept),
    new Chart("Waiting", [["pending in the outbox", 4], ["to read in Kafka", 5]], count, kept),
    new Chart("WAL lag of the slot", [["lag", 6]], bytes, kept),
    new Chart("End to end", [["p50", 7], ["p99", 8]], duration, kept),
  ];
  replace("charts", ...made.map((chart) => chart.figure));
  return made;
}

function stage(name, main, more, state = "") {
  const alarm = state === "alarm";
  return element("li", { class: state },
    element("strong", {}, name),
    element("span", { class: alarm ? "main alarm-text" : "main" }, main),
    ...more.map((text) => element("span", { class: "more" }, text)));
}

function stages(now) {
  const { slot, consumer, outbox } = now;
  const shown = [stage("Outbox", rate(now.enqueued), [outbox ? `${count(outbox.pending)} pending` : "unknown"], outbox ? "" : "unknown")];
  if (!slot) {
    shown.push(stage("WAL", "unknown", [], "unknown"), stage("Reader", "unknown", [], "unknown"));
  } else if (!slot.exists) {
    shown.push(stage("WAL", "no slot", [slot.name], "alarm"), stage("Reader", "unknown", ["it makes the slot"], "unknown"));
  } else {
    shown.push(stage("WAL", `${bytes(slot.lag_bytes)} lag`, [`${bytes(slot.retained_bytes)} pinned, ${slot.wal_status}`]));
    const reads = slot.catch_up_owed ? "catches up" : "reads the slot";
    shown.push(slot.active ? stage("Reader", reads, [`server process ${slot.active_pid}`])
      : stage("Reader", "no reader", ["nobody reads the slot"], "alarm"));
  }
  if (consumer.lag === null) {
    shown.push(stage("Kafka", "unknown", [], "unknown"), stage("Sink", "unknown", [], "unknown"));
  } else {
    shown.push(stage("Kafka", rate(now.published), [`${count(consumer.lag)} to read`]));
    shown.push(consumer.members ? stage("Sink", `${consumer.members} running`, [consumer.state])
      : stage("Sink", "no sink", ["nobody reads the topics"], "alarm"));
  }
  shown.push(stage("History", rate(now.stored), [now.latency ? `p99 ${duration(now.latency.p99)}` : ""], consumer.lag === null ? "unknown" : ""));
  replace("stages", ...shown);
}

function fact(name, text) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, text));
}

function facts(now) {
  const shown = [];
  const age = now.oldest_unconsumed_age_seconds;
  shown.push(fact("Oldest waiting", age === null ? (now.outbox ? "nothing waits" : "unknown") : duration(age)));
  const latency = now.latency;
  shown.push(fact("End to end", latency ? `p50 ${duration(latency.p50)}, p99 ${duration(latency.p99)}` : "nothing stored lately"));
  const retries = now.retries;
  const next = retries && retries.next_in !== null ? `, next in ${duration(retries.next_in)}` : "";
  shown.push(fact("Retries", retries ? `${count(retries.waiting)} wait, ${count(retries.due)} due${next}` : "unknown"));
  if (now.slot && now.slot.catch_up_owed) shown.push(fact("Catch-up owed", now.slot.catch_up_reason || "yes"));
  replace("facts", ...shown);
}

function backlog(now) {
  if (!now.outbox) {
    replace("backlog", element("li", {}, "unknown"));
    return;
  }
  const most = Math.max(1, ...Object.values(now.outbox));
  replace("backlog", ...Object.entries(now.outbox).map(([name, rows]) => {
    const about = now.outbox_estimated.includes(name) ? "about " : "";
    const bar = element("span", { class: `bar ${name}`, "aria-hidden": "true" });
    bar.style.width = `${(100 * rows) / most}%`;
    return element("li", {}, element("span", {}, name), element("span", { class: "count" }, about + count(rows)), bar);
  }));
}
