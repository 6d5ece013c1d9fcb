// Talks to the server that the page came from, and to no other.

const KEY = "expertd.key";

export const setKey = (key) => sessionStorage.setItem(KEY, key);

// Something went wrong that a sentence tells; `status` is HTTP's, 0 without an answer.
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer; it may have stopped, or the network is away.");
  }
  if (response.ok) return response;
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch { /* The body says nothing more. */ }
  throw new ServerError(message, response.status);
}

export const getJson = async (path) => (await ask(path)).json();

// The chunks of an answer as they come. Raises ServerError, and AbortError after `signal`.
export async function* streamChat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ServerError("The answer broke off before its end.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        const data = line.slice(6).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(chunk.error.message);
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ServerError("The connection broke before the answer's end.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
