// What stands below the curves of a run.

import { el } from "./dom.js";
import { badge, fold, table } from "./parts.js";
import { DASH, bytes, clock, count, loss, plain } from "./words.js";

const WRITES = {
  peak_memory_bytes: ["memory at its peak", bytes],
  seconds: ["time", clock],
  disk_bytes: ["disk", bytes],
};

/** What the watch over training and the rows said. */
export function warnings(found) {
  if (!found?.length) return null;
  return el(
    "section",
    {},
    el("h2", {}, "Said on the way"),
    found.map((one) => {
      const { code, severity, step, message, cause, cure } =
        typeof one === "string" ? { message: one } : one;
      const tone = severity || "warning";
      return el(
        "article",
        { class: `finding ${tone}-side` },
        el(
          "h3",
          {},
          badge(tone, tone),
          el("span", {}, message),
          code ? el("code", { class: "soft" }, code) : null,
        ),
        step ? el("p", { class: "small" }, `at step ${count(step)}`) : null,
        cause ? el("p", { class: "small soft" }, cause) : null,
        cure ? el("p", { class: "small" }, cure) : null,
      );
    }),
  );
}

/** The forecast beside what came. */
export function actual({ forecast, actual: came, state }) {
  if (!forecast) return null;
  const rows = Object.entries(WRITES)
    .filter(([key]) => forecast[key] !== undefined)
    .map(([key, [name, write]]) => {
      const [said, is] = [forecast[key], came?.[key]];
      const share =
        said && is
          ? `${is >= said ? "+" : "−"}${Math.abs(Math.round((100 * (is - said)) / said))}%`
          : DASH;
      return [name, write(said), write(is), share];
    });
  const so = state === "finished" ? "" : " (so far)";
  return el(
    "section",
    {},
    el("h2", {}, "Forecast and actual"),
    table(
      "Forecast and actual",
      [
        "",
        { text: "forecast", n: true },
        { text: `actual${so}`, n: true },
        { text: "difference", n: true },
      ],
      rows,
    ),
  );
}

/** Losses of held-out rows and general texts with the adapter switched off and on. */
export function beforeAfter(found) {
  if (!found) return null;
  const { rows = [], texts = [], skipped, held_out: held, general } = found;
  if (!rows.length && !texts.length) {
    return skipped
      ? el("section", {}, el("h2", {}, "Before and after"), el("p", { class: "soft" }, skipped))
      : null;
  }
  const cells = (one) => [
    one.prompt ?? one.text,
    one.answer ?? "",
    loss(one.before),
    loss(one.after),
    change(one),
  ];
  const sums = [
    held && `Held-out rows: ${loss(held.before)} → ${loss(held.after)} (${held.count}).`,
    general &&
      `General texts: ${loss(general.before)} → ${loss(general.after)}, which should stay.`,
  ].filter(Boolean);
  return el(
    "section",
    {},
    el("h2", {}, "Before and after"),
    el("p", {}, sums.join(" "), el("span", { class: "soft" }, " Losses; less is better.")),
    rows.length
      ? table(
          "Held-out rows before and after",
          [
            { text: "given", wide: true },
            { text: "answer", wide: true },
            { text: "before", n: true },
            { text: "after", n: true },
            "change",
          ],
          rows.map(cells),
        )
      : null,
    texts.length
      ? fold(
          "General texts",
          table(
            "General texts before and after",
            [
              { text: "text", wide: true },
              "",
              { text: "before", n: true },
              { text: "after", n: true },
              "change",
            ],
            texts.map(cells),
          ),
        )
      : null,
    skipped ? el("p", { class: "soft" }, skipped) : null,
  );
}

function change({ before, after }) {
  if (before === undefined || after === undefined) return DASH;
  const less = after < before;
  return badge(
    `${less ? "better" : "worse"} by ${loss(Math.abs(after - before))}`,
    less ? "good" : "warning",
  );
}

export function settings({ config }) {
  const rows = Object.entries(config || {})
    .filter(([, value]) => value !== null)
    .map(([key, value]) => [el("code", {}, key), plain(value)]);
  return rows.length
    ? fold("Settings", table("Settings", ["key", { text: "value", wide: true }], rows))
    : null;
}
