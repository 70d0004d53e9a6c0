// A sound of the form: dropped, chosen or recorded, and how it looks and sounds.
import { decode, draw } from "./spectrogram.js";

const LONGEST_S = 5;
const MOST_BYTES = 64e6;  // larger ones are sent, not drawn

// A label with a file input becomes a place to drop files on.
export function setUpDrop(zone, chosen) {
  const input = zone.querySelector("input"), strong = zone.querySelector("strong"), span = zone.querySelector("span");
  const words = [strong.textContent, span.textContent];
  input.addEventListener("change", () => {
    const file = input.files[0];
    zone.classList.toggle("chosen", Boolean(file));
    strong.textContent = strong.title = file ? file.name : words[0];
    span.textContent = file ? `${Math.max(1, Math.round(file.size / 1024))} kB, choose another` : words[1];
    if (file) chosen(file);
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    zone.addEventListener(name, (event) => {
      event.preventDefault();
      zone.classList.toggle("over", name === "dragover");
      if (name === "drop" && event.dataTransfer.files.length) give(input, event.dataTransfer.files[0]);
    });
  }
}

// Puts a file into an input, as if it had been chosen.
export function give(input, file) {
  const files = new DataTransfer();
  files.items.add(file);
  input.files = files.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
}

// "Dog barking (2).wav" -> "dog_barking_2", as a name in a prompt must be.
const nameOf = (file) => file.name.toLowerCase().replace(/\.[^.]*$/, "").replace(/[^a-z0-9]+/g, "_")
  .replace(/^[^a-z]+|_+$/g, "").slice(0, 24);

export class Sound {
  // usual: its name in prompts where it has no other.
  constructor(field, usual, fail) {
    this.card = document.getElementById("sound-card").content.firstElementChild.cloneNode(true);
    Object.assign(this, { usual, fail });
    this.part(".called").placeholder = usual;
    this.input = this.part("input[type=file]");
    this.input.name = field;
    this.audio = this.part("audio");
    setUpDrop(this.part(".drop"), (file) => this.show(file));
    this.setUpPlayer();
    this.setUpRecorder();
  }

  part(selector) { return this.card.querySelector(selector); }
  get file() { return this.input.files[0]; }
  get name() { return this.part(".called").value || this.usual; }
  get share() { return Number(this.part(".share").value); }

  // How it stands in a prompt.
  mention() { return this.share === 1 ? `<${this.name}>` : `<${this.name}*${this.share}>`; }

  // mixing: whether names matter. weighed: whether the strengths do.
  setMixing(mixing, weighed) {
    this.part(".mixing").hidden = !mixing;
    this.part(".called").disabled = !mixing;
    this.part(".share").disabled = !mixing || !weighed;
  }

  async show(file) {
    this.part(".called").value = nameOf(file);
    this.audio.pause();
    URL.revokeObjectURL(this.audio.src);
    this.audio.src = URL.createObjectURL(file);
    this.part(".heard").hidden = false;
    const canvas = this.part("canvas"), note = this.part(".note");
    try {
      if (file.size > MOST_BYTES) throw new Error("too large");
      const { samples, duration_s } = await decode(file);
      if (file !== this.file) return;
      draw(canvas, samples);
      canvas.setAttribute("aria-label", `Spectrogram of ${file.name}, ${duration_s.toFixed(1)} s`);
      this.part(".drop span").textContent = `${duration_s.toFixed(1)} s, choose another`;
      note.hidden = true;
    } catch {
      if (file !== this.file) return;
      this.part(".heard").hidden = true;
      note.textContent = "This browser cannot show the sound; the service may read it all the same.";
      note.hidden = false;
    }
  }

  setUpPlayer() {
    const { audio } = this, button = this.part(".play"), head = this.part(".playhead");
    const length_s = () => (Number.isFinite(audio.duration) ? audio.duration : LONGEST_S);
    const move = () => {
      head.style.left = `${Math.min(100, (100 * audio.currentTime) / length_s())}%`;
      if (!audio.paused) requestAnimationFrame(move);
    };
    const told = () => {
      button.classList.toggle("playing", !audio.paused);
      button.setAttribute("aria-label", audio.paused ? "Play" : "Pause");
      head.hidden = audio.paused;
      move();
    };
    for (const name of ["play", "pause", "ended", "emptied"]) audio.addEventListener(name, told);
    button.addEventListener("click", () => {
      if (audio.paused) audio.play().catch((error) => this.fail(`The sound cannot be played here: ${error.message}`));
      else audio.pause();
    });
    this.part(".picture").addEventListener("click", (event) => {
      audio.currentTime = (length_s() * event.offsetX) / event.currentTarget.clientWidth;
    });
    told();
  }

  setUpRecorder() {
    if (!navigator.mediaDevices || !window.MediaRecorder) return;  // only where the page is local or on HTTPS
    const button = this.part(".record");
    button.hidden = false;
    button.addEventListener("click", () => {
      if (this.recorder) this.recorder.stop();
      else this.record(button).catch((error) => this.fail(`The microphone cannot be used: ${error.message}`));
    });
  }

  async record(button) {
    // As it is: what cleans up calls would remove rain, wind and engines.
    const asItIs = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    const stream = await navigator.mediaDevices.getUserMedia({ audio: asItIs });
    const recorder = new MediaRecorder(stream), parts = [], label = button.querySelector("span");
    this.recorder = recorder;
    let left_s = LONGEST_S;
    const tick = () => {
      label.textContent = `Stop (${left_s} s)`;
      if (left_s-- <= 0 && recorder.state === "recording") recorder.stop();
    };
    const clock = setInterval(tick, 1000);
    recorder.ondataavailable = (event) => parts.push(event.data);
    recorder.onstop = () => {
      clearInterval(clock);
      stream.getTracks().forEach((track) => track.stop());
      this.recorder = null;
      label.textContent = "Record";
      button.classList.remove("recording");
      give(this.input, new File(parts, "recording", { type: recorder.mimeType }));
    };
    recorder.start();
    button.classList.add("recording");
    tick();
  }
}
