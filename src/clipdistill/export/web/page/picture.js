// Pictures to the numbers that the image tower takes, with Pillow's arithmetic: its filters widen with the reduction, its
// sums are in whole numbers. A canvas resizes with filters of its own, and the embeddings would be others.

const BITS = 22; // Pillow's fixed point for pixels of eight bits
const MOST_PIXELS = 1 << 26; // of a resized picture: of longer strips the centre is taken

const FILTERS = {
  bilinear: { support: 1, at: (x) => (Math.abs(x) < 1 ? 1 - Math.abs(x) : 0) },
  bicubic: { support: 2, at: (x) => {
    const a = -0.5;
    x = Math.abs(x);
    if (x < 1) { return ((a + 2) * x - (a + 3)) * x * x + 1; }
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
  } },
};

/** For outputs from..to of `outputs` of a line of `inputs` pixels: where each begins, how many it takes, with what weights. */
export function weights(inputs, outputs, from, to, interpolation) {
  const filter = FILTERS[interpolation], scale = inputs / outputs, wide = Math.max(scale, 1);
  const support = filter.support * wide, most = Math.ceil(support) * 2 + 1;
  const begin = new Int32Array(to - from), count = new Int32Array(to - from), values = new Int32Array((to - from) * most);
  const line = new Float64Array(most);
  for (let i = from; i < to; i++) {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const n = Math.min(inputs, Math.trunc(centre + support + 0.5)) - first;
    let sum = 0;
    for (let k = 0; k < n; k++) { sum += line[k] = filter.at((k + first - centre + 0.5) * (1 / wide)); }
    for (let k = 0; k < n; k++) {
      const value = (sum ? line[k] / sum : line[k]) * (1 << BITS);
      values[(i - from) * most + k] = Math.trunc(value < 0 ? value - 0.5 : value + 0.5);
    }
    begin[i - from] = first;
    count[i - from] = n;
  }
  return { begin, count, values, most };
}

const clip = (sum) => { const value = sum >> BITS; return value < 0 ? 0 : value > 255 ? 255 : value; };

/**
 * The window (left, top, w, h) of a picture resized to width x height.
 * source: RGBA bytes of sourceWidth x sourceHeight. Returns RGB bytes; black where the window lies outside.
 */
export function resized(source, sourceWidth, sourceHeight, width, height, left, top, w, h, interpolation) {
  const x0 = Math.max(0, left), x1 = Math.min(width, left + w), y0 = Math.max(0, top), y1 = Math.min(height, top + h);
  const across = weights(sourceWidth, width, x0, x1, interpolation), down = weights(sourceHeight, height, y0, y1, interpolation);
  const first = down.begin[0], last = down.begin[y1 - y0 - 1] + down.count[y1 - y0 - 1], columns = x1 - x0;
  const lines = new Uint8Array((last - first) * columns * 3), half = 1 << (BITS - 1);
  for (let y = first; y < last; y++) {
    const row = y * sourceWidth;
    let at = (y - first) * columns * 3;
    for (let x = 0; x < columns; x++) {
      if (width === sourceWidth) {
        const p = (row + x0 + x) * 4;
        lines[at++] = source[p]; lines[at++] = source[p + 1]; lines[at++] = source[p + 2];
        continue;
      }
      let r = half, g = half, b = half, p = (row + across.begin[x]) * 4, k = x * across.most;
      for (const end = k + across.count[x]; k < end; k++, p += 4) {
        const weight = across.values[k];
        r += source[p] * weight; g += source[p + 1] * weight; b += source[p + 2] * weight;
      }
      lines[at++] = clip(r); lines[at++] = clip(g); lines[at++] = clip(b);
    }
  }
  const out = new Uint8Array(w * h * 3), line = columns * 3, sums = new Int32Array(line);
  for (let y = y0; y < y1; y++) {
    const to = ((y - top) * w + x0 - left) * 3;
    if (height === sourceHeight) { out.set(lines.subarray((y - first) * line, (y - first + 1) * line), to); continue; }
    sums.fill(half);
    const own = y - y0;
    for (let k = 0; k < down.count[own]; k++) {
      const weight = down.values[own * down.most + k], from = (down.begin[own] + k - first) * line;
      for (let i = 0; i < line; i++) { sums[i] += lines[from + i] * weight; }
    }
    for (let i = 0; i < line; i++) { out[to + i] = clip(sums[i]); }
  }
  return out;
}

/** Python's round: halves go to the even neighbour. */
const round = (x) => { const low = Math.floor(x), rest = x - low; return rest === 0.5 ? low + (low % 2 ? 1 : 0) : Math.floor(x + 0.5); };

/** Rows and columns exchanged. */
function turned(bytes, width, height, channels) {
  const out = new Uint8Array(bytes.length);
  for (let y = 0, p = 0; y < height; y++) {
    for (let x = 0; x < width; x++) { for (let c = 0; c < channels; c++) { out[(x * height + y) * channels + c] = bytes[p++]; } }
  }
  return out;
}

/** RGB bytes (size x size) of the evaluation view: RGBA bytes and their width and height, transform.json. */
export function square(source, width, height, { size, resize_mode: mode, interpolation }) {
  if (mode === "squash") {
    // as Pillow 13: the longer reduction first, since values are rounded and cut off between the two
    if (height > width && height > size) { return turned(resized(turned(source, width, height, 4), height, width, size, size, 0, 0, size, size, interpolation), size, size, 3); }
    return resized(source, width, height, size, size, 0, 0, size, size, interpolation);
  }
  if (mode === "longest") {
    const ratio = Math.max(width, height) / size;
    const [w, h] = [Math.max(1, round(width / ratio)), Math.max(1, round(height / ratio))];
    return resized(source, width, height, w, h, -Math.floor((size - w) / 2), -Math.floor((size - h) / 2), size, size, interpolation);
  }
  const long = Math.floor((size * Math.max(width, height)) / Math.min(width, height));
  const [w, h] = width <= height ? [size, long] : [long, size];
  if (w * h > MOST_PIXELS) {
    const side = Math.min(width, height), x = Math.floor((width - side) / 2), y = Math.floor((height - side) / 2);
    const centre = new Uint8Array(side * side * 4);
    for (let row = 0; row < side; row++) {
      const from = ((y + row) * width + x) * 4;
      centre.set(source.subarray(from, from + side * 4), row * side * 4);
    }
    return resized(centre, side, side, size, size, 0, 0, size, size, interpolation);
  }
  return resized(source, width, height, w, h, round((w - size) / 2), round((h - size) / 2), size, size, interpolation);
}

/** float32 (3, size, size) of RGB bytes: divided by 255, minus mean, divided by std, each rounded as torch rounds. */
export function normalised(rgb, { mean, std }) {
  const pixels = rgb.length / 3, out = new Float32Array(rgb.length);
  for (let c = 0; c < 3; c++) {
    const table = new Float32Array(256), m = Math.fround(mean[c]), s = Math.fround(std[c]);
    for (let v = 0; v < 256; v++) { table[v] = Math.fround(Math.fround(Math.fround(v / 255) - m) / s); }
    for (let i = 0; i < pixels; i++) { out[c * pixels + i] = table[rgb[3 * i + c]]; }
  }
  return out;
}
