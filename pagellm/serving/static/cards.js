// One page as a shop shows it: its words, its band of colours, its cards. State lives in page.js.

import { fixed, make } from "./common.js";
import { paint, picture } from "./picture.js";

const many = (n, one, more = `${one}s`) => `${n} ${n === 1 ? one : more}`;

function counts(names) {
  const out = new Map();
  for (const name of names) if (name) out.set(name, (out.get(name) || 0) + 1);
  return [...out].sort((a, b) => b[1] - a[1]);
}

// The longest run of one category.
function longest(names) {
  let run = 0, best = 0;
  names.forEach((name, at) => { run = name && name === names[at - 1] ? run + 1 : 1; best = Math.max(best, name ? run : 0); });
  return best;
}

// A field for each item, in the colour of its category; neighbours of one category grow together.
export function band(node, items, what) {
  const names = items.map((item) => item.category);
  node.hidden = !names.some(Boolean);
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", `${what}: ${names.map((name) => name || "none").join(", ")}`);
  node.classList.toggle("dense", items.length > 30);
  node.replaceChildren(...items.map((item, at) => {
    const field = paint(make("span", { title: `${at + 1} · ${item.category || "no category"}` },
                             item.category ? [...item.category][0] : ""), item.category);
    field.dataset.category = item.category || "";
    field.classList.toggle("joined", at > 0 && Boolean(names[at]) && names[at] === names[at - 1]);
    return field;
  }));
}

// Categories that stand more than once, as buttons that show where.
export function legend(node, items, press) {
  const found = counts(items.map((item) => item.category)), repeated = found.filter(([, n]) => n > 1).slice(0, 8);
  const rest = found.length - repeated.length;
  node.replaceChildren(...repeated.map(([name, n]) => {
    const button = make("button", { type: "button", "aria-pressed": "false", on: { click: () => press(name) } },
                        paint(make("i", { className: "dot" }), name), make("bdi", {}, name), make("b", {}, `×${n}`));
    button.dataset.category = name;
    return button;
  }), rest && repeated.length ? make("span", { className: "quiet" }, `and ${rest} more`) : "");
}

// What a look at the page should tell, without a decimal.
export function words(order, other) {
  const names = order.map((slot) => slot.category), kinds = counts(names).length, run = longest(names);
  const out = [many(order.length, "item") + (kinds ? ` of ${many(kinds, "category", "categories")}` : "")];
  if (run > 1) out.push(`up to ${run} of one kind in a row`);
  if (other) {
    const place = new Map(other.map((slot, at) => [slot.item, at]));
    const both = order.filter((slot) => place.has(slot.item)).length;
    const same = order.filter((slot, at) => place.get(slot.item) === at).length;
    out.push(`${both} also on the other page` + (both ? `, ${same} in the same place` : ""));
  }
  return `${out.join("; ")}.`;
}

// What the score of a slot says when the page is written: see the field `score` in /openapi.json.
function worth(policy, score) {
  if (policy === "plain") return `Score of ALS ${fixed(score, 2)}`;
  if (policy === "compose") return `Chance that it is picked ${(100 * Math.exp(score)).toFixed(1)}%`;
  return `Log-probability ${fixed(score, 2)} when it was written`;
}

function bar(share) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  for (const width of [100, 4 + 96 * share]) {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of [["width", `${width}%`], ["height", "100%"], ["rx", "2"]]) rect.setAttribute(name, value);
    svg.append(rect);
  }
  return svg;
}

// Marks of a slot: only here, or how far from its place on the other page.
function marks(slot, at, place) {
  const out = [];
  if (slot.held_out) out.push(make("span", { className: "tag held-out", title: "held out: the user chose it" }, "✓ held out"));
  if (place && !place.has(slot.item)) out.push(make("span", { className: "tag only" }, "only here"));
  const up = place && place.has(slot.item) ? place.get(slot.item) - at : 0;
  if (up) {
    const told = `${many(Math.abs(up), "place")} ${up > 0 ? "higher" : "lower"} than on the other page`;
    out.push(make("span", { className: `tag ${up > 0 ? "up" : "down"}`, title: told },
                  make("span", { "aria-hidden": "true" }, `${up > 0 ? "▲" : "▼"} ${Math.abs(up)}`),
                  make("span", { className: "heard" }, told)));
  }
  return make("p", { className: "tags" }, ...out);
}

// view: {policy, rated, reward, low, span, place: Map of the other page's places or null}
// acts: {key, drag, leave}, each of (policy, at or slot)
export function card(slot, at, { policy, rated, reward, low, span, place }, acts) {
  const title = slot.title || slot.item;
  const grip = make("button", { type: "button", className: "grip", "aria-label": `Move ${title}, now ${at + 1}`,
    title: "drag, or press the arrow keys", on: { keydown: (event) => acts.key(event, policy, at) } }, "⠿");
  const photo = make("div", { className: "photo" }, picture(title, slot.category || ""),
    make("span", { className: "rank" }, String(at + 1)), grip);
  photo.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "mouse" || grip.contains(event.target)) acts.drag(event, policy, at);
  });
  const like = slot.similar.map((near) => `${near.title || near.item} (${fixed(near.similarity, 2)})`).join("; ");
  const why = make("details", { className: "why" }, make("summary", {}, "why"),
    make("p", { dir: "auto" }, title),
    make("p", { className: "count" }, `${rated ? `Reward of this slot ${fixed(reward)}. ` : ""}${worth(policy, slot.score)}.`),
    make("p", {}, like ? `Like, in the history: ${like}.` : "No history to compare with."),
    slot.held_out ? make("p", {}, "✓ The user chose it; the model has not seen that.") : "",
    make("button", { type: "button", on: { click: () => acts.leave(slot.item, title) } }, "leave out"));
  const about = [slot.price === null ? null : slot.price.toFixed(2), slot.brand].filter(Boolean).join(" · ");
  const node = make("li", { className: "card" }, photo, make("div", { className: "what" },
    make("p", { className: "title", dir: "auto", title }, title),
    slot.category ? make("p", { className: "kind" }, make("i", { className: "dot" }), make("bdi", {}, slot.category)) : "",
    about ? make("p", { className: "about", dir: "auto" }, about) : "",
    marks(slot, at, place),
    make("p", { className: "count id" }, slot.item),
    rated ? make("div", { className: "worth count", title: "reward of this slot" }, bar((reward - low) / span),
      make("span", {}, fixed(reward, 2))) : "", why));
  node.dataset.item = slot.item;
  node.dataset.category = slot.category || "";
  node.classList.toggle("only", Boolean(place) && !place.has(slot.item));
  return paint(node, slot.category);
}

// An item of a history, small.
export function thing({ item, title, category, rating }) {
  const name = title || item;
  return paint(make("li", { title: [name, category].filter(Boolean).join(" · ") }, picture(name, category || ""),
    make("bdi", {}, name), rating === null ? "" : make("small", {}, `${rating}★`)), category);
}
