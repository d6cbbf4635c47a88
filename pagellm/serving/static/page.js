// The page of `pagellm serve`, without a library. State is what stands in the form, the typed history, the
// items left out and the order of the cards; all of it stands in the address too (link.js).

import { band, card, legend, thing, words } from "./cards.js";
import { byId, call, fixed, later, make, say } from "./common.js";
import { read, written } from "./link.js";
import { tell } from "./picture.js";

const typed = new Map();        // item id -> {title, rating}
const excluded = new Map();     // item id -> title
const shown = {};               // policy -> {answer, order: [slots as they stand now], now: answer for that order}
let asked = 0;                  // the newest question; older answers are dropped
let policies = [];              // those that are shown, in the order of their columns
let served = [];                // all that may be shown
const NAMES = { plain: "Plain: ALS with facts, MMR", sft: "Without the reward", ppo: "With the reward",
                compose: "Composed" };  // in the order of the columns
let rated = false;              // whether there is a reward model
let models = "";                // what is served, as a link names it
let wanted = {};                // policy -> item ids: orders of a link that are still to be put
let past = [];                  // the stored history of the user
let lit = "";                   // the category that is being looked for

const part = (policy, name) => document.querySelector(`#${policy} .${name}`);

// What is asked for.

function person() {
  const user = byId("user").value.trim();
  const history = [...typed].map(([item, { rating }]) => ({ item, rating }));
  return { ...(user && { user }), ...((history.length || !user) && { history }) };
}

const chosen = () => [...document.querySelectorAll("#categories input:checked")].map((box) => box.value);
const stocked = () => byId("stock").value.split(/[\s,]+/).filter(Boolean);

function filters() {
  const out = {};
  const number = (id) => byId(id).value === "" ? null : Number(byId(id).value);
  if (excluded.size) out.exclude = [...excluded.keys()];
  if (chosen().length) out.categories = chosen();
  if (stocked().length) out.in_stock = stocked();
  if (number("min") !== null || number("max") !== null) out.price = { min: number("min"), max: number("max") };
  const count = Object.keys(out).length;
  byId("active").textContent = count ? `(${count} on)` : "";
  return out;
}

async function write() {
  const mine = ++asked;
  const method = byId("variety").value;
  const body = { ...person(), k: Number(byId("k").value), decoding: byId("decoding").value || null,
                 variety: method ? { method } : null, filters: filters(), explain: true };
  say("Writing…");
  byId("pages").setAttribute("aria-busy", "true");
  try {
    const answers = await Promise.all(policies.map((policy) => call("/v1/page", { ...body, policy })));
    if (mine !== asked) return;
    policies.forEach((policy, at) => { shown[policy] = fresh(answers[at], body); });
    const moved = policies.filter(putOrder);
    wanted = {};
    draw();
    say(remarks(answers.at(-1)));
    keepLink();
    for (const policy of moved) rescore(policy);
  } catch (error) {
    if (mine === asked) say(`That did not work: ${error.message}`);
  } finally {
    if (mine === asked) byId("pages").removeAttribute("aria-busy");
  }
}

const fresh = (answer, body) => ({ answer, now: answer, order: [...answer.items], body });

// Put a page into the order that the link names, if it holds just these items. True if that moves any.
function putOrder(policy) {
  const page = shown[policy], ids = wanted[policy] || [];
  const slot = new Map(page.order.map((x) => [x.item, x]));
  if (new Set(ids).size !== slot.size || !ids.every((id) => slot.has(id))) return false;
  page.order = ids.map((id) => slot.get(id));
  return page.order.some((x, at) => x !== page.answer.items[at]);
}

function remarks(answer) {
  const { unknown, user, notes, latency_ms } = answer;
  const out = [`Written in ${Math.round(latency_ms)} ms from a history of ${user.history}.`];
  if (unknown.user) out.push("The model has not met this user; the page follows the history alone.");
  if (unknown.items.length) out.push(`Unknown items: ${unknown.items.join(", ")}.`);
  if (unknown.categories.length) out.push(`Unknown categories: ${unknown.categories.join(", ")}.`);
  if (changed) out.push("The models have changed since this link was made.");
  return out.concat(notes.map((note) => `${note}.`)).join(" ");
}

