// A tokenizer.json of Hugging Face's `tokenizers` library, run in JavaScript: the parts of it that clipdistill's exports
// use (clipdistill/export/web/settings.py lists them), with the library's results.

const SPACE = "\\p{White_Space}";
const WORD = "\\p{L}\\p{M}\\p{Nd}\\p{Pc}";
const CLASSES = { s: [SPACE, SPACE], S: ["\\P{White_Space}", "\\P{White_Space}"], d: ["\\p{Nd}", "\\p{Nd}"], D: ["\\P{Nd}", "\\P{Nd}"],
  w: [`[${WORD}]`, WORD], W: [`[^${WORD}]`, null], h: ["[0-9a-fA-F]", "0-9a-fA-F"], A: ["^", null], z: ["$", null] };
const EITHER_CASE = { s: "sS\u017f", k: "kK\u212a" };

/** A pattern of the Oniguruma engine as a regular expression of JavaScript. Throws for what has no such form. */
export function regularExpression(source) {
  let out = "", inClass = false, depth = 0;
  const anyCase = []; // depths of the groups that ignore case
  for (let i = 0; i < source.length; i++) {
    const c = source[i];
    if (c === "\\") {
      const next = source[++i];
      if (next in CLASSES) {
        const form = CLASSES[next][inClass ? 1 : 0];
        if (form === null) { throw new Error(`\\${next} in ${source}`); }
        out += form;
      } else if (next === "x") {
        const braced = /^\{([0-9a-fA-F]+)\}|^([0-9a-fA-F]{2})/.exec(source.slice(i + 1));
        if (!braced) { throw new Error(`\\x in ${source}`); }
        out += `\\u{${braced[1] || braced[2]}}`;
        i += braced[0].length;
      } else if (next === "p" || next === "P") {
        const end = source.indexOf("}", i);
        out += `\\${source.slice(i, end + 1)}`;
        i = end;
      } else if (/[nrtfvbBu0-9^$\\.*+?()[\]{}|/]/.test(next) || (next === "-" && inClass)) { out += `\\${next}`;
      } else { out += next; }
    } else if (inClass) {
      if (c === "]") { inClass = false; }
      out += c === "[" ? "\\[" : c;
    } else if (c === "[") {
      inClass = true;
      out += c;
      if (source[i + 1] === "^") { out += source[++i]; }
    } else if (source.startsWith("(?i:", i)) {
      anyCase.push(++depth);
      out += "(?:";
      i += 3;
    } else if (c === "(") { depth += 1; out += c;
    } else if (c === ")") {
      if (anyCase.at(-1) === depth) { anyCase.pop(); }
      depth -= 1;
      out += c;
    } else if (anyCase.length && /[a-zA-Z]/.test(c)) {
      const lower = c.toLowerCase();
      out += `[${EITHER_CASE[lower] || lower + c.toUpperCase()}]`;
    } else { out += c; }
  }
  return new RegExp(out, "gu");
}

