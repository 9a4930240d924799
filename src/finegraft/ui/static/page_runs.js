// Runs: all of them with what became of each; some are ticked and compared.

import * as api from "./api.js";
import { el, put } from "./dom.js";
import { badge, button, command, confirmed, empty, fold, notice, table } from "./parts.js";
import { DASH, base, bytes, clock, many, count, loss, when } from "./words.js";

export const title = "Runs";

const LIVE = new Set(["running", "waiting"]);
const QUICK_MS = 1500;
const SLOW_MS = 6000;

export async function show(place, { signal, titled }) {
  const chosen = new Set();
  const list = el("div", {});
  const trash = el("div", {});
  const compare = el(
    "button",
    {
      type: "button",
      disabled: true,
      on: {
        click: () => {
          location.hash = `#/compare${api.query({ runs: [...chosen].map(api.name).join(",") })}`;
        },
      },
    },
    "Compare",
  );
  put(
    place,
    el(
      "div",
      { class: "top" },
      el("h1", {}, "Runs"),
      el(
        "div",
        { class: "actions" },
        compare,
        el("a", { class: "button", href: "#/train" }, "New run"),
      ),
    ),
    list,
    trash,
  );
  const mark = () => {
    compare.disabled = chosen.size < 2;
    compare.textContent = chosen.size > 1 ? `Compare ${chosen.size}` : "Compare";
    compare.title = chosen.size > 1 ? "" : "Tick two runs or more";
  };
  let shown = "";
  do {
    const { runs } = await api.get("/api/runs", signal);
    const now = JSON.stringify(runs);
    const live = runs.filter((run) => LIVE.has(run.state));
    titled(live.length ? `${live.length} running · Runs` : "Runs");
    if (now !== shown) {
      for (const name of [...chosen])
        if (!runs.some((run) => run.name === name)) chosen.delete(name);
      keepingFocus(list, () => put(list, runs.length ? lines(runs, chosen, mark) : nothing()));
      mark();
      await trashed(trash, signal);
      shown = now;
    }
    if (!(await api.pause(live.length ? QUICK_MS : SLOW_MS, signal))) return;
  } while (!signal.aborted);
}

function nothing() {
  return empty("No runs yet.", [
    "Bring some rows on ",
    el("a", { href: "#/data" }, "Data"),
    " and ",
    el("a", { href: "#/train" }, "train one"),
    ", or type: ",
    el("code", {}, "finegraft quickstart"),
  ]);
}

function lines(runs, chosen, mark) {
  const sorted = [...runs].sort((a, b) => (b.began || 0) - (a.began || 0));
  const head = [
    { text: "compare", hidden: true },
    { text: "run", name: true },
    "state",
    { text: "steps", less: true },
    { text: "loss", n: true },
    { text: "held out", n: true },
    { text: "tokens/s", n: true },
    { text: "time", n: true },
    "started",
    "model",
    "method",
    "rows",
    { text: "notes", wide: true },
  ];
  return [
    table(
      "Runs",
      head,
      sorted.map((run) => row(run, chosen, mark)),
      "runs-table",
    ),
    command("finegraft runs"),
  ];
}

function row(run, chosen, mark) {
  const tick = el("input", {
    type: "checkbox",
    "aria-label": `Compare ${run.name}`,
    "data-focus": `tick ${run.name}`,
    checked: chosen.has(run.name),
  });
  tick.addEventListener("change", () => {
    if (tick.checked) chosen.add(run.name);
    else chosen.delete(run.name);
    mark();
  });
  const link = el(
    "a",
    { href: `#/run/${api.name(run.name)}`, "data-focus": `run ${run.name}` },
    run.name,
  );
  return [
    tick,
    link,
    [badge(run.state), run.error ? ` ${run.error}` : null],
    steps(run),
    loss(run.loss),
    loss(run.eval_loss),
    run.tokens_per_second ? count(Math.round(run.tokens_per_second)) : DASH,
    clock(run.seconds),
    when(run.began),
    base(run.model) || DASH,
    run.method || DASH,
    run.data ? base(run.data) : DASH,
    run.notes ? String(run.notes).slice(0, 80) : "",
  ];
}

function steps({ step, steps: all }) {
  if (!all) return count(step);
  const fill = el("div", { class: "fill" });
  fill.style.width = `${(100 * step) / all}%`;
  return el(
    "div",
    { class: "steps" },
    el("span", {}, `${count(step)}/${count(all)}`),
    el("div", { class: "track", "aria-hidden": "true" }, fill),
  );
}

/** Draw anew without losing the place of the keyboard. */
function keepingFocus(within, draw) {
  const at = within.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
  draw();
  if (at) within.querySelector(`[data-focus="${CSS.escape(at)}"]`)?.focus();
}

/** Move a run to the trash and offer to take it back. */
export async function discard(name, after) {
  const { undo } = await api.remove(`/api/runs/${api.name(name)}`);
  const act = () => restored(undo, name).catch((problem) => notice(problem.message));
  notice(`${name} is in the trash.`, { words: "Undo", act });
  after();
}

async function restored(id, name) {
  await api.post(`/api/trash/${api.name(id)}/restore`);
  notice(`${name} is back.`);
  dispatchEvent(new HashChangeEvent("hashchange"));
}

/** What was deleted: taken back one by one, or emptied. */
async function trashed(place, signal) {
  const { entries, size_bytes } = await api.get("/api/trash", signal);
  if (!entries.length) return void put(place);
  const trouble = el("div", {});
  const emptied = async () => {
    const words = `${many(entries.length, "run")} with ${bytes(size_bytes)} cannot be taken back then.`;
    if (!(await confirmed("Empty the trash?", words, "Empty"))) return;
    await api.remove("/api/trash");
    await trashed(place, signal);
  };
  const rows = entries.map(({ id, path, time, size_bytes: size }) => [
    path,
    bytes(size),
    when(time),
    button("Take back", () => restored(id, base(path)), {
      where: trouble,
      "aria-label": `Take back ${base(path)}`,
    }),
  ]);
  const head = ["run", { text: "size", n: true }, "deleted", { text: "take back", hidden: true }];
  put(
    place,
    fold(`Trash: ${many(entries.length, "run")}, ${bytes(size_bytes)}`, [
      table("Trash", head, rows),
      trouble,
      button("Empty the trash", emptied, { kind: "danger", where: trouble }),
    ]),
  );
  return undefined;
}
