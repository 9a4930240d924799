// Parts that several pages share: faults, command lines, tiles, tables, progress, notices, questions.

import { add, el, fresh, put } from "./dom.js";
import { count } from "./words.js";

const STATE_TONES = {
  running: "note",
  waiting: "note",
  starting: "note",
  ready: "good",
  finished: "good",
  done: "good",
  stopped: "warning",
  failed: "error",
  killed: "error",
};

/** A problem with its code, what is allowed and what helps. */
export function fault(problem) {
  const pairs = [
    ["allowed", problem.allowed],
    ["fix", problem.fix],
  ].filter(([, words]) => words);
  return el(
    "div",
    { class: "fault", role: "alert" },
    el("h3", {}, problem.code || "That did not work"),
    el("p", {}, problem.message || problem.found || String(problem)),
    pairs.length
      ? el(
          "dl",
          {},
          pairs.map(([title, words]) => [el("dt", {}, title), el("dd", {}, words)]),
        )
      : null,
  );
}

/** The command line that does the same, with a button that copies it. */
export function command(words, what = "The same in a terminal") {
  if (!words) return null;
  const button = el("button", { type: "button", "aria-label": `Copy: ${words}` }, "Copy");
  button.addEventListener("click", async () => {
    const worked = await copied(words, code);
    button.textContent = worked ? "Copied" : "Marked: Ctrl+C";
    setTimeout(() => {
      button.textContent = "Copy";
    }, 2500);
  });
  const code = el("code", {}, unbroken(words));
  return el(
    "div",
    { class: "command" },
    el("div", {}, el("span", { class: "what" }, what), code),
    button,
  );
}

/** Words that stay whole where a line ends, as long as they are short: no break within a flag. */
function unbroken(words) {
  return words
    .split(/( +)/)
    .map((word) => (/^\S{2,34}$/.test(word) ? el("span", { class: "word" }, word) : word));
}

async function copied(words, node) {
  try {
    await navigator.clipboard.writeText(words);
    return true;
  } catch {
    // no clipboard here, or not allowed: the words are marked instead
    getSelection().selectAllChildren(node);
    return false;
  }
}

export function badge(words, tone = STATE_TONES[words] || "") {
  return el("span", { class: `badge ${tone}` }, words);
}

/** Numbers side by side: [name, value, remark]. */
export function tiles(values) {
  return el(
    "dl",
    { class: "tiles" },
    values
      .filter(Boolean)
      .map(([title, value, remark]) =>
        el(
          "div",
          { class: "tile" },
          el("dt", {}, title),
          el(
            "dd",
            { class: typeof value === "string" && value.length > 12 ? "long" : null },
            value,
            remark ? el("small", {}, remark) : null,
          ),
        ),
      ),
  );
}

/**
 * A table that scrolls sideways where it is too wide. `head`: text, or {text, n: right, less: left
 * out where it is narrow, wide, name: a short one that should not break}. Cells: text or nodes.
 */
export function table(label, head, rows, kind = "") {
  const columns = head.map((h) => (typeof h === "string" ? { text: h } : h));
  const name = (c) =>
    [c.n && "n", c.less && "less", c.wide && "wide", c.name && "name"].filter(Boolean).join(" ") ||
    null;
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": label },
    el(
      "table",
      { class: kind || null },
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          columns.map((c) =>
            el(
              "th",
              { scope: "col", class: name(c) },
              c.hidden ? el("span", { class: "hush" }, c.text) : c.text,
            ),
          ),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((row) =>
          el(
            "tr",
            {},
            row.map((cell, i) => el("td", { class: name(columns[i]) }, cell)),
          ),
        ),
      ),
    ),
  );
}

export function empty(title, ...rest) {
  return el(
    "div",
    { class: "empty" },
    el("p", {}, el("strong", {}, title)),
    rest.map((r) => el("p", {}, r)),
  );
}

export function fold(summary, body, opened = false) {
  return el(
    "details",
    { open: opened },
    el("summary", {}, summary),
    el("div", { class: "inside" }, body),
  );
}

