// Models: what is in the caches, with sizes; fetch and remove.

import * as api from "./api.js";
import { el, put } from "./dom.js";
import { follow, running } from "./job.js";
import {
  badge,
  button,
  command,
  confirmed,
  empty,
  labelled,
  notice,
  table,
  tiles,
} from "./parts.js";
import { bytes, count } from "./words.js";

export const title = "Models";

export async function show(place, { signal }) {
  const list = el("section", { "aria-label": "Models" });
  const jobs = el("div", {});
  const name = el("input", {
    type: "text",
    placeholder: "owner/name or demo",
    spellcheck: "false",
    autocomplete: "off",
  });
  const draw = async () => put(list, view(await api.get("/api/models", signal), draw, jobs));
  const after = (job) =>
    follow(jobs, job, { says: `Fetching ${job.model || name.value || "the model"}`, signal }).then(
      draw,
    );
  const fetching = async () => {
    if (!name.value.trim()) return void name.focus();
    await after(await api.post("/api/jobs", { kind: "fetch", model: name.value.trim() }));
  };
  const go = button("Fetch", fetching, { kind: "main", busy: "Fetching …", where: jobs });
  name.addEventListener("keydown", (event) => event.key === "Enter" && go.click());
  put(
    place,
    el("div", { class: "top" }, el("h1", {}, "Models")),
    el(
      "div",
      { class: "inline card" },
      labelled("Fetch a model", name, "a name on the hub, or one of the packaged models"),
      go,
    ),
    jobs,
    list,
  );
  await draw();
  const now = await running("fetch", signal);
  if (now) await after(now);
}

function view({ models, command: words }, draw, jobs) {
  if (!models.length)
    return empty("No models here yet.", [
      "The first training fetches its base, or type: ",
      el("code", {}, "finegraft quickstart"),
    ]);
  const total = models.reduce((all, one) => all + (one.size_bytes || 0), 0);
  const rows = [...models]
    .sort((a, b) => (b.size_bytes || 0) - (a.size_bytes || 0))
    .map((one) => [
      el("strong", {}, one.name),
      one.kind ? badge(one.kind) : "",
      bytes(one.size_bytes),
      (one.used_by || []).length
        ? one.used_by.map((run, i) => [
            i ? ", " : "",
            el(
              "a",
              { href: `#/run/${api.name(String(run).replace(/^runs\//, ""))}` },
              String(run).replace(/^runs\//, ""),
            ),
          ])
        : el("span", { class: "soft" }, "no run"),
      el("code", { class: "small" }, one.path || ""),
      one.removable
        ? removal(one, draw, jobs)
        : el("span", { class: "soft small" }, one.why || "stays"),
    ]);
  return [
    tiles([
      ["models", count(models.length)],
      ["together", bytes(total)],
    ]),
    table(
      "Models",
      [
        "model",
        "kind",
        { text: "size", n: true },
        { text: "used by", wide: true },
        { text: "folder", wide: true },
        { text: "remove", hidden: true },
      ],
      rows,
    ),
    command(words),
  ];
}

function removal(one, draw, jobs) {
  const act = async () => {
    const used = (one.used_by || []).length ? ` Runs that need it: ${one.used_by.join(", ")}.` : "";
    if (
      !(await confirmed(
        `Remove ${one.name}?`,
        `${bytes(one.size_bytes)} are freed; to use it again it has to be fetched again.${used}`,
        "Remove",
      ))
    )
      return;
    await api.remove(`/api/models/${api.name(one.name)}`);
    notice(`${one.name} is removed.`);
    await draw();
  };
  return button("Remove", act, {
    kind: "danger",
    busy: "Removing …",
    where: jobs,
    "aria-label": `Remove ${one.name}`,
  });
}
