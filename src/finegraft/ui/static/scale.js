// Axes: ranges, ticks and thinning; numbers only, nothing is drawn here.

/** The next 1, 2, 2.5 or 5 times a power of ten that is not below `step`. */
function nice(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= step * (1 - 1e-9));
}

/** Round values from `low` to `high`, about `wanted` of them. */
export function ticks(low, high, wanted, whole = false) {
  let step = nice((high - low) / wanted);
  if (!whole && (high - low) / step < 2.5) step = nice((high - low) / (2 * wanted));
  if (whole) step = Math.max(1, Math.round(step));
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) =>
    Number(((first + i) * step).toPrecision(12)),
  );
}

/** Ticks of a logarithmic axis: 1, 2, 5 times powers of ten, or even ones where that gives few. */
export function logTicks(low, high, wanted) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const m of [1, 2, 5]) {
      const value = m * 10 ** power;
      if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9))
        found.push(Number(value.toPrecision(12)));
    }
  }
  if (found.length < 3) return ticks(low, high, wanted).filter((v) => v > 0);
  const tens = found.filter((v) => Number.isInteger(Math.round(1e6 * Math.log10(v)) / 1e6));
  return found.length > 2 * wanted && tens.length > 1 ? tens : found;
}

/** Least and greatest of the values, with air around them; null without any. */
export function range(values, log) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (!Number.isFinite(low)) return null;
  if (log)
    return low === high
      ? [low / 1.5, high * 1.5]
      : [low / (high / low) ** 0.04, high * (high / low) ** 0.04];
  if (low === high) {
    const air = Math.abs(low) * 0.1 || 1;
    return low >= 0 ? [Math.max(0, low - air), high + air] : [low - air, high + air];
  }
  const air = 0.05 * (high - low);
  return [low >= 0 ? Math.max(0, low - air) : low - air, high + air];
}

/** Least and greatest of each step, so that a peak is never lost; at most about `most` points. */
export function thinned(points, most) {
  if (points.length <= most) return points;
  const step = Math.ceil((2 * points.length) / most);
  const out = [];
  for (let from = 0; from < points.length; from += step) {
    let low = from;
    let high = from;
    for (let i = from; i < Math.min(from + step, points.length); i += 1) {
      if (points[i][1] < points[low][1]) low = i;
      if (points[i][1] > points[high][1]) high = i;
    }
    out.push(...[...new Set([low, high])].sort((a, b) => a - b).map((i) => points[i]));
  }
  if (out.at(-1) !== points.at(-1)) out.push(points.at(-1));
  return out;
}

/** Place of the member of a rising list that is nearest to `value`. */
export function nearest(list, value) {
  let [low, high] = [0, list.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] < value) low = middle;
    else high = middle;
  }
  return value - list[low] <= list[high] - value ? low : high;
}
