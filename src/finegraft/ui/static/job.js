// A job: a child process of the command line. Its panel says what runs, how long, what it told, and
// stops it; it goes on when the page is left and is found again by `running`.

import * as api from "./api.js";
import { add, el, put } from "./dom.js";
import { badge, button, command, fault, fold, progress } from "./parts.js";
import { clock } from "./words.js";

const MOST_LETTERS = 8000;

/** The newest job of a kind that still runs, or null. */
export async function running(kind, signal) {
  const { jobs } = await api.get(`/api/jobs?kind=${kind}`, signal);
  return jobs.find((job) => job.state === "running") || null;
}

/**
 * Show a job in `place` until it ends.
 *
 * `says`: what it does ("Checking rows"). `ended(job)`: what its result looks like (a node), for a
 * job that is done. Resolves to the ended job, or null when the page was left.
 */
export async function follow(place, started, { says, signal, ended = () => null }) {
  const line = progress(says);
  const log = el("pre", { class: "log", tabindex: 0, "aria-label": "Output" });
  const told = fold("Output", log);
  told.hidden = true;
  const stop = button("Stop", () => api.post(`/api/jobs/${api.name(started.id)}/stop`), {
    busy: "Stopping …",
  });
  const began = performance.now() - 1000 * (started.seconds || 0);
  let last = "";
  const tick = () => line.set(null, last || `${says} …`, clock((performance.now() - began) / 1000));
  put(
    place,
    el(
      "section",
      { class: "card", "aria-label": says },
      line.node,
      el("div", { class: "actions" }, stop),
      told,
      command(started.command),
    ),
  );
  tick();
  const timer = setInterval(tick, 500);
  const show = (text) => {
    const low = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    log.textContent = (log.textContent + text).slice(-MOST_LETTERS);
    told.hidden = false;
    last = newest(log.textContent) || last;
    if (low) log.scrollTop = log.scrollHeight;
  };
  try {
    const job = await watched(started, show, signal);
    if (job) put(place, closing(job, says, ended));
    return job;
  } finally {
    clearInterval(timer);
  }
}

/** Stream until the end; a broken stream is taken up again. */
async function watched(started, show, signal) {
  const path = `/api/jobs/${api.name(started.id)}`;
  for (;;) {
    let job = null;
    let fresh = true;
    const output = ({ text }) => {
      show(text);
      fresh = false;
    };
    try {
      await api.events(
        `${path}/stream`,
        {
          output,
          end: (data) => {
            job = data.job || data;
          },
        },
        { signal },
      );
    } catch (problem) {
      if (problem.name === "AbortError") return null;
      if (problem.status && problem.status < 500) throw problem;
    }
    if (job) return job;
    if (!(await api.pause(fresh ? 1500 : 300, signal))) return null;
    const now = await api.get(path, signal).catch(() => null);
    if (now && now.state !== "running") return now;
  }
}

function newest(text) {
  const lines = text
    .split(/[\r\n]+/)
    .map((l) => l.trim())
    .filter(Boolean);
  const found = lines.at(-1) || "";
  return found.length > 90 ? `${found.slice(0, 89)}…` : found;
}

/** How a job ended. */
export function closing(job, says, ended = () => null) {
  const head = el(
    "p",
    { class: "actions" },
    badge(job.state),
    el("span", {}, says),
    el("span", { class: "soft" }, clock(job.seconds)),
  );
  const shown = job.state === "done" ? ended(job) : null;
  const card = el("section", { class: "card", "aria-label": says }, head);
  if (job.state === "failed") {
    add(
      card,
      fault(
        job.error || {
          message: newest(job.output || "") || `it ended with status ${job.exit_status}`,
        },
      ),
    );
  }
  const output = (job.output || "").trim();
  if (output)
    add(
      card,
      fold("Output", el("pre", { class: "log", tabindex: 0, "aria-label": "Output" }, output)),
    );
  add(card, command(job.command));
  return [card, shown];
}
