// Elements from plain data. Text only ever enters through textContent, so nothing that a file, a
// model or a command said is read as markup.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Make an element. `props`: "class", "on" ({event: function}), "data-*", "aria-*" and attributes;
 * true sets an empty attribute, false, null and undefined leave it out; "value" and "checked" are
 * set as properties. Children: nodes, text, lists of both; null and false are left out.
 */
export function el(tag, props = {}, ...children) {
  return filled(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), props, children);
}

function filled(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (name === "on") {
      for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    } else if (name === "value" || name === "checked") {
      node[name] = value;
    } else if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(name, value === true ? "" : String(value));
    }
  }
  add(node, ...children);
  return node;
}

export function add(node, ...children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : String(child));
  }
  return node;
}

/** Replace what is in a node. */
export function put(node, ...children) {
  node.replaceChildren();
  return add(node, ...children);
}

let counter = 0;

/** A name that no other element has. */
export function fresh(stem) {
  counter += 1;
  return `${stem}-${counter}`;
}

/** Call `act` once the calls have paused for so many milliseconds. */
export function debounced(act, ms) {
  let timer = 0;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...args), ms);
  };
}