// Drawing.

function sums(policy) {
  const { answer, now } = shown[policy];
  const parts = [["energy", "energy"], ...(rated ? [["page reward", "page_reward"]] : []), ["diversity", "ild"],
                 ["entropy", "entropy"]];
  const nodes = parts.map(([name, key]) => {
    const change = answer[key] === null ? 0 : now[key] - answer[key];
    const moved = Math.abs(change) >= 0.0005;
    return make("span", {}, `${name} `, make("b", {}, fixed(now[key])), moved ? make("span",
      { className: change > 0 ? "up" : "down" }, ` ${change > 0 ? "▲ +" : "▼ "}${fixed(change)}`) : "");
  });
  part(policy, "sums").replaceChildren(...nodes);
}

// How to find what has the focus again once its page is drawn anew; "" if nothing on a page has it.
function focused() {
  const at = document.activeElement, policy = at?.closest?.("article")?.id;
  if (!policy || at.className === "back") return "";
  const item = at.closest(".card")?.dataset.item;
  if (item === undefined) return `#${policy} .legend [data-category="${CSS.escape(at.dataset.category)}"]`;
  const what = at.className === "grip" ? ".grip" : `.why ${at.tagName}`;
  return `#${policy} .card[data-item="${CSS.escape(item)}"] ${what}`;
}

// All pages: a move on one changes the marks on the other.
function draw() {
  const focus = focused();

  const slots = policies.flatMap((policy) => shown[policy]?.order || []);
  tell([...slots, ...past].map(({ category }) => category));
  band(byId("past-band"), past, "Categories of the history");
  byId("past-items").replaceChildren(...past.map(thing));
  policies.filter((policy) => shown[policy]).forEach(drawOne);
  find(lit);
  if (focus) document.querySelector(focus)?.focus({ preventScroll: true });
}

function drawOne(policy) {
  sums(policy);
  const { order, now, answer } = shown[policy];
  const other = policies.find((name) => name !== policy && shown[name]);
  const place = other ? new Map(shown[other].order.map((slot, at) => [slot.item, at])) : null;
  const rewards = policies.flatMap((name) => shown[name]?.now.items.map((slot) => slot.token_reward) || []);
  const low = Math.min(...rewards), span = Math.max(...rewards) - low || 1;
  const reward = new Map(now.items.map((slot) => [slot.item, slot.token_reward]));
  const acts = { key, drag, leave: (item, title) => { excluded.set(item, title); chips(); write(); } };
  const open = new Set([...document.querySelectorAll(`#${policy} .why[open]`)].map((why) => why.closest("li").dataset.item));
  part(policy, "words").textContent = words(order, other && shown[other].order);
  band(part(policy, "band"), order, "Categories in the order of the page");
  legend(part(policy, "legend"), order, (name) => find(name === lit ? "" : name));
  part(policy, "back").hidden = order.every((slot, at) => slot.item === answer.items[at].item);
  const list = part(policy, "cards");
  list.replaceChildren(...order.map((slot, at) =>
    card(slot, at, { policy, rated, reward: reward.get(slot.item), low, span, place }, acts)));
  for (const why of list.querySelectorAll(".why")) why.open = open.has(why.closest("li").dataset.item);
  if (!order.length) list.append(make("li", { className: "nothing" }, "No item passes the filters."));
}

// Show where a category stands; "" shows all alike.
function find(category) {
  const there = policies.some((policy) => shown[policy]?.order.some((slot) => slot.category === category));
  lit = category && there ? category : "";
  byId("pages").classList.toggle("seeking", Boolean(lit));
  for (const node of document.querySelectorAll("#pages [data-category]")) {
    const on = Boolean(lit) && node.dataset.category === lit;
    node.classList.toggle("on", on);
    if (node.tagName === "BUTTON") node.setAttribute("aria-pressed", String(on));
  }
}

// The same item on the other page is marked while one is looked at.
function twin(event) {
  const item = event.target.closest?.(".card")?.dataset.item;
  for (const node of document.querySelectorAll("#pages .card")) {
    node.classList.toggle("twin", Boolean(item) && node.dataset.item === item);
  }
}

