// The interactive figure of chapter 4. Plain scripts, for a browser loads no modules from file://.
// They share one object, BNFigure, and are loaded in the order of their names:
//   chart.js, model.js, panels.js, reading.js, texts.js, widget.js
"use strict";

/** Elements, scales, ticks: what any chart needs. */
(globalThis.BNFigure ??= {}).chart = (() => {
  const SVG = "http://www.w3.org/2000/svg";

  const filled = (element, attributes, children) => {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };

  const html = (name, attributes = {}, ...children) =>
    filled(document.createElement(name), attributes, children);

  const svg = (name, attributes = {}, ...children) =>
    filled(document.createElementNS(SVG, name), attributes, children);

  /** A function that takes `low`…`high` to `from`…`to`, linearly. */
  const scale = (low, high, from, to) => (value) =>
    from + ((value - low) / (high - low)) * (to - from);

  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  /** Round numbers from `low` to `high`, about `count` of them. */
  function ticks(low, high, count) {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
    const first = Math.ceil(low / step);
    const last = Math.floor(high / step);
    const rounded = (value) => Number(value.toPrecision(6)); // 3 × 0.2 is 0.6 and no more
    return Array.from({ length: last - first + 1 }, (_, index) => rounded((first + index) * step));
  }

  const path = (points) =>
    points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");

  /** Many round dots as one path: lines without length, whose round ends are the dots. */
  const dots = (points) =>
    points.map(([x, y]) => `M${x.toFixed(2)} ${y.toFixed(2)}h0`).join("");

  const signed = (text) => text.replaceAll("-", "−");

  /** A number as the figure prints it: with a minus sign, and without one before zero. */
  function number(value, digits = 2) {
    const text = Math.abs(value) < 1e4 ? value.toFixed(digits) : value.toExponential(1);
    return /[1-9]/.test(text) ? signed(text) : text.replace("-", "");
  }

  return { html, svg, scale, clamp, ticks, path, dots, signed, number };
})();
