// What the page of `pagellm serve` and the storefront's share: nodes, calls with the key, words.
export const byId = (id) => document.getElementById(id);

export function make(tag, options = {}, ...children) {
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

export async function call(path, body) {
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

export const say = (text) => { byId("status").textContent = text; };
export const fixed = (x, digits = 3) => x === null || x === undefined ? "–" : x.toFixed(digits).replace("-", "−");
export const later = (act, wait = 250) => { let t; return () => { clearTimeout(t); t = setTimeout(act, wait); }; };