// Moving an item. The keyboard moves by slots or rows; the pointer moves freely and scores on release.

function move(policy, from, to) {
  const { order } = shown[policy];
  order.splice(to, 0, ...order.splice(from, 1));
}

async function rescore(policy) {
  const page = shown[policy];
  const { user, history } = page.body;
  const items = page.order.map((slot) => slot.item);
  const turn = page.turn = (page.turn || 0) + 1;
  keepLink();
  try {
    const now = await call("/v1/score", { ...(user && { user }), ...(history && { history }), items, policy });
    if (shown[policy] !== page || page.turn !== turn) return;
    page.now = now;
    draw();
    say(`New order: energy ${fixed(now.energy)} (was ${fixed(page.answer.energy)})` + (rated ?
        `, page reward ${fixed(now.page_reward)} (was ${fixed(page.answer.page_reward)}).` : "."));
  } catch (error) {
    say(`That did not work: ${error.message}`);
  }
}

function key(event, policy, at) {
  const row = getComputedStyle(part(policy, "cards")).gridTemplateColumns.split(" ").length;
  const to = at + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row }[event.key];
  if (!(to >= 0 && to < shown[policy].order.length)) return;
  event.preventDefault();
  move(policy, at, to);
  draw();
  document.activeElement.scrollIntoView({ block: "nearest" });
  rescore(policy);
}

function drag(event, policy, from) {
  if (event.button > 0) return;
  event.preventDefault();
  const hold = event.currentTarget, item = hold.closest("li"), list = item.parentNode;
  const page = shown[policy];
  hold.setPointerCapture(event.pointerId);
  item.querySelector(".grip").focus({ preventScroll: true });
  item.classList.add("held");
  const follow = ({ clientX, clientY }) => {
    if (clientY < 60) scrollBy(0, -12); else if (clientY > innerHeight - 60) scrollBy(0, 12);
    const over = document.elementFromPoint(clientX, clientY)?.closest("li");
    if (!over || over === item || over.parentNode !== list) return;
    const cards = [...list.children], at = cards.indexOf(item), to = cards.indexOf(over);
    // The neighbours move: a node that is put elsewhere loses its pointer.
    if (at < to) item.before(...cards.slice(at + 1, to + 1)); else item.after(...cards.slice(to, at));
    [...list.children].forEach((li, place) => { li.querySelector(".rank").textContent = place + 1; });
  };
  const drop = (last) => {
    for (const [name, act] of Object.entries(step)) hold.removeEventListener(name, act);
    item.classList.remove("held");
    const to = [...list.children].indexOf(item);
    if (shown[policy] !== page || !list.contains(item)) return;
    if (last.type === "pointercancel" || to === from) return draw();
    move(policy, from, to);
    draw();
    rescore(policy);
  };
  const step = { pointermove: follow, pointerup: drop, pointercancel: drop };
  for (const [name, act] of Object.entries(step)) hold.addEventListener(name, act);
}

// The form.

function chips() {
  const chip = (kept, id, before, text, act) => make("li", {}, before, make("bdi", {}, text), make("button", { type: "button",
    "aria-label": `Remove ${text}`, on: { click: () => { kept.delete(id); chips(); act(); } } }, "×"));
  byId("history").replaceChildren(...[...typed].map(([id, { title, rating }]) =>
    chip(typed, id, "", `${title}${rating === null ? "" : ` ${rating}★`}`, write)));
  byId("excluded").replaceChildren(...[...excluded].map(([id, title]) =>
    chip(excluded, id, make("small", {}, "left out: "), title, write)));
  byId("none").hidden = excluded.size > 0;
}

async function suggest(input, list, path) {
  try {
    const { found } = await call(`${path}?limit=20&query=${encodeURIComponent(byId(input).value)}`);
    byId(list).replaceChildren(...found.map(({ id, title }) => make("option", { value: id }, title || id)));
    return found;
  } catch (error) {
    say(error.message);
    return [];
  }
}

async function add() {
  const text = byId("find").value.trim();
  if (!text) return;
  const found = await suggest("find", "found", "/v1/items");
  const item = found.find(({ id }) => id === text) || found[0];
  if (!item) return say(`No item is called ${text}.`);
  typed.delete(item.id);
  const rating = byId("rating").value;
  typed.set(item.id, { title: item.title || item.id, rating: rating === "" ? null : Number(rating) });
  byId("find").value = "";
  chips();
  write();
}

