// Lines over the last minutes, drawn as SVG; each also says in words what it shows.

import { bytes, duration, element } from "./page.js";

const SVG = "http://www.w3.org/2000/svg";
const [HEIGHT, LEFT, BOTTOM, TOP] = [144, 58, 18, 8];
const SHORTEST = 120;

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A number at or above the highest value that is round: in bytes a power of two. */
function ceiling(highest, written) {
  if (!(highest > 0)) return 1;
  if (written === bytes) return 2 ** Math.ceil(Math.log2(highest));
  const power = 10 ** Math.floor(Math.log10(highest));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((top) => top >= highest);
}

export class Chart {
  /** `series` are [name, index of the value in a point]; `written` turns a value into text. */
  constructor(title, series, written, kept) {
    this.title = title;
    this.series = series;
    this.written = written;
    this.kept = kept;
    this.legends = series.map(([name], number) => element("span", { class: `legend series-${number + 1}` }, name));
    this.drawing = shape("svg", { class: "chart", role: "img" });
    this.figure = element("figure", {}, element("figcaption", {}, element("strong", {}, title), ...this.legends), this.drawing);
  }

  draw(points) {
    const width = Math.max(200, this.drawing.clientWidth || 400);
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const until = points.length ? points[points.length - 1][0] : 0;
    const span = Math.min(this.kept, Math.max(SHORTEST, points.length ? until - points[0][0] : 0));
    const since = until - span;
    const values = points.flatMap((point) => this.series.map(([, index]) => point[index])).filter((v) => v !== null);
    const top = ceiling(Math.max(0, ...values), this.written);
    const x = (at) => LEFT + ((at - since) / span) * (width - LEFT - 2);
    const y = (value) => TOP + (1 - value / top) * (HEIGHT - TOP - BOTTOM);
    const shapes = [];
    for (const part of [0, 0.5, 1]) {
      const height = y(top * part);
      shapes.push(shape("line", { class: "grid", x1: LEFT, x2: width, y1: height, y2: height }));
      shapes.push(shape("text", { x: LEFT - 6, y: height + 4, "text-anchor": "end" }, this.written(top * part)));
    }
    for (const [part, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
      const text = part === 1 ? "now" : `${duration(span * (1 - part))} ago`;
      shapes.push(shape("text", { x: x(since + span * part), y: HEIGHT - 4, "text-anchor": anchor }, text));
    }
    this.series.forEach(([, index], number) => {
      shapes.push(shape("path", { class: `series-${number + 1}`, d: line(points, index, x, y) }));
    });
    this.drawing.replaceChildren(...shapes);
    this.drawing.setAttribute("aria-label", this.inWords(points));
    this.series.forEach(([name, index], number) => {
      const latest = points.length ? points[points.length - 1][index] : null;
      this.legends[number].textContent = latest === null ? name : `${name} ${this.written(latest)}`;
    });
  }

  inWords(points) {
    const told = this.series.map(([name, index]) => {
      const values = points.map((point) => point[index]).filter((value) => value !== null);
      if (!values.length) return `${name}: nothing known`;
      const [low, high] = [Math.min(...values), Math.max(...values)].map(this.written);
      return `${name}: now ${this.written(values[values.length - 1])}, between ${low} and ${high}`;
    });
    return `${this.title} over the last ${Math.round(this.kept / 60)} minutes. ${told.join("; ")}`;
  }
}

/** The path of one series; where a value is not known the line is interrupted, and a lone value is a short dash. */
function line(points, index, x, y) {
  let [path, before] = ["", null];
  for (const point of points) {
    const value = point[index];
    if (value === null) {
      before = null;
      continue;
    }
    const at = `${x(point[0]).toFixed(1)} ${y(value).toFixed(1)}`;
    path += before === null ? `M${at}h1` : `L${at}`;
    before = value;
  }
  return path;
}
