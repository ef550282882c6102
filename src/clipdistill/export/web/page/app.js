// The page: what is asked, what is shown. The work is done in engine.js, the index lies in store.js.
import { Store } from "./store.js";

const $ = (id) => document.getElementById(id);
const MOST = 60; // pictures shown
const AHEAD = 8; // pictures written to the storage at a time
const format = new Intl.NumberFormat("en");
const parameters = new URLSearchParams(location.search);

// --- the worker, one promise a question

const worker = new Worker(new URL("engine.js", import.meta.url), { type: "module" });
const waiting = new Map();
let questions = 0;

function ask(kind, given = {}, tell = null) {
  return new Promise((resolve, reject) => {
    const id = questions++;
    waiting.set(id, { resolve, reject, tell });
    worker.postMessage({ id, kind, ...given });
  });
}

worker.addEventListener("message", ({ data: { id, answer, error, progress, moved } }) => {
  if (moved) { described(moved); problem(`${moved.notes.at(-1)} It goes on in WASM.`); return; }
  const one = waiting.get(id);
  if (progress) { if (one.tell) { one.tell(progress); } return; }
  waiting.delete(id);
  if (error !== undefined) { one.reject(new Error(error)); } else { one.resolve(answer); }
});
worker.addEventListener("error", (event) => {
  event.preventDefault();
  const reason = new Error(event.message || "this browser cannot run the page's worker");
  waiting.forEach(({ reject }) => reject(reason));
  waiting.clear();
});

// --- small helpers

function element(tag, values = {}, ...children) {
  const made = Object.assign(document.createElement(tag), values);
  made.append(...children);
  return made;
}

const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
const many = (n, one, more = `${one}s`) => `${format.format(n)} ${n === 1 ? one : more}`;
const addresses = new Map(); // picture key -> blob address

function address(picture) {
  if (!addresses.has(picture.key)) { addresses.set(picture.key, URL.createObjectURL(picture.thumb)); }
  return addresses.get(picture.key);
}

function problem(text) { $("problem").textContent = text; }

async function busily(work) {
  problem("");
  document.body.classList.add("busy");
  try { return await work(); } catch (error) { problem(error.message); return null; } finally { document.body.classList.remove("busy"); }
}

let store = null, manifest = null, shown = [], asked = null;

// --- the index

function counted() {
  const n = store.pictures.length;
  $("count").textContent = n ? `${many(n, "picture")} in the index.` : "No pictures yet.";
  $("welcome").hidden = n > 0;
  $("clear").hidden = n === 0;
  if (store.problem) { problem(store.problem); }
}

let queue = [], indexing = false, stopped = false;
const costs = { n: 0, decode: 0, prepare: 0, model: 0, seconds: 0 }, refused = [];

function passedOver() {
  $("passed").hidden = refused.length === 0;
  $("passed").querySelector("summary").textContent = `${many(refused.length, "file")} passed over`;
  $("passed").querySelector("ul").replaceChildren(...refused.map(({ name, reason }) => element("li", { textContent: `${name}: ${reason}` })));
}

