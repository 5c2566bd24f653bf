// Dead messages, grouped by what they died of.

import { linkTo, table } from "./messages.js";
import { ask, count, element, foreign, moment, replace } from "./page.js";
import { openRedrive } from "./redrive.js";

export function startDead() {
  document.getElementById("dead-refresh").addEventListener("click", look);
  look();
}

async function look() {
  const told = document.getElementById("dead-told");
  try {
    const { groups } = await ask("/api/dead");
    const rows = groups.reduce((sum, group) => sum + group.rows, 0);
    told.textContent = rows ? `${count(rows)} dead messages, in groups by their reason.` : "No message is dead.";
    replace("dead-groups", ...(rows ? [shown(groups)] : []));
  } catch (error) {
    told.textContent = error.message;
  }
}

function shown(groups) {
  const head = ["Messages", "Keys", "Kind", "Reason", "Last", "Latest", ""];
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Dead messages by reason" },
    element("table", {},
      element("thead", {}, element("tr", {}, ...head.map((name, number) =>
        element(name ? "th" : "td", { scope: name ? "col" : null, class: number < 2 ? "number" : null }, name)))),
      element("tbody", {}, ...groups.map((group) => {
        const list = element("div", {});
        const open = element("button", { type: "button", class: "plain", "aria-expanded": "false", onclick: () => toggle(group, list, open) }, "Show");
        return element("tr", {},
          element("td", { class: "number" }, count(group.rows)),
          element("td", { class: "number" }, count(group.keys)),
          element("td", { class: "name" }, foreign(group.biz_type)),
          element("td", {}, foreign(group.example || "no error kept"), list),
          element("td", {}, moment(group.last_change)),
          element("td", {}, linkTo(group.last_id)),
          element("td", {}, element("div", { class: "row" }, open,
            element("button", { type: "button", class: "danger writes", onclick: () => redrive(group) }, "Redrive…"))));
      }))));
}

const rowsOf = async (group) => {
  const reason = encodeURIComponent(group.reason);
  return (await ask(`/api/dead/rows?reason=${reason}&biz_type=${encodeURIComponent(group.biz_type)}`)).rows;
};

async function toggle(group, list, button) {
  if (list.hasChildNodes()) {
    list.replaceChildren();
  } else {
    try {
      list.replaceChildren(table("The latest of these", (await rowsOf(group)).slice(0, 50)));
    } catch (error) {
      list.replaceChildren(element("p", { class: "told" }, error.message));
    }
  }
  button.textContent = list.hasChildNodes() ? "Hide" : "Show";
  button.setAttribute("aria-expanded", String(list.hasChildNodes()));
}

async function redrive(group) {
  try {
    openRedrive(await rowsOf(group), look);
  } catch (error) {
    document.getElementById("dead-told").textContent = error.message;
  }
}
