// Try: the base and the tuned model answer the same words side by side.

import * as api from "./api.js";
import { keep, kept } from "./draft.js";
import { add, el, put } from "./dom.js";
import {
  badge,
  button,
  command,
  empty,
  fault,
  fold,
  labelled,
  options,
  progress,
} from "./parts.js";
import { beforeAfter } from "./run_parts.js";
import { clock, many } from "./words.js";

export const title = "Try";

const POLL_MS = 600;
const SAMPLING = [
  ["temperature", "Temperature", "0 takes the likeliest token", 0, 0, 5],
  ["top_p", "Top p", "share of likely tokens", 1, 0, 1],
  ["max_tokens", "Tokens", "longest answer", 128, 1, 100000],
  ["seed", "Seed", "the same again", "", 0, 2 ** 31],
];

export async function show(place, { words, signal, titled }) {
  const { runs } = await api.get("/api/runs", signal);
  const usable = runs.filter((run) => run.step > 0 && !["running", "waiting"].includes(run.state));
  const wanted = words.get("run");
  const trouble = el("div", {});
  const body = el("div", {});
  put(place, el("div", { class: "top" }, el("h1", {}, "Try")));
  if (!usable.length) {
    add(
      place,
      empty("No run to try yet.", [
        el("a", { href: "#/train" }, "Train one"),
        ", or type: ",
        el("code", {}, "finegraft quickstart"),
      ]),
    );
    return;
  }
  const choice = el(
    "select",
    {},
    options(
      usable.map((run) => run.name),
      wanted ?? usable[0].name,
    ),
  );
  const open = () => start(choice.value, { body, trouble, signal, titled });
  add(
    place,
    el(
      "div",
      { class: "inline card" },
      labelled("Run", choice, "its base and its adapter are opened once, for both sides"),
      button("Open", open, { kind: "main", busy: "Opening …", where: trouble }),
    ),
    trouble,
    body,
  );
  choice.addEventListener("change", () => {
    location.hash = `#/try${api.query({ run: choice.value })}`;
  });
  const tries = (await api.get("/api/try", signal).catch(() => ({ tries: [] }))).tries || [];
  const path = usable.find((run) => run.name === choice.value)?.path;
  const already = tries.find(
    (one) => [choice.value, path].includes(one.run) && one.state !== "failed",
  );
  if (already) await session(already, choice.value, { body, trouble, signal, titled });
  else put(body, await table(choice.value, signal));
}

async function start(name, around) {
  await session(await api.post("/api/try", { run: name }), name, around);
}

/** Wait until the models are open, then talk. */
async function session(first, name, { body, trouble, signal, titled }) {
  const line = progress("Opening the models");
  const began = performance.now();
  let now = first;
  put(body, line.node, command(now.command));
  while (now.state === "starting") {
    line.set(null, "Opening the base and the adapter …", clock((performance.now() - began) / 1000));
    if (!(await api.pause(POLL_MS, signal))) return;
    now = await api.get(`/api/try/${api.name(now.id)}`, signal);
  }
  if (now.state !== "ready") {
    put(body);
    put(
      trouble,
      fault(now.error || { message: "the models did not open" }),
      now.output ? el("pre", { class: "log" }, now.output) : null,
      command(now.command),
    );
    return;
  }
  titled(`${name} · Try`);
  put(
    body,
    talk(now, {
      signal,
      closed: async () => {
        await api.remove(`/api/try/${api.name(now.id)}`);
        put(body, el("p", { class: "soft" }, "The models are closed."));
      },
    }),
    await table(name, signal),
    command(now.command),
  );
}

async function table(name, signal) {
  const run = await api.get(`/api/runs/${api.name(name)}`, signal);
  return beforeAfter(run.before_after);
}

function pane(words) {
  const pace = el("span", { class: "pace" });
  const box = el("div", {
    class: "talk",
    tabindex: 0,
    role: "log",
    "aria-label": `${words} answers`,
  });
  const node = el(
    "section",
    { class: "pane", "aria-label": words },
    el("h3", {}, el("span", {}, words), pace),
    box,
  );
  const say = (text, kind) => {
    const low = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
    const said = add(box, el("p", { class: `said ${kind}` }, text)).lastChild;
    if (low) box.scrollTop = box.scrollHeight;
    return said;
  };
  const clear = () => {
    put(box);
    pace.textContent = "";
  };
  return { node, box, pace, say, clear, messages: [] };
}

