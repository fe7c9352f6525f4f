"use strict";

/** Which of the situations that have a sentence in texts.js the figure shows. */
(globalThis.BNFigure ??= {}).reading = (settings, state) => {
  if (settings.gamma === 0) return "flat";
  if (settings.mode === "train") {
    // A pair comes out as ±1 to a rounding of the figure while its variance is far above ε.
    if (settings.size === 2 && state.own.deviation > 0.05) return "pair";
    return settings.size <= 8 ? "rough" : "whole";
  }
  if (settings.updates === 0) return "unstarted";
  // About what the eye can tell: a tenth of a deviation, and as much in the deviation itself.
  const [inMean, inVariance] = [0.1, 0.2];
  const close =
    Math.abs(state.meanError) <= inMean && Math.abs(state.varianceRatio - 1) <= inVariance;
  if (close) return state.left > 0.05 ? "lucky" : "settled";
  // The start's part in the errors: where it is less than half of what is close, noise did it.
  const { left } = state;
  const started =
    (left * Math.abs(settings.offset)) / settings.spread > inMean / 2 ||
    left * Math.abs(settings.spread ** -2 - 1) > inVariance / 2;
  if (!started) return "noisy";
  return left >= 0.5 ? "start" : "partly";
};
