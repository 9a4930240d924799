// The forecast beside the form: memory against what there is, time, disk, and settings that would fit.

import * as api from "./api.js";
import { el, put } from "./dom.js";
import { badge, bars, button, command, fault, fold, progress, tiles } from "./parts.js";
import { written } from "./form.js";
import { bytes, clock, count } from "./words.js";

/** `use(values)`: what a suggestion changes. */
export function forecastView(place, { use }) {
  const body = el("div", { "aria-live": "polite" });
  put(place, el("h2", {}, "Forecast"), body);
  const paused = (words) => put(body, el("p", { class: "soft" }, words));
  const of = async (settings, signal) => {
    const line = progress("Counting memory and time");
    line.set(null, "Counting memory and time …");
    const began = performance.now();
    const timer = setInterval(
      () => line.set(null, "Counting memory and time …", clock((performance.now() - began) / 1000)),
      500,
    );
    if (body.querySelector(".tiles")) body.classList.add("soft");
    else put(body, line.node);
    const wait = setTimeout(() => put(body, line.node), 1500);
    try {
      const found = await api.post("/api/forecast", { settings }, signal);
      put(body, view(found, use));
    } catch (problem) {
      if (problem.name === "AbortError") throw problem;
      if (problem.status === 422 && (problem.keys.length || problem.problems.length)) throw problem;
      put(body, fault(problem));
    } finally {
      clearInterval(timer);
      clearTimeout(wait);
      body.classList.remove("soft");
    }
  };
  return { of, paused };
}

function view(found, use) {
  const { peak_memory_bytes: peak, available_bytes: there } = found;
  const share = there ? peak / there : 0;
  const meter = progress("Memory");
  meter.set(
    share,
    `${bytes(peak)} of ${bytes(there)}`,
    `${Math.round(100 * share)}%`,
    !found.fits ? "error" : share > 0.85 ? "warning" : "good",
  );
  return [
    el(
      "p",
      { class: "actions" },
      el("strong", {}, "Memory at its peak"),
      found.fits ? badge("it fits", "good") : badge("it does not fit", "error"),
    ),
    meter.node,
    tiles([
      ["time", clock(found.seconds), found.steps ? `${count(found.steps)} steps` : ""],
      ["disk", bytes(found.disk_bytes)],
      found.tokens ? ["tokens", count(found.tokens)] : null,
    ]),
    parts(found),
    (found.suggestions || []).length
      ? [el("h3", {}, "What would fit"), found.suggestions.map((one) => suggestion(one, use))]
      : null,
  ];
}

function parts(found) {
  const memory = Object.entries(found.parts || {})
    .filter(([, value]) => value)
    .sort((a, b) => b[1] - a[1]);
  const time = Object.entries(found.seconds_parts || {})
    .filter(([, value]) => value >= 0.05)
    .sort((a, b) => b[1] - a[1]);
  if (!memory.length && !time.length) return null;
  return fold("Where it goes", [
    memory.length ? [el("h3", {}, "Memory"), bars(memory.map(([n, v]) => [n, v, bytes(v)]))] : null,
    time.length ? [el("h3", {}, "Time"), bars(time.map(([n, v]) => [n, v, clock(v)]))] : null,
    command(found.command, "This forecast in a terminal"),
    found.probed
      ? null
      : el("p", { class: "small soft" }, "Computed from the rows and the model, not measured."),
  ]);
}

function suggestion(one, use) {
  const words = Object.entries(one.changed || {})
    .map(([key, value]) => `${key}: ${written(value)}`)
    .join(", ");
  const why = [].concat(one.why || []);
  return el(
    "div",
    { class: "card" },
    el("p", {}, el("code", {}, words)),
    why.map((text) => el("p", { class: "small soft" }, text)),
    button("Use these settings", () => use(one.changed)),
  );
}