/** Add files to the index: [{ file, name }]. Resolves when all are in, passed over or stopped. */
async function index(files) {
  const fresh = [];
  for (const { file, name } of files) {
    const key = `${name}|${file.size}|${file.lastModified}`;
    if (/(^|\/)\./.test(name) || store.has(key) || queue.some((one) => one.key === key)) { continue; }
    if (file.type && !file.type.startsWith("image/")) { refused.push({ name, reason: "no picture" }); continue; }
    if (!file.size) { refused.push({ name, reason: "empty" }); continue; }
    fresh.push({ file, name, key });
  }
  passedOver();
  queue.push(...fresh);
  if (indexing || !queue.length) { return; }
  indexing = true;
  stopped = false;
  $("indexing").hidden = false;
  let done = 0, begin = performance.now(), ready = [], next = null;
  const send = (one) => ask("image", { blob: one.file }).then((answer) => ({ one, answer }), (error) => ({ one, error }));
  const keep = async () => { const kept = ready; ready = []; await store.add(kept); counted(); };
  while ((queue.length || next) && !stopped) {
    const now = next || send(queue.shift());
    next = queue.length ? send(queue.shift()) : null; // the worker never waits for the page
    const { one, answer, error } = await now;
    done += 1;
    if (error) { refused.push({ name: one.name, reason: error.message }); passedOver();
    } else {
      const { vector, thumb, width, height, times } = answer;
      ready.push({ key: one.key, name: one.name, vector, thumb, width, height, added: Date.now() + done / 1e6, file: one.file });
      costs.n += 1;
      for (const part of ["decode", "prepare", "model"]) { costs[part] += times[part]; }
    }
    if (ready.length >= AHEAD || (!queue.length && !next)) { await keep(); }
    const all = done + queue.length + (next ? 1 : 0), each = (performance.now() - begin) / done;
    $("indexed").max = all;
    $("indexed").value = done;
    $("rate").textContent = `${format.format(done)} of ${many(all, "picture")}, ${milliseconds(each)} each, ${Math.ceil((all - done) * each / 1000)} s left`;
  }
  if (next) { const { one, answer } = await next; if (answer) { ready.push({ key: one.key, name: one.name, ...answer, times: undefined, added: Date.now(), file: one.file }); } }
  if (ready.length) { await keep(); }
  costs.seconds += (performance.now() - begin) / 1000;
  queue = [];
  indexing = false;
  $("indexing").hidden = true;
  spent();
  if (!asked) { browse(); } else { await again(); }
}

function spent() {
  if (!costs.n) { return; }
  const part = (name) => `${name} ${milliseconds(costs[name] / costs.n)}`;
  $("cost").textContent = `${milliseconds(1000 * costs.seconds / costs.n)} a picture (${["decode", "prepare", "model"].map(part).join(", ")})`;
}

/** All files below what was dropped: folders are walked. */
async function dropped(items) {
  const entries = Array.from(items, (item) => (item.webkitGetAsEntry ? item.webkitGetAsEntry() : null)), files = [];
  const plain = Array.from(items, (item) => (item.kind === "file" ? item.getAsFile() : null));
  const walk = async (entry) => {
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject)).catch(() => null);
      if (file) { files.push({ file, name: entry.fullPath.replace(/^\//, "") }); }
      return;
    }
    const reader = entry.createReader();
    for (;;) { // a reader gives at most a hundred names at a time
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)).catch(() => []);
      if (!some.length) { return; }
      for (const one of some) { await walk(one); }
    }
  };
  for (const [i, entry] of entries.entries()) {
    if (entry) { await walk(entry); } else if (plain[i]) { files.push({ file: plain[i], name: plain[i].name }); }
  }
  return files;
}

const chosen = (list) => Array.from(list, (file) => ({ file, name: file.webkitRelativePath || file.name }));

// --- what is found

function hit(picture, facts, number) {
  const image = element("img", { src: address(picture), alt: picture.name, loading: "lazy" });
  const large = element("button", { type: "button", title: picture.name }, image);
  large.dataset.number = number;
  large.addEventListener("click", () => enlarge(number));
  const similar = element("button", { type: "button", textContent: "similar" });
  similar.setAttribute("aria-label", `pictures like ${picture.name}`);
  similar.tabIndex = -1;
  similar.addEventListener("click", () => like(picture));
  const item = element("li", { className: "hit" }, large, element("span", { className: "facts" }, ...facts, similar));
  item.dataset.name = picture.name;
  return item;
}

function show(pictures, facts) {
  shown = pictures;
  $("results").replaceChildren(element("ol", { className: "hits" }, ...pictures.map((picture, i) => hit(picture, facts(picture, i), i))));
}

function browse() {
  asked = null;
  $("answer").textContent = "";
  show(store.pictures.slice(-MOST).reverse(), (picture) => [element("span", { className: "name", textContent: picture.name.split("/").at(-1) })]);
}

