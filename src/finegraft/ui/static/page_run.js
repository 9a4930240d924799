// One run: what it does now, its curves as they grow, forecast against actual, before and after,
// notes; stop, resume, try, export, delete.

import * as api from "./api.js";
import { lineChart } from "./chart.js";
import { debounced, el, put } from "./dom.js";
import { follow } from "./job.js";
import { watch } from "./live.js";
import { badge, button, command, fault, fold, labelled, notice, progress, tiles } from "./parts.js";
import { discard } from "./page_runs.js";
import { actual, beforeAfter, settings, warnings } from "./run_parts.js";
import { bytes, clock, count, figure, finely, loss, when } from "./words.js";

export const title = "Run";

const AT_WORK = new Set(["running", "waiting"]);
const FOLDER_MS = 1000;
const AGAIN = new Set([
  "run",
  "start",
  "end",
  "interrupted",
  "stopped",
  "failed",
  "before_after",
  "phase",
  "watch",
  "forecast",
]);

export async function show(place, { parts, words, signal, titled }) {
  const name = parts.join("/");
  const job = words.get("job");
  titled(`${name} · Run`);
  const run = await coming(place, name, job, { signal, titled });
  if (run) await page(place, run, { signal, titled });
}

/** The run, as soon as its folder is there; until then what its job says. */
async function coming(place, name, job, { signal, titled }) {
  const path = `/api/runs/${api.name(name)}`;
  if (!job || (await there(name, signal))) return api.get(path, signal);
  titled(`starting · ${name}`);
  const panel = el("div", {});
  put(place, el("div", { class: "top" }, el("h1", {}, name), badge("starting")), panel);
  const own = new AbortController();
  const stop = () => own.abort();
  signal.addEventListener("abort", stop, { once: true });
  const ended = follow(panel, await api.get(`/api/jobs/${api.name(job)}`, signal), {
    says: "Starting",
    signal: own.signal,
  });
  let over = false;
  ended.then(
    (done) => {
      over = true;
      if (done) titled(`${done.state} · ${name}`);
    },
    () => {
      over = true;
    },
  );
  while (await api.pause(FOLDER_MS, signal)) {
    if (await there(name, signal)) {
      own.abort();
      return api.get(path, signal);
    }
    if (over) return null; // it ended without a folder: the panel says why
  }
  return null;
}

/** Whether the folder of a run is there; one that is still to come is listed with its job. */
async function there(name, signal) {
  const { runs } = await api.get("/api/runs", signal);
  return runs.some((run) => run.name === name && !run.job);
}

async function page(place, first, { signal, titled }) {
  let run = first;
  const { name } = run;
  const path = `/api/runs/${api.name(name)}`;
  const [head, trouble, jobs, top, rest] = Array.from({ length: 5 }, () => el("div", {}));
  const line = progress(`Training ${name}`);
  const charts = curves();
  put(
    place,
    head,
    trouble,
    line.node,
    jobs,
    top,
    el("section", { "aria-label": "Curves" }, charts.node),
    rest,
    notes(run, path),
  );
  const latest = {};
  const headline = () => {
    put(
      head,
      el(
        "div",
        { class: "top" },
        el("h1", {}, name),
        badge(run.state),
        actions(run, { trouble, jobs, again, resuming, signal }),
      ),
      run.error ? el("p", { class: "error" }, `ended with ${run.error}`) : null,
    );
  };
  const now = () => {
    const step = latest.step ?? run.step;
    const all = latest.total_steps ?? run.steps;
    const left = latest.eta_seconds ?? run.actual?.eta_seconds ?? run.eta_seconds;
    const live = AT_WORK.has(run.state);
    const phase =
      run.phase && !latest.step
        ? run.phase
        : `step ${count(step)}${all ? ` of ${count(all)}` : ""}`;
    const tone =
      run.state === "finished"
        ? "good"
        : run.state === "failed" || run.state === "killed"
          ? "error"
          : live
            ? ""
            : "warning";
    line.set(
      all ? step / all : live ? null : 0,
      live ? phase : `${run.state} at step ${count(step)}${all ? ` of ${count(all)}` : ""}`,
      live && left ? `about ${clock(left)} left` : "",
      tone,
    );
    titled(`${live ? (all ? `${step}/${all}` : run.phase || "starting") : run.state} · ${name}`);
    put(top, tiles(numbers(run, latest)));
  };
  const all = () => {
    headline();
    now();
    put(rest, below(run));
  };
  const again = async () => {
    run = await api.get(path, signal);
    if (AT_WORK.has(run.state)) awaited?.abort(); // the run tells itself how far it is
    all();
  };
  let awaited = null;
  const resuming = (job) => {
    const own = new AbortController();
    awaited = own;
    signal.addEventListener("abort", () => own.abort(), { once: true });
    follow(jobs, job, { says: "Resuming", signal: own.signal }).then(
      (ended) => (ended ? again() : put(jobs)),
      again,
    );
  };
  const soon = debounced(
    () => again().catch((problem) => problem.name !== "AbortError" && put(trouble, fault(problem))),
    300,
  );
  all();
  await watch(name, {
    signal,
    drawn: charts.set,
    told: (event) => {
      if (event.type === "step") Object.assign(latest, event);
      if (event.type === "eval") latest.eval_loss = event.loss;
      if (AGAIN.has(event.type)) soon();
      now();
    },
    state: (word) => {
      if (word !== run.state) soon();
    },
  });
}

