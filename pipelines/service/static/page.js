"use strict";
const $ = (id) => document.getElementById(id);
const form = $("form");
const ABOUT = {
  generate: "Paints what is heard. <sound> in the prompt is the sound.",
  edit: "Puts the object that is heard into the picture.",
  stylize: "Puts the ambience that is heard onto the picture.",
};
const verb = () => form.elements.verb.value;
let urls = [];

function show(file, image) {
  const url = URL.createObjectURL(file);
  if (image) { $("preview").src = url; $("preview").hidden = false; }
  else { $("player").src = url; $("player").hidden = false; }
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function changeVerb() {
  const repaint = verb() !== "generate";
  $("about").textContent = ABOUT[verb()];
  $("drop-image").hidden = !repaint;
  form.elements.image.required = repaint;
  form.elements.denoise_strength.disabled = !repaint;
  form.elements.prompt.placeholder = repaint ? "read off the picture" : "a photo of <sound>";
}

function setUpDrop(zone) {
  const input = zone.querySelector("input");
  const chosen = () => {
    if (!input.files.length) return;
    zone.querySelector("strong").textContent = input.files[0].name;
    zone.querySelector("span").textContent = `${(input.files[0].size / 1024).toFixed(0)} kB`;
    show(input.files[0], input.name === "image");
  };
  input.addEventListener("change", chosen);
  for (const name of ["dragover", "dragleave", "drop"]) {
    zone.addEventListener(name, (event) => {
      event.preventDefault();
      zone.classList.toggle("over", name === "dragover");
      if (name === "drop" && event.dataTransfer.files.length) { input.files = event.dataTransfer.files; chosen(); }
    });
  }
}

function setUpRecorder() {
  if (!navigator.mediaDevices || !window.MediaRecorder) return;  // only where the page is local or on HTTPS
  $("record").hidden = false;
  $("record").addEventListener("click", async () => {
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
      const recorder = new MediaRecorder(stream);
      const parts = [];
      recorder.ondataavailable = (event) => parts.push(event.data);
      recorder.onstop = () => {
        stream.getTracks().forEach((track) => track.stop());
        const files = new DataTransfer();
        files.items.add(new File(parts, "recording", { type: recorder.mimeType }));
        form.elements.audio.files = files.files;
        form.elements.audio.dispatchEvent(new Event("change"));
        $("record").textContent = "Record 5 s";
        $("record").disabled = false;
      };
      recorder.start();
      $("record").textContent = "Recording ...";
      $("record").disabled = true;
      setTimeout(() => recorder.stop(), 5000);
    } catch (error) {
      fail(`The microphone cannot be used: ${error.message}`);
    }
  });
}

function request() {
  const body = new FormData();
  for (const [name, value] of new FormData(form)) {
    if (name === "verb" || (name === "image" && verb() === "generate")) continue;
    if (value instanceof File ? value.size : value !== "") body.append(name, value);
  }
  const key = sessionStorage.getItem("key") || "";
  return { method: "POST", body, headers: key ? { "X-API-Key": key } : {} };
}

async function reason(response) {
  if (response.status === 401) $("key-field").hidden = false;
  const wait = response.headers.get("Retry-After");
  const text = await response.text();
  let message = text;
  try { message = JSON.parse(text).error.message; } catch { /* the proxy answers in plain text */ }
  return `${message}${wait ? ` (try again in ${wait} s)` : ""} [${response.status}]`;
}

const STOPPED = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><rect width="64" height="64" fill="#888"/>
<text x="32" y="30" font-size="6" text-anchor="middle">stopped by the<tspan x="32" dy="8">safety checker</tspan></text></svg>`;

async function pictures(response) {
  if (response.headers.get("Content-Type").startsWith("image/")) return [await response.blob()];
  const { images } = await response.json();
  return images.map((text) => text === null
    ? new Blob([STOPPED], { type: "image/svg+xml" })
    : new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], { type: "image/png" }));
}

function showPictures(blobs, seed) {
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = blobs.map((blob) => URL.createObjectURL(blob));
  $("pictures").replaceChildren(...urls.map((url, i) => {
    const link = document.createElement("a");
    const image = document.createElement("img");
    link.href = image.src = url;
    link.download = `${verb()}-${seed + i}.png`;
    image.alt = `Picture of the sound, seed ${seed + i}`;
    link.append(image);
    return link;
  }));
}

async function paint(event) {
  event.preventDefault();
  fail("");
  if ($("key").value) sessionStorage.setItem("key", $("key").value);
  $("paint").disabled = true;
  $("paint").textContent = "Painting ...";
  $("pictures").classList.add("busy");
  const started = performance.now();
  try {
    const response = await fetch(`v1/${verb()}`, request());
    if (!response.ok) { fail(await reason(response)); return; }
    const seed = Number(response.headers.get("X-AAI-Seed"));
    showPictures(await pictures(response), seed);
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    $("made").textContent = `${response.headers.get("X-AAI-Model")}, seed ${seed}, ${seconds} s. Click a picture to save it.`;
  } catch (error) {
    fail(`The service cannot be reached: ${error.message}`);
  } finally {
    $("paint").disabled = false;
    $("paint").textContent = "Paint";
    $("pictures").classList.remove("busy");
  }
}

async function health() {
  try {
    const state = await (await fetch("healthz")).json();
    const name = `${state.model.name} ${state.model.version}${state.model.alias ? ` (${state.model.alias})` : ""}`;
    $("health").textContent = `${name}: ${state.status}, ${state.queue_depth} waiting`;
  } catch {
    $("health").textContent = "Service unreachable";
  }
}

form.addEventListener("submit", paint);
form.addEventListener("change", changeVerb);
document.querySelectorAll(".drop").forEach(setUpDrop);
setUpRecorder();
changeVerb();
health();
setInterval(health, 5000);
