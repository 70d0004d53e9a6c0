import { ask, Refused } from "./asking.js";
import { Brush } from "./brush.js";
import { describe, read } from "./made.js";
import { give, setUpDrop, Sound } from "./sound.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
const ABOUT = {
  generate: "Paints what is heard.",
  mix: "Paints two sounds in one picture.",
  edit: "Puts the object that is heard into a picture.",
  stylize: "Puts the ambience that is heard onto a picture.",
};
const EXTENTS = {
  all: "The whole picture is painted anew, after the given one.",
  brush: "Paint over the part that may change. All else stays as it is, pixel by pixel.",
  found: "The model finds the picture's object. Edit changes it, stylize all around it.",
};
const verb = () => form.elements.verb.value;
const extent = () => form.elements.extent.value;
const repaints = () => verb() === "edit" || verb() === "stylize";
const mixes = () => verb() === "mix";
const sounds = [new Sound("audio", "sound", fail), new Sound("audio2", "sound2", fail)];
const brush = new Brush($("brush"), $("cursor"), $("brush-size"), () => { $("clear").disabled = !brush.used; });
let running = null, urls = [];

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
  if (text) $("error").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

const mixedPrompt = () => `a photo of ${sounds.map((sound) => sound.mention()).join(" and ")}`;
const ownPrompt = () => form.elements.prompt.value.trim() !== "";

function promptHint() {
  if (mixes() && ownPrompt()) return "A strength is written as <name*0.6>.";
  if (mixes()) return "Empty: both sounds, as strong as you set them.";
  if (repaints()) return "Empty: read off the picture.";
  return "<sound> is the sound. Empty: a photo of it.";
}

// Everything that depends on what is chosen.
function update() {
  const weighed = mixes() && !ownPrompt();
  $("about").textContent = ABOUT[verb()];
  $("given").hidden = !repaints();
  form.elements.denoise_strength.closest("label").hidden = !repaints();
  form.elements.denoise_strength.disabled = !repaints();
  form.elements.denoise_strength.placeholder = extent() === "all" ? "0.8" : "0.9";
  sounds[1].card.hidden = !mixes();
  for (const sound of sounds) sound.setMixing(mixes(), weighed);
  $("strength").hidden = form.elements.sound_strength.disabled = weighed;
  form.elements.prompt.placeholder = mixes() ? mixedPrompt() : repaints() ? "" : "a photo of <sound>";
  $("prompt-hint").textContent = promptHint();
  $("extent-hint").textContent = EXTENTS[extent()];
  $("brushing").hidden = $("brush").hidden = extent() !== "brush";
  for (const range of form.querySelectorAll(".slider:has(output) input")) {
    range.closest("label").querySelector("output").textContent = Number(range.value).toFixed(2);
  }
}

async function showGiven(file) {
  try {
    const { width, height } = await createImageBitmap(file);
    URL.revokeObjectURL($("preview").src);
    $("preview").src = URL.createObjectURL(file);
    brush.fit(width, height);
    $("extent-field").hidden = false;
  } catch {
    $("extent-field").hidden = true;
    form.elements.extent.value = "all";
    fail("This browser cannot show the picture; PNG, JPEG and WebP can be given.");
  }
}

// What is missing or does not fit, as a sentence; empty when the request can be sent.
function missing() {
  if (mixes() && !sounds.every((sound) => sound.file)) return "Choose or record two sounds first.";
  if (!sounds[0].file) return "Choose or record a sound first.";
  if (mixes() && sounds[0].name === sounds[1].name) return "Give the two sounds different names.";
  if (repaints() && !form.elements.image.files.length) return "Choose the picture that shall be changed.";
  if (repaints() && extent() === "brush" && !brush.used) return "Brush over the part that may change first.";
  return "";
}

async function body() {
  const data = new FormData(form);
  for (const name of ["verb", "extent", "audio", "audio2"]) data.delete(name);
  if (!repaints()) data.delete("image");
  for (const [name, value] of [...data]) if (value === "") data.delete(name);
  for (const sound of mixes() ? sounds : sounds.slice(0, 1)) data.append("audio", sound.file);
  if (mixes()) {
    data.set("names", sounds.map((sound) => sound.name).join(","));
    if (!ownPrompt()) data.set("prompt", mixedPrompt());
  }
  if (repaints() && extent() !== "all") data.set("repaint", "invert");
  if (repaints() && extent() === "brush") data.set("mask", await brush.mask(), "mask.png");
  return data;
}

const urlOf = (blob) => { urls.push(URL.createObjectURL(blob)); return urls.at(-1); };

function button(text, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", act);
  return made;
}

async function showHow(blob, open) {
  const details = describe(await read(blob));
  details.open = open;
  $("how").replaceChildren(details);
}

// Takes a picture as the one to be changed.
function edit(blob, name) {
  form.elements.verb.value = "edit";
  give(form.elements.image, new File([blob], name, { type: "image/png" }));
  form.scrollIntoView({ behavior: "smooth" });
}

