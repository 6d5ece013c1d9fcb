// The page at /host: what the server, its engines and the daemon do, each second anew.
import { ServerError, getJson, setKey } from "./api.js";
import { byId, element } from "./elements.js";
import { showHeat } from "./heat.js";

const PAUSE = 1000; // milliseconds between two looks
const NUM_POINTS = 60;

let before = null; // the state of the last look
const speeds = new Map(); // tokens/s of each model, one a look
const cards = new Map(); // what shows each model

const count = (number) => number.toLocaleString("en-US");
const percent = (part) => `${(100 * part).toFixed(part < 0.1 ? 1 : 0)} %`;

function bytes(number) {
  const names = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (number >= 1024 && at < names.length - 1) { number /= 1024; at += 1; }
  return `${number.toFixed(at === 0 || number >= 100 ? 0 : 1)} ${names[at]}`;
}

function duration(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} days`;
}

// How fast a count has grown since the last look; a count that fell has begun anew.
function rate(now, old, seconds) {
  return old === undefined || seconds <= 0 ? 0 : Math.max(0, now - old) / seconds;
}

function figures(pairs) {
  return pairs.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

// Models

function card(model) {
  const made = {
    engines: element("div", { className: "note" }),
    speed: element("strong"),
    line: document.createElementNS("http://www.w3.org/2000/svg", "svg"),
    figures: element("dl", { className: "figures" }),
  };
  made.line.setAttribute("viewBox", `0 0 ${NUM_POINTS - 1} 20`);
  made.line.setAttribute("preserveAspectRatio", "none");
  made.line.setAttribute("aria-hidden", "true");
  made.line.append(document.createElementNS("http://www.w3.org/2000/svg", "polyline"));
  const speed = element("p", { className: "speed" }, made.speed, " tokens/s");
  made.place = element("article", { className: "card" }, element("h3", {}, model.name), made.engines, speed, made.line, made.figures);
  return made;
}

// One line for each of a model's engines.
function engineLine(engine, at, all) {
  const name = all.length > 1 ? `Engine ${at}: ` : "";
  if (engine.pid === null) return element("p", {}, `${name || "No engine; "}the next request starts ${name ? "it" : "one"}.`);
  const busy = name ? `, ${count(engine.running)} running, ${count(engine.waiting)} waiting` : "";
  return element("p", { title: engine.reason ?? "" }, `${name ? `${name}e` : "E"}xecutor ${engine.executor} on ${engine.place}, process ${engine.pid}, room for ${count(engine.kv_tokens)} tokens${busy}`);
}

// What a model's engines did together; null for a model that was not there.
function together(model) {
  if (!model) return null;
  const sum = (value) => model.engines.reduce((total, engine) => total + value(engine), 0);
  const all = { tokens: model.tokens, kv_used: sum((one) => one.kv_used * one.kv_tokens) / Math.max(1, sum((one) => one.kv_tokens)) };
  for (const name of ["running", "waiting", "steps", "rows", "prefix_queries", "prefix_hits", "preemptions", "deaths"]) all[name] = sum((one) => one[name]);
  return all;
}

function showModel(model, before, seconds) {
  const now = together(model);
  const old = together(before);
  if (!cards.has(model.name)) {
    cards.set(model.name, card(model));
    speeds.set(model.name, []);
  }
  const made = cards.get(model.name);
  const points = speeds.get(model.name);
  if (old) points.push(rate(now.tokens, old.tokens, seconds));
  if (points.length > NUM_POINTS) points.shift();
  const most = Math.max(1, ...points);
  const start = NUM_POINTS - points.length;
  made.line.firstChild.setAttribute("points", points.map((value, at) => `${start + at},${(19 - 18 * value / most).toFixed(1)}`).join(" "));
  made.speed.textContent = (points.at(-1) ?? 0).toFixed(1);
  const lines = model.engines.map(engineLine);
  if (lines.some((line, at) => !line.isEqualNode(made.engines.children[at] ?? null))) made.engines.replaceChildren(...lines);
  const steps = old ? now.steps - old.steps : now.steps;
  const rows = steps > 0 ? (now.rows - (old?.rows ?? 0)) / steps : now.rows / Math.max(1, now.steps);
  made.figures.replaceChildren(...figures([
    ["Running", count(now.running)],
    ["Waiting", count(now.waiting)],
    ["Rows a step", rows.toFixed(1)],
    ["KV in use", percent(now.kv_used)],
    ["Prefix hits", now.prefix_queries ? percent(now.prefix_hits / now.prefix_queries) : "–"],
    ["Tokens", count(now.tokens)],
    ["Preempted", count(now.preemptions)],
    ["Engines lost", count(now.deaths)],
  ]));
}

// The daemon

function showDaemon(daemon, old, seconds) {
  const { arena } = daemon;
  byId("ram").replaceChildren(
    element("p", {}, `${bytes(arena.bytes_used)} of the RAM budget of ${bytes(arena.bytes_total)} in use`, element("span", { className: "note" }, ` · policy ${daemon.policy} · daemon up for ${duration(daemon.uptime_seconds)}`)),
    element("progress", { max: Math.max(1, arena.bytes_total), value: arena.bytes_used, "aria-label": "RAM budget in use" }),
    ...daemon.warnings.map((warning) => element("p", { className: "note" }, warning[0].toUpperCase() + warning.slice(1))),
  );
  byId("tiers").replaceChildren(...daemon.models.map((model) => {
    const earlier = old?.models.find((one) => one.name === model.name);
    const uses = model.host_hits + model.nvme_misses;
    return row(
      model.name,
      `${count(model.num_resident)} of ${count(model.num_experts)} (${bytes(model.resident_bytes)})`,
      count(model.host_hits),
      count(model.nvme_misses),
      uses ? percent(model.host_hits / uses) : "–",
      bytes(model.nvme_bytes_read),
      `${bytes(rate(model.nvme_bytes_read, earlier?.nvme_bytes_read, seconds))}/s`,
    );
  }));
  byId("sessions").replaceChildren(...daemon.sessions.map((one) => row(
    String(one.id), one.role, one.model || "–", one.pid ? String(one.pid) : "–", String(one.uid),
    duration(one.attached_seconds), count(one.host_hits), count(one.nvme_misses), bytes(one.kept_bytes),
  )));
  if (!daemon.sessions.length) byId("sessions").append(element("tr", {}, element("td", { colSpan: 9 }, "Nobody is attached.")));
}

function row(...cells) {
  return element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));
}

function showHeatModels(names) {
  const choice = byId("heat-model");
  const shown = [...choice.options].map((one) => one.value);
  if (names.join("\n") !== shown.join("\n")) {
    const chosen = choice.value;
    choice.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
    if (names.includes(chosen)) choice.value = chosen;
  }
}

// The page

function show(state) {
  const seconds = before ? state.time - before.time : 0;
  byId("version").textContent = state.version;
  for (const model of state.models) showModel(model, before?.models.find((one) => one.name === model.name), seconds);
  const shown = state.models.map((model) => cards.get(model.name).place);
  if (shown.length !== byId("models").children.length || shown.some((one, at) => byId("models").children[at] !== one)) {
    byId("models").replaceChildren(...shown);
  }
  const waiting = state.models.reduce((sum, model) => sum + together(model).waiting, 0);
  const { daemon } = state;
  if (daemon) {
    showDaemon(daemon, before?.daemon, seconds);
    showHeatModels(daemon.models.map((model) => model.name));
  }
  if (state.heat) showHeat(state.heat);
  byId("waiting").replaceChildren(...figures([
    ["Requests for a place", count(waiting)],
    ["Fetches for a grant", daemon ? count(daemon.fetches_waiting) : "–"],
    ["Reads of the disk", daemon ? count(daemon.queued_reads) : "–"],
    ["Of these, hinted", daemon ? count(daemon.queued_hints) : "–"],
  ]));
  before = state;
}

// Says why some numbers are old; null if none are. A sentence that stays is not read out again.
function say(sentence) {
  const place = byId("away");
  if (place.textContent !== (sentence ?? "")) place.textContent = sentence ?? "";
  place.hidden = sentence === null;
  document.body.classList.toggle("old", sentence !== null);
}

async function look() {
  try {
    const chosen = byId("heat-model").value;
    const state = await getJson(`host/state?heat=${encodeURIComponent(chosen)}`);
    show(state);
    say(state.away === null ? null : `The daemon's numbers below are old or missing. ${state.away}`);
    if (!chosen && byId("heat-model").value) return look();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    if (error.status === 401) {
      byId("key").hidden = false;
      byId("key-field").focus();
      return;
    }
    say(error.message);
  }
  setTimeout(look, PAUSE);
}

byId("key").onsubmit = (event) => {
  event.preventDefault();
  setKey(byId("key-field").value.trim());
  byId("key-field").value = "";
  byId("key").hidden = true;
  look();
};
byId("heat-model").onchange = () => showHeat(null);
look();
