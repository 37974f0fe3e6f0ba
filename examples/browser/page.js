import { toDigit } from "./digit.js";
import { load } from "./model/index.js";

const PEN = 22; // pixels
const BURST = 40; // milliseconds
const BURSTS = 8; // of each competitor

const $ = (id) => document.getElementById(id);
const canvas = $("canvas");
const pen = canvas.getContext("2d", { willReadFrequently: true });
const model = await load();
let image = new Float32Array(64);
let peer = null;

// ---- drawing, with mouse, pen or finger

Object.assign(pen, { lineWidth: PEN, lineCap: "round", lineJoin: "round", strokeStyle: "#fff" });
const at = (event) => [(event.offsetX * canvas.width) / canvas.clientWidth, (event.offsetY * canvas.height) / canvas.clientHeight];

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pen.beginPath();
  pen.moveTo(...at(event));
  pen.lineTo(...at(event));
  pen.stroke();
});
canvas.addEventListener("pointermove", (event) => {
  if (!canvas.hasPointerCapture(event.pointerId)) return;
  pen.lineTo(...at(event));
  pen.stroke();
  predict();
});
canvas.addEventListener("pointerup", predict);
$("clear").addEventListener("click", () => {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  $("prediction").textContent = "?";
  show(new Float32Array(10));
});

// ---- the model

function predict() {
  const { data, width } = pen.getImageData(0, 0, canvas.width, canvas.height);
  const digit = toDigit(data.filter((_, i) => i % 4 === 3), width); // its opacity is the ink
  if (digit === null) return;
  image = digit;
  const { logits } = model.run({ image });
  const most = Math.max(...logits);
  const powers = logits.map((value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b);
  $("prediction").textContent = logits.indexOf(most);
  show(powers.map((value) => value / sum));
  const pixels = new ImageData(8, 8);
  image.forEach((value, i) => pixels.data.set([255 * value, 255 * value, 255 * value, 255], 4 * i));
  $("small").getContext("2d").putImageData(pixels, 0, 0);
}

function show(shares) {
  const rows = Array.from(shares, (share, digit) => {
    const percent = Math.round(100 * share);
    return `<tr><td>${digit}</td><td><div class="bar" style="width: ${percent}px"></div></td><td>${percent} %</td></tr>`;
  });
  $("scores").innerHTML = rows.join("");
}

// ---- time

const pause = () => new Promise((done) => setTimeout(done, 10));

/** Milliseconds of a call: the clock of a browser is coarse, so many calls are timed at once. */
async function burst(run) {
  const begin = performance.now();
  let calls = 0;
  do {
    for (let i = 0; i < 10; i++) await run();
    calls += 10;
  } while (performance.now() - begin < BURST);
  return (performance.now() - begin) / calls;
}

const median = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];

async function compare() {
  $("compare").disabled = true;
  const [ours, theirs] = [[], []];
  for (let i = 0; i <= BURSTS; i++) {
    const mine = await burst(() => model.run({ image }));
    await pause();
    const other = peer === null ? NaN : await burst(peer);
    await pause();
    if (i === 0) continue; // the engine still compiles
    ours.push(mine);
    theirs.push(other);
  }
  const shown = (milliseconds) => `${(1000 * milliseconds).toFixed(0)} microseconds`;
  $("time").textContent = `One run takes ${shown(median(ours))} (build ${model.build}, one thread).`;
  if (peer !== null) {
    const ratio = median(theirs) / median(ours);
    $("comparison").textContent = `onnxruntime-web takes ${shown(median(theirs))}, ${ratio.toFixed(1)} times as long.`;
  }
  $("compare").disabled = false;
  $("compare").hidden = false;
}

/** The same model in onnxruntime-web, when `build.py --onnxruntime-web` has put it here. */
async function other() {
  let ort;
  try {
    ort = await import("./onnxruntime-web/ort.wasm.min.mjs");
  } catch {
    $("comparison").textContent = "onnxruntime-web is not here; build.py --onnxruntime-web adds it.";
    return null;
  }
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = new URL("./onnxruntime-web/", import.meta.url).href;
  const session = await ort.InferenceSession.create("./onnxruntime-web/model.onnx", { executionProviders: ["wasm"] });
  return () => session.run({ image: new ort.Tensor("float32", image, [1, 1, 8, 8]) });
}

show(new Float32Array(10));
$("time").textContent = "The model is loaded.";
document.body.dataset.ready = "model";
peer = await other();
await compare();
$("compare").addEventListener("click", compare);
document.body.dataset.ready = "time";
