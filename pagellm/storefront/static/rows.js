// The page of rows: whose it is stands in the form.

import { byId, call, fixed, later, make, say } from "./common.js";

let asked = 0;                  // the newest question; older answers are dropped
const PARTS = [["ranker", "the shop's ranker"], ["ret", "retrieval"], ["agree", "fit to the theme"],
               ["redundancy", "repeats"], ["reward", "the shop's wish"]];
const SOURCES = { generated: "written for this person", segment: "written for people alike", static: "static",
                  editorial: "a merchandiser's" };

const request = () => {
  const user = byId("user").value.trim();
  const day = byId("day").value;
  return { ...(user && { user }), ...(byId("layout").value && { layout: byId("layout").value }),
           ...(day && { at: Date.parse(`${day}T00:00:00Z`) / 1000 }), explore: Number(byId("explore").value) || 0,
           explain: true };
};

async function show() {
  const mine = ++asked;
  say("Asking…");
  try {
    const body = request();
    const [themed, plain] = await Promise.all(
      [call("/v1/storefront", body), call("/v1/storefront", { ...body, static: true })]);
    if (mine !== asked) return;
    draw("themed", themed);
    draw("plain", plain);
    notes(themed);
    say(`${themed.placements.length} rows, ${themed.page.items} items, made in ${fixed(themed.ms.total, 1)} ms.`);
  } catch (error) {
    if (mine === asked) say(`That did not work: ${error.message}`);
  }
}

function draw(where, page) {
  const box = byId(where);
  box.querySelector(".sums").textContent =
    `expected clicks ${fixed(page.page.value, 2)} · ${page.page.items} items · ${page.page.repeats} shown twice`;
  box.querySelector(".rows").replaceChildren(...page.placements.map((row) => section(where, row)));
}

function section(where, row) {
  const id = `${where}-why-${row.position}`;
  const why = make("div", { className: "why", id, hidden: true });
  const title = make("button", { type: "button", "aria-expanded": "false", "aria-controls": id,
    on: { click: () => toggle(title, why, row) } },
    row.theme.title, make("span", { className: "tag" }, SOURCES[row.source]));
  const items = row.items.map((item) => make("li", {}, item.title || item.id,
    make("small", {}, item.keyword ? `found by ${item.keyword}` : "")));
  return make("section", { className: "row-of" }, make("h3", {}, title), why,
    make("ol", { className: "shelf", tabIndex: 0, "aria-label": `${row.theme.title}, ${items.length} items` },
      ...items));
}

function toggle(title, why, row) {
  const open = why.hidden;
  if (open && !why.childElementCount) why.append(...reasons(row));
  why.hidden = !open;
  title.setAttribute("aria-expanded", String(open));
}

function reasons(row) {
  const { theme, keywords, quality } = row;
  const who = theme.writer ? `Writer ${theme.writer}` : "No writer: the theme was given";
  const fit = quality.agreement === undefined ? ""
    : `; the first five items fit it at ${fixed(quality.agreement, 2)}, ${Math.round(100 * quality.tp5)}% of them well`;
  const used = PARTS.filter(([key]) => key === "ranker" || row.items.some((item) => (item.parts[key] ?? 0) !== 0));
  const parts = make("table", {}, make("thead", {}, make("tr", {}, make("th", {}, "item"), make("th", {}, "score"),
    ...used.map(([, name]) => make("th", {}, name)), make("th", {}, "chance"))));
  const most = Math.max(1e-9, ...row.items.flatMap((item) => PARTS.map(([key]) => Math.abs(item.parts[key] ?? 0))));
  parts.append(make("tbody", {}, ...row.items.map((item) => make("tr", {}, make("td", {}, item.title || item.id),
    make("td", { className: "number" }, fixed(item.score)),
    ...used.map(([key]) => make("td", {}, bar(item.parts[key] ?? 0, most))),
    make("td", { className: "number" }, fixed(item.propensity, 2))))));
  return [make("p", {}, `${who}; intent ${row.intent}${fit}. Expected clicks ${fixed(quality.value ?? 0)}.`),
    keywords.length ? make("p", {}, "Keywords, and the items in stock that each finds:") : null,
    keywords.length ? make("ul", { className: "keys" }, ...keywords.map((key) =>
      make("li", {}, `${key.text} `, make("small", {}, `${key.matches} · ${key.type}`)))) : null,
    parts].filter(Boolean);
}

