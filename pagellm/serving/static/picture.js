// What an item looks like: a picture drawn from its title and category, and the colour of a category.
// The same words give the same picture. Nothing is asked of anybody. Colours are in page.css.

// FNV-1a, 32 bits.
function hash(text) {
  let h = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) h = Math.imul(h ^ byte, 0x01000193);
  return h >>> 0;
}

// Numbers in [0, 1) that follow from a text (mulberry32).
function draws(text) {
  let state = hash(text);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

const HUES = 12, STEPS = [0, 1, -1];   // 36 colours that can be told apart
const colours = new Map();      // category -> {hue, step}

// Give each of these categories a colour of its own, as far as there are any: near the one that its name asks
// for, rather in a hue that no other has. So a category mostly keeps its colour from page to page.
export function tell(categories) {
  colours.clear();
  const free = new Set(STEPS.flatMap((step) => Array.from({ length: HUES }, (_, hue) => `${hue} ${step}`)));
  const taken = Array(HUES).fill(0);
  for (const name of new Set(categories)) {
    if (!name) continue;
    const want = hash(name) % HUES, tilt = hash(`${name} step`) % 3;
    const far = ([hue, step]) => 3 * Math.min((hue - want + HUES) % HUES, (want - hue + HUES) % HUES) +
                                 9 * taken[hue] + (STEPS.indexOf(step) - tilt + 3) % 3;
    const left = [...free].map((text) => text.split(" ").map(Number));
    const [hue, step] = left.length ? left.reduce((a, b) => far(b) < far(a) ? b : a) : [want, STEPS[tilt]];
    free.delete(`${hue} ${step}`);
    taken[hue] += 1;
    colours.set(name, { hue: hue * 360 / HUES + 12, step });
  }
}

// Give a node the colour of a category.
export function paint(node, category) {
  const { hue, step } = colours.get(category) ?? { hue: 260, step: 0 };
  node.classList.toggle("gray", !category);
  node.style.setProperty("--h", String(hue));
  node.style.setProperty("--step", String(step));
  return node;
}

function shape(tag, values) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(values)) {
    node.setAttribute(name, typeof value === "number" ? value.toFixed(1) : value);
  }
  return node;
}

// Parts of a thing: x is the middle, y the upper edge, w and h the size.
const PARTS = {
  block: (x, y, w, h) => shape("rect", { x: x - w / 2, y, width: w, height: h, rx: Math.min(4, h / 3) }),
  slab: (x, y, w, h) => shape("rect", { x: x - w / 2, y, width: w, height: h, rx: h / 2 }),
  ball: (x, y, w, h) => shape("ellipse", { cx: x, cy: y + h / 2, rx: w / 2, ry: h / 2 }),
  dome: (x, y, w, h) => shape("path", { d: `M${x - w / 2} ${y + h}A${w / 2} ${h} 0 0 1 ${x + w / 2} ${y + h}Z` }),
  bowl: (x, y, w, h) => shape("path", { d: `M${x - w / 2} ${y}A${w / 2} ${h} 0 0 0 ${x + w / 2} ${y}Z` }),
  drum: (x, y, w, h) => shape("path", { d: `M${x - w * .34} ${y}H${x + w * .34}L${x + w / 2} ${y + h}H${x - w / 2}Z` }),
  cup: (x, y, w, h) => shape("path", { d: `M${x - w / 2} ${y}H${x + w / 2}L${x + w * .34} ${y + h}H${x - w * .34}Z` }),
};

// What is drawn on the largest part: this is where variants of one thing differ.
function label(kind, x, y, w, h, value) {
  const at = y + h * (.3 + .4 * value);
  if (kind === 0) return [shape("rect", { x: x - w * .3, y: at - h * .14, width: w * .6, height: h * .28, rx: 2 })];
  if (kind === 1) return [shape("circle", { cx: x, cy: at, r: Math.min(w, h) * .18 })];
  if (kind === 2) return [-.18, 0, .18].map((dx) => shape("circle", { cx: x + dx * w, cy: at, r: Math.min(w, h) * .08 }));
  return [-.1, .1].map((dy) => shape("rect", { x: x - w * .28, y: at + dy * h - 1, width: w * .56, height: 2.4 }));
}

// An abstract thing on a shelf. The category decides which parts are stacked, the first words of the
// title their sizes, all of it the label: what is alike looks alike.
export function picture(title, category) {
  const words = title.split(/\s+/).filter(Boolean);
  const stem = words.slice(0, Math.max(1, Math.min(3, words.length - 1))).join(" ");
  const kind = draws(`kind ${category}`), size = draws(`size ${category} ${stem}`), own = draws(`own ${title}`);
  const names = Object.keys(PARTS), count = 2 + Math.floor(kind() * 2.6);
  const parts = Array.from({ length: count }, () => names[Math.floor(kind() * names.length)]);
  const base = 24 + 20 * kind(), narrow = .55 + .4 * kind();
  const heights = parts.map((_, at) => (at ? .5 : 1) * (.7 + .6 * size()));
  const total = heights.reduce((a, b) => a + b), tall = 46 + 16 * size();
  const svg = shape("svg", { viewBox: "0 0 120 90", "aria-hidden": "true", focusable: "false" });
  svg.classList.add("picture");
  const add = (node, ...names) => { node.classList.add(...names); svg.append(node); };
  add(shape("rect", { width: 120, height: 90 }), "wall");
  add(shape("circle", { cx: 30 + 60 * size(), cy: 28 + 12 * size(), r: 24 + 12 * size() }), "light");
  add(shape("rect", { y: 74, width: 120, height: 16 }), "shelf");
  let bottom = 78, width = base * (.85 + .4 * size()), widest = null;
  add(shape("ellipse", { cx: 60, cy: 78, rx: width * .62, ry: 3.2 }), "shade");
  parts.forEach((part, at) => {
    const h = tall * heights[at] / total, box = [60, bottom - h, width, h];
    add(PARTS[part](...box), `tone${at % 3}`);
    if (!widest || h * width > widest[2] * widest[3]) widest = box;
    bottom -= h - .3;
    width *= narrow * (.85 + .4 * size());
  });
  const turn = Math.floor(own() * 4), value = own(), tone = own() < .5 ? "accent" : "paper";
  label(turn, ...widest, value).forEach((node) => add(node, tone));
  return svg;
}
