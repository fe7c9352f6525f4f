"use strict";

/** The numbers of the figure: samples, statistics, updates, outputs. */
(globalThis.BNFigure ??= {}).model = (() => {
  const EPSILON = 1e-5; // the layer's default
  const MOST_UPDATES = 100;
  const LARGEST_BATCH = 256;

  /** Uniform numbers between 0 and 1: a counter, scrambled by MurmurHash3's last step. */
  function uniforms(seed) {
    let counter = seed;
    return () => {
      counter = (counter + 0x9e3779b9) | 0; // 2³² ÷ the golden ratio: seeds end far apart
      let bits = counter;
      bits = Math.imul(bits ^ (bits >>> 16), 0x85ebca6b);
      bits = Math.imul(bits ^ (bits >>> 13), 0xc2b2ae35);
      bits ^= bits >>> 16;
      return ((bits >>> 0) + 0.5) / 2 ** 32; // never 0, of which there is no logarithm
    };
  }

  /** Standard normal numbers, by Box and Muller's method; always the same of one seed. */
  function normals(seed, count) {
    const next = uniforms(seed);
    const values = [];
    while (values.length < count) {
      const radius = Math.sqrt(-2 * Math.log(next()));
      const angle = 2 * Math.PI * next();
      values.push(radius * Math.cos(angle), radius * Math.sin(angle));
    }
    return values.slice(0, count);
  }

  let latest = {};
  function draws(seed) {
    if (latest.seed !== seed) {
      latest = { seed, values: normals(seed, (1 + MOST_UPDATES) * LARGEST_BATCH) };
    }
    return latest.values;
  }

  /**
   * The batch of update `step`; that of step 0 is the one in hand, which no update has seen.
   *
   * A smaller batch is the beginning of a larger one, and the same draws serve every offset and
   * spread: a slider moves nothing but what it is for.
   */
  function batch({ seed, size, offset, spread }, step) {
    const start = step * LARGEST_BATCH;
    return draws(seed)
      .slice(start, start + size)
      .map((draw) => offset + spread * draw);
  }

  /** Mean, biased variance (÷ m, which normalizes) and unbiased (÷ m − 1, which is stored). */
  function moments(values) {
    const sum = (numbers) => numbers.reduce((total, value) => total + value, 0);
    const mean = sum(values) / values.length;
    const squares = sum(values.map((value) => (value - mean) ** 2));
    return { mean, biased: squares / values.length, unbiased: squares / (values.length - 1) };
  }

  /** All that the figure shows, of these settings. */
  function run(settings) {
    const { offset, spread, gamma, beta, momentum, updates, mode } = settings;
    const input = batch(settings, 0);
    const own = moments(input);

    const steps = [];
    const means = [0];
    const variances = [1];
    for (let step = 1; step <= MOST_UPDATES; step++) {
      const { mean, unbiased } = moments(batch(settings, step));
      steps.push({ mean, variance: unbiased });
      means.push((1 - momentum) * means[step - 1] + momentum * mean);
      variances.push((1 - momentum) * variances[step - 1] + momentum * unbiased);
    }
    const running = { mean: means[updates], variance: variances[updates] };

    const used = mode === "train" ? { mean: own.mean, variance: own.biased } : running;
    const deviation = Math.sqrt(used.variance + EPSILON);
    const output = input.map((value) => (gamma * (value - used.mean)) / deviation + beta);
    const { mean, biased } = moments(output);

    return {
      input,
      own: { mean: own.mean, deviation: Math.sqrt(own.biased) },
      steps,
      means,
      variances,
      running: { ...running, deviation: Math.sqrt(running.variance) },
      output,
      result: { mean, deviation: Math.sqrt(biased) },
      left: (1 - momentum) ** updates,
      meanError: (running.mean - offset) / spread,
      varianceRatio: running.variance / spread ** 2,
    };
  }

  /** How wide the bars of `count` values with this standard deviation are: a power of two. */
  function barWidth(deviation, count) {
    // Half of Scott's width, 3.49 σ m^(−1/3): he wants a smooth estimate, and here one sees noise.
    const ideal = 1.75 * deviation * count ** (-1 / 3);
    return 2 ** Math.min(Math.max(Math.round(Math.log2(ideal)), -3), 1);
  }

  /** Bars of an area of 1 in all, each around a multiple of `width`; keyed by that multiple. */
  function histogram(values, width) {
    const bars = new Map();
    for (const value of values) {
      const place = Math.round(value / width);
      bars.set(place, (bars.get(place) ?? 0) + 1 / (values.length * width));
    }
    return bars;
  }

  const density = (value, mean, deviation) =>
    Math.exp(-0.5 * ((value - mean) / deviation) ** 2) / (deviation * Math.sqrt(2 * Math.PI));

  return { MOST_UPDATES, normals, batch, moments, run, barWidth, histogram, density };
})();
