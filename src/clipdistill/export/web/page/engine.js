// Runs in a worker: the two towers, the tokenizer and the pictures, so that the page stays awake while it indexes.
import { normalised, square } from "./picture.js";
import { Tokenizer } from "./tokenizer.js";

const LARGEST = 64e6; // pixels, as in clipdistill's own reader
const THUMB = 320;
const PATIENCE = 10000; // milliseconds for a browser to say which adapters it has
let ort, manifest, transform, tokenizer, sessions, about, lost;

/** A file of this folder; `tell` hears how many of its bytes are here. */
async function bytes(name, tell) {
  const answer = await fetch(new URL(name, import.meta.url)).catch((error) => { throw new Error(`${name}: ${error.message}`); });
  if (!answer.ok) { throw new Error(`${name}: the server answered ${answer.status}`); }
  if (!answer.body || !tell) { return new Uint8Array(await answer.arrayBuffer()); }
  const reader = answer.body.getReader(), parts = [];
  let size = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) { break; }
    parts.push(value);
    tell(size += value.length);
  }
  const all = new Uint8Array(size);
  let at = 0;
  for (const part of parts) { all.set(part, at); at += part.length; }
  return all;
}

/** What an error says, in one line. */
const brief = (error) => String((error && error.message) || error).trim().split("\n")[0].slice(0, 300);

const json = async (name) => JSON.parse(new TextDecoder().decode(await bytes(name)));

/** Rows of length 1. */
function unit(values, rows) {
  const width = values.length / rows;
  for (let r = 0; r < rows; r++) {
    let sum = 0;
    for (let i = r * width; i < (r + 1) * width; i++) { sum += values[i] * values[i]; }
    if (!(sum > 0 && sum < Infinity)) { throw new Error("the model gives no embedding"); }
    const scale = 1 / Math.max(Math.sqrt(sum), 1e-12);
    for (let i = r * width; i < (r + 1) * width; i++) { values[i] *= scale; }
  }
  return values;
}

const cosine = (a, b) => { let sum = 0; for (let i = 0; i < a.length; i++) { sum += a[i] * b[i]; } return sum; };

async function run(tower, data, shape) {
  const session = sessions[tower], kind = tower === "image" ? "float32" : "int64";
  const given = new ort.Tensor(kind, data, shape);
  const found = session.run({ [session.inputNames[0]]: given }).then((all) => all[session.outputNames[0]].getData());
  return unit(Float32Array.from(await Promise.race([found, lost])), shape[0]); // work on a lost device may never end
}

/** `run`; where WebGPU fails in the middle of it, the model moves to WASM, which is told, and the work is done there. */
async function steady(...asked) {
  try { return await run(...asked); } catch (error) {
    if (about.backend !== "webgpu") { throw error; }
    const why = await Promise.race([lost.catch((told) => told), new Promise((resolve) => { setTimeout(resolve, 100, error); })]);
    const graphs = { image: await bytes("image.onnx"), text: await bytes("text.onnx") };
    const agreement = await start("wasm", about.threads, graphs);
    about = { ...about, backend: "wasm", agreement, notes: [...about.notes, `WebGPU stopped in the middle of the work (${brief(why)}).`] };
    self.postMessage({ moved: about });
    return run(...asked);
  }
}

