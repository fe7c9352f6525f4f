"use strict";

/** The drawings, each an SVG of a width in pixels, of what model.run gave. */
(globalThis.BNFigure ??= {}).panels = (() => {
  const { chart, model } = globalThis.BNFigure;
  const { svg, scale, clamp, ticks, path, dots, signed, number } = chart;

  // Holds the data's mean, −6…6, and two of its largest deviations, 3.
  const REACH = 12;

  /** Heights of the first drawing, from its top. */
  const ROWS = {
    own: 12,
    running: 40,
    input: 62,
    crossing: 160,
    output: 222,
    result: 338,
    end: 376,
  };
  const BARS = ROWS.crossing - ROWS.input - 4;

  const text = (name, x, y, content, anchor = "middle") =>
    svg("text", { class: name, x: x.toFixed(1), y, "text-anchor": anchor }, content);

  const line = (name, ...ends) =>
    svg("path", { class: name, d: path([ends.slice(0, 2), ends.slice(2)]) });

  /** Text over `x`, but within the drawing. Sizes are estimated: Chinese characters are square. */
  function held(name, x, y, content, width) {
    const letters = [...content].reduce((sum, letter) => sum + (letter > "⺀" ? 12 : 6.4), 0);
    return text(name, clamp(x, letters / 2 + 2, width - letters / 2 - 2), y, content);
  }

  /** A mean with one deviation to each side, and what it says above. */
  function ruler(name, at, y, { mean, deviation }, label, width) {
    const [low, middle, high] = [mean - deviation, mean, mean + deviation].map((value) =>
      clamp(at(value), -1, width + 1),
    );
    const mark = name.includes("running")
      ? svg("circle", { cx: middle, cy: y, r: 3.5 })
      : svg("rect", { x: middle - 3.5, y: y - 3.5, width: 7, height: 7 });
    return svg(
      "g",
      { class: `ruler ${name}` },
      line("span", low, y, high, y),
      line("end", low, y - 4, low, y + 4),
      line("end", high, y - 4, high, y + 4),
      mark,
      held("label", middle, y - 8, label, width),
    );
  }

  /** Bars and the density to compare them with, from `base` up (`way` −1) or down (1). */
  function distribution(name, at, base, way, values, width, mean, deviation) {
    const bars = [...model.histogram(values, width)].filter(
      ([place]) => Math.abs(place * width) <= REACH,
    );
    const peak = deviation ? model.density(mean, mean, deviation) : 0;
    // While no bar is taller than this, the curve keeps its height, and the eye has a measure.
    const tallest = Math.max(1.6 * peak, ...bars.map(([, share]) => share));
    const height = scale(0, tallest, 0, BARS);
    const group = svg("g", { class: name });
    for (const [place, share] of bars) {
      const left = at((place - 0.5) * width);
      const size = height(share);
      group.append(
        svg("rect", {
          class: "bar",
          x: (left + 0.5).toFixed(2),
          y: (way < 0 ? base - size : base).toFixed(2),
          width: (at((place + 0.5) * width) - left - 1).toFixed(2),
          height: size.toFixed(2),
        }),
      );
    }
    if (deviation) {
      const places = Array.from({ length: 241 }, (_, index) => REACH * (index / 120 - 1));
      const curve = places
        .map((value) => [value, height(model.density(value, mean, deviation))])
        .filter(([, size]) => size > 0.5) // flatter, it would only thicken the base
        .map(([value, size]) => [at(value), base + way * size]);
      group.append(svg("path", { class: "truth", d: path(curve) }));
    } else {
      group.append(line("truth", at(mean), base, at(mean), base + way * BARS));
    }
    return group;
  }

  /** How many values lie beyond either end of the axis. */
  function beyond(values, y, width, words) {
    const below = values.filter((value) => value < -REACH).length;
    const above = values.filter((value) => value > REACH).length;
    const group = svg("g", { class: "beyond" });
    if (below) group.append(text("label", 2, y, `◂ ${words.beyond(below)}`, "start"));
    if (above) group.append(text("label", width - 2, y, `${words.beyond(above)} ▸`, "end"));
    return group;
  }

  /** Input above, output below, on one axis, and the way of each value from one to the other. */
  function flow(settings, state, width, words) {
    const at = scale(-REACH, REACH, 10, width - 10);
    const { input, output, own, running, result } = state;
    const training = settings.mode === "train";
    const tell = (said, { mean, deviation }) => said(number(mean), number(deviation));
    const labels = {
      own: tell(words.own, own) + (training ? words.inUse : ""),
      running: tell(words.running, running) + (training ? "" : words.inUse),
      result: tell(words.result, result),
    };
    const drawing = svg("svg", {
      class: "flow",
      role: "img",
      width,
      height: ROWS.end,
      "aria-label": words.flow(labels.own, labels.running, labels.result),
    });

    for (const value of ticks(-REACH, REACH, width < 300 ? 4 : 6)) {
      drawing.append(
        line("grid", at(value), ROWS.input, at(value), ROWS.result - 14),
        text("tick", at(value), ROWS.end - 4, signed(`${value}`)),
      );
    }

    const routes = input.map((value, index) =>
      path([[at(value), ROWS.crossing], [at(clamp(output[index], -99, 99)), ROWS.output]]),
    );
    // Few lines may be dark; of many, each is but a thread of the whole.
    const opacity = Math.max(0.9 / Math.sqrt(input.length), 0.12);
    drawing.append(
      svg("path", {
        class: `routes ${training ? "batch" : "running"}`,
        d: routes.join(""),
        style: `opacity: ${opacity.toFixed(2)}`,
      }),
    );

    const { size, offset, spread, beta, gamma } = settings;
    const bars = (values, name, base, way, mean, deviation) =>
      distribution(name, at, base, way, values, model.barWidth(deviation, size), mean, deviation);
    drawing.append(
      bars(input, "input", ROWS.crossing, -1, offset, spread),
      bars(output, "output", ROWS.output, 1, beta, Math.abs(gamma)),
      line("base", 0, ROWS.crossing, width, ROWS.crossing),
      line("base", 0, ROWS.output, width, ROWS.output),
      text("name", 2, ROWS.input + 12, words.input, "start"),
      text("name", 2, ROWS.result - 18, words.output, "start"),
      beyond(input, ROWS.input + 29, width, words),
      beyond(output, ROWS.result - 35, width, words),
    );

    const statistics = [
      ["batch", own, ROWS.own, training],
      ["running", running, ROWS.running, !training],
    ];
    for (const [name, which, y, used] of statistics) {
      const x = clamp(at(which.mean), -1, width + 1);
      const look = `${name} ${used ? "used" : "idle"}`;
      drawing.append(
        line(`mean ${look}`, x, ROWS.input - 4, x, ROWS.crossing),
        ruler(look, at, y + 10, which, labels[name === "batch" ? "own" : "running"], width),
      );
    }
    drawing.append(ruler("batch used", at, ROWS.result + 16, result, labels.result, width));
    return drawing;
  }

  /** The running mean or variance after each update, each update's batch, and the truth. */
  function track(name, settings, { values, each, truth }, width, words) {
    const height = 150;
    const [left, right, top, bottom] = [40, width - 12, 12, height - 22];
    const { updates } = settings;
    const sorted = [...each].sort((first, second) => first - second);
    // The tails of the batches would squeeze the rest: their dots are held at the edge.
    const inner = [sorted[4], sorted[sorted.length - 5]];
    const low = Math.min(truth, ...values, ...inner);
    const high = Math.max(truth, ...values, ...inner);
    const margin = (high - low) * 0.06;
    const x = scale(0, model.MOST_UPDATES, left, right);
    const y = scale(low - margin, high + margin, bottom, top);
    const points = values.map((value, index) => [x(index), y(value)]);
    const marks = each.map((value, index) => [x(index + 1), clamp(y(value), top, bottom)]);
    const value = values[updates];

    const drawing = svg("svg", {
      class: "track",
      role: "img",
      width,
      height,
      "aria-label": words.track(name, updates, number(value), number(truth)),
    });
    for (const tick of ticks(low - margin, high + margin, 6)) {
      drawing.append(
        line("grid", left, y(tick), right, y(tick)),
        text("tick", left - 6, y(tick) + 4, signed(`${tick}`), "end"),
      );
    }
    for (const tick of ticks(0, model.MOST_UPDATES, 5)) {
      drawing.append(text("tick", x(tick), height - 6, `${tick}`));
    }
    const leftwards = updates > model.MOST_UPDATES / 2;
    drawing.append(
      svg("path", { class: "each future", d: dots(marks.slice(updates)) }),
      svg("path", { class: "each", d: dots(marks.slice(0, updates)) }),
      line("truth", left, y(truth), right, y(truth)),
      svg("path", { class: "running future", d: path(points.slice(updates)) }),
      svg("path", { class: "running", d: path(points.slice(0, updates + 1)) }),
      line("now", x(updates), top, x(updates), bottom),
      svg("circle", { class: "running", cx: x(updates), cy: y(value).toFixed(2), r: 4.5 }),
      text(
        "value",
        x(updates) + (leftwards ? -8 : 8),
        clamp(y(value) + (value < truth ? 16 : -9), top + 10, bottom - 4),
        number(value),
        leftwards ? "end" : "start",
      ),
    );
    return drawing;
  }

  return { flow, track };
})();