function bar(x, most) {
  const make2 = (tag, given) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(given)) node.setAttribute(name, value);
    return node;
  };
  const long = 50 * Math.abs(x) / most;
  const svg = make2("svg", { viewBox: "0 0 100 12", preserveAspectRatio: "none", role: "img",
                             "aria-label": x.toFixed(3) });
  svg.append(make2("rect", { class: x < 0 ? "minus" : "plus", x: x < 0 ? 50 - long : 50, y: 2, width: long, height: 8 }),
    make2("line", { x1: 50, x2: 50, y1: 0, y2: 12 }));
  const hint = make2("title", {});
  hint.textContent = x.toFixed(3);
  svg.append(hint);
  return svg;
}

const words = (d) => `${d.level}, rule ${d.rule}` +
  (d.value || d.threshold ? `: ${fixed(d.value, 2)} against ${fixed(d.threshold, 2)}` : "");

function notes(page) {
  const list = page.fallbacks.length ? page.fallbacks : ["nothing"];
  byId("notes").replaceChildren(...list.map((text) => make("li", {}, text)));
  const out = (page.page.decisions || []).filter((d) => d.action !== "pass");
  byId("kept-out").querySelector("summary").textContent = `What the gates kept out (${out.length})`;
  byId("kept-out").querySelector("ul").replaceChildren(...out.map((d) => make("li", {}, `${words(d)}; ${d.action}`)));
}

async function judge() {
  const names = byId("own-names").value.split(",").map((name) => name.trim()).filter(Boolean);
  try {
    const said = await call("/v1/storefront/check",
      { title: byId("own-title").value, concepts: names, intent: byId("own-intent").value });
    const against = said.decisions.filter((d) => d.action !== "pass");
    byId("own-said").replaceChildren(
      make("p", { className: said.passes ? "passes" : "blocked" },
        said.passes ? "It passes." : "It does not pass."),
      make("ul", {}, ...against.map((d) => make("li", {}, `why not: ${words(d)}`)),
        ...said.unknown.map((name) => make("li", {}, `no category or keyword is called ${name}`))),
      make("ol", { className: "shelf", tabIndex: 0, "aria-label": "Its items" },
        ...said.items.map((item) => make("li", {}, item.title || item.id))));
  } catch (error) {
    byId("own-said").textContent = `That did not work: ${error.message}`;
  }
}

async function suggest() {
  const { found } = await call(`/v1/storefront/users?limit=20&query=${encodeURIComponent(byId("user").value)}`);
  byId("users").replaceChildren(...found.map(({ id }) => make("option", { value: id })));
  return found;
}

async function begin() {
  const state = await call("/v1/storefront/state");
  const { layouts, default: first } = await call("/v1/storefront/layouts");
  const [people, pages] = [state.coverage.people, state.coverage.pages].map((n) => n.toLocaleString("en"));
  byId("facts").textContent = `${people} people, ranker ${state.ranker}, writer ${state.writer}; ` +
    (state.themes_on ? `${pages} pages are kept` : "themes are switched off");
  byId("layout").append(...layouts.map(({ id }) => make("option", { value: id, selected: id === first }, id)));
  const day = new Date(1000 * state.at + 86_399_000).toISOString().slice(0, 10);
  byId("day").min = day;
  const found = await suggest();
  if (found.length && !byId("user").value) byId("user").value = found[0].id;
  show();
}

byId("ask").addEventListener("submit", (event) => { event.preventDefault(); show(); });
byId("user").addEventListener("input", later(() => { suggest(); show(); }));
for (const id of ["layout", "day", "explore"]) byId(id).addEventListener("input", later(show));
byId("own").addEventListener("submit", (event) => { event.preventDefault(); judge(); });
begin().catch((error) => say(`That did not work: ${error.message}`));
