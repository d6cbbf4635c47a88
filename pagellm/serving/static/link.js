// The view as the fragment of an address. Browsers keep fragments to themselves, so no log of a server
// or proxy holds a person or an item.

const ONE = ["user", "k", "decoding", "variety", "left", "right", "min", "max", "models"];
const MANY = ["category", "stock", "without"];

// view: {user, k, ..., category: [], stock: [], without: [], history: [[item, rating]], order: {policy: [items]}}
export function written(view) {
  const out = new URLSearchParams();
  for (const name of ONE) if (view[name]) out.append(name, view[name]);
  for (const name of MANY) for (const value of view[name]) out.append(name, value);
  for (const [item, rating] of view.history) out.append("history", `${rating ?? ""}:${item}`);
  for (const [policy, items] of Object.entries(view.order)) for (const item of items) out.append(`order-${policy}`, item);
  if (view.numbers) out.append("numbers", "1");
  return out.toString();
}

// The view that a fragment names; null for an empty one. What it does not name is "" or empty.
export function read(fragment) {
  const given = new URLSearchParams(fragment.replace(/^#/, ""));
  if (![...given].length) return null;
  const view = { numbers: given.has("numbers"), order: {} };
  for (const name of ONE) view[name] = given.get(name) ?? "";
  for (const name of MANY) view[name] = given.getAll(name);
  view.history = given.getAll("history").map((text) => {
    const at = text.indexOf(":"), rating = Number(text.slice(0, at));
    return [text.slice(at + 1), at > 0 && rating >= 1 && rating <= 5 ? rating : null];
  }).filter(([item]) => item);
  for (const name of new Set(given.keys())) {
    if (name.startsWith("order-")) view.order[name.slice(6)] = given.getAll(name);
  }
  return view;
}
