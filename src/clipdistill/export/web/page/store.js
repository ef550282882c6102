// The index: pictures with their vectors, in the browser's storage and in memory.

const wait = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

export class Store {
  /** name: of the database; one for each model, since vectors of two models cannot be compared. */
  constructor(name, width) {
    Object.assign(this, { name, width, pictures: [], keys: new Map(), database: null, problem: "" });
    this.matrix = new Float32Array(0);
  }

  /** Read what is stored. Without storage (a private window, say) the index lives as long as the page. */
  async open() {
    try {
      const request = indexedDB.open(this.name, 1);
      request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "key" });
      this.database = await wait(request);
      const stored = await wait(this.database.transaction("pictures").objectStore("pictures").getAll());
      for (const picture of stored.sort((a, b) => a.added - b.added)) {
        if (picture.vector instanceof Float32Array && picture.vector.length === this.width) { this.remember(picture); }
      }
    } catch (error) {
      this.problem = `This browser keeps nothing for this page (${error && error.message || error}): the index lasts until it is closed.`;
    }
  }

  remember(picture) {
    const n = this.pictures.length;
    if ((n + 1) * this.width > this.matrix.length) {
      const larger = new Float32Array(Math.max(256, 2 * n) * this.width);
      larger.set(this.matrix);
      this.matrix = larger;
    }
    this.matrix.set(picture.vector, n * this.width);
    this.keys.set(picture.key, n);
    this.pictures.push(picture);
  }

  has(key) { return this.keys.has(key); }

  /** Add pictures; they are kept when this returns. */
  async add(pictures) {
    for (const picture of pictures) { if (!this.has(picture.key)) { this.remember(picture); } }
    await this.write((table) => pictures.forEach(({ file, ...picture }) => table.put(picture)));
  }

  async remove(key) {
    const kept = this.pictures.filter((picture) => picture.key !== key);
    this.empty();
    kept.forEach((picture) => this.remember(picture));
    await this.write((table) => table.delete(key));
  }

  async clear() {
    this.empty();
    await this.write((table) => table.clear());
  }

  empty() { this.pictures = []; this.keys = new Map(); this.matrix = new Float32Array(0); }

  async write(change) {
    if (!this.database) { return; }
    try {
      const transaction = this.database.transaction("pictures", "readwrite");
      change(transaction.objectStore("pictures"));
      await new Promise((resolve, reject) => {
        transaction.oncomplete = resolve;
        transaction.onabort = transaction.onerror = () => reject(transaction.error);
      });
    } catch (error) {
      this.problem = `The browser's storage takes no more (${error && error.message || error}): what is added now lasts until the page is closed.`;
    }
  }

  /** Cosines of one vector with every picture. */
  scores(vector) {
    const { width, matrix } = this, out = new Float32Array(this.pictures.length);
    for (let n = 0, at = 0; n < out.length; n++) {
      let sum = 0;
      for (let i = 0; i < width; i++, at++) { sum += matrix[at] * vector[i]; }
      out[n] = sum;
    }
    return out;
  }

  /** The `most` pictures nearest to a vector: [{ picture, score }], the best first. */
  nearest(vector, most) {
    const scores = this.scores(vector), order = Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a]);
    return order.slice(0, most).map((n) => ({ picture: this.pictures[n], score: scores[n] }));
  }
}
