// Export: a run in the formats that others run, with sizes before, progress, and the proof after.

import * as api from "./api.js";
import { add, el, put } from "./dom.js";
import { follow, running } from "./job.js";
import { badge, button, command, empty, fold, labelled, options, table } from "./parts.js";
import { base, bytes, figure } from "./words.js";

export const title = "Export";

const USUAL = ["gguf:q8_0", "gguf:q4_k_m", "gguf:f16", "gguf:bf16"];
const CHOSEN = USUAL[0];
const MOST_SHOWN = 6;
const ALONE = "model or adapter"; // formats without variants, together

export async function show(place, { words, signal, titled }) {
  const { runs } = await api.get("/api/runs", signal);
  const usable = runs.filter((run) => run.step > 0 && !["running", "waiting"].includes(run.state));
  put(place, el("div", { class: "top" }, el("h1", {}, "Export")));
  const made = el("section", { "aria-label": "Exports" });
  if (!usable.length) {
    add(
      place,
      empty("No run to export yet.", [
        el("a", { href: "#/train" }, "Train one"),
        ", or type: ",
        el("code", {}, "finegraft quickstart"),
      ]),
      made,
    );
    await exportsOf(made, null, signal);
    return;
  }
  const name = words.get("run") ?? usable[0].name;
  const run = usable.find((one) => one.name === name) ?? usable[0];
  const choice = el(
    "select",
    {},
    options(
      usable.map((one) => one.name),
      run.name,
    ),
  );
  choice.addEventListener("change", () => {
    location.hash = `#/export${api.query({ run: choice.value })}`;
  });
  const jobs = el("div", {});
  const body = el("div", {}, el("p", { class: "soft" }, "Reckoning sizes …"));
  add(place, el("div", { class: "inline card" }, labelled("Run", choice)), body, jobs, made);
  const after = (job) => {
    const begun = () => exportsOf(made, run.name, signal).catch(() => {});
    return follow(jobs, job, { says: "Exporting", signal, ended: result }).then((done) => {
      if (done) titled(`${done.state === "done" ? "exported" : done.state} · Export`);
      return begun();
    });
  };
  const now = await running("export", signal);
  const { formats } = await exportsOf(made, run.name, signal);
  put(body, form(run, formats, jobs, after));
  if (now) await after(now);
}

function form(run, formats, jobs, after) {
  const boxes = formats.map((one) => ({
    one,
    box: el("input", {
      type: "checkbox",
      checked: one.name === CHOSEN && !one.problem,
      disabled: Boolean(one.problem),
    }),
  }));
  const sum = el("p", { class: "soft", role: "status" });
  const output = el("input", { type: "text", value: `exports/${run.name}`, spellcheck: "false" });
  const wanted = () => boxes.filter(({ box }) => box.checked).map(({ one }) => one);
  const start = async () =>
    after(
      await api.post("/api/jobs", {
        kind: "export",
        run: run.name,
        formats: wanted().map((one) => one.name),
        output: output.value.trim() || `exports/${run.name}`,
      }),
    );
  const go = button("Export", start, {
    kind: "main",
    busy: "Exporting …",
    where: jobs,
    enabled: () => wanted().length > 0,
  });
  const told = () => {
    const chosen = wanted();
    const total = chosen.reduce((all, one) => all + (one.size_bytes || 0), 0);
    sum.textContent = chosen.length ? `About ${bytes(total)} on the disk.` : "Choose a format.";
    go.disabled = !chosen.length;
  };
  for (const { box } of boxes) box.addEventListener("change", told);
  told();
  const sizes = new Map();
  for (const { one } of boxes) sizes.set(one.format, (sizes.get(one.format) || 0) + 1);
  const groups = new Map();
  for (const each of boxes) {
    const name = sizes.get(each.one.format) > 1 ? each.one.format : ALONE;
    groups.set(name, [...(groups.get(name) || []), each]);
  }
  return [
    [...groups].map(([name, members]) => group(name, members)),
    el(
      "div",
      { class: "inline" },
      labelled(
        "Folder",
        output,
        "in this workspace; each export is reloaded and compared with what was trained",
      ),
    ),
    sum,
    el("div", { class: "actions" }, go),
  ];
}

