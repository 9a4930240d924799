// A line chart: several series over steps, drawn as SVG at the width that there is, read out with the
// pointer or the arrow keys. Series: {name, points: [[x, y], ...] with x rising, tone: 0 to 5,
// spots: single marks instead of a line}. Several lines differ by a letter
// at their ends and, where they are not dense, by dashes, as well as by colour.

import { el, put, svg } from "./dom.js";
import { count, figure } from "./words.js";
import { logTicks, nearest, range, thinned, ticks } from "./scale.js";

const LEFT = 54;
const RIGHT = 16;
const TOP = 8;
const BOTTOM = 24;
const FEW = 150; // points up to which dashes can be told from noise
const DASHES = [null, "7 3", "2 3", "9 3 2 3", "4 2", "1 3"];

/**
 * Make a chart; `set(series)` draws, as often as wanted: at most once a frame.
 *
 * @param {string} title
 * @param {{format?: Function, log?: boolean, tall?: number, empty?: string}} settings `log` offers a
 *   logarithmic axis; `format` writes a value.
 */
export function lineChart(
  title,
  { format = figure, log = false, tall = 170, empty = "no values yet" } = {},
) {
  const state = { series: [], shown: [], xs: [], at: null, log: false, wide: 0, due: false };
  const plot = el("div", {
    class: "plot",
    role: "slider",
    tabindex: 0,
    "aria-label": `${title}, by step`,
  });
  const read = el("span", { class: "read" });
  const legend = el("div", { class: "legend" });
  const toggle = log ? el("button", { type: "button", "aria-pressed": "false" }, "log") : null;
  toggle?.setAttribute("aria-label", `log axis of ${title}`);
  const node = el(
    "figure",
    { class: "chart" },
    el("figcaption", {}, el("span", {}, title), toggle, read),
    plot,
    legend,
  );

  const draw = () => {
    state.due = false;
    state.wide = plot.clientWidth || 320;
    keep(state);
    paint(plot, state, { title, format, tall, empty });
    const several = state.shown.filter((one) => !one.spots).length > 1;
    put(
      legend,
      state.shown.map((one) => entry(one, format, several && !one.spots ? `${named(one)} ` : "")),
    );
    tell();
  };
  const soon = () => {
    if (state.due) return;
    state.due = true;
    requestAnimationFrame(draw);
  };
  const tell = () => {
    const x = state.at === null ? null : state.xs[state.at];
    const words =
      x === null || x === undefined ? "" : `step ${count(x)}: ${values(state.shown, x, format)}`;
    read.textContent = words;
    plot.setAttribute("aria-valuemin", String(state.xs[0] ?? 0));
    plot.setAttribute("aria-valuemax", String(state.xs.at(-1) ?? 0));
    plot.setAttribute("aria-valuenow", String(x ?? state.xs.at(-1) ?? 0));
    plot.setAttribute("aria-valuetext", words || summary(state.shown, format) || empty);
  };
  const move = (at) => {
    state.at = at;
    cursor(plot, state);
    tell();
  };
  toggle?.addEventListener("click", () => {
    state.log = !state.log;
    toggle.setAttribute("aria-pressed", String(state.log));
    draw();
  });
  listen(plot, state, move);
  let seen = 0;
  new ResizeObserver(([entry]) => {
    // a chart that grew because it was drawn is not drawn again
    if (Math.abs(entry.contentRect.width - seen) > 1) soon();
    seen = entry.contentRect.width;
  }).observe(plot);
  return {
    node,
    set: (series) => {
      state.series = series;
      soon();
    },
  };
}

/** What can be drawn of the series, and all their steps. */
function keep(state) {
  const fine = ([x, y]) =>
    Number.isFinite(x) && y !== null && Number.isFinite(y) && (y > 0 || !state.log);
  state.shown = state.series
    .map((one) => ({ ...one, points: one.points.filter(fine) }))
    .filter((one) => one.points.length);
  const all = new Set();
  for (const one of state.shown) for (const [x] of one.points) all.add(x);
  state.xs = [...all].sort((a, b) => a - b);
  if (state.at !== null && state.at >= state.xs.length) state.at = null;
}