async function stored() {
  const user = byId("user").value.trim();
  let history = [];
  try {
    if (user) ({ history } = await call(`/v1/users/${encodeURIComponent(user)}`));
  } catch { /* a stranger: the page says so itself */ }
  if (byId("user").value.trim() !== user) return;
  byId("stored").textContent = history.length ? `(${history.length} stored)` : "(none stored)";
  past = history;
  draw();
}

// Users that are worth a look, once the first pages are there.
async function interesting() {
  const box = byId("interesting"), [left, right] = [policies[0], policies.at(-1)];
  const note = { changed: (n) => `${n} on both pages`, reward: (x) => `page reward ${fixed(x, 2)}`,
                 near: (x) => `nearness to the history ${fixed(x, 2)}`, history: (n) => `history of ${n}`,
                 newest: (t) => `since ${new Date(1000 * t).toISOString().slice(0, 10)}` };
  try {
    const { groups, sampled } = await call(`/v1/interesting?left=${left}&right=${right}`);
    const [first, last] = [policies[0], policies.at(-1)];
    if (first !== left || last !== right) return;
    box.replaceChildren(make("option", { value: "" }, `choose (of ${sampled})`), ...groups.map(({ name, measure, users }) => {
      const group = make("optgroup", { label: name });
      group.append(...users.map(({ id, value }) => make("option", { value: id }, `${id} · ${note[measure](value)}`)));
      return group;
    }));
  } catch (error) {
    box.replaceChildren(make("option", { value: "" }, `none found: ${error.message}`));
  }
}

// One column for each policy that is compared; what cannot be shown is not explained either.
function columns() {
  const pair = [byId("left").value, byId("right").value];
  policies = served.filter((policy) => pair.includes(policy));
  for (const policy of Object.keys(NAMES)) {
    byId(policy).hidden = !policies.includes(policy);
    if (!policies.includes(policy)) delete shown[policy];
  }
  byId("go").textContent = policies.length > 1 ? "Write both pages" : "Write the page";
  byId("about-both").hidden = policies.length < 2;
}

// The default beside SFT, or beside what else there is.
function offer({ policies: there, default: best, why, models: made, split }) {
  served = Object.keys(NAMES).filter((policy) => there.includes(policy));
  rated = Boolean(made.reward);
  const other = ["sft", "ppo", "plain", "compose"].find((policy) => policy !== best && served.includes(policy)) || best;
  for (const [id, choice] of [["left", other], ["right", best]]) {
    byId(id).replaceChildren(...served.map((policy) =>
      make("option", { value: policy, selected: policy === choice }, NAMES[policy])));
  }
  for (const policy of Object.keys(NAMES)) {
    byId(policy).append(
      make("div", { className: "told" }, make("p", { className: "words" }), make("div", { className: "sums count" })),
      make("div", { className: "band" }), make("div", { className: "legend" }),
      make("button", { type: "button", className: "back", hidden: true, on: { click: () => {
        Object.assign(shown[policy], fresh(shown[policy].answer, shown[policy].body));
        draw();
        keepLink();
      } } }, "Put back"),
      make("ol", { className: "cards", role: "list" }));
  }
  byId("versus").hidden = served.length < 2;
  byId("about-bar").hidden = !rated;
  byId("about-held").hidden = split === "none";
  byId("about-default").textContent = served.length > 1 ? `Default: ${NAMES[best]} (${why}).` : "";
}

// The link.

let changed = false;            // whether other models are served than the link was made with
let linked = "";                // the fragment that this page has written

function keepLink() {
  const order = {};
  for (const policy of policies) {
    const page = shown[policy];
    if (page?.order.some((slot, at) => slot !== page.answer.items[at])) order[policy] = page.order.map((slot) => slot.item);
  }
  const value = (id) => byId(id).value.trim();
  linked = written({ user: value("user"), k: value("k"), decoding: value("decoding"), variety: value("variety"),
    left: value("left"), right: value("right"), min: value("min"), max: value("max"), category: chosen(),
    stock: stocked(), without: [...excluded.keys()], history: [...typed].map(([item, { rating }]) => [item, rating]),
    numbers: byId("numbers").checked, order, models });
  history.replaceState(null, "", `#${linked}`);
}

