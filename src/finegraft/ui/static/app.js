// Start: sign in with the token of the printed address, then show the page that the address names.
// A page is a function (place, {parts, words, signal}) in a module of its own; `signal` ends all
// that it watches when it is left.

import * as api from "./api.js";
import { el, put } from "./dom.js";
import { button, command, fault } from "./parts.js";
import * as data from "./page_data.js";
import * as train from "./page_train.js";
import * as runs from "./page_runs.js";
import * as run from "./page_run.js";
import * as compare from "./page_compare.js";
import * as tryout from "./page_try.js";
import * as exporting from "./page_export.js";
import * as models from "./page_models.js";

const PAGES = { data, train, runs, run, compare, try: tryout, export: exporting, models };
const NAV_OF = { run: "runs", compare: "runs" };

let leave = new AbortController();

/** "#/run/a%20b?x=1" as {page, parts, words}. */
function address() {
  const [path, words = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, ...parts] = path.split("/").map(decodeURIComponent);
  return { page: page in PAGES ? page : "runs", parts, words: new URLSearchParams(words) };
}

async function show() {
  leave.abort();
  leave = new AbortController();
  const { signal } = leave;
  const { page, parts, words } = address();
  for (const link of document.querySelectorAll("#nav a")) {
    if (link.hash === `#/${NAV_OF[page] || page}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const place = el("div", {}, el("p", { class: "soft" }, "Reading …"));
  put(document.getElementById("content"), place);
  titled(PAGES[page].title);
  scrollTo(0, 0);
  try {
    await PAGES[page].show(place, { parts, words, signal, titled });
  } catch (problem) {
    if (problem.name === "AbortError" || signal.aborted) return;
    if (problem.status === 401) put(place, closed());
    else put(place, el("h1", {}, PAGES[page].title), fault(problem));
  }
}

function titled(words) {
  document.title = `${words} · finegraft`;
}

function closed() {
  return [
    el("h1", {}, "This page is closed"),
    el(
      "p",
      {},
      "It opens with the address that ",
      el("code", {}, "finegraft ui"),
      " printed in its terminal. That address works once; press Enter there for a new one.",
    ),
  ];
}

async function start() {
  const token = /^#token=([\w-]+)/.exec(location.hash)?.[1];
  let refused = null;
  if (token) {
    history.replaceState(null, "", "#/runs");
    try {
      await api.post("/api/session", { token });
    } catch (problem) {
      refused = problem;
    }
  }
  try {
    const state = await api.get("/api/state");
    put(document.getElementById("another"), another());
    document.getElementById("where").textContent =
      `finegraft ${state.version} · ${state.workspace} · ${machine(state.machine)}`;
  } catch (problem) {
    put(document.getElementById("content"), closed(), fault(refused || problem));
    titled("closed");
    addEventListener("hashchange", () => location.reload(), { once: true });
    return;
  }
  addEventListener("hashchange", show);
  if (!location.hash) history.replaceState(null, "", "#/runs");
  await show();
}

function machine({ processor, cores, memory_bytes, gpus }) {
  const memory = `${Math.round(memory_bytes / 1e9)} GB`;
  const names = (gpus || []).map((gpu) => gpu.name || gpu);
  return [processor, `${cores} cores`, memory, ...names].filter(Boolean).join(", ");
}

/** An address for a second browser: each opens the page once. */
function another() {
  const place = el("div", {});
  const show = async () => {
    const { address } = await api.post("/api/session/new");
    put(place, command(address, "Opens this page once, in another browser on this machine"));
  };
  return [button("Another browser", show, { kind: "plain", where: place }), place];
}

start();