const escaped = (text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
const pattern = (value) => ("String" in value ? new RegExp(escaped(value.String), "gu") : regularExpression(value.Regex));
const lower = (text) => Array.from(text, (c) => c.toLowerCase()).join(""); // one by one: no rule for a final sigma

// --- normalizers

const CHINESE = [[0x4e00, 0x9fff], [0x3400, 0x4dbf], [0x20000, 0x2a6df], [0x2a700, 0x2b73f], [0x2b740, 0x2b81f],
  [0x2b920, 0x2ceaf], [0xf900, 0xfaff], [0x2f800, 0x2fa1f]];
const trim = (text, left, right) => {
  const from = left ? text.replace(/^\p{White_Space}+/u, "") : text;
  return right ? from.replace(/\p{White_Space}+$/u, "") : from;
};

function bertNormalizer(part) {
  const strip = part.strip_accents ?? part.lowercase;
  return (text) => {
    if (part.clean_text) { text = text.replace(/[\0\ufffd]|(?![\t\n\r])[\p{Cc}\p{Cf}\p{Co}]/gu, "").replace(/\p{White_Space}/gu, " "); }
    if (part.handle_chinese_chars) {
      text = Array.from(text, (c) => (CHINESE.some(([a, b]) => c.codePointAt(0) >= a && c.codePointAt(0) <= b) ? ` ${c} ` : c)).join("");
    }
    if (strip) { text = text.normalize("NFD").replace(/\p{Mn}/gu, ""); }
    return part.lowercase ? lower(text) : text;
  };
}

function normalizer(part) {
  if (!part) { return (text) => text; }
  switch (part.type) {
    case "Sequence": {
      const steps = part.normalizers.map(normalizer);
      return (text) => steps.reduce((now, step) => step(now), text);
    }
    case "NFC": case "NFD": case "NFKC": case "NFKD": return (text) => text.normalize(part.type);
    case "Lowercase": return lower;
    case "Strip": return (text) => trim(text, part.strip_left, part.strip_right);
    case "StripAccents": return (text) => text.replace(/\p{M}/gu, "");
    case "Prepend": return (text) => (text ? part.prepend + text : text);
    case "BertNormalizer": return bertNormalizer(part);
    case "Replace": {
      if ("String" in part.pattern) { return (text) => text.replaceAll(part.pattern.String, () => part.content); }
      const found = pattern(part.pattern);
      return (text) => text.replace(found, () => part.content);
    }
    default: throw new Error(`the normalizer ${part.type} is not known to this page`);
  }
}

// --- pre-tokenizers: text -> words

/** [piece, whether it is a match] of a text, in order and without empty pieces. */
function pieces(text, expression, invert) {
  const found = [];
  let end = 0;
  for (const match of text.matchAll(expression)) {
    if (!match[0]) { continue; }
    if (match.index > end) { found.push([text.slice(end, match.index), invert]); }
    found.push([match[0], !invert]);
    end = match.index + match[0].length;
  }
  if (end < text.length) { found.push([text.slice(end), invert]); }
  return found;
}

function split(text, expression, behaviour, invert = false) {
  const out = [];
  let pending = "", before = null;
  for (const [piece, match] of pieces(text, expression, invert)) {
    switch (behaviour) {
      case "Removed": if (!match) { out.push(piece); } break;
      case "Isolated": out.push(piece); break;
      case "Contiguous": if (match === before) { out[out.length - 1] += piece; } else { out.push(piece); } break;
      case "MergedWithPrevious": if (match && before === false) { out[out.length - 1] += piece; } else { out.push(piece); } break;
      case "MergedWithNext": if (match) { if (pending) { out.push(pending); } pending = piece; } else { out.push(pending + piece); pending = ""; } break;
      default: throw new Error(`the split behaviour ${behaviour} is not known to this page`);
    }
    before = match;
  }
  if (pending) { out.push(pending); }
  return out;
}

/** Bytes as the printable characters that GPT-2's vocabulary writes them with. */
const BYTES = (() => {
  const table = new Array(256);
  let next = 256;
  for (let b = 0; b < 256; b++) {
    const printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174);
    table[b] = String.fromCodePoint(printable ? b : next++);
  }
  return table;
})();
const utf8 = new TextEncoder();
const GPT2 = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}]/gu;

function preTokenizer(part) {
  if (!part) { return (text) => [text]; }
  switch (part.type) {
    case "Sequence": {
      const steps = part.pretokenizers.map(preTokenizer);
      return (text) => steps.reduce((words, step) => words.flatMap(step), [text]);
    }
    case "Split": {
      const expression = pattern(part.pattern);
      return (text) => split(text, expression, part.behavior, part.invert);
    }
    case "ByteLevel": return (text) => {
      if (part.add_prefix_space && !text.startsWith(" ")) { text = ` ${text}`; }
      const words = part.use_regex === false ? [text] : split(text, GPT2, "Isolated");
      return words.map((word) => Array.from(utf8.encode(word), (b) => BYTES[b]).join(""));
    };
    case "BertPreTokenizer": return (text) => split(text, /\p{White_Space}/gu, "Removed").flatMap((word) => split(word, PUNCTUATION, "Isolated"));
    case "Whitespace": return (text) => split(text, regularExpression("\\w+|[^\\w\\s]+"), "Removed", true);
    case "WhitespaceSplit": return (text) => split(text, /\p{White_Space}/gu, "Removed");
    case "Punctuation": return (text) => split(text, PUNCTUATION, part.behavior || "Isolated");
    case "Digits": return (text) => split(text, /\p{N}/gu, part.individual_digits ? "Isolated" : "Contiguous");
    default: throw new Error(`the pre-tokenizer ${part.type} is not known to this page`);
  }
}