function listed(vector, head, encoding) {
  const begin = performance.now(), found = store.nearest(vector, MOST), search = performance.now() - begin;
  $("answer").replaceChildren(...head, ` ${milliseconds(encoding)} for the question, ${milliseconds(search)} to compare it with ${many(store.pictures.length, "picture")}.`);
  const scores = new Map(found.map(({ picture, score }) => [picture, score]));
  show(found.map(({ picture }) => picture), (picture, i) => [element("b", { textContent: i + 1 }), element("span", { className: "score", textContent: scores.get(picture).toFixed(3) })]);
}

const nothing = () => (store.pictures.length ? false : (problem("There are no pictures yet: add some, or drop them on this page."), true));

async function search(words) {
  if (!words.trim() || nothing()) { return; }
  await busily(async () => {
    const { vectors, unknown, milliseconds: spent } = await ask("text", { texts: [words] });
    if (unknown.length) { throw new Error(`The model knows no word of “${words}”: whatever it found would mean nothing.`); }
    asked = () => search(words);
    listed(vectors, [element("b", { textContent: `“${words}”:` })], spent);
  });
}

async function searchByFile(file) {
  if (nothing()) { return; }
  await busily(async () => {
    const { vector, thumb, times } = await ask("image", { blob: file });
    const image = element("img", { className: "asked", alt: "", src: URL.createObjectURL(thumb) });
    asked = () => searchByFile(file);
    listed(vector, [image, element("b", { textContent: "Pictures like yours:" })], times.decode + times.prepare + times.model);
  });
}

function like(picture) {
  $("large").close();
  pick("search");
  asked = () => like(picture);
  const image = element("img", { className: "asked", alt: "", src: address(picture) });
  listed(picture.vector, [image, element("b", { textContent: `Pictures like ${picture.name}:` })], 0);
  scrollTo({ top: 0 });
}

let classes = null; // { labels, chances: Map(picture -> chances) } of the last classification

function chancesOf(vector, vectors, n) {
  const width = store.width, scores = new Float64Array(n);
  for (let c = 0; c < n; c++) { for (let i = 0; i < width; i++) { scores[c] += vector[i] * vectors[c * width + i]; } }
  const scale = manifest.logit_scale, top = Math.max(...scores), chances = scores.map((score) => Math.exp(scale * (score - top)));
  const sum = chances.reduce((a, b) => a + b, 0);
  return Array.from(chances, (chance) => chance / sum);
}

async function classify(text, prompt) {
  const labels = [...new Set(text.split(/[,\n]/).map((label) => label.trim()).filter(Boolean))];
  if (nothing()) { return; }
  if (labels.length < 2) { problem("Type two labels or more, one a line or with commas between."); return; }
  await busily(async () => {
    const sentence = prompt.includes("{}") ? prompt : `${prompt} {}`;
    const { unknown } = await ask("text", { texts: labels });
    const { vectors, milliseconds: spent } = await ask("text", { texts: labels.map((label) => sentence.replaceAll("{}", () => label)) });
    if (unknown.length) { problem(`The model knows no word of ${unknown.map((one) => `“${one}”`).join(", ")}: what is put there means nothing.`); }
    const begin = performance.now(), chances = new Map(store.pictures.map((picture) => [picture, chancesOf(picture.vector, vectors, labels.length)]));
    classes = { labels, chances };
    asked = () => classify(text, prompt);
    const groups = labels.map((label, c) => ({ label, c, own: [] }));
    for (const picture of store.pictures) { const own = chances.get(picture); groups[own.indexOf(Math.max(...own))].own.push(picture); }
    $("answer").textContent = `${milliseconds(spent)} for ${labels.length} labels, ${milliseconds(performance.now() - begin)} for ${many(store.pictures.length, "picture")}.`;
    shown = [];
    const sections = groups.filter(({ own }) => own.length).sort((a, b) => b.own.length - a.own.length).map(({ label, c, own }) => {
      own.sort((a, b) => chances.get(b)[c] - chances.get(a)[c]);
      const hits = own.slice(0, MOST).map((picture) => {
        shown.push(picture);
        return hit(picture, [element("b", { className: "score", textContent: `${Math.round(100 * chances.get(picture)[c])} %` })], shown.length - 1);
      });
      const more = own.length > MOST ? `, the surest ${MOST} are shown` : "";
      const heading = element("h2", { textContent: label }, element("span", { textContent: `  ${many(own.length, "picture")}${more}` }));
      return element("section", {}, heading, element("ol", { className: "hits" }, ...hits));
    });
    $("results").replaceChildren(...sections);
  });
}