async function encodeTexts(texts, how = steady) {
  const rows = tokenizer.batch(texts);
  return how("text", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
}

/** The picture that the manifest's own embedding belongs to: (3, size, size) numbers made by one rule everywhere. */
function probe(size) {
  const out = new Float32Array(3 * size * size);
  for (let i = 0; i < out.length; i++) { out[i] = ((i % (size * size)) * 31 % 257 + Math.floor(i / size / size) * 64) / 128 - 1; }
  return out;
}

/** Least cosine between what this browser computes and what the export computed. */
async function check() {
  const { size } = transform, { image, text, caption } = manifest.web.check;
  const found = [await run("image", probe(size), [1, 3, size, size]), await encodeTexts([caption], run)];
  return Math.min(cosine(found[0], unit(Float32Array.from(image), 1)), cosine(found[1], unit(Float32Array.from(text), 1)));
}

async function start(backend, threads, graphs) {
  const library = backend === "webgpu" ? "webgpu" : "wasm", file = backend === "webgpu" ? "threaded.asyncify" : "threaded";
  ort = await import(`./runtime/ort.${library}.min.js`);
  const at = (name) => new URL(`runtime/${name}`, import.meta.url).href;
  ort.env.wasm.wasmPaths = { mjs: at(`ort-wasm-simd-${file}.js`), wasm: at(`ort-wasm-simd-${file}.wasm`) };
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  // weights of eight or sixteen bits become float32 once, when the graph is read
  const options = { executionProviders: [backend], graphOptimizationLevel: "all", logSeverityLevel: 3, extra: { session: { disable_quant_qdq: "1" } } };
  const made = {};
  for (const tower of ["image", "text"]) { made[tower] = await ort.InferenceSession.create(graphs[tower], options); }
  sessions = made;
  lost = new Promise(() => {});
  const device = backend === "webgpu" ? await ort.env.webgpu.device : null;
  if (device) {
    lost = device.lost.then(({ message, reason }) => { throw new Error(`its device was lost: ${message || reason}`); });
    lost.catch(() => {}); // told by whatever runs then
  }
  const agreement = await check();
  if (!(agreement >= 0.99)) { throw new Error(`embeddings differ from the model's (cosine ${agreement.toFixed(4)})`); }
  return agreement;
}

/** Why WebGPU is not used here; nothing where it can be tried. */
async function without() {
  if (!navigator.gpu) { return "this browser has none"; }
  const late = new Promise((resolve) => { setTimeout(resolve, PATIENCE, "late"); });
  let adapter;
  try { adapter = await Promise.race([navigator.gpu.requestAdapter(), late]); } catch (error) { return brief(error); }
  if (adapter === "late") { return "it does not answer"; }
  if (!adapter) { return "there is no adapter"; }
  return (adapter.info && adapter.info.isFallbackAdapter) || adapter.isFallbackAdapter ? "it is emulated here" : "";
}

async function load({ backend: wanted }, tell) {
  [manifest, transform] = await Promise.all([json("manifest.json"), json("transform.json")]);
  tokenizer = new Tokenizer(await json(manifest.tokenizer));
  const graphs = {}, total = manifest.towers.image.bytes + manifest.towers.text.bytes, here = { image: 0, text: 0 };
  await Promise.all(["image", "text"].map(async (tower) => {
    graphs[tower] = await bytes(`${tower}.onnx`, (size) => { here[tower] = size; tell({ loaded: here.image + here.text, total }); });
  }));
  const threads = self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency || 1) : 1;
  const notes = [], why = wanted ? "" : await without();
  if (why) { notes.push(`WebGPU is not used: ${why}.`); }
  let backend = wanted || (why ? "wasm" : "webgpu"), agreement;
  try {
    agreement = await start(backend, threads, graphs);
  } catch (error) {
    if (backend !== "webgpu") { throw error; }
    notes.push(`WebGPU was tried and left: ${brief(error)}.`);
    backend = "wasm";
    agreement = await start(backend, threads, graphs);
  }
  about = { backend, threads, agreement, notes, manifest };
  return about;
}

/** The RGBA bytes of a picture file, upright and on white, and a small JPEG of it. */
async function decoded(blob) {
  const picture = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const { width, height } = picture;
  if (width * height > LARGEST) { picture.close(); throw new Error(`${width} x ${height} pixels are too many`); }
  const draw = (w, h) => {
    const context = new OffscreenCanvas(w, h).getContext("2d", { willReadFrequently: true, alpha: false });
    context.fillStyle = "white";
    context.fillRect(0, 0, w, h);
    context.drawImage(picture, 0, 0, w, h);
    return context;
  };
  const pixels = draw(width, height).getImageData(0, 0, width, height).data;
  const scale = Math.min(1, THUMB / Math.max(width, height));
  const small = draw(Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale)));
  const thumb = await small.canvas.convertToBlob({ type: "image/jpeg", quality: 0.85 });
  picture.close();
  return { pixels, width, height, thumb };
}

/** One picture: its embedding, thumbnail, size and the milliseconds of each part. */
async function image({ blob }) {
  const t0 = performance.now(), { pixels, width, height, thumb } = await decoded(blob), t1 = performance.now();
  const values = normalised(square(pixels, width, height, transform), transform), t2 = performance.now();
  const vector = await steady("image", values, [1, 3, transform.size, transform.size]), t3 = performance.now();
  return { vector, thumb, width, height, times: { decode: t1 - t0, prepare: t2 - t1, model: t3 - t2 } };
}

/** Captions: embeddings one after the other, and which of them hold no word that the model knows. */
async function text({ texts }) {
  const t0 = performance.now(), vectors = await encodeTexts(texts);
  return { vectors, unknown: texts.filter((one) => !tokenizer.knows(one)), milliseconds: performance.now() - t0 };
}

const work = { load, image, text, tokens: ({ texts }) => tokenizer.batch(texts) };
let last = Promise.resolve();
self.addEventListener("message", ({ data: { id, kind, ...given } }) => {
  const tell = (progress) => self.postMessage({ id, progress });
  // one at a time, in order: a session takes one call, and times would mean nothing
  last = last.then(() => work[kind](given, tell)).then((answer) => self.postMessage({ id, answer }), (error) => self.postMessage({ id, error: brief(error) }));
});