// --- models: word -> ids

function bytePairs(model) {
  const vocabulary = new Map(Object.entries(model.vocab));
  const merges = model.merges.map((pair) => (Array.isArray(pair) ? pair : pair.split(" ")));
  const prefix = model.continuing_subword_prefix || "", suffix = model.end_of_word_suffix || "";
  const ranks = new Map();
  for (const [rank, [a, b]] of merges.entries()) {
    const joined = vocabulary.get(a + b.slice(b.startsWith(prefix) ? prefix.length : 0));
    ranks.set(`${vocabulary.get(a)} ${vocabulary.get(b)}`, [rank, joined]);
  }
  const unknown = model.unk_token == null ? null : vocabulary.get(model.unk_token);
  return (word) => {
    if (model.ignore_merges && vocabulary.has(word)) { return [vocabulary.get(word)]; }
    const letters = Array.from(word), ids = [];
    letters.forEach((letter, i) => {
      const known = vocabulary.get((i ? prefix : "") + letter + (i === letters.length - 1 ? suffix : ""));
      if (known !== undefined) { ids.push(known);
      } else if (unknown !== null && !(model.fuse_unk && ids.at(-1) === unknown)) { ids.push(unknown); }
    });
    for (;;) {
      let best = null, at = -1;
      for (let i = 0; i + 1 < ids.length; i++) {
        const merge = ranks.get(`${ids[i]} ${ids[i + 1]}`);
        if (merge && (best === null || merge[0] < best[0])) { best = merge; at = i; }
      }
      if (best === null) { return ids; }
      ids.splice(at, 2, best[1]);
    }
  };
}

function wordPieces(model) {
  const vocabulary = new Map(Object.entries(model.vocab)), unknown = vocabulary.get(model.unk_token);
  return (word) => {
    const letters = Array.from(word), ids = [];
    if (letters.length > (model.max_input_chars_per_word ?? 100)) { return [unknown]; }
    for (let from = 0; from < letters.length;) {
      let to = letters.length, id;
      for (; to > from; to--) {
        id = vocabulary.get((from ? model.continuing_subword_prefix : "") + letters.slice(from, to).join(""));
        if (id !== undefined) { break; }
      }
      if (id === undefined) { return [unknown]; }
      ids.push(id);
      from = to;
    }
    return ids;
  };
}

function wholeWords(model) {
  const vocabulary = new Map(Object.entries(model.vocab)), unknown = vocabulary.get(model.unk_token);
  return (word) => {
    const id = vocabulary.get(word) ?? unknown;
    return id === undefined ? [] : [id];
  };
}

const MODELS = { BPE: bytePairs, WordPiece: wordPieces, WordLevel: wholeWords };

// --- what is put around the ids

function ends(part) {
  if (!part) { return [[], []]; }
  switch (part.type) {
    case "ByteLevel": return [[], []];
    case "BertProcessing": case "RobertaProcessing": return [[part.cls[1]], [part.sep[1]]];
    case "Sequence": {
      const all = part.processors.map(ends);
      return [all.toReversed().flatMap(([start]) => start), all.flatMap(([, end]) => end)];
    }
    case "TemplateProcessing": {
      const at = part.single.findIndex((piece) => "Sequence" in piece);
      const ids = (list) => list.flatMap((piece) => part.special_tokens[piece.SpecialToken.id].ids);
      return [ids(part.single.slice(0, at)), ids(part.single.slice(at + 1))];
    }
    default: throw new Error(`the post-processor ${part.type} is not known to this page`);
  }
}

