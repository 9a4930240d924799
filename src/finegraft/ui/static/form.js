// The training form, made from the schema: a control for each key, its help, its default as the
// placeholder. Only what is set is sent; an empty control means the default.

import { el, fresh } from "./dom.js";
import { options } from "./parts.js";
import { plain } from "./words.js";

/** What kind of value a property of the JSON schema takes. */
export function kindOf(property) {
  const types = (property.anyOf || [property]).filter((one) => one.type !== "null");
  const values = types.find((one) => one.enum)?.enum;
  if (values) return { kind: "choice", values };
  if (types.some((one) => one.type === "boolean")) return { kind: "boolean" };
  const of = (name) => types.find((one) => one.type === name);
  if (of("array")) return { kind: of("string") ? "text or list" : "list" };
  if (of("integer") && !of("number")) return { kind: "integer", ...limits(of("integer")) };
  if (of("number")) return { kind: "number", ...limits(of("number")) };
  if (of("object")) return { kind: "pairs" };
  return { kind: "text" };
}

const limits = ({ minimum, exclusiveMinimum, maximum, exclusiveMaximum }) => ({
  minimum,
  exclusiveMinimum,
  maximum,
  exclusiveMaximum,
});

/** The default of a key for a task. */
export function defaultOf(property, task = "causal") {
  const own = task.endsWith("classification") ? property.classification : null;
  const tokens = task === "token_classification" ? property.token_classification : null;
  return tokens ?? own ?? property.default;
}

/** Whether a key means something in a task. */
export const belongs = (property, task) =>
  !property.task || (task || "causal").endsWith(property.task);

/** Text of a control as a value; throws words for the person when it is none. */
export function parsed(text, { kind, ...limit }) {
  const words = text.trim();
  if (words === "") return undefined;
  if (kind === "boolean") return words === "yes";
  if (kind === "integer" || kind === "number") return numbered(words, kind, limit);
  if (kind === "list") return split(words);
  if (kind === "text or list") return words.includes(",") ? split(words) : words;
  if (kind === "pairs") return pairs(words);
  return words;
}

function numbered(words, kind, limit) {
  const value = Number(words);
  if (!Number.isFinite(value)) throw new Error(`'${words}' is not a number`);
  if (kind === "integer" && !Number.isInteger(value))
    throw new Error(`${words} is not a whole number`);
  const { minimum, exclusiveMinimum, maximum, exclusiveMaximum } = limit;
  if (minimum !== undefined && value < minimum) throw new Error(`at least ${minimum}`);
  if (exclusiveMinimum !== undefined && value <= exclusiveMinimum)
    throw new Error(`more than ${exclusiveMinimum}`);
  if (maximum !== undefined && value > maximum) throw new Error(`at most ${maximum}`);
  if (exclusiveMaximum !== undefined && value >= exclusiveMaximum)
    throw new Error(`less than ${exclusiveMaximum}`);
  return value;
}

const split = (words) =>
  words
    .split(",")
    .map((part) => part.trim())
    .filter(Boolean);

function pairs(words) {
  if (words.startsWith("{")) {
    try {
      return JSON.parse(words);
    } catch {
      throw new Error("it begins with { and is not JSON");
    }
  }
  const out = {};
  for (const part of split(words)) {
    const at = part.indexOf("=");
    if (at < 1) throw new Error(`'${part}' is not name=value`);
    const value = part.slice(at + 1).trim();
    out[part.slice(0, at).trim()] =
      value !== "" && Number.isFinite(Number(value)) ? Number(value) : value;
  }
  return out;
}

/** A value as its control shows it. */
export function written(value) {
  if (value === undefined || value === null) return "";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value))
    return value.every((v) => typeof v !== "object") ? value.join(", ") : JSON.stringify(value);
  if (typeof value === "object")
    return Object.entries(value)
      .map(([k, v]) => `${k}=${v}`)
      .join(", ");
  return String(value);
}

/**
 * A field: {node, read, fill, wrong, key}. `changed()` is told when its value has changed;
 * `suggestions` are offered while typing.
 */
export function field(
  key,
  property,
  { changed, required = false, suggestions = null, task = "causal" },
) {
  const type = kindOf(property);
  const id = fresh(key);
  const told = placeholder(defaultOf(property, task), required);
  const control = made(type, id, told, suggestions);
  const list =
    suggestions && type.kind !== "choice"
      ? el("datalist", { id: `${id}-list` }, options(suggestions))
      : null;
  const wrong = el("p", { class: "wrong", id: `${id}-wrong`, hidden: true });
  control.setAttribute("aria-describedby", `${id}-help ${id}-wrong`);
  if (required) control.setAttribute("aria-required", "true");
  const node = el(
    "div",
    { class: "field", "data-key": key },
    el("label", { for: id }, key),
    control,
    list,
    wrong,
    el("p", { class: "help", id: `${id}-help` }, property.description || ""),
  );
  const tell = (words) => {
    wrong.textContent = words || "";
    wrong.hidden = !words;
    control.setAttribute("aria-invalid", words ? "true" : "false");
  };
  const read = () => {
    try {
      const value = parsed(control.value, type);
      tell("");
      return value;
    } catch (problem) {
      tell(problem.message);
      throw problem;
    }
  };
  const fill = (value) => {
    control.value = written(value);
    node.classList.toggle("changed", control.value !== "");
  };
  const given = () => {
    node.classList.toggle("changed", control.value.trim() !== "");
    changed(key);
  };
  control.addEventListener("input", given);
  return { key, node, control, read, fill, wrong: tell };
}

function placeholder(value, required) {
  if (required) return "needed";
  if (value === null || value === undefined || value === "") return "not set";
  return Array.isArray(value) && !value.length ? "none" : plainDefault(value);
}

const plainDefault = (value) => (typeof value === "number" ? String(value) : plain(value));

function made({ kind, values }, id, told, suggestions) {
  if (kind === "choice" || kind === "boolean") {
    const all = kind === "boolean" ? ["yes", "no"] : values;
    return el("select", { id }, options([["", `default: ${told}`], ...all.map((v) => [v, v])]));
  }
  const numeric = kind === "integer" || kind === "number";
  return el("input", {
    id,
    type: "text",
    placeholder: told,
    autocomplete: "off",
    spellcheck: "false",
    inputmode: numeric ? "decimal" : null,
    list: suggestions ? `${id}-list` : null,
  });
}

/** Show the defaults of another task. */
export function retask(fields, properties, task) {
  for (const one of fields) {
    const property = properties[one.key];
    const told = placeholder(
      defaultOf(property, task),
      one.control.getAttribute("aria-required") === "true",
    );
    if (one.control.tagName === "SELECT") one.control.options[0].textContent = `default: ${told}`;
    else one.control.placeholder = told;
    one.node.hidden = !belongs(property, task);
  }
}

/** Mark the fields that a fault of the server names; true where it names just one. */
export function place(fields, problem) {
  const by = new Map(fields.map((one) => [one.key, one]));
  by.set("output", by.get("name")); // the run's name stands for its folder
  const named = problem.problems.filter(({ key }) => key);
  const told = named.length
    ? named
    : problem.keys.map((key) => ({ key, message: problem.message }));
  const found = told.filter(({ key }) => by.has(key) && !by.get(key).node.hidden);
  for (const { key, message } of found) by.get(key).wrong(message.replace(/^the form: /, ""));
  return found.length === 1;
}
