// The curves of one run, as the server has them and as they grow.

import * as api from "./api.js";

export const CURVES = [
  "loss",
  "eval_loss",
  "learning_rate",
  "grad_norm",
  "tokens_per_second",
  "memory_bytes",
];
const POINTS = 600;
const MOST_POINTS = 3000;
const AGAIN_MS = 1500;

/** Curves thinned by the server: {series, offset}. */
export const curves = (name, signal) =>
  api.get(`/api/runs/${api.name(name)}/series?points=${POINTS}`, signal);

/** Put an event's values behind the curves; a step that is told again replaces what follows it. */
export function grow(series, event) {
  if (event.type === "eval") return extend(series.eval_loss, event.step, event.loss);
  if (event.type !== "step") return undefined;
  for (const name of CURVES)
    if (name !== "eval_loss") extend(series[name], event.step, event[name]);
  return undefined;
}

function extend(points, step, value) {
  while (points.length && points.at(-1)[0] >= step) points.pop();
  if (value !== undefined && value !== null) points.push([step, value]);
}

/**
 * Watch a run: `drawn(series)` whenever the curves have changed, `told(event)` for each event,
 * `state(word)` when its state is known. A break is mended by reading the curves anew. Ends when
 * the signal says so.
 */
export async function watch(name, { signal, drawn, told, state }) {
  while (!signal.aborted) {
    try {
      const { series, offset } = await curves(name, signal);
      for (const curve of CURVES) series[curve] = series[curve] || [];
      drawn(series);
      await stream(name, offset, series, { signal, drawn, told, state });
    } catch (problem) {
      if (problem.name === "AbortError") return;
      if (problem.status === 401) throw problem;
    }
    await api.pause(AGAIN_MS, signal);
  }
}

async function stream(name, offset, series, { signal, drawn, told, state }) {
  const own = new AbortController();
  const leave = () => own.abort();
  signal.addEventListener("abort", leave, { once: true });
  const events = (list) => {
    for (const event of list) {
      grow(series, event);
      told(event);
    }
    drawn(series);
    if (series.loss.length > MOST_POINTS) own.abort(); // thinned anew by the server
  };
  try {
    await api.events(
      `/api/runs/${api.name(name)}/stream?from=${offset}`,
      { events, state: (data) => state(data.state), reset: leave },
      { signal: own.signal },
    );
  } catch (problem) {
    if (problem.name !== "AbortError" || signal.aborted) throw problem;
  } finally {
    signal.removeEventListener("abort", leave);
  }
}
