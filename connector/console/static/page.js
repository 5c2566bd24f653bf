// Builds elements out of text, never out of markup, and writes numbers and times as people read them.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") made.addEventListener("click", value);
    else if (value !== undefined && value !== null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** What others have written: shown as it is, isolated from the text around it. */
export function foreign(text, name = "span") {
  return element(name, { class: "foreign" }, visible(text));
}

/** Control characters and those that turn the direction of text are shown by their code. */
function visible(text) {
  return String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** A table that scrolls by itself; `rows` are lists of cells or of what is in them. */
export function grid(label, caption, head, rows) {
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    element("table", {},
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, ...rows.map((cells) => element("tr", {},
        ...cells.map((cell) => (cell instanceof HTMLTableCellElement ? cell : element("td", {}, cell))))))));
}

/** A cell for a key or a kind. */
export const name = (text) => element("td", { class: "name" }, foreign(text));

export function replace(id, ...children) {
  document.getElementById(id).replaceChildren(...children);
}

/** Writes text only where it has changed, so that nothing is announced twice. */
export function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { signal: AbortSignal.timeout(30_000), ...options });
  } catch {
    throw new Error("The console does not answer. This page goes on by itself once it does.");
  }
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(body.error || `The console answered ${answer.status}.`);
  return body;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (value) => (value === null || value === undefined ? "unknown" : whole.format(value));

export function rate(value) {
  if (value === null || value === undefined) return "unknown";
  return `${value >= 10 || value === 0 ? whole.format(value) : value.toFixed(1)}/s`;
}

export function bytes(value) {
  if (value === null || value === undefined) return "unknown";
  let [amount, unit] = [Math.abs(value), 0];
  const units = ["B", "kB", "MB", "GB", "TB"];
  while (amount >= 1024 && unit < units.length - 1) [amount, unit] = [amount / 1024, unit + 1];
  return `${value < 0 ? "-" : ""}${unit && amount < 100 ? amount.toFixed(1) : Math.round(amount)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "unknown";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return seconds < 86400 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}

const clock = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

/** A time as PostgreSQL writes it in UTC, in the reader's own time zone; what is no moment is shown as it is. */
export function moment(text) {
  if (text === null || text === undefined) return element("span", { class: "when" }, "at no time");
  const parsed = new Date(typeof text === "number" ? text * 1000 : `${text.replace(" ", "T").replace(/\+00$/, "Z")}`);
  if (Number.isNaN(parsed.getTime())) return element("span", { class: "when" }, text);
  const milliseconds = String(parsed.getMilliseconds()).padStart(3, "0");
  return element("time", { datetime: parsed.toISOString() }, `${clock.format(parsed)}.${milliseconds}`);
}

export const status = (name) => element("span", { class: `status ${/^[a-z]+$/.test(name) ? name : ""}` }, name);
