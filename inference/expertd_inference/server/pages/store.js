// Conversations, in this browser only: one entry of localStorage each, so that two tabs do not
// overwrite each other's.

const PREFIX = "expertd.conversation.";

export function all() {
  const found = [];
  for (const key of Object.keys(localStorage)) {
    if (!key.startsWith(PREFIX)) continue;
    try {
      found.push(JSON.parse(localStorage.getItem(key)));
    } catch {
      localStorage.removeItem(key); // Not written by this page: there is nothing to show.
    }
  }
  return found.sort((a, b) => b.updated - a.updated);
}

export function fresh(model) {
  const id = Array.from(crypto.getRandomValues(new Uint32Array(2)), (n) => n.toString(36)).join("");
  return { id, title: "New conversation", model, system: "", settings: {}, messages: [], updated: Date.now() };
}

// Raises QuotaExceededError if the browser has no room left.
export function save(conversation) {
  localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
}

export function remove(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}