function sampling() {
  const fields = SAMPLING.map(([key, words, help, value, least, most]) => {
    const control = el("input", {
      type: "text",
      inputmode: "decimal",
      value: String(kept(`try ${key}`, value)),
      "data-key": key,
    });
    const read = () => {
      const number = Number(control.value);
      const fine =
        (control.value === "" && key === "seed") ||
        (control.value.trim() !== "" &&
          number >= least &&
          number <= most &&
          (!["max_tokens", "seed"].includes(key) || Number.isInteger(number)));
      control.setAttribute("aria-invalid", String(!fine));
      if (!fine) throw new Error(`${words} is '${control.value}'; allowed: ${least} to ${most}`);
      keep(`try ${key}`, control.value);
      return control.value === "" ? undefined : number;
    };
    return { key, node: labelled(words, control, help), read };
  });
  const system = el("textarea", { rows: 2, value: kept("try system", "") });
  const node = fold("Sampling", [
    el(
      "div",
      { class: "sampling" },
      fields.map((one) => one.node),
    ),
    labelled("System message", system, "stands before the talk; empty: none"),
  ]);
  const read = () => {
    keep("try system", system.value);
    const values = Object.fromEntries(fields.map((one) => [one.key, one.read()]));
    return { values, system: system.value.trim() };
  };
  return { node, read };
}

function talk(open, { signal, closed }) {
  const titles = { base: "Base", tuned: "Tuned" };
  const sides = Object.fromEntries(
    (open.models || Object.keys(titles)).map((which) => [which, pane(titles[which] || which)]),
  );
  const settings = sampling();
  const trouble = el("div", {});
  const text = el("textarea", { rows: 2, placeholder: "Message", id: "message" });
  const stop = el("button", { type: "button", hidden: true }, "Stop");
  const send = el("button", { type: "submit", class: "main" }, "Send");
  let asked = null;
  const ask = async (event) => {
    event?.preventDefault();
    const words = text.value.trim();
    if (!words || asked) return;
    put(trouble);
    let read;
    try {
      read = settings.read();
    } catch (problem) {
      put(trouble, fault({ code: "Sampling", message: problem.message }));
      settings.node.open = true;
      return;
    }
    asked = new AbortController();
    const leave = () => asked?.abort();
    signal.addEventListener("abort", leave, { once: true });
    text.value = "";
    [stop.hidden, send.disabled] = [false, true];
    for (const which of Object.keys(sides))
      await answer(sides[which], which, words, open, read, asked.signal);
    signal.removeEventListener("abort", leave);
    asked = null;
    [stop.hidden, send.disabled] = [true, false];
    text.focus();
  };
  const form = el(
    "form",
    { class: "compose", on: { submit: ask } },
    labelled("Message", text, "Enter sends to both, Shift+Enter is a new line"),
    el("div", { class: "actions" }, stop, send),
  );
  stop.addEventListener("click", () => asked?.abort());
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
    if (event.key === "Escape") asked?.abort();
  });
  const reset = button("New talk", () => {
    asked?.abort();
    for (const one of Object.values(sides)) {
      one.messages.length = 0;
      one.clear();
    }
    text.focus();
  });
  return el(
    "section",
    { "aria-label": "Talk" },
    sides.base
      ? null
      : el(
          "p",
          { class: "soft" },
          "Every weight of this run was trained, so there is no base in it to compare with.",
        ),
    el(
      "div",
      { class: "panes" },
      Object.values(sides).map((one) => one.node),
    ),
    trouble,
    form,
    settings.node,
    el(
      "p",
      { class: "actions" },
      badge("ready", "good"),
      reset,
      button("Close the models", closed, { busy: "Closing …", where: trouble }),
    ),
  );
}

/** One side answers; what was said before goes along. */
async function answer(side, which, words, open, { values, system }, signal) {
  side.messages.push({ role: "user", content: words });
  side.say(words, "user");
  const node = side.say("thinking …", "waiting");
  const messages = system ? [{ role: "system", content: system }, ...side.messages] : side.messages;
  let said = "";
  let problem = null;
  const shown = (more) => {
    const low = side.box.scrollHeight - side.box.scrollTop - side.box.clientHeight < 60;
    said += more;
    node.className = "said";
    node.textContent = said;
    if (low) side.box.scrollTop = side.box.scrollHeight;
  };
  try {
    await api.events(
      `/api/try/${api.name(open.id)}/chat`,
      {
        token: ({ text }) => shown(text),
        error: ({ error }) => {
          problem = error;
        },
        end: ({ reason, tokens, seconds }) => {
          side.pace.textContent = [
            tokens ? many(tokens, "token") : "",
            seconds ? `${clock(seconds)}, ${Math.round(tokens / seconds)} tokens/s` : "",
            reason === "length" ? "cut at the longest answer" : "",
          ]
            .filter(Boolean)
            .join(" · ");
        },
      },
      { signal, value: { which, messages, ...values } },
    );
    if (!said) node.textContent = "(an empty answer)";
  } catch (failed) {
    if (failed.name === "AbortError") node.textContent = `${said} [stopped]`;
    else problem = failed;
  }
  if (problem) side.box.append(fault(problem));
  if (problem && !said) node.remove();
  if (said) side.messages.push({ role: "assistant", content: said });
  else side.messages.pop();
}
