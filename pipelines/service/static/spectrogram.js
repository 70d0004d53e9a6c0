// What a sound looks like: loudness by time and frequency, drawn onto a canvas.
const RATE_HZ = 16000;  // what the models hear
const WINDOW = 1024;
const RANGE_DB = 65;
const LOWEST_HZ = 40;
const COLOURS = [[11, 14, 26], [38, 41, 92], [22, 104, 128], [52, 173, 150], [190, 219, 122], [255, 244, 201]];

// Mono samples of any file that the browser can decode; it rejects for others.
export async function decode(file) {
  const buffer = await new OfflineAudioContext(1, 1, RATE_HZ).decodeAudioData(await file.arrayBuffer());
  const mono = new Float32Array(buffer.length);
  for (let c = 0; c < buffer.numberOfChannels; c++) {
    buffer.getChannelData(c).forEach((value, i) => { mono[i] += value / buffer.numberOfChannels; });
  }
  return { samples: mono, duration_s: buffer.duration };
}

// In place, radix 2.
function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) { [re[i], re[j]] = [re[j], re[i]]; [im[i], im[j]] = [im[j], im[i]]; }
  }
  for (let size = 2; size <= n; size *= 2) {
    const half = size / 2;
    for (let k = 0; k < half; k++) {
      const cos = Math.cos((-2 * Math.PI * k) / size), sin = Math.sin((-2 * Math.PI * k) / size);
      for (let i = k; i < n; i += size) {
        const j = i + half;
        const a = re[j] * cos - im[j] * sin, b = re[j] * sin + im[j] * cos;
        re[j] = re[i] - a; im[j] = im[i] - b;
        re[i] += a; im[i] += b;
      }
    }
  }
}

// Loudness in dB, one array of WINDOW / 2 + 1 frequencies for each of `columns` moments.
export function spectra(samples, columns) {
  const hop = Math.max(0, samples.length - WINDOW) / Math.max(1, columns - 1);
  return Array.from({ length: columns }, (_, column) => {
    const re = new Float32Array(WINDOW), im = new Float32Array(WINDOW);
    const start = Math.round(column * hop);
    for (let i = 0; i < WINDOW && start + i < samples.length; i++) {
      re[i] = samples[start + i] * (0.5 - 0.5 * Math.cos((2 * Math.PI * i) / WINDOW));
    }
    fft(re, im);
    return Float32Array.from({ length: WINDOW / 2 + 1 }, (_, k) => 10 * Math.log10(re[k] ** 2 + im[k] ** 2 + 1e-12));
  });
}

const mel = (hz) => Math.log1p(hz / 700);

// 0 (quiet) to 1 (loud) -> a colour.
function colour(share) {
  const at = Math.min(0.9999, Math.max(0, share)) * (COLOURS.length - 1);
  const low = Math.floor(at);
  return COLOURS[low].map((value, i) => value + (COLOURS[low + 1][i] - value) * (at - low));
}

export function draw(canvas, samples) {
  const { width, height } = canvas;
  const columns = spectra(samples, width);
  const loudest = Math.max(-60, ...columns.map((column) => column.reduce((a, b) => Math.max(a, b))));
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const lowest = mel(LOWEST_HZ), highest = mel(RATE_HZ / 2);
  for (let y = 0; y < height; y++) {
    const hz = 700 * Math.expm1(highest - ((highest - lowest) * y) / (height - 1));
    const bin = (hz * WINDOW) / RATE_HZ, low = Math.min(WINDOW / 2 - 1, Math.floor(bin));
    for (let x = 0; x < width; x++) {
      const level = columns[x][low] + (columns[x][low + 1] - columns[x][low]) * (bin - low);
      image.data.set([...colour(1 + (level - loudest) / RANGE_DB), 255], 4 * (y * width + x));
    }
  }
  context.putImageData(image, 0, 0);
}