function numbers(run, latest) {
  const speed = AT_WORK.has(run.state)
    ? (latest.tokens_per_second ?? run.tokens_per_second)
    : run.tokens_per_second;
  return [
    ["loss", loss(latest.loss ?? run.loss)],
    ["held-out loss", loss(latest.eval_loss ?? run.eval_loss)],
    ["tokens/s", speed ? count(Math.round(speed)) : "–"],
    ["time", clock(latest.seconds ?? run.seconds)],
    ["memory", bytes(run.actual?.peak_memory_bytes ?? latest.memory_bytes), "at its peak"],
    run.start?.trainable && [
      "trains",
      count(run.start.trainable),
      `of ${count(run.start.parameters)} parameters`,
    ],
  ];
}

function actions(run, { trouble, jobs, again, resuming, signal }) {
  const path = `/api/runs/${api.name(run.name)}`;
  const start = (kind, says, done) => async () => {
    const job = await api.post("/api/jobs", { kind, run: run.name });
    if (kind === "resume") return resuming(job);
    const over = await follow(jobs, job, { says, signal });
    if (over?.state === "done") await done(over);
    await again();
    return undefined;
  };
  const stop = async () => {
    await api.post(`${path}/stop`);
    notice("It finishes the step, saves and stops.");
  };
  const live = AT_WORK.has(run.state);
  const link = (page, words) =>
    el("a", { class: "button", href: `#/${page}${api.query({ run: run.name })}` }, words);
  const done = run.step > 0 && !live;
  return el(
    "div",
    { class: "actions" },
    live ? button("Stop", stop, { busy: "Stopping …", where: trouble }) : null,
    run.can_resume
      ? button("Resume", start("resume", "Resuming"), { kind: "main", where: trouble })
      : null,
    done ? [link("try", "Try it"), link("export", "Export")] : null,
    run.has_report
      ? el(
          "a",
          {
            class: "button",
            href: `/runs/${run.name.split("/").map(api.name).join("/")}/report/`,
            target: "_blank",
            rel: "noopener",
          },
          "Report",
        )
      : done
        ? button(
            "Draw the report",
            start("report", "Drawing the report", () => notice("The report is drawn.")),
            { where: trouble },
          )
        : null,
    live
      ? null
      : button(
          "Delete",
          () =>
            discard(run.name, () => {
              location.hash = "#/runs";
            }),
          { kind: "danger", where: trouble },
        ),
  );
}

/** The charts of a run; `set(series)` draws. */
function curves() {
  const big = lineChart("Loss", {
    log: true,
    tall: 250,
    format: (v) => figure(Number(v.toPrecision(4))),
    empty: "no step yet",
  });
  const small = {
    learning_rate: lineChart("Learning rate", { tall: 140 }),
    grad_norm: lineChart("Gradient norm", { tall: 140, log: true }),
    tokens_per_second: lineChart("Tokens a second", { tall: 140 }),
    memory_bytes: lineChart("Memory", { tall: 140, format: finely }),
  };
  big.node.classList.add("first");
  const node = el(
    "div",
    { class: "charts" },
    big.node,
    Object.values(small).map((chart) => chart.node),
  );
  const set = (series) => {
    big.set([
      { name: "training", points: series.loss, tone: 0 },
      { name: "held out", points: series.eval_loss, tone: 1, spots: true },
    ]);
    for (const [name, chart] of Object.entries(small))
      chart.set([
        {
          name: name.replaceAll("_", " ").replace("memory bytes", "memory"),
          points: series[name],
          tone: 0,
        },
      ]);
  };
  return { node, set };
}

function below(run) {
  const more = Object.entries(run.commands || {}).filter(
    ([what]) => what !== "watch" && (what !== "resume" || run.can_resume),
  );
  return [
    warnings(run.warnings),
    actual(run),
    beforeAfter(run.before_after),
    settings(run),
    el(
      "p",
      { class: "soft small" },
      run.began ? `begun ${when(run.began)}` : "",
      run.notices?.length ? ` · ${run.notices.join(" · ")}` : "",
    ),
    command(run.command, "This run in a terminal"),
    more.length
      ? fold(
          "More commands for this run",
          more.map(([what, words]) => command(words, what)),
        )
      : null,
  ];
}

function notes(run, path) {
  const text = el("textarea", { rows: 3, value: run.notes || "" });
  const said = el("span", { class: "soft small", role: "status" });
  const save = async () => {
    try {
      await api.put(`${path}/notes`, { text: text.value });
      said.textContent = "saved";
    } catch (problem) {
      said.textContent = problem.message;
    }
  };
  const soon = debounced(save, 800);
  text.addEventListener("input", () => {
    said.textContent = "…";
    soon();
  });
  return el(
    "section",
    {},
    el("h2", {}, "Notes"),
    labelled("What you want to remember of this run", text, "kept beside the run"),
    said,
  );
}
