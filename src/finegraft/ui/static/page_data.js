// Data: a file comes in, is looked at as training sees it, checked, mended.

import * as api from "./api.js";
import { audit } from "./audit.js";
import { kept, keep, keepSettings, settings } from "./draft.js";
import { add, el, put } from "./dom.js";
import { closing, follow, running } from "./job.js";
import {
  badge,
  button,
  command,
  empty,
  fault,
  labelled,
  notice,
  options,
  progress,
  tiles,
} from "./parts.js";
import { rowsView } from "./rows.js";
import { base, bytes, count, when } from "./words.js";

export const title = "Data";

export async function show(place, { words, signal, titled }) {
  const wanted = words.get("file");
  const [{ files }, state] = await Promise.all([
    api.get("/api/data", signal),
    api.get("/api/state", signal),
  ]);
  const trouble = el("div", {});
  const open = (path) => {
    const address = `#/data${api.query({ file: path })}`;
    if (location.hash === address) dispatchEvent(new HashChangeEvent("hashchange"));
    else location.hash = address;
  };
  put(place, el("div", { class: "top" }, el("h1", {}, wanted ? base(wanted) : "Data")), trouble);
  if (wanted) {
    titled(`${base(wanted)} · Data`);
    await one(place, wanted, { state, signal, titled });
  }
  add(
    place,
    wanted ? el("h2", {}, "Another file") : null,
    dropper(open, trouble),
    list(files, wanted),
  );
  if (!wanted && !files.length)
    add(place, empty("No rows yet.", "Drop a file above, or write the built-in sample."));
}

function dropper(open, trouble) {
  const input = el("input", {
    type: "file",
    hidden: true,
    "aria-label": "A file of rows",
    accept: ".jsonl,.json,.csv,.tsv,.parquet,.txt,.gz,.yaml,.yml",
  });
  const sending = el("div", {});
  const send = async (file) => {
    if (!file) return;
    const bar = progress(`Sending ${file.name}`);
    put(trouble);
    put(sending, bar.node);
    try {
      const tell = (share) =>
        bar.set(
          share,
          `Sending ${file.name}`,
          `${bytes(share * file.size)} of ${bytes(file.size)}`,
        );
      const { path } = await api.upload(`/api/data/${api.name(file.name)}`, file, tell);
      open(path);
    } catch (problem) {
      put(trouble, fault(problem));
    } finally {
      put(sending);
      input.value = "";
    }
  };
  input.addEventListener("change", () => send(input.files[0]));
  const box = el(
    "div",
    { class: "drop" },
    el("p", {}, "Drop a file of rows here: JSONL, JSON, CSV, TSV, Parquet or text."),
    el(
      "div",
      { class: "actions" },
      el(
        "button",
        { type: "button", class: "main", on: { click: () => input.click() } },
        "Choose a file",
      ),
      button(
        "Use the built-in sample",
        async () => open((await api.post("/api/data/sample")).path),
        { where: trouble },
      ),
    ),
    input,
    sending,
  );
  for (const kind of ["dragenter", "dragover"]) {
    box.addEventListener(kind, (event) => {
      event.preventDefault();
      box.classList.add("over");
    });
  }
  box.addEventListener("dragleave", () => box.classList.remove("over"));
  box.addEventListener("drop", (event) => {
    event.preventDefault();
    box.classList.remove("over");
    send(event.dataTransfer.files[0]);
  });
  return box;
}

function list(files, open) {
  const others = files.filter((file) => file.path !== open);
  if (!others.length) return null;
  return [
    el("h2", {}, "In this workspace"),
    el(
      "ul",
      { class: "files" },
      others.map((file) =>
        el(
          "li",
          {},
          el("a", { href: `#/data${api.query({ file: file.path })}` }, file.path),
          " ",
          el("span", { class: "soft small" }, `${bytes(file.size_bytes)}, ${when(file.modified)}`),
        ),
      ),
    ),
  ];
}

