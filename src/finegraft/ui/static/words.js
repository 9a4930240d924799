// Numbers as people read them. Units: bytes, seconds, seconds since 1970.

export const DASH = "–";

export function bytes(count, digits = 2) {
  if (count === null || count === undefined) return DASH;
  const names = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  let value = count;
  while (value >= 999.5 && at < names.length - 1) {
    value /= 1000;
    at += 1;
  }
  return `${at === 0 ? value : rounded(value, digits)} ${names[at]}`;
}

function rounded(value, digits) {
  if (value >= 99.5) return Math.round(value);
  return value.toFixed(Math.max(1, digits - String(Math.trunc(value)).length));
}

/** Bytes in three digits, for the axis of a chart, whose steps are small. */
export const finely = (count) => bytes(count, 3);

export function clock(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return DASH;
  if (seconds < 0.095) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const all = Math.round(seconds);
  if (all < 120) return `${all} s`;
  const [h, m, s] = [Math.floor(all / 3600), Math.floor((all % 3600) / 60), all % 60];
  if (h >= 48) return `${Math.floor(h / 24)} d ${h % 24} h`;
  return h ? `${h} h ${m} min` : `${m} min ${s} s`;
}

export function count(value) {
  return value === null || value === undefined ? DASH : Number(value).toLocaleString("en-US");
}

/** "1 row", "2 rows". */
export function many(value, one, more = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : more}`;
}

/** A measured number in few digits. */
export function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(Number(value))) return DASH;
  const number = Number(value);
  const size = Math.abs(number);
  if (Number.isInteger(number) && size < 1e9) return number.toLocaleString("en-US");
  if (size >= 1000) return Math.round(number).toLocaleString("en-US");
  if (size !== 0 && size < 0.001) return Number(number.toPrecision(3)).toExponential();
  return String(Number(number.toPrecision(4)));
}

export function loss(value) {
  return value === null || value === undefined ? DASH : Number(value).toFixed(value < 10 ? 3 : 1);
}

export function when(seconds) {
  if (!seconds) return DASH;
  const time = new Date(seconds * 1000);
  const pad = (n) => String(n).padStart(2, "0");
  const hours = `${pad(time.getHours())}:${pad(time.getMinutes())}`;
  if (Date.now() / 1000 - seconds < 86400) return hours;
  return `${time.getFullYear()}-${pad(time.getMonth() + 1)}-${pad(time.getDate())} ${hours}`;
}

/** Any value of a setting or a result, in words. */
export function plain(value) {
  if (value === null || value === undefined) return "not set";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number") return figure(value);
  if (Array.isArray(value)) return value.length ? value.map(plain).join(", ") : "none";
  if (typeof value === "object") {
    const parts = Object.entries(value).map(([k, v]) => `${k}=${plain(v)}`);
    return parts.length ? parts.join(", ") : "none";
  }
  return String(value);
}

/** The last part of a path. */
export function base(path) {
  return String(path ?? "")
    .replace(/\/+$/, "")
    .split("/")
    .pop();
}
