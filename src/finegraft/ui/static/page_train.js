// Train: the form from the schema, the forecast and the command line beside it, the start.

import * as api from "./api.js";
import { keepSettings, settings as draft } from "./draft.js";
import { add, debounced, el, put } from "./dom.js";
import { forecastView } from "./forecast.js";
import { field, place as placeFaults, retask } from "./form.js";
import { button, command, fault, fold, notice } from "./parts.js";
import { base } from "./words.js";

export const title = "Train";

const CHECK_MS = 350;
const OFFERED = { task: ["causal", "classification", "token_classification"] };

export async function show(place, { signal }) {
  const [form, state, { files }, { runs }] = await Promise.all([
    api.get("/api/schema", signal),
    api.get("/api/state", signal),
    api.get("/api/data", signal),
    api.get("/api/runs", signal),
  ]);
  const page = build(form, { state, files, runs, signal });
  put(
    place,
    el(
      "div",
      { class: "top" },
      el("h1", {}, "Train"),
      el(
        "div",
        { class: "actions" },
        button("Clear all", () => page.fill({})),
      ),
    ),
    el("div", { class: "form" }, page.form, page.aside),
  );
  page.fill({ model: "demo", ...(files.length === 1 ? { data: files[0].path } : {}), ...draft() });
}

function build({ schema, groups, basic }, { state, files, runs, signal }) {
  const properties = schema.properties;
  const required = new Set(schema.required || []);
  const offered = {
    ...OFFERED,
    model: state.models,
    data: files.map((f) => f.path),
    eval_data: files.map((f) => f.path),
  };
  const fields = [];
  const changed = () => {
    task();
    told();
    soon();
  };
  const make = (key) => {
    const one = field(key, properties[key], {
      changed,
      required: required.has(key),
      suggestions: offered[key],
    });
    fields.push(one);
    return one.node;
  };
  const name = field(
    "name",
    { description: "of the run: its folder is runs/NAME", type: "string" },
    { changed },
  );
  const first = basic.filter((key) => key !== "output" && properties[key]);
  const shown = basic
    .filter((key) => properties[key])
    .map((key) => (key === "output" ? name.node : make(key)));
  if (!shown.includes(name.node)) shown.push(name.node);
  const form = el("form", {
    "aria-label": "Settings",
    novalidate: true,
    on: {
      submit: (event) => {
        event.preventDefault();
        start();
      },
    },
  });
  add(
    form,
    el("div", { class: "fields" }, shown),
    el("h2", {}, "More settings"),
    el("p", { class: "soft small" }, "An empty field takes its default, shown in grey."),
  );
  const folds = groups
    .map(({ name: group, keys }) => {
      const rest = keys.filter(
        (key) => !first.includes(key) && key !== "output" && properties[key],
      );
      if (!rest.length) return null;
      const counted = el("span", { class: "count" });
      const node = fold(
        [`${group} `, el("span", { class: "soft small" }, sample(rest)), counted],
        el("div", { class: "fields" }, rest.map(make)),
      );
      add(form, node);
      return { node, counted, keys: new Set(rest) };
    })
    .filter(Boolean);

  const trouble = el("div", {});
  const beside = el("div", {});
  const same = el("div", {});
  const startButton = el("button", { type: "submit", class: "main" }, "Start training");
  const aside = el(
    "aside",
    { class: "aside", "aria-label": "Forecast" },
    beside,
    trouble,
    el("div", { class: "actions" }, startButton),
    same,
  );
  startButton.addEventListener("click", () => start());

  const read = () => {
    const values = {};
    let wrong = null;
    for (const one of [...fields, name]) {
      if (one.node.hidden) continue;
      try {
        const value = one.read();
        if (value !== undefined) values[one.key] = value;
      } catch {
        wrong = wrong || one;
      }
    }
    const { name: given, ...rest } = values;
    const run = String(given ?? free(rest.data, runs));
    name.control.placeholder = run;
    return { values: rest, sent: { ...rest, output: `runs/${run}` }, given, wrong };
  };
  const task = () =>
    retask(fields, properties, fields.find((one) => one.key === "task")?.control.value || "causal");
  const told = () => {
    for (const one of folds) {
      const set = fields.filter(
        (f) => one.keys.has(f.key) && !f.node.hidden && f.control.value.trim() !== "",
      ).length;
      one.counted.textContent = set ? `${set} changed` : "";
    }
  };
  const view = forecastView(beside, {
    signal,
    use: (values) => fill({ ...read().values, ...values }),
  });
  let asked = null;
  const check = async () => {
    if (signal.aborted) return;
    asked?.abort();
    asked = new AbortController();
    const { values, sent, given, wrong } = read();
    keepSettings(given === undefined ? values : { ...values, name: given });
    put(trouble);
    if (wrong) return void view.paused("Correct the marked fields; the forecast follows.");
    if (values.data === undefined || values.model === undefined) {
      put(same);
      return void view.paused(
        values.data === undefined
          ? "Name the rows (data), and the forecast follows."
          : "Name a model, and the forecast follows.",
      );
    }
    try {
      const answer = await api.post("/api/settings/check", { settings: sent }, asked.signal);
      put(
        same,
        command(answer.command),
        fold("Complete settings as YAML", el("pre", { tabindex: 0 }, answer.yaml)),
      );
      await view.of(sent, asked.signal);
    } catch (problem) {
      if (problem.name === "AbortError") return;
      put(same);
      view.paused("No forecast for settings that do not hold.");
      complain(problem);
    }
  };
  const soon = debounced(check, CHECK_MS);
  const complain = (problem) => {
    const whole = placeFaults([...fields, name], problem);
    const marked = [...fields, name].find(
      (one) => one.control.getAttribute("aria-invalid") === "true",
    );
    marked?.node.closest("details")?.setAttribute("open", "");
    put(
      trouble,
      whole && !problem.fix && !problem.allowed
        ? el("p", { class: "error" }, `See the marked field: ${marked.key}.`)
        : fault(problem),
    );
    return marked;
  };
  const start = async () => {
    const { values, sent, wrong } = read();
    if (wrong) return void wrong.control.focus();
    startButton.disabled = true;
    startButton.textContent = "Starting …";
    put(trouble);
    try {
      const job = await api.post("/api/jobs", { kind: "train", settings: sent });
      const { name: _, ...rest } = values;
      keepSettings(rest);
      notice("Training started; it goes on when this page is closed.");
      location.hash = `#/run/${api.name((job.run || sent.output).replace(/^runs\//, ""))}?job=${api.name(job.id)}`;
    } catch (problem) {
      complain(problem)?.control.focus();
    } finally {
      startButton.disabled = false;
      startButton.textContent = "Start training";
    }
  };
  const fill = (values) => {
    for (const one of [...fields, name]) {
      one.fill(values[one.key]);
      one.wrong("");
      if (values[one.key] !== undefined) one.node.closest("details")?.setAttribute("open", "");
    }
    changed();
  };
  return { form, aside, fill };
}

/** Some of the keys of a folded group, so that one need not open it to know. */
function sample(keys) {
  return keys.slice(0, 4).join(", ") + (keys.length > 4 ? `, … (${keys.length})` : "");
}

/** A name that no run has, after the rows. */
function free(data, runs) {
  const stem =
    (typeof data === "string" &&
      base(data)
        .replace(/\.[^.]*$/, "")
        .replace(/[^\w.-]+/g, "-")) ||
    "run";
  const taken = new Set(runs.map((run) => run.name));
  if (!taken.has(stem)) return stem;
  for (let number = 2; ; number += 1)
    if (!taken.has(`${stem}-${number}`)) return `${stem}-${number}`;
}