// A picture, what it is called, and what can be done with it.
function tile(blob, title, name, seed, changeable = true) {
  const figure = document.createElement("figure"), image = document.createElement("img");
  const caption = document.createElement("figcaption"), save = document.createElement("a");
  image.src = save.href = urlOf(blob);
  image.alt = `${title}, seed ${seed}`;
  save.download = `${name}-${seed}.png`;
  save.textContent = "Save";
  const words = document.createElement("span");
  words.textContent = title;
  caption.append(words, save);
  if (changeable) caption.append(button("Edit", () => edit(blob, save.download)));
  caption.append(button("How", () => showHow(blob, true)));
  figure.append(image, caption);
  return figure;
}

function showSteps(step, steps, preview) {
  $("bar").max = steps;
  $("bar").value = step;
  $("step").textContent = `Step ${step} of ${steps}`;
  if (!preview) return;
  $("sketch").src = urlOf(preview);
  $("sketch").hidden = false;
}

function showPainting(busy) {
  $("painting").hidden = !busy;
  $("pictures").hidden = busy;
  $("paint").disabled = busy;
  $("paint").textContent = busy ? "Painting ..." : "Paint";
  $("result").setAttribute("aria-busy", busy);
  if (busy) {
    $("empty").hidden = $("floor").hidden = $("sketch").hidden = true;
    $("bar").removeAttribute("value");
    $("step").textContent = "Sent";
  } else {
    $("empty").hidden = $("pictures").childElementCount > 0;
    $("floor").hidden = !$("floor").childElementCount;
  }
}

function showPictures({ blobs, seed, model }, started_ms) {
  const seconds = ((performance.now() - started_ms) / 1000).toFixed(1);
  const several = blobs.length > 1;
  const title = (i) => (several ? `Seed ${seed + i}` : "With the sound");
  $("pictures").replaceChildren(...blobs.map((blob, i) => tile(blob, title(i), verb(), seed + i)));
  $("floor").replaceChildren();
  $("shown").classList.toggle("several", several);
  $("made").textContent = `${model}, seed ${seed}, ${seconds} s`;
  showHow(blobs[0], false);
}

// The same with no sound: what the prompt alone gives.
async function paintFloor(path, data, options, model) {
  data.set("sound_strength", "0");
  data.set("num_images", "1");
  const waiting = document.createElement("p");
  waiting.className = "frame hint";
  waiting.textContent = "Painting without the sound ...";
  $("floor").replaceChildren(waiting);
  $("floor").hidden = false;
  try {
    const answer = await ask(path, data, options);
    const by = answer.model === model ? "" : ` (${answer.model})`;  // promoted in between
    $("floor").replaceChildren(tile(answer.blobs[0], `Without the sound${by}`, "without-sound", answer.seed, false));
  } catch (error) {
    if (error.name === "AbortError") $("floor").replaceChildren();
    waiting.textContent = `Not painted without the sound: ${error.message}`;
  }
}

function explain(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) { $("key-field").hidden = false; $("key").focus(); }
  fail(error instanceof Refused ? error.message : `The service cannot be reached: ${error.message}`);
}

async function paint(event) {
  event.preventDefault();
  fail(missing());
  if (!$("error").hidden) return;
  if ($("key").value) sessionStorage.setItem("key", $("key").value);
  running?.abort();
  const mine = running = new AbortController();
  const options = { key: sessionStorage.getItem("key") || "", signal: mine.signal };
  const path = mixes() ? "generate" : verb(), started_ms = performance.now();
  $("cancel").hidden = false;
  showPainting(true);
  if (matchMedia("(max-width: 46rem)").matches) $("result").scrollIntoView({ behavior: "smooth" });
  try {
    const data = await body();
    const compared = $("compare").checked && data.get("sound_strength") !== "0";
    const answer = await ask(path, data, { ...options, progress: showSteps });
    urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
    showPictures(answer, started_ms);
    showPainting(false);
    health();
    if (compared) await paintFloor(path, data, options, answer.model);
  } catch (error) {
    showPainting(false);
    explain(error);
  } finally {
    if (running === mine) $("cancel").hidden = true;
  }
}

async function health() {
  const shown = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };  // told aloud once
  let state = null;
  try { state = await (await fetch("healthz")).json(); } catch { /* said below */ }
  $("health").className = state?.status === "ready" ? "ready" : "away";
  if (!state) { shown("model", "Service unreachable"); shown("queue", ""); return; }
  const { name, version, alias } = state.model;
  shown("model", `${name} version ${version.slice(0, 12)}${alias ? ` (${alias})` : ""}`);
  const busy = state.queue_depth ? `${state.queue_depth} waiting` : state.painting ? "painting" : "free";
  shown("queue", state.status === "ready" ? busy : state.status);
}

form.addEventListener("submit", paint);
form.addEventListener("input", update);
form.addEventListener("change", update);
form.addEventListener("invalid", (event) => { event.target.closest("details")?.setAttribute("open", ""); }, true);
$("cancel").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => brush.clear());
$("dice").addEventListener("click", () => { form.elements.seed.value = Math.floor(Math.random() * 1e6); });
$("sounds").append(...sounds.map((sound) => sound.card));
setUpDrop($("drop-image"), showGiven);
update();
health();
setInterval(health, 5000);
