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
  // About what the eye can tell: a tenth of a deviation, and an eighth in the deviation itself.
  const close =
    Math.abs(state.meanError) <= 0.1 && state.varianceRatio >= 0.8 && state.varianceRatio <= 1.25;
  if (state.left > 0.05) {
    if (close) return "lucky";
    return state.left >= 0.5 ? "start" : "partly";
  }
  return close ? "settled" : "noisy";
};
