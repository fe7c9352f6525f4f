"use strict";

/** Controls, drawings and words joined; each `<div class="bn-figure">` becomes a figure. */
(globalThis.BNFigure ??= {}).widget = (() => {
  const { chart, model, panels, reading, texts } = globalThis.BNFigure;
  const { html, svg, number } = chart;

  // The data and the layer of the chapter's example. In this sample the first two values, all that
  // is left of a batch of 2, lie well apart.
  const START = {
    size: 64,
    offset: 5,
    spread: 2,
    gamma: 1,
    beta: 0,
    momentum: 0.1,
    updates: 10,
    mode: "train",
    seed: 7,
  };

  const range = (first, last, step) =>
    Array.from({ length: Math.round((last - first) / step) + 1 }, (_, index) =>
      Number((first + index * step).toFixed(2)),
    );

  /** Every slider: its group, the values it stands on, and their decimals. */
  const SLIDERS = {
    size: ["data", [2, 4, 8, 16, 32, 64, 128, 256], 0],
    offset: ["data", range(-6, 6, 0.5), 1],
    spread: ["data", range(0.5, 3, 0.25), 2],
    gamma: ["layer", range(-2, 2, 0.1), 1],
    beta: ["layer", range(-3, 3, 0.25), 2],
    momentum: ["layer", [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], 2],
    updates: ["time", range(0, model.MOST_UPDATES, 1), 0],
  };

  const percent = (share) => `${number(100 * share, 1)}%`;

  function slider(name, words, settings, changed) {
    const [, values, digits] = SLIDERS[name];
    const [label, symbol] = words.controls[name];
    const input = html("input", { type: "range", name, min: 0, max: values.length - 1, step: 1 });
    const shown = html("span", { class: "value", "aria-hidden": "true" });
    const show = () => {
      const value = number(settings[name], digits);
      input.value = values.indexOf(settings[name]);
      input.setAttribute("aria-valuetext", value);
      shown.textContent = value;
    };
    input.addEventListener("input", () => {
      settings[name] = values[input.value];
      changed();
    });
    const caption = html("span", { class: "caption" }, `${label} `, html("var", {}, symbol));
    return { element: html("label", { class: "slider" }, caption, shown, input), show };
  }

  function modes(words, settings, name, changed) {
    const inputs = {};
    const choices = Object.entries(words.modes).map(([mode, label]) => {
      inputs[mode] = html("input", { type: "radio", name, value: mode });
      inputs[mode].addEventListener("change", () => {
        settings.mode = mode;
        changed();
      });
      return html("label", {}, inputs[mode], html("span", {}, label));
    });
    const show = () => {
      for (const mode in inputs) inputs[mode].checked = settings.mode === mode;
    };
    const group = { class: "modes", role: "radiogroup", "aria-label": words.mode };
    return { element: html("div", group, ...choices), show };
  }

  function button(label, pressed) {
    const element = html("button", { type: "button" }, label);
    element.addEventListener("click", pressed);
    return element;
  }

  function legend(words) {
    const samples = {
      batch: svg("rect", { class: "bar", x: 3, y: 1, width: 16, height: 10 }),
      running: svg("path", { class: "running", d: "M0 6H22" }),
      truth: svg("path", { class: "truth", d: "M1 6H22" }),
      each: svg("path", { class: "each", d: chart.dots([[5, 8], [11, 4], [17, 7]]) }),
    };
    const items = Object.entries(samples).map(([name, sample]) =>
      html(
        "span",
        { class: "item" },
        svg("svg", { width: 22, height: 12, "aria-hidden": "true" }, sample),
        words.legend[name],
      ),
    );
    return html("div", { class: "legend" }, ...items);
  }

  /** The four numbers: what each is, and how to print it. */
  function numbers(words) {
    const cells = Object.entries(words.numbers).map(([name, label]) => {
      const value = html("div", { class: "number", "data-number": name });
      const detail = html("div", { class: "detail" });
      const caption = html("div", { class: "detail" }, label);
      const element = html("div", { "aria-atomic": "true" }, caption, value, detail);
      return { name, value, detail, element };
    });
    const show = (settings, state) => {
      const { left, meanError, varianceRatio, running, result } = state;
      const { offset, spread, beta, gamma } = settings;
      const { details } = words;
      const contents = {
        left: [percent(left), details.left],
        meanError: [
          `${number(meanError)} σ*`,
          details.meanError(number(running.mean), number(offset)),
        ],
        varianceRatio: [
          number(varianceRatio),
          details.varianceRatio(number(running.variance), number(spread ** 2)),
        ],
        result: [
          `${number(result.mean)} ± ${number(result.deviation)}`,
          details.result(number(beta), number(Math.abs(gamma))),
        ],
      };
      for (const { name, value, detail } of cells) {
        [value.textContent, detail.textContent] = contents[name];
      }
    };
    const element = html(
      "div",
      { class: "numbers", role: "status", "aria-atomic": "false" },
      ...cells.map((cell) => cell.element),
    );
    return { element, show };
  }

  function sentence(words, settings, state) {
    const { size, offset, spread, gamma, beta, momentum } = settings;
    return words.reading[reading(settings, state)]({
      size,
      momentum,
      beta: number(beta),
      high: number(beta + Math.abs(gamma)),
      low: number(beta - Math.abs(gamma)),
      left: percent(state.left),
      off: number(Math.abs(state.own.mean - offset) / spread),
    });
  }

  let figures = 0;

  /** Fills `place` with a figure. */
  function make(place) {
    figures += 1;
    const words = texts[place.dataset.lang] ?? texts.en;
    const settings = { ...START };

    const controls = Object.keys(SLIDERS).map((name) => ({
      group: SLIDERS[name][0],
      ...slider(name, words, settings, update),
    }));
    controls.push({ group: "time", ...modes(words, settings, `bn-mode-${figures}`, update) });
    const again = button(words.again, () => {
      settings.seed += 1;
      update();
    });
    const reset = button(words.reset, () => {
      Object.assign(settings, START);
      update();
    });
    const groups = Object.entries(words.groups).map(([group, label]) =>
      html(
        "fieldset",
        {},
        html("legend", {}, label),
        ...controls.filter((control) => control.group === group).map(({ element }) => element),
        ...(group === "time" ? [html("div", { class: "buttons" }, again, reset)] : []),
      ),
    );

    const said = html("div", { class: "reading", role: "status" });
    const table = numbers(words);
    const frames = {
      flow: html("div", { class: "frame" }),
      mean: html("div", { class: "frame" }),
      variance: html("div", { class: "frame" }),
    };
    const titled = (name, frame) =>
      html("div", {}, html("div", { class: "title" }, words.by(name)), frame);
    const body = html(
      "div",
      { class: "body", role: "group", "aria-label": words.title },
      html("div", { class: "controls" }, ...groups),
      said,
      legend(words),
      html(
        "div",
        { class: "charts" },
        frames.flow,
        html(
          "div",
          { class: "tracks" },
          titled(words.means, frames.mean),
          titled(words.variances, frames.variance),
        ),
      ),
      table.element,
      html("div", { class: "note" }, words.note),
    );
    place.replaceChildren(body);

    let state;
    const draw = () => {
      const { steps, means, variances } = state;
      const track = (title, values, each, truth) => (width) =>
        panels.track(title, settings, { values, each, truth }, width, words);
      const pictures = {
        flow: (width) => panels.flow(settings, state, width, words),
        mean: track(words.means, means, steps.map(({ mean }) => mean), settings.offset),
        variance: track(
          words.variances,
          variances,
          steps.map(({ variance }) => variance),
          settings.spread ** 2,
        ),
      };
      for (const name in frames) {
        const width = Math.floor(frames[name].clientWidth);
        if (width) frames[name].replaceChildren(pictures[name](width)); // none while it is hidden
      }
    };
    function update() {
      state = model.run(settings);
      for (const control of controls) control.show();
      said.textContent = sentence(words, settings, state);
      table.show(settings, state);
      draw();
    }
    update();
    new ResizeObserver(draw).observe(body);
  }

  /** Makes the figures of a page that are not made yet. */
  function start() {
    for (const place of document.querySelectorAll(".bn-figure:not([data-ready])")) {
      place.dataset.ready = "";
      make(place);
    }
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
  // Material for MkDocs tells of each page that it shows without loading it anew.
  globalThis.document$?.subscribe(start);

  return { START, SLIDERS, start };
})();
