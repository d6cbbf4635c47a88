// One page, no library. State is what stands in the form, plus the typed history and the items left out.
"use strict";

const byId = (id) => document.getElementById(id);
const typed = new Map();        // item id -> {title, rating}
const excluded = new Map();     // item id -> title
const shown = {};               // policy -> {answer, order: [slots as they stand now], now: answer for that order}
let asked = 0;                  // the newest question; older answers are dropped
let policies = [];              // those that are shown, in the order of their columns
let served = [];                // all that may be shown
const NAMES = { plain: "Plain: ALS with facts, MMR", sft: "Without the reward", ppo: "With the reward",
                compose: "Composed" };  // in the order of the columns
let rated = false;              // whether there is a reward model

function make(tag, options = {}, ...children) {
  const { on = {}, ...rest } = options;
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(rest)) {
    if (name in node && name !== "list") node[name] = value; else node.setAttribute(name, value);
  }
  for (const [name, act] of Object.entries(on)) node.addEventListener(name, act);
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

// The key of a service that has one: asked for once, kept until the tab is closed.
let asking = null;              // the open question, so that calls at the same time share it
function askKey() {
  asking ??= new Promise((told) => {
    const dialog = byId("key");
    dialog.addEventListener("close", () => {
      const key = byId("key-value").value.trim();
      byId("key-value").value = "";
      asking = null;
      if (key && dialog.returnValue === "send") sessionStorage.setItem("key", key);
      told(Boolean(key) && dialog.returnValue === "send");
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

async function call(path, body) {
  let reply;
  const key = sessionStorage.getItem("key");
  try {
    reply = await fetch(path, {
      headers: {
        ...(key && { authorization: `Bearer ${key}` }),
        ...(body !== undefined && { "content-type": "application/json" }),
      },
      ...(body !== undefined && { method: "POST", body: JSON.stringify(body) }) });
  } catch {
    throw new Error("the service does not answer; is it still running?");
  }
  // Another call may have been told the key meanwhile.
  if (reply.status === 401 && (sessionStorage.getItem("key") !== key || await askKey())) return call(path, body);
  const answer = await reply.json();
  if (!reply.ok) throw new Error(answer.error.message);
  return answer;
}

const say = (text) => { byId("status").textContent = text; };
const fixed = (x, digits = 3) => x === null ? "–" : x.toFixed(digits).replace("-", "−");
const later = (act, wait = 250) => { let t; return () => { clearTimeout(t); t = setTimeout(act, wait); }; };

function person() {
  const user = byId("user").value.trim();
  const history = [...typed].map(([item, { rating }]) => ({ item, rating }));
  return { ...(user && { user }), ...((history.length || !user) && { history }) };
}

function filters() {
  const out = {};
  const number = (id) => byId(id).value === "" ? null : Number(byId(id).value);
  if (excluded.size) out.exclude = [...excluded.keys()];
  const categories = [...document.querySelectorAll("#categories input:checked")].map((box) => box.value);
  if (categories.length) out.categories = categories;
  const stock = byId("stock").value.split(/[\s,]+/).filter(Boolean);
  if (stock.length) out.in_stock = stock;
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
  try {
    const answers = await Promise.all(policies.map((policy) => call("/v1/page", { ...body, policy })));
    if (mine !== asked) return;
    policies.forEach((policy, at) => { shown[policy] = fresh(answers[at], body); });
    policies.forEach(draw);
    say(remarks(answers.at(-1)));
  } catch (error) {
    if (mine === asked) say(`That did not work: ${error.message}`);
  }
}

const fresh = (answer, body) => ({ answer, now: answer, order: [...answer.items], body });

function remarks(answer) {
  const { unknown, user, notes, latency_ms } = answer;
  const out = [`Written in ${Math.round(latency_ms)} ms from a history of ${user.history}.`];
  if (unknown.user) out.push("The model has not met this user; the page follows the typed history alone.");
  if (unknown.items.length) out.push(`Unknown items: ${unknown.items.join(", ")}.`);
  if (unknown.categories.length) out.push(`Unknown categories: ${unknown.categories.join(", ")}.`);
  return out.concat(notes.map((note) => `${note}.`)).join(" ");
}

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
  if (now !== answer) nodes.push(make("button", { type: "button", on: { click: () => {
    Object.assign(shown[policy], fresh(answer, shown[policy].body));
    draw(policy);
  } } }, "Put back"));
  document.querySelector(`#${policy} .sums`).replaceChildren(...nodes);
}

function draw(policy) {
  sums(policy);
  const { order, now } = shown[policy];
  const other = policies.find((name) => name !== policy);
  const there = other && new Set(shown[other].answer.items.map((slot) => slot.item));
  const rewards = Object.values(shown).flatMap((page) => page.now.items.map((slot) => slot.token_reward));
  const low = Math.min(...rewards), span = Math.max(...rewards) - low || 1;
  const reward = new Map(now.items.map((slot) => [slot.item, slot.token_reward]));
  const list = document.querySelector(`#${policy} ol`);
  list.replaceChildren(...order.map((slot, at) => row(policy, slot, at, reward.get(slot.item), low, span,
                                                      there && !there.has(slot.item))));
  if (!order.length) list.append(make("li", {}, "No item passes the filters."));
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

// What the score of a slot says when the page is written: see the field `score` in /openapi.json.
function worth(policy, score) {
  if (policy === "plain") return `Score of ALS ${fixed(score, 2)}`;
  if (policy === "compose") return `Chance that it is picked ${(100 * Math.exp(score)).toFixed(1)}%`;
  return `Log-probability ${fixed(score, 2)} when it was written`;
}

function row(policy, slot, at, reward, low, span, alone) {
  const title = slot.title || slot.item;
  const grip = make("button", { type: "button", className: "grip", "aria-label": `Move ${title}, now ${at + 1}`,
                                on: { keydown: (event) => key(event, policy, at),
                                      pointerdown: (event) => drag(event, policy, at) } }, "⠿");
  const like = slot.similar.map((near) => `${near.title || near.item} (${fixed(near.similarity, 2)})`).join("; ");
  const why = make("details", { className: "why" }, make("summary", {}, "why"),
    make("p", {}, `${rated ? `Reward of this slot ${fixed(reward)}. ` : ""}${worth(policy, slot.score)}.`),
    make("p", {}, like ? `Like, in the history: ${like}.` : "No history to compare with."),
    slot.held_out ? make("p", {}, "✓ The user chose it; the model has not seen that.") : "",
    make("button", { type: "button", on: { click: () => { excluded.set(slot.item, title); chips(); write(); } } },
      "leave out"));
  return make("li", {}, grip, make("span", { className: "rank" }, String(at + 1)),
    make("div", { className: "what" }, make("p", {}, slot.held_out ? make("span", { title: "held out" }, "✓ ") : "",
      title, " ", alone ? make("span", { className: "tag" }, "only here") : ""),
      make("small", {}, [slot.category, slot.price === null ? null : slot.price.toFixed(2), slot.item]
        .filter(Boolean).join(" · ")), why),
    rated ? make("div", { className: "worth", title: "reward of this slot" }, fixed(reward, 2),
      bar((reward - low) / span)) : "");
}

// Moving an item. The keyboard moves one slot; the pointer moves freely and scores on release.

function move(policy, from, to) {
  const { order } = shown[policy];
  order.splice(to, 0, ...order.splice(from, 1));
}

async function rescore(policy) {
  const page = shown[policy];
  const { user, history } = page.body;
  const items = page.order.map((slot) => slot.item);
  const turn = page.turn = (page.turn || 0) + 1;
  try {
    const now = await call("/v1/score", { ...(user && { user }), ...(history && { history }), items, policy });
    if (shown[policy] !== page || page.turn !== turn) return;
    page.now = now;
    const focus = document.activeElement?.closest?.("li");
    const at = focus ? [...focus.parentNode.children].indexOf(focus) : -1;
    const inside = focus && focus.closest("article")?.id === policy;
    draw(policy);
    if (inside) document.querySelectorAll(`#${policy} .grip`)[at]?.focus();
    say(`New order: energy ${fixed(now.energy)} (was ${fixed(page.answer.energy)})` + (rated ?
        `, page reward ${fixed(now.page_reward)} (was ${fixed(page.answer.page_reward)}).` : "."));
  } catch (error) {
    say(`That did not work: ${error.message}`);
  }
}

function key(event, policy, at) {
  const to = at + { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (!(to >= 0 && to < shown[policy].order.length)) return;
  event.preventDefault();
  move(policy, at, to);
  draw(policy);
  document.querySelectorAll(`#${policy} .grip`)[to].focus();
  rescore(policy);
}

function drag(event, policy, from) {
  if (event.button > 0) return;
  event.preventDefault();
  const grip = event.currentTarget, item = grip.closest("li"), list = item.parentNode;
  const page = shown[policy];
  grip.setPointerCapture(event.pointerId);
  item.classList.add("held");
  const follow = ({ clientY }) => {
    if (clientY < 60) scrollBy(0, -12); else if (clientY > innerHeight - 60) scrollBy(0, 12);
    for (let next = item.nextElementSibling; next; next = item.nextElementSibling) {
      const box = next.getBoundingClientRect();
      if (clientY < box.top + box.height / 2) break;
      item.before(next);             // the neighbour moves: a node that is put elsewhere loses its pointer
    }
    for (let before = item.previousElementSibling; before; before = item.previousElementSibling) {
      const box = before.getBoundingClientRect();
      if (clientY > box.top + box.height / 2) break;
      item.after(before);
    }
    [...list.children].forEach((li, at) => { li.querySelector(".rank").textContent = at + 1; });
  };
  const drop = (last) => {
    for (const name of ["pointermove", "pointerup", "pointercancel"]) grip.removeEventListener(name, step[name]);
    item.classList.remove("held");
    const to = [...list.children].indexOf(item);
    if (shown[policy] !== page || !list.isConnected) return;
    if (last.type === "pointercancel" || to === from || to < 0) return draw(policy);
    move(policy, from, to);
    draw(policy);
    rescore(policy);
  };
  const step = { pointermove: follow, pointerup: drop, pointercancel: drop };
  for (const [name, act] of Object.entries(step)) grip.addEventListener(name, act);
}

// The form.

function chips() {
  const chip = (kept, id, text, act) => make("li", {}, text, make("button", { type: "button",
    "aria-label": `Remove ${text}`, on: { click: () => { kept.delete(id); chips(); act(); } } }, "×"));
  byId("history").replaceChildren(...[...typed].map(([id, { title, rating }]) =>
    chip(typed, id, `${title}${rating === null ? "" : ` ${rating}★`}`, write)));
  byId("excluded").replaceChildren(...[...excluded].map(([id, title]) => chip(excluded, id, title, write)));
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
  const box = byId("stored"), user = byId("user").value.trim();
  box.hidden = true;
  if (!user) return;
  try {
    const { history } = await call(`/v1/users/${encodeURIComponent(user)}`);
    if (byId("user").value.trim() !== user) return;
    box.hidden = false;
    box.querySelector("summary").textContent = `${history.length} items of stored history`;
    box.querySelector("ul").replaceChildren(...history.map(({ title, item, rating }) =>
      make("li", {}, `${title || item}${rating === null ? "" : ` ${rating}★`}`)));
  } catch { /* a stranger: the page says so itself */ }
}

// One column for each policy that is compared; what cannot be shown is not explained either.
function columns() {
  const wanted = [byId("left").value, byId("right").value];
  policies = served.filter((policy) => wanted.includes(policy));
  for (const policy of Object.keys(NAMES)) {
    byId(policy).hidden = !policies.includes(policy);
    if (!policies.includes(policy)) delete shown[policy];
  }
  byId("go").textContent = policies.length > 1 ? "Write both pages" : "Write the page";
  byId("about-both").hidden = policies.length < 2;
}

// The default beside SFT, or beside what else there is.
function offer({ policies: there, default: best, why, models, split }) {
  served = Object.keys(NAMES).filter((policy) => there.includes(policy));
  rated = Boolean(models.reward);
  const other = ["sft", "ppo", "plain", "compose"].find((policy) => policy !== best && served.includes(policy)) || best;
  for (const [id, chosen] of [["left", other], ["right", best]]) {
    byId(id).replaceChildren(...served.map((policy) =>
      make("option", { value: policy, selected: policy === chosen }, NAMES[policy])));
  }
  byId("versus").hidden = served.length < 2;
  byId("pages").classList.toggle("unrated", !rated);
  byId("about-bar").hidden = !rated;
  byId("about-held").hidden = split === "none";
  byId("about-default").textContent = served.length > 1 ? `Default: ${NAMES[best]} (${why}).` : "";
  columns();
}

async function begin() {
  const shop = await call("/v1/shop");
  const count = (n) => n.toLocaleString("en");
  byId("facts").textContent = `${shop.dataset}: ${count(shop.users)} users, ${count(shop.items)} items`;
  const names = { compose: "composed", ppo: "with the reward", sft: "without the reward", reward: "reward model" };
  byId("models").textContent = [`version ${shop.version}`, ...Object.keys(names).filter((name) => shop.models[name])
    .map((name) => `${names[name]} ${shop.models[name]}`)].join(", ");
  offer(shop);
  byId("k").max = shop.k_max;
  byId("k").value = Math.min(20, shop.k_max);
  if (shop.price) {
    byId("min").placeholder = shop.price.min;
    byId("max").placeholder = shop.price.max;
  }
  byId("categories").append(...shop.categories.map(({ name, items }) => make("label", {},
    make("input", { type: "checkbox", value: name }), ` ${name} `, make("small", {}, `(${items})`))));
  const users = await suggest("user", "users", "/v1/users");
  if (users.length && !byId("user").value) byId("user").value = users[0].id;
  stored();
  write();
}

const again = later(write);
byId("ask").addEventListener("submit", (event) => { event.preventDefault(); write(); });
byId("filters").addEventListener("input", again);
byId("k").addEventListener("input", again);
byId("decoding").addEventListener("input", again);
byId("variety").addEventListener("input", again);
for (const id of ["left", "right"]) byId(id).addEventListener("input", () => { columns(); write(); });
byId("user").addEventListener("input", later(() => { suggest("user", "users", "/v1/users"); stored(); write(); }));
byId("find").addEventListener("input", later(() => suggest("find", "found", "/v1/items")));
byId("find").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); add(); } });
byId("add").addEventListener("click", add);
begin().catch((error) => say(`That did not work: ${error.message}`));
