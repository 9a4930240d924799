// Settings that are being written, and what was chosen last: kept in this window's storage, so that a
// reload or another page of ours loses nothing. A window without storage keeps them until it closes.

const STEM = "finegraft:";
const memory = new Map();

export function keep(name, value) {
  memory.set(name, value);
  try {
    sessionStorage.setItem(STEM + name, JSON.stringify(value));
  } catch {
    /* storage is full or not allowed: memory has it */
  }
}

export function kept(name, otherwise = null) {
  if (memory.has(name)) return memory.get(name);
  try {
    const text = sessionStorage.getItem(STEM + name);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

/** Settings of the training form that are set, {key: value}. */
export const settings = () => ({ ...kept("settings", {}) });
export const keepSettings = (values) => keep("settings", values);