function listen(plot, state, move) {
  const point = (event) => {
    if (!state.xs.length || !state.toStep) return;
    const { left } = plot.getBoundingClientRect();
    move(nearest(state.xs, state.toStep(event.clientX - left)));
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", () => move(null));
  plot.addEventListener("blur", () => move(null));
  plot.addEventListener("keydown", (event) => {
    const last = state.xs.length - 1;
    const at = state.at ?? last;
    const page = Math.max(1, Math.round(last / 10));
    const to = {
      ArrowLeft: at - 1,
      ArrowDown: at - 1,
      ArrowRight: at + 1,
      ArrowUp: at + 1,
      PageDown: at - page,
      PageUp: at + page,
      Home: 0,
      End: last,
    }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    move(Math.min(last, Math.max(0, to)));
  });
}

function paint(plot, state, { format, tall, empty }) {
  const drawing = svg("svg", {
    height: tall,
    viewBox: `0 0 ${state.wide} ${tall}`,
    "aria-hidden": "true",
  });
  const ys = range(each(state.shown), state.log);
  if (!ys) {
    state.toStep = null;
    drawing.append(svg("text", { x: state.wide / 2, y: tall / 2, "text-anchor": "middle" }, empty));
    put(plot, drawing);
    return;
  }
  const [x0, x1] = [
    state.xs[0],
    state.xs.at(-1) === state.xs[0] ? state.xs[0] + 1 : state.xs.at(-1),
  ];
  const [w, h] = [state.wide - LEFT - RIGHT, tall - TOP - BOTTOM];
  const scale = state.log ? Math.log : Number;
  const [y0, y1] = ys.map(scale);
  const px = (x) => LEFT + (w * (x - x0)) / (x1 - x0);
  const py = (y) => TOP + (h * (y1 - scale(y))) / (y1 - y0);
  state.toStep = (at) => x0 + ((at - LEFT) / w) * (x1 - x0);
  Object.assign(state, { px, py, bottom: TOP + h });
  drawing.append(...axes(state, ys, [x0, x1], tall, format));
  const lines = state.shown.filter((one) => !one.spots);
  for (const one of state.shown)
    drawing.append(one.spots ? spots(one, px, py) : line(one, px, py, w));
  if (lines.length > 1) drawing.append(...lines.map((one) => letter(one, px, py)));
  drawing.append(svg("g", { class: "reading" }));
  put(plot, drawing);
  cursor(plot, state);
}

function* each(series) {
  for (const one of series) for (const [, y] of one.points) yield y;
}

function axes(state, [low, high], [x0, x1], tall, format) {
  const wanted = Math.max(2, Math.round((tall - TOP - BOTTOM) / 38));
  const values = state.log ? logTicks(low, high, wanted) : ticks(low, high, wanted);
  const right = state.wide - RIGHT;
  const out = values.flatMap((value) => {
    const y = state.py(value).toFixed(1);
    return [
      svg("line", { class: "gridline", x1: LEFT, x2: right, y1: y, y2: y }),
      svg("text", { x: LEFT - 7, y: Number(y) + 4, "text-anchor": "end" }, format(value)),
    ];
  });
  out.push(svg("line", { class: "axis", x1: LEFT, x2: right, y1: state.bottom, y2: state.bottom }));
  for (const value of ticks(x0, x1, Math.max(2, Math.round(state.wide / 90)), true)) {
    const x = state.px(value);
    const edge = x + 4 * count(value).length > state.wide - 2;
    out.push(
      svg(
        "text",
        {
          x: edge ? state.wide - 2 : x.toFixed(1),
          y: state.bottom + 16,
          "text-anchor": edge ? "end" : "middle",
        },
        count(value),
      ),
    );
  }
  return out;
}

function line(one, px, py, wide) {
  const points = thinned(one.points, 2 * wide);
  const tone = `t${one.tone || 0}`;
  if (points.length === 1)
    return svg("circle", {
      class: `spot ${tone}`,
      cx: px(points[0][0]),
      cy: py(points[0][1]),
      r: 3.5,
    });
  const dense = one.points.length > FEW;
  return svg("polyline", {
    class: `line ${tone}${dense ? " dense" : ""}`,
    "stroke-dasharray": dashes(one),
    points: points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" "),
  });
}

const dashes = (one) => (one.points.length > FEW ? null : DASHES[one.tone || 0]);

/** The letter of a series, as the legend has it. */
const named = (one) => "ABCDEF"[one.tone || 0];

function letter(one, px, py) {
  const [x, y] = one.points.at(-1);
  return svg(
    "text",
    { class: `letter t${one.tone || 0}`, x: (px(x) + 3).toFixed(1), y: (py(y) + 4).toFixed(1) },
    named(one),
  );
}

function spots(one, px, py) {
  return svg(
    "g",
    {},
    one.points.map(([x, y]) =>
      svg("circle", {
        class: `spot t${one.tone || 0}`,
        cx: px(x).toFixed(1),
        cy: py(y).toFixed(1),
        r: 4,
      }),
    ),
  );
}

/** The line at the step that is read, and a mark on each series there. */
function cursor(plot, state) {
  const group = plot.querySelector(".reading");
  if (!group) return;
  const x = state.at === null ? undefined : state.xs[state.at];
  if (x === undefined) return void put(group);
  const at = state.px(x);
  put(
    group,
    svg("line", { class: "cursor", x1: at, x2: at, y1: TOP, y2: state.bottom }),
    state.shown.map((one) => {
      const value = valueAt(one, x);
      return value === null
        ? null
        : svg("circle", { class: `at t${one.tone || 0}`, cx: at, cy: state.py(value), r: 3.5 });
    }),
  );
}

function valueAt(one, x) {
  const places = one.points;
  const at = nearest(
    places.map((p) => p[0]),
    x,
  );
  return places[at][0] === x ? places[at][1] : null;
}

function values(series, x, format) {
  const found = series
    .map((one) => [one.name, valueAt(one, x)])
    .filter(([, value]) => value !== null);
  return found
    .map(([name, value]) => (series.length > 1 ? `${name} ${format(value)}` : format(value)))
    .join(", ");
}

function summary(series, format) {
  return series
    .map((one) => `${one.name} from ${format(one.points[0][1])} to ${format(one.points.at(-1)[1])}`)
    .join("; ");
}

function entry(one, format, mark) {
  const tone = `t${one.tone || 0}`;
  const sign = one.spots
    ? svg("circle", { class: `spot ${tone}`, cx: 13, cy: 5, r: 4 })
    : svg("line", {
        class: `line ${tone}`,
        x1: 0,
        x2: 27,
        y1: 5,
        y2: 5,
        "stroke-dasharray": dashes(one),
      });
  const holder = svg("svg", { viewBox: "0 0 27 10", "aria-hidden": "true" }, sign);
  const [first, last] = [one.points[0][1], one.points.at(-1)[1]];
  return el("span", {}, holder, el("b", {}, mark, one.name), ` ${format(first)} → ${format(last)}`);
}