/** Splits a text at added tokens: [piece, id or null]. */
function addedTokens(tokens) {
  if (!tokens.length) { return (text) => [[text, null]]; }
  const ids = new Map(tokens.map((token) => [token.content, token]));
  const longest = [...ids.keys()].sort((a, b) => b.length - a.length).map(escaped).join("|");
  const expression = new RegExp(longest, "gu"), word = new RegExp(`[${WORD}]`, "u");
  return (text) => {
    const out = [];
    let end = 0;
    for (const match of text.matchAll(expression)) {
      const token = ids.get(match[0]);
      let from = match.index, to = from + match[0].length;
      if (token.single_word) {
        const before = Array.from(text.slice(0, from)).at(-1), after = Array.from(text.slice(to, to + 2))[0];
        if ((before && word.test(before)) || (after && word.test(after))) { continue; }
      }
      if (token.lstrip) { from = Math.max(end, text.slice(0, from).replace(/\p{White_Space}+$/u, "").length); }
      if (token.rstrip) { to = text.length - text.slice(to).replace(/^\p{White_Space}+/u, "").length; }
      if (from > end) { out.push([text.slice(end, from), null]); }
      out.push([match[0], token.id]);
      end = to;
    }
    if (end < text.length) { out.push([text.slice(end), null]); }
    return out;
  };
}

export class Tokenizer {
  /** definition: the content of a tokenizer.json. Throws for parts that this page does not know. */
  constructor(definition) {
    const make = MODELS[definition.model.type];
    if (!make) { throw new Error(`the tokenizer model ${definition.model.type} is not known to this page`); }
    this.words = make(definition.model);
    this.normalise = normalizer(definition.normalizer);
    this.split = preTokenizer(definition.pre_tokenizer);
    [this.start, this.end] = ends(definition.post_processor);
    this.limit = definition.truncation ? definition.truncation.max_length : Infinity;
    this.padding = definition.padding;
    const added = definition.added_tokens || [];
    this.raw = addedTokens(added.filter((token) => !token.normalized));
    this.normalised = addedTokens(added.filter((token) => token.normalized).map((token) => ({ ...token, content: this.normalise(token.content) })).filter((token) => token.content));
    const unknown = definition.model.unk_token;
    this.meaningless = new Set([...this.start, ...this.end, unknown == null ? -1 : definition.model.vocab[unknown]]);
    this.memory = new Map();
  }

  /** The ids of one text, cut to the model's context, start and end included. */
  encode(text) {
    const ids = [];
    for (const [raw, known] of this.raw(text)) {
      if (known !== null) { ids.push(known); continue; }
      for (const [piece, id] of this.normalised(this.normalise(raw))) {
        if (id !== null) { ids.push(id); continue; }
        for (const word of this.split(piece)) {
          if (!word) { continue; }
          let found = this.memory.get(word);
          if (!found) { found = this.words(word); if (this.memory.size < 20000) { this.memory.set(word, found); } }
          for (const one of found) { ids.push(one); }
        }
      }
    }
    return [...this.start, ...ids.slice(0, Math.max(0, this.limit - this.start.length - this.end.length)), ...this.end];
  }

  /** Rows of equal length, as the text tower takes them. */
  batch(texts) {
    const rows = texts.map((text) => this.encode(text));
    if (!this.padding) { return rows; }
    const fixed = this.padding.strategy.Fixed;
    const length = fixed ?? Math.max(...rows.map((row) => row.length));
    return rows.map((row) => row.concat(new Array(Math.max(0, length - row.length)).fill(this.padding.pad_id)));
  }

  /** Whether any part of a text is in the vocabulary: what is found for others means nothing. */
  knows(text) {
    return this.encode(text).some((id) => !this.meaningless.has(id));
  }
}
