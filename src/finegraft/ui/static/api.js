// The server, over fetch. Every failure is a Fault with code, message, allowed and fix.

export class Fault extends Error {
  constructor({ code, message, found, allowed, fix, key, keys, problems }, status) {
    super(message || found || `the server answered ${status}`);
    Object.assign(this, {
      code,
      allowed,
      fix,
      keys: keys || (key ? [key] : []),
      problems: problems || [],
      status,
    });
  }
}

export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", ...options });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Fault(
      {
        message: "the server does not answer",
        fix: "see whether `finegraft ui` still runs in its terminal; runs go on without it",
      },
      0,
    );
  }
  if (!answer.ok) throw new Fault(await body(answer), answer.status);
  return answer;
}

async function body(answer) {
  try {
    return (await answer.json()).error || {};
  } catch {
    return {};
  }
}

async function json(path, options) {
  const answer = await ask(path, options);
  return answer.status === 204 ? null : answer.json();
}

const send = (method, value, signal) => ({
  method,
  signal,
  headers: value === undefined ? {} : { "Content-Type": "application/json" },
  body: value === undefined ? undefined : JSON.stringify(value),
});

export const get = (path, signal) => json(path, { signal });
export const post = (path, value = {}, signal) => json(path, send("POST", value, signal));
export const put = (path, value) => json(path, send("PUT", value));
export const remove = (path) => json(path, { method: "DELETE" });
export const name = encodeURIComponent;

/** The words of a query, left out where they are null or empty. */
export function query(values) {
  const kept = Object.entries(values).filter(([, v]) => v !== null && v !== undefined && v !== "");
  return kept.length ? `?${new URLSearchParams(kept)}` : "";
}

/** Upload a file; `progress(share)` is told while it goes. fetch cannot tell, XMLHttpRequest can. */
export function upload(path, file, progress) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("PUT", path);
    request.upload.onprogress = (e) => e.lengthComputable && progress(e.loaded / e.total);
    request.onerror = () => failed(new Fault({ message: `${file.name} could not be sent` }, 0));
    request.onload = () => {
      let value = {};
      try {
        value = JSON.parse(request.responseText);
      } catch {
        /* an answer without a body */
      }
      if (request.status < 300) done(value);
      else failed(new Fault(value.error || {}, request.status));
    };
    request.send(file);
  });
}

/** Read server-sent events until they end: `on[event](data)` for each. */
export async function events(path, on, { signal, value } = {}) {
  const answer = await ask(path, value === undefined ? { signal } : send("POST", value, signal));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value: text, done } = await reader.read();
    if (done) return;
    const blocks = (rest + text).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) tell(block, on);
  }
}

function tell(block, on) {
  let event = "message";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  if (data.length && on[event]) on[event](JSON.parse(data.join("\n")));
}

/** Wait so many milliseconds, or until the signal says stop (then false). */
export function pause(ms, signal) {
  return new Promise((done) => {
    if (signal?.aborted) return done(false);
    const timer = setTimeout(() => done(true), ms);
    signal?.addEventListener(
      "abort",
      () => {
        clearTimeout(timer);
        done(false);
      },
      { once: true },
    );
    return undefined;
  });
}
