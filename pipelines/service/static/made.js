// What a picture's file says of its making: the PNG text `aai`, and whether a C2PA manifest is in it.
const LABELS = {
  model: "Model", bundle: "Bundle", verb: "Command", seed: "Seed", prompt: "Prompt", sounds: "",
  image_sha256: "Picture, SHA-256", mask_sha256: "Mask, SHA-256", sound_strength: "Sound strength",
  negative_prompt: "Negative prompt", steps: "Steps", guidance_scale: "Guidance",
};

// -> {made: object, software: text, manifestBytes: number, 0 = none}. Chunks that it does not know are passed over.
export async function read(blob) {
  const view = new DataView(await blob.arrayBuffer());
  const found = { made: {}, software: "", manifestBytes: 0 };
  for (let at = 8; at + 12 <= view.byteLength;) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...new Uint8Array(view.buffer, at + 4, 4));
    if (at + 12 + length > view.byteLength) break;
    if (kind === "caBX") found.manifestBytes += length;
    if (kind === "tEXt") {
      const text = new TextDecoder("latin1").decode(new Uint8Array(view.buffer, at + 8, length));
      const [name, value] = [text.slice(0, text.indexOf("\0")), text.slice(text.indexOf("\0") + 1)];
      if (name === "Software") found.software = value;
      if (name === "aai") try { found.made = Object(JSON.parse(value)); } catch { /* somebody else's text */ }
    }
    at += 12 + length;
  }
  return found;
}

function rows({ made, software }) {
  const told = [], rest = [];
  for (const [name, label] of Object.entries(LABELS)) {
    if (name === "sounds") {
      for (const [sound, hash] of Object.entries(made.sounds || {})) told.push([`<${sound}>, SHA-256`, hash]);
    } else if (made[name] != null && made[name] !== "") told.push([label, String(made[name])]);
  }
  for (const [name, value] of Object.entries(made)) {
    if (!(name in LABELS) && value !== null && value !== "") rest.push(`${name}=${JSON.stringify(value)}`);
  }
  if (rest.length) told.push(["Other settings", rest.join(" ")]);
  return software ? [...told, ["Painted by", software]] : told;
}

const element = (tag, text = "", ...children) => {
  const made = document.createElement(tag);
  made.textContent = text;
  made.append(...children);
  return made;
};

// A closed details element for what `read` found.
export function describe(found) {
  const table = element("table", "", element("tbody", "", ...rows(found).map(([label, value]) => {
    const head = element("th", label);
    head.scope = "row";
    return element("tr", "", head, element("td", value));
  })));
  const proof = element("p");
  proof.className = "proof";
  if (found.manifestBytes) {
    const size = `${Math.ceil(found.manifestBytes / 1024)} kB`;
    proof.append(`A C2PA manifest (${size}) is in the file. Whether it holds, and whose it is, says `);
  } else {
    proof.append("No C2PA manifest is in the file, so nothing proves this. Files that have one are checked by ");
  }
  proof.append(element("code", "aai verify FILE"));
  return element("details", "", element("summary", "How it was made"), table, proof);
}
