// What everybody needs to read a page: run in it, and gives what is wrong with it as a list.
(() => {
  const bad = [];
  const say = (what, element) => bad.push(`${what}: ${element.outerHTML.slice(0, 120)}`);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const isSeen = (element) => element.getClientRects().length > 0;

  // WCAG 2.1, 1.4.3: the contrast of every piece of text that is seen against the colour behind it.
  const numbers = (colour) => colour.match(/[\d.]+/g).map(Number);
  const linear = (part) => (part / 255 <= 0.03928 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([red, green, blue]) => 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = numbers(getComputedStyle(each).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  for (const element of all("body *")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
    if (!hasText || !isSeen(element) || element.closest(".skip, noscript")) continue;
    const style = getComputedStyle(element);
    const colour = numbers(element instanceof SVGElement ? style.fill : style.color);
    const [lighter, darker] = [light(colour), light(behind(element))].sort((a, b) => b - a);
    if ((lighter + 0.05) / (darker + 0.05) < 4.5) say("contrast", element);
  }

  // 1.1.1, 1.3.1, 4.1.2: names and labels.
  for (const element of all("button, a")) if (!element.textContent.trim() && !element.ariaLabel) say("no name", element);
  for (const element of all("input")) if (!element.labels.length) say("no label", element);
  for (const element of all("svg[role=img]")) if (!element.getAttribute("aria-label")) say("no name", element);
  for (const element of all("th")) if (!element.scope) say("no scope", element);
  for (const name of ["aria-labelledby", "aria-describedby"]) {
    for (const element of all(`[${name}]`)) {
      if (!document.getElementById(element.getAttribute(name))) say(`nothing is named by its ${name}`, element);
    }
  }
  const ids = all("[id]").map((element) => element.id);
  for (const element of all("[id]")) if (ids.indexOf(element.id) !== ids.lastIndexOf(element.id)) say("id twice", element);

  // 1.3.1, 2.4.6, 3.1.1: headings without gaps, one main part, a language.
  const headings = all("h1, h2, h3, h4").filter(isSeen);
  headings.forEach((element, place) => {
    if (place && Number(element.tagName[1]) > Number(headings[place - 1].tagName[1]) + 1) say("a level too deep", element);
  });
  if (all("main").length !== 1 || all("h1").length !== 1) say("not one main part and title", document.body);
  if (!document.documentElement.lang) say("no language", document.documentElement);

  // 1.4.10: nothing is wider than the screen.
  if (document.documentElement.scrollWidth > innerWidth) say(`wider than ${innerWidth}`, document.body);
  return bad;
})();
