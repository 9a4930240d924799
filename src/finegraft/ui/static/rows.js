// Rows as training sees them: which tokens are trained, read, cut off.

import * as api from "./api.js";
import { el, put } from "./dom.js";
import { button, command, fault } from "./parts.js";
import { count } from "./words.js";

const SHOWN = 5;
const LEGEND = [
  ["trained", "the model learns to say this"],
  ["read", "given, not learnt"],
  ["cut", "beyond the longest length"],
];

/** Show rows of a file in `place`, a few at a time; `told(answer)` gets what the file is. */
export async function rowsView(place, { path, model, signal, told }) {
  let from = 0;
  let answer = { rows: [] };
  const rows = el("div", {});
  const where = el("span", { class: "soft small" });
  const foot = el("div", {});
  const first = () => from > 0;
  const more = () => answer.rows.length === SHOWN && from + SHOWN !== answer.rows_total;
  const page = async () => {
    answer = await api.get(`/api/data/look${api.query({ path, model, from, n: SHOWN })}`, signal);
    told(answer);
    put(rows, answer.error ? fault(answer.error) : null, answer.rows.map(row));
    const last = from + answer.rows.length;
    where.textContent = answer.rows.length
      ? `rows ${count(from + 1)} to ${count(last)}${answer.rows_total ? ` of ${count(answer.rows_total)}` : ""}`
      : "no more rows";
    put(foot, command(answer.command));
    [before.disabled, after.disabled] = [!first(), !more()];
  };
  const turn = (by) => async () => {
    from = Math.max(0, from + by);
    await page();
  };
  const before = button("Earlier", turn(-SHOWN), { where: foot, enabled: first });
  const after = button("Later", turn(SHOWN), { where: foot, enabled: more });
  put(
    place,
    el("h2", {}, "Rows as training sees them"),
    legend(),
    rows,
    el("div", { class: "actions" }, before, after, where),
    foot,
  );
  put(rows, el("p", { class: "soft" }, "Reading rows; the first time the tokenizer is opened …"));
  try {
    await page();
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    put(place, fault(problem));
  }
}

function legend() {
  return el(
    "p",
    { class: "row-key" },
    LEGEND.map(([state, words]) =>
      el("span", {}, el("i", { class: `span-${state}` }, state), ` ${words}`),
    ),
  );
}

function row({ place, spans, trained, tokens, dropped }) {
  const cut = spans.some((span) => span.state === "cut");
  const counted = tokens
    ? `${count(trained)} of ${count(tokens)} tokens trained`
    : "as it stands in the file";
  return el(
    "article",
    { class: "card", "aria-label": `row ${place}` },
    el(
      "p",
      { class: "small soft" },
      `row ${count(place)} · ${counted}`,
      dropped ? " · nothing in it can be learnt: training leaves it out" : "",
      cut ? " · its end is cut" : "",
    ),
    el(
      "div",
      { class: "row-text mono" },
      spans.map((span) =>
        el(
          "span",
          { class: `span-${span.state}` },
          el("span", { class: "hush" }, `[${span.state}] `),
          span.text,
        ),
      ),
    ),
  );
}