/** Formats of one kind; many variants fold behind the usual ones. */
function group(name, members) {
  const boxes = (some) => some.map(({ one, box }) => format(one, box));
  const usual =
    members.length > MOST_SHOWN ? members.filter(({ one }) => USUAL.includes(one.name)) : members;
  const rest = members.filter((each) => !usual.includes(each));
  return el(
    "fieldset",
    { class: "formats" },
    el(
      "legend",
      {},
      name.replaceAll("_", " "),
      " ",
      el("small", { class: "soft" }, name === ALONE ? "" : members[0].one.summary || ""),
    ),
    boxes(usual),
    rest.length
      ? fold(
          `${rest.length} ${usual.length ? "more" : "forms"} of ${name.replaceAll("_", " ")}`,
          el("div", { class: "formats" }, boxes(rest)),
        )
      : null,
  );
}

function format(one, box) {
  box.id = `format-${one.name.replace(/\W+/g, "-")}`;
  const problem =
    one.problem &&
    [one.problem.message || one.problem.found || one.problem, one.problem.fix]
      .filter(Boolean)
      .join("; ");
  return el(
    "div",
    { class: "format" },
    box,
    el(
      "label",
      { for: box.id },
      el("b", {}, one.name),
      one.help || one.summary || "",
      el(
        "small",
        {},
        problem ? `not here: ${problem}` : one.size_bytes ? `about ${bytes(one.size_bytes)}` : "",
      ),
    ),
  );
}

/** What an export job says in the end. */
function result(job) {
  const found = job.result?.exports || [];
  return el(
    "section",
    { "aria-label": "Verification" },
    found.map((one) =>
      el(
        "article",
        { class: "card" },
        el(
          "p",
          { class: "actions" },
          word(one.verified, one.cause),
          el("strong", {}, one.format),
          el("span", { class: "soft" }, `${bytes(one.bytes ?? one.size_bytes)}, ${one.path}`),
        ),
        one.cause ? el("p", { class: one.verified ? "" : "error" }, one.cause) : null,
        checks(one),
      ),
    ),
  );
}

const word = (verified, cause) =>
  verified
    ? badge("verified", "good")
    : badge(
        verified === false && cause ? "not verified" : "not checked",
        verified === false ? "error" : "warning",
      );

function checks({ checks: done }) {
  if (!done?.length) return null;
  return table(
    "Checks",
    ["check", { text: "measured", n: true }, { text: "allowed", n: true }, "outcome"],
    done.map((one) => [
      one.name,
      figure(one.value),
      one.tolerance === null ? "" : figure(one.tolerance),
      badge(one.ok ? "holds" : "fails", one.ok ? "good" : "error"),
    ]),
  );
}

/** All exports of the workspace; returns what the server said, formats among it. */
async function exportsOf(place, run, signal) {
  const answer = await api.get(`/api/exports${api.query({ run })}`, signal);
  const { exports } = answer;
  put(
    place,
    el("h2", {}, "Exports in this workspace"),
    exports.length
      ? exports.map((one) =>
          el(
            "article",
            { class: "card" },
            el(
              "p",
              { class: "actions" },
              word(one.verified, one.cause),
              el("strong", {}, base(one.path)),
              el(
                "span",
                { class: "soft" },
                [one.format, bytes(one.size_bytes), one.run && `of ${one.run}`, one.path]
                  .filter(Boolean)
                  .join(" · "),
              ),
            ),
            (one.commands || []).map((words, i) => command(words, i ? "or" : "To use it")),
            one.checks?.length ? fold("Verification", checks(one)) : null,
          ),
        )
      : empty("No exports yet.", "What is exported is verified and listed here."),
  );
  return answer;
}
