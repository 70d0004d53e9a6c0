// One request for pictures. The service answers with a stream of its steps, or, where it has none, at once.

// What the service refused: an HTTP status, and a sentence.
export class Refused extends Error {
  constructor(status, message, wait_s = null) {
    super(`${message}${wait_s ? ` (try again in ${wait_s} s)` : ""} [${status}]`);
    this.status = status;
  }
}

const STOPPED = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><rect width="64" height="64" fill="#888"/>
<text x="32" y="30" font-size="6" text-anchor="middle">stopped by the<tspan x="32" dy="8">safety checker</tspan></text></svg>`;

// A picture; null stands for one that the safety checker stopped.
const blobOf = (base64) => base64 === null
  ? new Blob([STOPPED], { type: "image/svg+xml" })
  : new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type: "image/png" });

async function refusal(response) {
  const text = await response.text();
  let message = text;
  try { message = JSON.parse(text).error.message; } catch { /* a proxy answers in plain text */ }
  return new Refused(response.status, message, response.headers.get("Retry-After"));
}

// The events of a text/event-stream, each as {event, data}.
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    if (!value.includes("\n")) continue;  // a piece of a long line
    const blocks = text.replaceAll("\r\n", "\n").split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const found = { event: "message", data: "" };
      for (const line of block.split("\n")) {
        const [, field, content] = line.match(/^(event|data): ?(.*)$/) || [];
        if (field === "event") found.event = content;
        if (field === "data") found.data += content;
      }
      if (found.data) yield { ...found, data: JSON.parse(found.data) };
    }
  }
}

async function followed(response, progress) {
  for await (const { event, data } of events(response.body)) {
    if (event === "progress") progress(data.step, data.steps, data.preview ? blobOf(data.preview) : null);
    if (event === "error") throw new Refused(data.status, data.error.message);
    if (event === "done") return { ...data, blobs: data.images.map(blobOf) };
  }
  throw new Error("it ended the answer before the picture was done");
}

async function atOnce(response) {
  const told = {
    seed: Number(response.headers.get("X-AAI-Seed")),
    model: response.headers.get("X-AAI-Model"),
    bundle: response.headers.get("X-AAI-Bundle"),
  };
  if (response.headers.get("Content-Type").startsWith("image/")) return { ...told, blobs: [await response.blob()] };
  const { images } = await response.json();
  return { ...told, blobs: images.map(blobOf) };
}

// -> {seed, model, bundle, blobs}. progress(step, steps, preview) is called on the way, preview a Blob or null.
// Throws Refused, an AbortError after signal, else an Error when the service cannot be reached.
export async function ask(verb, body, { key = "", signal, progress = () => {} } = {}) {
  const headers = { Accept: "text/event-stream" };
  if (key) headers["X-API-Key"] = key;
  const response = await fetch(`v1/${verb}`, { method: "POST", body, headers, signal });
  if (!response.ok) throw await refusal(response);
  const streamed = response.headers.get("Content-Type").startsWith("text/event-stream");
  return streamed ? followed(response, progress) : atOnce(response);
}
