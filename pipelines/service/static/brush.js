// A mask painted over the given picture, by mouse, touch or keys.
const LONGEST_PX = 1024;
const STEP = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Brush {
  // changed: called when something was painted or all of it is gone.
  constructor(canvas, cursor, size, changed) {
    Object.assign(this, { canvas, cursor, size, changed });
    this.context = canvas.getContext("2d");
    this.at = null;
    this.used = false;
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerleave", () => { this.cursor.hidden = true; });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { this.pressed = false; });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => { this.cursor.hidden = true; });
  }

  // For a picture of this size; what was painted is gone.
  fit(width, height) {
    const scale = Math.min(1, LONGEST_PX / Math.max(width, height));
    this.canvas.width = Math.max(1, Math.round(width * scale));
    this.canvas.height = Math.max(1, Math.round(height * scale));
    this.at = null;
    this.clear();
  }

  clear() {
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.used = false;
    this.changed();
  }

  diameter() { return (this.canvas.width * this.size.value) / 100; }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const { width, height } = this.canvas;
    return [((event.clientX - box.left) * width) / box.width, ((event.clientY - box.top) * height) / box.height];
  }

  press(event) {
    if (event.button) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.pressed = true;
    this.at = this.point(event);
    this.stroke(this.at);
  }

  move(event) {
    const here = this.point(event);
    if (this.pressed) this.stroke(here);
    this.at = here;
    this.showCursor();
  }

  key(event) {
    const step = STEP[event.key], { width, height } = this.canvas;
    if (!step && event.key !== " ") return;
    event.preventDefault();
    const [x, y] = this.at || [width / 2, height / 2];
    const by = this.diameter() / 3;
    const within = (value, most) => Math.min(most, Math.max(0, value));
    this.at = step ? [within(x + step[0] * by, width), within(y + step[1] * by, height)] : [x, y];
    if (!step) this.stroke(this.at);
    this.showCursor();
  }

  stroke(to) {
    const { context } = this;
    context.strokeStyle = "#ffb000";
    context.lineWidth = this.diameter();
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...this.at);
    context.lineTo(to[0] + 0.01, to[1]);  // a line of no length would leave no dot
    context.stroke();
    if (!this.used) { this.used = true; this.changed(); }
  }

  showCursor() {
    const share = 100 / this.canvas.width, style = this.cursor.style;
    style.left = `${this.at[0] * share}%`;
    style.top = `${(this.at[1] * 100) / this.canvas.height}%`;
    style.width = `${this.diameter() * share}%`;
    this.cursor.hidden = false;
  }

  // White where it was painted, else black.
  mask() {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [this.canvas.width, this.canvas.height];
    const context = canvas.getContext("2d");
    context.drawImage(this.canvas, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    return new Promise((resolve) => { canvas.toBlob(resolve, "image/png"); });
  }
}
