// The page at /: conversations with the models of this server.
import { ServerError, getJson, setKey, streamChat } from "./api.js";
import { byId, element } from "./elements.js";
import { copyText, show } from "./markdown.js";
import * as store from "./store.js";

const CURRENT = "expertd.current";
const TITLE_LENGTH = 48;
const NEAR_END = 80; // pixels
const PAUSE = 10_000; // milliseconds, in which a download has begun

let conversations = store.all();
let current = conversations.find((one) => one.id === localStorage.getItem(CURRENT)) ?? conversations[0];
let models = [];
const coming = new Map(); // conversations whose answer is coming, and its AbortController
let editing = false; // whether the composer holds the last message again
let afterKey = () => {}; // what to do again once there is a key

// Conversations

function select(conversation) {
  current = conversation;
  localStorage.setItem(CURRENT, current.id);
  endEditing();
  drawConversations();
  drawMessages();
  showBusy();
  closeMenu();
}

function begin() {
  const empty = conversations.find((one) => !one.messages.length);
  const made = empty ?? store.fresh(current?.model ?? models[0] ?? "");
  if (!empty) conversations.unshift(made);
  select(made);
  byId("message").focus();
}

function save(conversation) {
  try {
    store.save(conversation);
  } catch {
    tell("The browser has no room for more conversations; delete one, or export them first.");
  }
}

function rename(conversation, item) {
  const field = element("input", { value: conversation.title, "aria-label": "Name of the conversation", maxLength: 120 });
  const end = (keep, focus = true) => {
    field.onblur = null;
    if (keep && field.value.trim()) {
      conversation.title = field.value.trim();
      conversation.named = true;
      save(conversation);
    }
    field.remove();
    drawConversations();
    if (focus) byId(`c-${conversation.id}`).focus();
  };
  field.onblur = () => end(true, false);
  field.onkeydown = (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault(); // The button that gets the focus is not pressed.
    event.stopPropagation();
    end(event.key === "Enter");
  };
  item.replaceChildren(field);
  field.select();
}

function remove(conversation) {
  if (!confirm(`Delete “${conversation.title}”? It is in this browser only.`)) return;
  coming.get(conversation)?.abort();
  store.remove(conversation);
  conversations = conversations.filter((one) => one !== conversation);
  if (conversation !== current) drawConversations();
  else if (conversations.length) select(conversations[0]);
  else begin();
  byId("new").focus();
}