async function again() { if (asked && store.pictures.length) { await asked(); } else { browse(); } }

// --- one picture, large

let at = 0;

function enlarge(number) {
  const picture = shown[number];
  if (!picture) { return; }
  at = number;
  const image = $("large").querySelector("img");
  if (image.dataset.whole) { URL.revokeObjectURL(image.dataset.whole); delete image.dataset.whole; }
  // the file itself while it is at hand; after the page was closed its small picture is what the index has
  image.src = picture.file ? (image.dataset.whole = URL.createObjectURL(picture.file)) : address(picture);
  image.alt = picture.name;
  $("large").querySelector("p").textContent = `${picture.name} (${picture.width} × ${picture.height})`;
  const chances = classes && classes.chances.get(picture), order = chances ? [...chances.keys()].sort((a, b) => chances[b] - chances[a]).slice(0, 8) : [];
  $("bars").replaceChildren(...order.map((c) => element("li", {}, element("span", { className: "name", textContent: classes.labels[c] }), element("progress", { max: 1, value: chances[c] }), element("b", { textContent: `${(100 * chances[c]).toFixed(0)} %` }))));
  if (!$("large").open) { $("large").showModal(); }
}

function step(by) {
  const buttons = [...document.querySelectorAll(".hit > button")];
  const now = buttons.indexOf(document.activeElement), to = buttons[Math.min(buttons.length - 1, Math.max(0, now < 0 ? 0 : now + by))];
  if (to) { to.focus(); to.scrollIntoView({ block: "nearest" }); }
}

function columns() {
  const grid = document.querySelector(".hits");
  return grid ? getComputedStyle(grid).gridTemplateColumns.split(" ").length : 1;
}

// --- the page's own controls

function pick(name) {
  for (const one of ["search", "classify"]) {
    $(one).hidden = one !== name;
    $(`tab-${one}`).setAttribute("aria-selected", String(one === name));
    $(`tab-${one}`).tabIndex = one === name ? 0 : -1;
  }
}

const themes = ["auto", "light", "dark"];
let theme = 0;
try { theme = Math.max(0, themes.indexOf(localStorage.getItem("theme") || "auto")); } catch { theme = 0; }
function paint() {
  if (theme) { document.documentElement.dataset.theme = themes[theme]; } else { delete document.documentElement.dataset.theme; }
  $("theme").textContent = `Theme: ${themes[theme]}`;
}