async function putView(view) {
  const may = (id, value) => [...byId(id).options].some((option) => option.value === value);
  for (const id of ["user", "min", "max"]) byId(id).value = view[id];
  byId("k").value = view.k || byId("k").value;
  for (const id of ["left", "right", "decoding", "variety"]) if (may(id, view[id])) byId(id).value = view[id];
  byId("stock").value = view.stock.join(" ");
  for (const box of document.querySelectorAll("#categories input")) box.checked = view.category.includes(box.value);
  byId("numbers").checked = view.numbers;
  changed = Boolean(view.models) && view.models !== models;
  wanted = view.order;
  const title = async (id) => {
    try { return (await call(`/v1/items/${encodeURIComponent(id)}`)).title || id; } catch { return id; }
  };
  typed.clear();
  excluded.clear();
  for (const [item, rating] of view.history) typed.set(item, { title: await title(item), rating });
  for (const item of view.without) excluded.set(item, await title(item));
  chips();
  columns();
  numbers();
}

async function copyLink() {
  keepLink();
  try {
    await navigator.clipboard.writeText(location.href);
    say("The link to this view is copied.");
  } catch {                     // a browser allows this only over https and on the machine itself
    const box = byId("address");
    box.hidden = false;
    box.value = location.href;
    box.select();
    say("The link to this view is marked; copy it.");
  }
}

function numbers() {
  document.body.classList.toggle("numbers", byId("numbers").checked);
}

async function begin() {
  const shop = await call("/v1/shop");
  const count = (n) => n.toLocaleString("en");
  byId("facts").textContent = `${shop.dataset}: ${count(shop.users)} users, ${count(shop.items)} items`;
  const names = { compose: "composed", ppo: "with the reward", sft: "without the reward", reward: "reward model" };
  models = Object.keys(names).filter((name) => shop.models[name]).map((name) => shop.models[name]).join(".");
  byId("models").textContent = [`version ${shop.version}`, ...Object.keys(names).filter((name) => shop.models[name])
    .map((name) => `${names[name]} ${shop.models[name]}`)].join(", ");
  offer(shop);
  columns();
  byId("k").max = shop.k_max;
  byId("k").value = Math.min(20, shop.k_max);
  if (shop.price) {
    byId("min").placeholder = shop.price.min;
    byId("max").placeholder = shop.price.max;
  }
  byId("categories").append(...shop.categories.map(({ name, items }) => make("label", {},
    make("input", { type: "checkbox", value: name }), " ", make("bdi", {}, name), " ", make("small", {}, `(${items})`))));
  const view = read(location.hash);
  if (view) await putView(view);
  const users = await suggest("user", "users", "/v1/users");
  if (!view && users.length && !byId("user").value) byId("user").value = users[0].id;
  stored();
  await write();
  interesting();
}

function ask() {
  changed = false;
  write();
}

const again = later(ask);
byId("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
byId("filters").addEventListener("input", again);
byId("k").addEventListener("input", again);
for (const id of ["left", "right"]) byId(id).addEventListener("input", () => { columns(); ask(); interesting(); });
byId("user").addEventListener("input", later(() => { suggest("user", "users", "/v1/users"); stored(); ask(); }));
byId("interesting").addEventListener("input", () => {
  if (!byId("interesting").value) return;
  byId("user").value = byId("interesting").value;
  stored();
  ask();
});
byId("find").addEventListener("input", later(() => suggest("find", "found", "/v1/items")));
byId("find").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); add(); } });
byId("add").addEventListener("click", add);
byId("numbers").addEventListener("input", () => { numbers(); keepLink(); });
byId("link").addEventListener("click", copyLink);
for (const name of ["pointerover", "focusin"]) byId("pages").addEventListener(name, twin);
addEventListener("hashchange", async () => {
  const view = read(location.hash);
  if (!view || location.hash === `#${linked}`) return;
  await putView(view);
  stored();
  write();
});
begin().catch((error) => say(`That did not work: ${error.message}`));