function exportAll() {
  const text = JSON.stringify({ exported: new Date().toISOString(), conversations }, null, 2);
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  element("a", { href: address, download: "conversations.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), PAUSE);
}

function drawConversations() {
  if (byId("conversations").querySelector("input")) return; // One is being renamed.
  const focused = document.activeElement.closest("#conversations") && document.activeElement.id;
  byId("conversations").replaceChildren(...conversations.map((one) => {
    const item = element("li");
    const open = element("button", { id: `c-${one.id}`, className: "open", title: one.title }, one.title);
    if (one === current) open.setAttribute("aria-current", "true");
    open.onclick = () => select(one);
    const again = element("button", { id: `r-${one.id}`, className: "quiet", "aria-label": `Rename ${one.title}`, title: "Rename" }, "✎");
    again.onclick = () => rename(one, item);
    const away = element("button", { id: `d-${one.id}`, className: "quiet", "aria-label": `Delete ${one.title}`, title: "Delete" }, "✕");
    away.onclick = () => remove(one);
    item.append(open, again, away);
    return item;
  }));
  if (focused) byId(focused)?.focus();
  byId("title").textContent = current.title;
  if (models.length && !models.includes(current.model)) current.model = models[0];
  byId("model").value = current.model;
}

// Messages

function drawMessages() {
  const log = byId("messages");
  log.replaceChildren(...current.messages.map((message, at) => drawn(message, at)));
  byId("empty").hidden = current.messages.length > 0;
  toEnd();
}

function drawn(message, at) {
  const isUser = message.role === "user";
  const text = element("div", { className: "text" });
  const made = element("article", { className: message.role }, element("h2", {}, isUser ? "You" : message.model || "Answer"));
  if (isUser) text.textContent = message.content;
  else made.append(element("details", { className: "reasoning", hidden: true }, element("summary", {}, "Reasoning"), element("div", { className: "text" })));
  made.append(text, element("footer"));
  if (!isUser) refresh(made, message);
  drawFoot(made, message, at);
  return made;
}

// Shows what an answer has by now.
function refresh(article, message) {
  const reasoning = article.querySelector(".reasoning");
  reasoning.hidden = !message.reasoning;
  if (message.reasoning) show(reasoning.querySelector(".text"), message.reasoning);
  show(article.querySelector(":scope > .text"), message.content);
}

function drawFoot(article, message, at) {
  const foot = article.querySelector("footer");
  foot.replaceChildren();
  if (message.error) foot.append(failure(message.error));
  if (coming.has(current)) return;
  const add = (name, action) => {
    const button = element("button", { type: "button", className: "quiet" }, name);
    button.onclick = action;
    foot.append(button);
    return button;
  };
  const isLast = at === current.messages.length - 1;
  if (message.role === "assistant") {
    if (message.content) add("Copy", (event) => copyText(message.content).then((done) => { event.target.textContent = done ? "Copied" : "The browser refuses"; }));
    if (isLast) add(message.error ? "Retry" : "Regenerate", answer);
    foot.append(element("span", { className: "note" }, figures(message)));
  } else if (at >= current.messages.length - 2 && at === current.messages.findLastIndex((one) => one.role === "user")) {
    add("Edit", edit);
  }
}

const HINTS = [
  [/has no chat template/, "A model without one continues texts only; another model of the list above may be made for chats."],
  [/maximum context length/, "This conversation is as long as the model takes: begin a new one."],
];

function failure({ message, status }) {
  const hints = HINTS.filter(([about]) => about.test(message)).map(([, hint]) => hint);
  if (status === 429) hints.push("Others are being served first.");
  return element("p", { className: "failure", role: "alert" }, [message, ...hints].join(" "));
}

function figures({ tokens, seconds, first, stopped, cut }) {
  if (!tokens) return stopped ? "stopped" : "";
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  if (first !== undefined) {
    parts.push(`first after ${first < 1 ? `${Math.round(1000 * first)} ms` : `${first.toFixed(1)} s`}`);
  }
  if (stopped) parts.push("stopped");
  if (cut) parts.push("cut: as long as it may be");
  return parts.join(" · ");
}

function toEnd() {
  byId("scroll").scrollTop = byId("scroll").scrollHeight;
}

function tell(sentence) {
  byId("status").textContent = sentence;
}

// Asking

function send(event) {
  event.preventDefault();
  const field = byId("message");
  const content = field.value.trim();
  if (!content || coming.has(current)) return;
  if (editing) current.messages.length = current.messages.findLastIndex((one) => one.role === "user");
  endEditing();
  current.messages.push({ role: "user", content });
  if (!current.named && current.messages.length === 1) {
    current.title = content.length > TITLE_LENGTH ? `${content.slice(0, TITLE_LENGTH - 1)}…` : content;
  }
  field.value = "";
  grow();
  answer();
}

// Asks for an answer to the last message of the user; an answer that is there makes place. It
// goes on while another conversation is shown.
async function answer() {
  const conversation = current;
  if (coming.has(conversation)) return;
  conversation.messages.length = conversation.messages.findLastIndex((one) => one.role === "user") + 1;
  const messages = conversation.messages.map(({ role, content }) => ({ role, content }));
  if (conversation.system.trim()) messages.unshift({ role: "system", content: conversation.system });
  const message = { role: "assistant", content: "", model: conversation.model };
  conversation.messages.push(message);
  touch(conversation);
  const abort = new AbortController();
  coming.set(conversation, abort);
  drawMessages();
  showBusy();
  tell("The answer is coming.");
  try {
    await receive(conversation, message, messages, abort.signal);
    tell("The answer is complete.");
  } catch (error) {
    if (abort.signal.aborted) {
      message.stopped = true;
      tell("The answer was stopped.");
    } else if (error instanceof ServerError) {
      message.error = { message: error.message, status: error.status };
      tell("");
      if (error.status === 401) askForKey(answer);
      else loadModels(); // The server may have come back with others.
    } else throw error;
  } finally {
    coming.delete(conversation);
    if (conversations.includes(conversation)) touch(conversation);
    if (conversation === current) {
      withEndInView(() => {
        refresh(byId("messages").lastElementChild, message);
        [...byId("messages").children].forEach((one, at) => drawFoot(one, conversation.messages[at], at));
      });
      showBusy();
    }
  }
}

// Fills `message` with what comes, and shows it at most once a frame.
async function receive(conversation, message, messages, signal) {
  const asked = performance.now();
  let begun, frame = 0;
  const draw = () => {
    frame = 0;
    if (conversation !== current) return;
    const article = byId("messages").lastElementChild;
    withEndInView(() => {
      refresh(article, message);
      article.querySelector("footer").textContent = figures(message);
    });
  };
  const body = { ...conversation.settings, model: conversation.model, messages };
  try {
    for await (const chunk of streamChat(body, signal)) {
      const delta = chunk.choices[0]?.delta ?? {};
      const thought = delta.reasoning_content ?? delta.reasoning ?? "";
      if (delta.content || thought) {
        const now = performance.now();
        begun ??= now;
        message.content += delta.content ?? "";
        if (thought) message.reasoning = (message.reasoning ?? "") + thought;
        message.first = (begun - asked) / 1000;
        message.seconds = (now - begun) / 1000;
        message.tokens = (message.tokens ?? 0) + 1;
      }
      message.cut ||= chunk.choices[0]?.finish_reason === "length";
      message.tokens = chunk.usage?.completion_tokens ?? message.tokens;
      frame ||= requestAnimationFrame(draw);
    }
  } finally {
    cancelAnimationFrame(frame);
  }
}

// Keeps a conversation that has changed, as the first of the list.
function touch(conversation) {
  conversation.updated = Date.now();
  save(conversation);
  conversations.sort((a, b) => b.updated - a.updated);
  drawConversations();
}

// Does `draw`; who had read to the end still sees it then.
function withEndInView(draw) {
  const scroll = byId("scroll");
  const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_END;
  draw();
  if (atEnd) toEnd();
}

function showBusy() {
  const is = coming.has(current);
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("messages").setAttribute("aria-busy", String(is)); // What is complete is read out, not each token.
  byId("messages").classList.toggle("coming", is);
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  if (hadFocus) byId("message").focus();
}

function edit() {
  editing = true;
  byId("editing").hidden = false;
  byId("message").value = current.messages.findLast((one) => one.role === "user").content;
  byId("message").focus();
  grow();
}

function endEditing() {
  if (!editing) return;
  editing = false;
  byId("editing").hidden = true;
  byId("message").value = "";
  grow();
}

function grow() {
  const field = byId("message");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

// Models, key, settings

async function loadModels() {
  try {
    models = (await getJson("v1/models")).data.map((one) => one.id);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    if (error.status === 401) askForKey(loadModels);
    if (error.status === 401 || !models.length) tell(error.message);
    return;
  }
  byId("model").replaceChildren(...models.map((name) => element("option", { value: name }, name)));
  drawConversations();
  if (!models.length) tell("The server has no model yet.");
}

function askForKey(then) {
  afterKey = then;
  byId("key").hidden = false;
  byId("key-field").focus();
}

function useKey(event) {
  event.preventDefault();
  setKey(byId("key-field").value.trim());
  byId("key-field").value = "";
  byId("key").hidden = true;
  byId("message").focus();
  tell("");
  const again = afterKey;
  if (again !== loadModels) loadModels();
  again();
}

function openSettings() {
  const form = byId("drawer").querySelector("form");
  form.elements.system.value = current.system;
  for (const field of form.querySelectorAll("input")) field.value = current.settings[field.name] ?? "";
  byId("drawer").showModal();
}

function keepSettings() {
  const form = byId("drawer").querySelector("form");
  current.system = form.elements.system.value;
  current.settings = {};
  for (const field of form.querySelectorAll("input")) {
    if (field.value !== "" && field.checkValidity()) current.settings[field.name] = field.valueAsNumber;
  }
  if (current.messages.length) save(current);
}

function closeMenu() {
  document.body.classList.remove("menu");
  byId("menu").setAttribute("aria-expanded", "false");
}

// The page

byId("new").onclick = begin;
byId("export").onclick = exportAll;
byId("composer").onsubmit = send;
byId("stop").onclick = () => coming.get(current)?.abort();
byId("key").onsubmit = useKey;
byId("keep").onclick = () => { endEditing(); byId("message").focus(); };
byId("settings").onclick = openSettings;
byId("drawer").onclose = keepSettings;
byId("drawer").onclick = (event) => { if (event.target === event.currentTarget) event.target.close(); };
byId("model").onchange = (event) => {
  current.model = event.target.value;
  if (current.messages.length) save(current);
};
byId("menu").onclick = () => {
  byId("menu").setAttribute("aria-expanded", String(document.body.classList.toggle("menu")));
};
byId("message").oninput = grow;
byId("message").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
};
addEventListener("pagehide", () => {
  // What has come of an answer stays, and the end of its request is no failure.
  for (const [one, abort] of coming) {
    one.messages.at(-1).stopped = true;
    save(one);
    abort.abort();
  }
});
document.onkeydown = (event) => {
  if (event.key !== "Escape" || byId("drawer").open) return;
  if (coming.has(current)) coming.get(current).abort();
  else if (editing) endEditing();
  else closeMenu();
};
addEventListener("storage", () => {
  // Another tab has changed something. What is only here, or coming, stays.
  const own = conversations.filter((one) => coming.has(one) || !one.messages.length);
  const found = store.all().filter((one) => !own.some(({ id }) => id === one.id));
  conversations = [...own, ...found];
  const shown = conversations.find((one) => one.id === current.id) ?? conversations[0] ?? store.fresh(current.model);
  if (!conversations.includes(shown)) conversations.push(shown);
  if (shown === current) drawConversations();
  else select(shown);
});

if (!current) {
  current = store.fresh("");
  conversations = [current];
}
drawConversations();
drawMessages();
byId("message").focus();
loadModels();
