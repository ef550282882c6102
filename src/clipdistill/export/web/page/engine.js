// Runs in a worker: the two towers, the tokenizer and the pictures, so that the page stays awake while it indexes.
import { normalised, square } from "./picture.js";
import { Tokenizer } from "./tokenizer.js";

const LARGEST = 64e6; // pixels, as in clipdistill's own reader
const THUMB = 320;
let ort, manifest, transform, tokenizer, sessions, about;

/** A file of this folder; `tell` hears how many of its bytes are here. */
async function bytes(name, tell) {
  const answer = await fetch(new URL(name, import.meta.url));
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

const json = async (name) => JSON.parse(new TextDecoder().decode(await bytes(name)));

/** Rows of length 1. */
function unit(values, rows) {
  const width = values.length / rows;
  for (let r = 0; r < rows; r++) {
    let sum = 0;
    for (let i = r * width; i < (r + 1) * width; i++) { sum += values[i] * values[i]; }
    const scale = 1 / Math.max(Math.sqrt(sum), 1e-12);
    for (let i = r * width; i < (r + 1) * width; i++) { values[i] *= scale; }
  }
  return values;
}

const cosine = (a, b) => { let sum = 0; for (let i = 0; i < a.length; i++) { sum += a[i] * b[i]; } return sum; };

async function run(tower, data, shape) {
  const session = sessions[tower], kind = tower === "image" ? "float32" : "int64";
  const given = new ort.Tensor(kind, data, shape);
  const out = (await session.run({ [session.inputNames[0]]: given }))[session.outputNames[0]];
  return unit(Float32Array.from(await out.getData()), shape[0]);
}

async function encodeTexts(texts) {
  const rows = tokenizer.batch(texts);
  return run("text", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
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
  const found = [await run("image", probe(size), [1, 3, size, size]), await encodeTexts([caption])];
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
  const options = { executionProviders: [backend], graphOptimizationLevel: "all", extra: { session: { disable_quant_qdq: "1" } } };
  sessions = {};
  for (const tower of ["image", "text"]) { sessions[tower] = await ort.InferenceSession.create(graphs[tower], options); }
  const agreement = await check();
  if (!(agreement >= 0.99)) { throw new Error(`embeddings differ from the model's (cosine ${agreement.toFixed(4)})`); }
  return agreement;
}

async function gpu() {
  const adapter = navigator.gpu ? await navigator.gpu.requestAdapter().catch(() => null) : null;
  return adapter && !(adapter.info && adapter.info.isFallbackAdapter) && !adapter.isFallbackAdapter;
}

async function load({ backend: wanted }, tell) {
  [manifest, transform] = await Promise.all([json("manifest.json"), json("transform.json")]);
  tokenizer = new Tokenizer(await json(manifest.tokenizer));
  const graphs = {}, total = manifest.towers.image.bytes + manifest.towers.text.bytes, here = { image: 0, text: 0 };
  await Promise.all(["image", "text"].map(async (tower) => {
    graphs[tower] = await bytes(`${tower}.onnx`, (size) => { here[tower] = size; tell({ loaded: here.image + here.text, total }); });
  }));
  const threads = self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency || 1) : 1;
  const notes = [];
  let backend = wanted || ((await gpu()) ? "webgpu" : "wasm"), agreement;
  try {
    agreement = await start(backend, threads, graphs);
  } catch (error) {
    if (backend !== "webgpu") { throw error; }
    notes.push(`WebGPU was tried and left: ${error.message}`);
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
  const vector = await run("image", values, [1, 3, transform.size, transform.size]), t3 = performance.now();
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
  last = last.then(() => work[kind](given, tell)).then((answer) => self.postMessage({ id, answer }), (error) => self.postMessage({ id, error: String(error && error.message || error) }));
});