function listen() {
  $("theme").addEventListener("click", () => {
    theme = (theme + 1) % 3;
    try { localStorage.setItem("theme", themes[theme]); } catch { /* the choice lasts for this page */ }
    paint();
  });
  for (const name of ["search", "classify"]) {
    $(`tab-${name}`).addEventListener("click", () => pick(name));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") { return; }
      const other = name === "search" ? "classify" : "search";
      pick(other);
      $(`tab-${other}`).focus();
      event.stopPropagation();
    });
  }
  $("search").addEventListener("submit", (event) => { event.preventDefault(); if ($("q").value.trim()) { search($("q").value); } else { browse(); } });
  $("classify").addEventListener("submit", (event) => { event.preventDefault(); classify($("labels").value, $("prompt").value); });
  $("labels").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("classify").requestSubmit(); } });
  $("example").addEventListener("change", ({ target }) => { if (target.files[0]) { searchByFile(target.files[0]); } target.value = ""; });
  for (const id of ["files", "folder"]) {
    $(id).addEventListener("change", ({ target }) => { const files = chosen(target.files); target.value = ""; problem(""); index(files); });
  }
  $("add-folder").hidden = !("webkitdirectory" in HTMLInputElement.prototype);
  $("stop").addEventListener("click", () => { stopped = true; });
  $("clear").addEventListener("click", async () => {
    if (confirm(`Take all ${many(store.pictures.length, "picture")} out of the index? The files stay where they are.`)) { await store.clear(); counted(); browse(); }
  });
  $("like").addEventListener("click", () => like(shown[at]));
  $("remove").addEventListener("click", async () => { const { key } = shown[at]; $("large").close(); await store.remove(key); counted(); await again(); });
  $("large").addEventListener("click", (event) => { if (event.target === $("large")) { $("large").close(); } });
  $("large").addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") { enlarge(Math.min(shown.length - 1, at + 1)); } else if (event.key === "ArrowLeft") { enlarge(Math.max(0, at - 1)); }
  });
  addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName);
    if ($("large").open || event.ctrlKey || event.metaKey || event.altKey) { return; }
    if (event.key === "Escape" && typing) { document.activeElement.blur(); return; }
    if (typing) { return; }
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() }[event.key];
    if (by) { event.preventDefault(); step(by);
    } else if (event.key === "/") { event.preventDefault(); pick("search"); $("q").focus(); $("q").select();
    } else if (event.key === "s" && document.activeElement.dataset.number) { like(shown[Number(document.activeElement.dataset.number)]); }
  });
  let inside = 0;
  addEventListener("dragenter", (event) => { event.preventDefault(); inside += 1; document.body.classList.add("drop"); });
  addEventListener("dragleave", () => { inside -= 1; if (inside <= 0) { inside = 0; document.body.classList.remove("drop"); } });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", async (event) => {
    event.preventDefault();
    inside = 0;
    document.body.classList.remove("drop");
    problem("");
    index(await dropped(event.dataTransfer.items));
  });
  addEventListener("paste", (event) => {
    const files = Array.from(event.clipboardData ? event.clipboardData.files : []);
    if (files.length) { event.preventDefault(); searchByFile(files[0]); }
  });
}

/** Threads need two headers; where the host does not send them a service worker adds them, and the page loads once more. */
async function isolated() {
  if (crossOriginIsolated || !isSecureContext || !navigator.serviceWorker || window !== top || sessionStorage.getItem("isolated")) { return; }
  try {
    sessionStorage.setItem("isolated", "tried");
    await navigator.serviceWorker.register("isolation.js");
    await navigator.serviceWorker.ready;
    location.reload();
    await new Promise(() => {});
  } catch { /* one thread, then */ }
}

const size = (n) => `${(n / 1e6).toFixed(1)} MB`;

/** What runs the model, and where. */
function described(about) {
  const where = about.backend === "webgpu" ? "WebGPU" : `WASM, ${many(about.threads, "thread")}`, { name, parameters: { total }, towers, web } = about.manifest;
  $("backend").textContent = where;
  $("about").textContent = `${name}: ${format.format(total)} parameters, ${size(towers.image.bytes + towers.text.bytes)} of ${web.weights} weights, run by ONNX Runtime (${where}). Scores are cosines. ${about.notes.join(" ")}`;
  if (window.clipdistill) { window.clipdistill.about = about; }
}

async function start() {
  paint();
  $("loading").textContent = "Loading the model …";
  await isolated();
  const about = await ask("load", { backend: parameters.get("backend") }, ({ loaded, total }) => {
    $("loaded").hidden = false;
    $("loaded").max = total;
    $("loaded").value = loaded;
    $("loading").textContent = `Loading the model: ${size(loaded)} of ${size(total)}`;
  });
  manifest = about.manifest;
  store = new Store(`clipdistill ${manifest.model_fingerprint} ${manifest.web.weights}`, manifest.embed_dim);
  await store.open();
  document.title = `${manifest.name} · pictures, searched in this browser`;
  $("name").textContent = manifest.name;
  described(about);
  $("start").hidden = true;
  document.body.classList.remove("loading");
  listen();
  counted();
  browse();
  window.clipdistill = { about, ask, index, store: () => store };
}

start().catch((error) => { $("loading").textContent = `The model cannot be loaded: ${error.message}`; $("loaded").hidden = true; });
