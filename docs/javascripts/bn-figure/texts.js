"use strict";

/**
 * Every word of the figure, in each language. Functions take numbers as they are to be printed.
 * The symbols: μ* and σ* are the data's own mean and standard deviation, μ and σ the batch's.
 */
(globalThis.BNFigure ??= {}).texts = (() => {
  const en = {
    title: "Interactive figure: batch normalization of one channel",
    groups: { data: "Data", layer: "Layer", time: "Training and evaluation" },
    controls: {
      size: ["Batch size", "m"],
      offset: ["Offset", "μ*"],
      spread: ["Spread", "σ*"],
      gamma: ["Scale", "γ"],
      beta: ["Shift", "β"],
      momentum: ["Momentum", "α"],
      updates: ["Updates so far", "t"],
    },
    mode: "Mode",
    modes: { train: "Training", eval: "Evaluation" },
    again: "New sample",
    reset: "Reset",
    legend: {
      batch: "the batch",
      running: "running statistics",
      truth: "truth N(μ*, σ*²), target N(β, γ²)",
      each: "batches of the updates",
    },
    input: "Input x",
    output: "Output y",
    own: (mean, deviation) => `batch ${mean} ± ${deviation}`,
    running: (mean, deviation) => `running ${mean} ± ${deviation}`,
    inUse: " · in use",
    result: (mean, deviation) => `output ${mean} ± ${deviation}`,
    beyond: (count) => `${count} beyond`,
    flow: (own, running, output) =>
      `Histogram of the input, ${own}; ${running}; below it, that of the output, ${output}. A line leads each value to its place.`,
    means: "Running mean",
    variances: "Running variance",
    by: (name) => `${name}, by updates t`,
    track: (name, updates, value, truth) => `${name} after ${updates} updates: ${value}; truth: ${truth}.`,
    numbers: {
      left: "Left of the start, (1 − α)ᵗ",
      meanError: "Running mean, off by",
      varianceRatio: "Running variance ÷ truth",
      result: "Output, mean ± std",
    },
    details: {
      left: "start: mean 0, variance 1",
      meanError: (value, truth) => `${value} instead of ${truth}`,
      varianceRatio: (value, truth) => `${value} instead of ${truth}`,
      result: (mean, deviation) => `target ${mean} ± ${deviation}`,
    },
    note: "The batch shown is not one of those that updated the running statistics. It is normalized by its biased variance (÷ m); the running variance takes in the unbiased ones (÷ (m − 1)).",
    reading: {
      flat: ({ beta }) => `γ is 0: every output is β = ${beta}, whatever comes in.`,
      pair: ({ high, low }) =>
        `Two values in training: one becomes ${high}, the other ${low}, however far apart they were. Only the sign is left.`,
      rough: ({ size, off }) =>
        `${size} values make a rough mean, here ${off} σ* off the truth. The output does not show it: in training its mean is β and its standard deviation |γ|, always.`,
      whole: () =>
        "In training the batch comes out with mean β and standard deviation |γ|, whatever its offset and spread. The running statistics take no part in it.",
      unstarted: () =>
        "Evaluation before the first update: the running statistics are still 0 and 1, so nothing is normalized; y = γx + β.",
      start: ({ left }) =>
        `The running statistics are still mostly their start of 0 and 1: ${left} of it is left. The output misses its target.`,
      partly: ({ left }) =>
        `Of the start of 0 and 1, ${left} is still in the running statistics: enough for the output to miss its target.`,
      lucky: ({ left }) =>
        `Of the start of 0 and 1, ${left} is left, and it does no harm: the running statistics are close to the truth all the same.`,
      noisy: ({ size, momentum }) =>
        `With batches of ${size} and a momentum of ${momentum}, the running statistics average too few values. Their error is noise, and the output misses its target.`,
      settled: ({ size }) =>
        "The start is forgotten and the running statistics are close to the truth: evaluation comes near its target, for each value on its own." +
        (size === 2 ? " Training, on pairs, is another function." : ""),
    },
  };

  const zh = {
    title: "交互图：一个通道的批量归一化",
    groups: { data: "数据", layer: "层", time: "训练与评估" },
    controls: {
      size: ["批次大小", "m"],
      offset: ["偏移", "μ*"],
      spread: ["离散程度", "σ*"],
      gamma: ["缩放", "γ"],
      beta: ["平移", "β"],
      momentum: ["动量", "α"],
      updates: ["已更新次数", "t"],
    },
    mode: "模式",
    modes: { train: "训练", eval: "评估" },
    again: "换一批样本",
    reset: "重置",
    legend: {
      batch: "当前批次",
      running: "运行统计量",
      truth: "真值 N(μ*, σ*²)，目标 N(β, γ²)",
      each: "各次更新的批次",
    },
    input: "输入 x",
    output: "输出 y",
    own: (mean, deviation) => `批次 ${mean} ± ${deviation}`,
    running: (mean, deviation) => `运行值 ${mean} ± ${deviation}`,
    inUse: " · 正在用",
    result: (mean, deviation) => `输出 ${mean} ± ${deviation}`,
    beyond: (count) => `界外 ${count} 个`,
    flow: (own, running, output) =>
      `输入的直方图，${own}；${running}；下面是输出的直方图，${output}。每个值由一条线连到它的新位置。`,
    means: "运行均值",
    variances: "运行方差",
    by: (name) => `${name}（按更新次数 t）`,
    track: (name, updates, value, truth) => `更新 ${updates} 次后的${name}：${value}；真值：${truth}。`,
    numbers: {
      left: "起始值还剩 (1 − α)ᵗ",
      meanError: "运行均值的误差",
      varianceRatio: "运行方差 ÷ 真值",
      result: "输出的均值 ± 标准差",
    },
    details: {
      left: "起始值：均值 0，方差 1",
      meanError: (value, truth) => `${value}，真值 ${truth}`,
      varianceRatio: (value, truth) => `${value}，真值 ${truth}`,
      result: (mean, deviation) => `目标 ${mean} ± ${deviation}`,
    },
    note: "当前批次不在各次更新的批次之中。归一化用它的有偏方差（÷ m）；进入运行方差的是无偏方差（÷ (m − 1)）。",
    reading: {
      flat: ({ beta }) => `γ 为 0：无论输入是什么，输出都是 β = ${beta}。`,
      pair: ({ high, low }) =>
        `训练模式下只有两个值：一个变成 ${high}，另一个变成 ${low}，与原来相差多少无关。只剩下了符号。`,
      rough: ({ size, off }) =>
        `${size} 个值的均值很粗略，这里与真值相差 ${off} σ*。从输出上却看不出来：训练模式下，输出的均值总是 β，标准差总是 |γ|。`,
      whole: () =>
        "训练模式下，无论批次的偏移和离散程度如何，输出的均值都是 β，标准差都是 |γ|。运行统计量不参与其中。",
      unstarted: () =>
        "还没有更新过就评估：运行统计量还是 0 和 1，等于没有归一化，y = γx + β。",
      start: ({ left }) =>
        `运行统计量大半还是起始的 0 和 1：它们还占 ${left}。输出偏离了目标。`,
      partly: ({ left }) =>
        `起始的 0 和 1 在运行统计量里还占 ${left}，足以让输出偏离目标。`,
      lucky: ({ left }) =>
        `起始的 0 和 1 还占 ${left}，但没有妨碍：运行统计量仍然接近真值。`,
      noisy: ({ size, momentum }) =>
        `批次大小为 ${size}、动量为 ${momentum} 时，运行统计量所平均的值太少：误差是噪声，输出偏离了目标。`,
      settled: ({ size }) =>
        "起始值已被忘掉，运行统计量接近真值：评估的输出接近目标，而且每个值都与同批的其他值无关。" +
        (size === 2 ? "训练模式下只看两个值，是另一个函数。" : ""),
    },
  };

  return { en, zh };
})();
