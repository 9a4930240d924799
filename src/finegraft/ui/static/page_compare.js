// Compare: the curves of several runs in one chart, and what differs between two of them.

import * as api from "./api.js";
import { lineChart } from "./chart.js";
import { el, put } from "./dom.js";
import { curves } from "./live.js";
import { badge, command, empty, fault, labelled, options, table } from "./parts.js";
import { bytes, clock, figure, finely, loss, plain } from "./words.js";

export const title = "Compare";

const MOST = 6; // tones of a chart
const AGAIN_MS = 2000;
const CHARTS = [
  ["loss", "Loss", { log: true, tall: 260 }],
  ["eval_loss", "Held-out loss", { log: true }],
  ["grad_norm", "Gradient norm", { log: true }],
  ["learning_rate", "Learning rate", {}],
  ["tokens_per_second", "Tokens a second", {}],
  ["memory_bytes", "Memory", { format: finely }],
];
const WRITES = { "peak memory": bytes, seconds: clock, "last loss": loss, "held-out loss": loss };

export async function show(place, { words, signal, titled }) {
  const names = (words.get("runs") || "").split(",").filter(Boolean).map(decodeURIComponent);
  put(
    place,
    el(
      "div",
      { class: "top" },
      el("h1", {}, "Compare"),
      el("a", { class: "button", href: "#/runs" }, "Choose runs"),
    ),
  );
  if (names.length < 2) {
    place.append(empty("Nothing to compare yet.", "Tick two runs or more in the list of runs."));
    return;
  }
  titled(`${names.slice(0, 3).join(", ")} · Compare`);
  const drawn = charts();
  const sides = el("section", { "aria-label": "Differences" });
  if (names.length > MOST)
    place.append(
      el("p", { class: "warning" }, `The first ${MOST} of ${names.length} runs are drawn.`),
    );
  place.append(drawn.node, sides);
  await pairs(sides, names, signal);
  for (let before = ""; ;) {
    const all = await Promise.all(names.slice(0, MOST).map((name) => curves(name, signal)));
    const now = all.map((one) => one.offset).join();
    if (now !== before)
      drawn.set(
        names,
        all.map((one) => one.series),
      );
    before = now;
    if (!(await api.pause(AGAIN_MS, signal))) return;
  }
}

function charts() {
  const made = CHARTS.map(([key, words, settings]) => [
    key,
    lineChart(words, { tall: 160, ...settings }),
  ]);
  made[0][1].node.classList.add("first");
  const node = el(
    "div",
    { class: "charts" },
    made.map(([, chart]) => chart.node),
  );
  const set = (names, all) => {
    for (const [key, chart] of made) {
      chart.set(
        all.map((series, i) => ({
          name: names[i],
          points: series[key] || [],
          tone: i,
          spots: key === "eval_loss" && (series[key] || []).length < 3,
        })),
      );
    }
  };
  return { node, set };
}

async function pairs(place, names, signal) {
  const found = el("div", {});
  const choose = (at) => el("select", {}, options(names, names[at]));
  const [a, b] = [choose(0), choose(1)];
  const look = async () => {
    put(found, el("p", { class: "soft" }, "Comparing …"));
    try {
      put(
        found,
        differences(
          await api.get(`/api/compare${api.query({ a: a.value, b: b.value })}`, signal),
          a.value,
          b.value,
        ),
      );
    } catch (problem) {
      if (problem.name === "AbortError") throw problem;
      put(found, fault(problem));
    }
  };
  for (const one of [a, b]) one.addEventListener("change", look);
  put(
    place,
    el("h2", {}, "What differs"),
    names.length > 2
      ? el("div", { class: "inline" }, labelled("This run", a), labelled("and this one", b))
      : null,
    found,
  );
  await look();
}

function differences(found, a, b) {
  const heads = (first, last = []) => [
    first,
    { text: a, wide: true },
    { text: b, wide: true },
    ...last,
  ];
  const rows = found.differences.map((one) => [
    [badge(one.likely ? "likely" : "unlikely", one.likely ? "warning" : ""), " ", one.name],
    plain(one.a),
    plain(one.b),
    one.reason,
  ]);
  const results = found.results.map((one) => {
    const write =
      WRITES[one.name] || ((value) => (typeof value === "number" ? figure(value) : plain(value)));
    return [
      one.name,
      one.a === null ? plain(null) : write(one.a),
      one.b === null ? plain(null) : write(one.b),
    ];
  });
  return [
    el("p", {}, el("strong", {}, found.verdict)),
    rows.length
      ? table("What differs", heads("difference", [{ text: "why it matters", wide: true }]), rows)
      : null,
    el("h3", {}, "Results"),
    table("Results", heads("result"), results),
    found.apart_from_step ? el("p", {}, `The losses part at step ${found.apart_from_step}.`) : null,
    command(found.command),
  ];
}