/** Progress in words and as a bar; a share of null is a bar that moves, still with words. */
export function progress(label) {
  const left = el("span", {});
  const right = el("span", { class: "soft" });
  const fill = el("div", { class: "fill" });
  const track = el(
    "div",
    {
      class: "track",
      role: "progressbar",
      "aria-label": label,
      "aria-valuemin": 0,
      "aria-valuemax": 100,
    },
    fill,
  );
  const node = el("div", { class: "progress" }, el("div", { class: "words" }, left, right), track);
  const set = (share, words, more = "", tone = "") => {
    left.textContent = words;
    right.textContent = more;
    track.setAttribute("aria-valuetext", [words, more].filter(Boolean).join(", "));
    track.classList.toggle("moving", share === null);
    if (share === null) track.removeAttribute("aria-valuenow");
    else track.setAttribute("aria-valuenow", String(Math.round(100 * share)));
    fill.className = `fill ${tone}`;
    fill.style.width = `${100 * Math.min(1, share || 0)}%`;
  };
  set(null, label);
  return { node, set };
}

/** Bars with names and values: [name, value, shown, tone]. */
export function bars(values) {
  const most = Math.max(...values.map(([, value]) => value), 0) || 1;
  return el(
    "div",
    { class: "bars" },
    values.map(([name, value, shown, tone]) => {
      const fill = el("div", { class: `fill ${tone || ""}` });
      fill.style.width = value > 0 ? `${Math.max((100 * value) / most, 0.8)}%` : "0";
      return [
        el("div", { class: "name" }, name),
        el("div", { class: "track" }, fill),
        el("div", { class: "value" }, shown ?? count(value)),
      ];
    }),
  );
}

/** A notice in the corner; with `action` ({words, act}) it stays three times as long. */
export function notice(words, action = null, seconds = action ? 20 : 6) {
  const node = el("div", { class: "toast" }, el("span", {}, words));
  const gone = () => node.remove();
  if (action) {
    add(
      node,
      el(
        "button",
        {
          type: "button",
          on: {
            click: () => {
              gone();
              action.act();
            },
          },
        },
        action.words,
      ),
    );
  }
  add(document.getElementById("toasts"), node);
  setTimeout(gone, seconds * 1000);
}

/** Ask before something is lost; true for yes. */
export function confirmed(title, words, yes) {
  return new Promise((answer) => {
    const id = fresh("ask");
    const box = el(
      "dialog",
      { "aria-labelledby": id },
      el("h2", { id }, title),
      el("p", {}, words),
      el(
        "div",
        { class: "actions" },
        el("button", { type: "button", on: { click: () => box.close("") } }, "Cancel"),
        el(
          "button",
          { type: "button", class: "danger", on: { click: () => box.close("yes") } },
          yes,
        ),
      ),
    );
    box.addEventListener("close", () => {
      box.remove();
      answer(box.returnValue === "yes");
    });
    document.body.append(box);
    box.showModal();
  });
}

/** A labelled control. */
export function labelled(title, control, help = "", kind = "") {
  const id = control.id || fresh("field");
  control.id = id;
  const told = help ? el("p", { class: "help", id: `${id}-help` }, help) : null;
  if (told) control.setAttribute("aria-describedby", told.id);
  const label = el("label", { for: id }, title);
  return el("div", { class: `field ${kind}` }, label, control, told);
}

export function options(values, chosen) {
  return values.map((v) => {
    const [value, words] = Array.isArray(v) ? v : [v, v];
    return el("option", { value, selected: value === chosen }, words);
  });
}

/** A button that says what it does meanwhile, and shows in `where` what went wrong. `enabled()`: afterwards. */
export function button(
  words,
  act,
  { kind = "", busy = "…", where = null, enabled = null, ...props } = {},
) {
  const node = el("button", { type: "button", class: kind || null, ...props }, words);
  node.addEventListener("click", async () => {
    node.disabled = true;
    node.textContent = busy === "…" ? `${words} …` : busy;
    if (where) put(where);
    try {
      await act();
    } catch (problem) {
      if (problem.name !== "AbortError")
        where ? put(where, fault(problem)) : notice(problem.message);
    } finally {
      node.disabled = enabled ? !enabled() : false;
      node.textContent = words;
      if (document.activeElement === document.body && node.isConnected)
        node.focus({ preventScroll: true });
    }
  });
  return node;
}