/** One file: what it is, its rows, its check. */
async function one(place, path, { state, signal, titled }) {
  const facts = el("div", {});
  const shown = el("section", { "aria-label": "Rows" });
  const checked = el("section", { "aria-label": "Check" });
  const mended = el("section", { "aria-label": "Mending" });
  const model = el("input", {
    type: "text",
    list: "models-here",
    value: kept("model", "demo"),
    spellcheck: "false",
    autocomplete: "off",
  });
  const offered = el("datalist", { id: "models-here" }, options(state.models));
  const train = el(
    "button",
    {
      type: "button",
      class: "main",
      on: {
        click: () => {
          keepSettings({ ...settings(), data: path, model: model.value });
          location.hash = "#/train";
        },
      },
    },
    "Train on these rows",
  );
  const fix = async (job) => {
    const done = await follow(mended, job, { says: "Mending rows", signal, ended: mendedView });
    if (done?.state === "done") notice("A mended copy is written.");
  };
  const startFix = () =>
    api.post("/api/jobs", { kind: "fix", data: path, model: model.value }).then(fix);
  const check = async (job) => {
    const done = await follow(checked, job, {
      says: "Checking rows",
      signal,
      ended: (ended) => audit(ended, startFix),
    });
    if (done?.state === "done")
      titled(`${done.result?.verdict || "checked"} · ${base(path)} · Data`);
  };
  const startCheck = () =>
    api.post("/api/jobs", { kind: "check", data: path, model: model.value }).then(check);
  add(
    place,
    facts,
    el(
      "div",
      { class: "inline card" },
      labelled(
        "Read as which model's tokens",
        model,
        "a model here, a folder, or a name on the hub",
      ),
      offered,
      el(
        "div",
        { class: "actions" },
        button("Check the rows", startCheck, { busy: "Checking …", where: checked }),
        train,
      ),
    ),
    checked,
    mended,
    shown,
  );
  const look = () =>
    rowsView(shown, {
      path,
      model: model.value,
      signal,
      told: (answer) => put(facts, about(answer)),
    });
  model.addEventListener("change", () => {
    keep("model", model.value);
    look();
  });
  await look();
  await resume(path, { checked, check, startFix, signal });
}

function about({ format, columns, rows_total }) {
  return tiles([
    ["format", format || "not known"],
    ["rows", count(rows_total)],
    ["columns", (columns || []).join(", ")],
  ]);
}

/** A check that runs goes on being shown; else the newest one that ended. */
async function resume(path, { checked, check, startFix, signal }) {
  const now = await running("check", signal);
  if (now && isOf(now, path)) return void check(now).catch(() => {});
  const { jobs } = await api.get("/api/jobs?kind=check", signal);
  const ended = jobs
    .filter((job) => isOf(job, path) && job.state === "done")
    .sort((a, b) => (b.began || 0) - (a.began || 0))[0];
  if (ended)
    put(
      checked,
      closing(await api.get(`/api/jobs/${api.name(ended.id)}`, signal), "Checked", (job) =>
        audit(job, startFix),
      ),
    );
}

/** Whether a job is about a file. */
function isOf(job, path) {
  return job.command.split(" ").includes(path) || job.command.includes(`'${path}'`);
}

function mendedView(job) {
  const fixed = job.result?.fixed;
  if (!fixed) return el("p", {}, "Nothing had to be mended.");
  return el(
    "section",
    { class: "card" },
    el(
      "p",
      {},
      badge("written", "good"),
      " ",
      el("a", { href: `#/data${api.query({ file: fixed.path })}` }, fixed.path),
    ),
    tiles([
      ["rows kept", count(fixed.kept)],
      ["changed", count(fixed.changed)],
      ["removed", count(fixed.removed)],
    ]),
    el(
      "p",
      { class: "soft" },
      "The source is as it was. What was changed and why: ",
      el("code", {}, fixed.changes || ""),
    ),
    command(`finegraft data show ${fixed.path}`),
  );
}
