// What a check found: the verdict, findings by severity with row numbers, charts.

import { el } from "./dom.js";
import { badge, bars, button, fold, tiles } from "./parts.js";
import { count, many } from "./words.js";

const TONES = { good: "good", "look at these": "warning", "do not train": "error" };
const SHOWN_ROWS = 20;

/** The result of a `check` job; `fix()` starts the mending. */
export function audit(job, fix) {
  const found = job.result || {};
  const findings = found.findings || [];
  const trouble = el("div", {});
  const mendable = findings.some((one) => one.fix);
  return el(
    "section",
    { "aria-label": "Verdict" },
    el("p", { class: `verdict ${TONES[found.verdict] || ""}` }, `Verdict: ${found.verdict}`),
    numbers(found),
    findings.length ? [charts(found), findings.map(finding)] : el("p", {}, "Nothing was found."),
    el(
      "div",
      { class: "actions" },
      mendable
        ? button("Write a mended copy", fix, { busy: "Mending …", kind: "main", where: trouble })
        : null,
      job.page
        ? el(
            "a",
            { class: "button", href: job.page, target: "_blank", rel: "noopener" },
            "The whole report",
          )
        : null,
    ),
    trouble,
  );
}

function numbers(found) {
  const tokens = found.tokens || {};
  const about = tokens.sampled ? "estimated" : "";
  return tiles([
    ["rows", count(found.rows)],
    ["without a finding", count(found.clean_rows)],
    tokens.total !== undefined && ["tokens", count(tokens.total), about],
    tokens.trained !== undefined && ["trained tokens", count(tokens.trained), about],
    tokens.longest !== undefined && [
      "longest row",
      `${count(tokens.longest)} tokens`,
      `limit ${count(tokens.max_length)}`,
    ],
  ]);
}

function charts(found) {
  const marked = { error: "error", warning: "warning", note: "" };
  const hits = found.findings
    .filter((one) => one.count)
    .map((one) => [one.title, one.count, many(one.count, "row"), marked[one.severity]]);
  const groups = [
    ["Rows by finding", hits],
    ["Languages", pairs(found.languages)],
    ["Labels", pairs(found.labels)],
    ["Tokens a row", perRow(found.tokens)],
  ];
  return el(
    "div",
    { class: "charts" },
    groups
      .filter(([, values]) => values.length)
      .map(([title, values]) =>
        el("figure", { class: "chart" }, el("figcaption", {}, title), bars(values)),
      ),
  );
}

const pairs = (counts) =>
  Object.entries(counts || {})
    .sort((a, b) => b[1] - a[1])
    .slice(0, 8);

function perRow(tokens) {
  if (!tokens?.trained_per_row) return [];
  const { least, median, most } = tokens.trained_per_row;
  return [
    ["whole, median", tokens.median],
    ["whole, longest", tokens.longest],
    ["trained, least", least],
    ["trained, median", median],
    ["trained, most", most],
  ];
}

function finding(one) {
  const details = Object.entries(one.details || {}).filter(([, words]) => words);
  const rows = one.rows || [];
  const numbered = rows.slice(0, SHOWN_ROWS).map(count).join(", ");
  const more = rows.length > SHOWN_ROWS ? ` and ${count(rows.length - SHOWN_ROWS)} more` : "";
  return el(
    "article",
    { class: `finding ${one.severity}-side` },
    el(
      "h3",
      {},
      badge(one.severity, one.severity),
      el("span", {}, one.title),
      el("code", { class: "soft" }, one.code),
    ),
    rows.length
      ? el("p", {}, `${rows.length === 1 ? "row" : "rows"} ${numbered}${more}`)
      : el("p", {}, one.message),
    details.length
      ? el(
          "ul",
          {},
          details
            .slice(0, 3)
            .map(([row, words]) =>
              el("li", { class: "small" }, `row ${row}: `, el("span", { class: "mono" }, words)),
            ),
        )
      : null,
    el(
      "p",
      { class: "small soft" },
      one.cure,
      one.fix ? ` Mending would ${one.fix} ${rows.length === 1 ? "it" : "them"}.` : "",
    ),
    rows.length > SHOWN_ROWS
      ? fold(
          "All row numbers",
          el(
            "p",
            { class: "small" },
            rows.slice(0, 2000).map(count).join(", "),
            rows.length > 2000 ? " …" : "",
          ),
        )
      : null,
  );
}
