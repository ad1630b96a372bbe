// Texts, layers, heads, rows and tokens count from 0, steps from 1.
// The recorded trace, unpacked: rows of q, k and v, and the attention weights that follow from them.
// payload.py packs what is unpacked here; this file and stepper.js are one module, see payload.front_end.

// Read once: the numbers of every half-precision bit pattern.
let halves;
function half(bits) {
  if (!halves) {
    halves = new Float32Array(65536);
    for (let b = 0; b < 65536; b++) {
      const e = (b >> 10) & 31, m = b & 1023, sign = b >> 15 ? -1 : 1;
      halves[b] = sign * (e === 31 ? (m ? NaN : Infinity) : e ? 2 ** (e - 15) * (1 + m / 1024) : 2 ** -14 * (m / 1024));
    }
  }
  return halves[bits];
}

class Trace {
  // buffer: an ArrayBuffer, the length of a JSON text (uint32), the text, then the numbers of each text's runs.
  constructor(buffer) {
    const size = new DataView(buffer).getUint32(0, true);
    Object.assign(this, JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size))));
    this.hs = this.n_embd / this.n_head;
    this.slices = new Map();
    let at = 4 + size;
    const take = (Type, count) => new Type(buffer.slice(at, (at += count * Type.BYTES_PER_ELEMENT)));
    const Numbers = { float32: Float32Array, float16: Uint16Array, int8: Int8Array }[this.dtype];
    for (const text of this.texts) {
      text.data = text.runs.map((S) => {
        const scale = this.dtype === "int8" ? take(Float32Array, this.kinds * this.n_layer * S * this.n_head) : null;
        return { S, scale, raw: take(Numbers, this.kinds * this.n_layer * S * this.n_embd) };
      });
    }
  }

  // {values, limit}: all rows of q, k or v (which: 0, 1, 2), or of q as the sinks see it (3), of a layer, S × C, and the largest absolute value.
  slice(t, run, which, layer) {
    const key = [t, run, which, layer].join();
    let found = this.slices.get(key);
    if (!found) {
      const { S, scale, raw } = this.texts[t].data[run], C = this.n_embd;
      const first = (which * this.n_layer + layer) * S * C, values = new Float32Array(S * C);
      let limit = 0;
      for (let i = 0; i < S * C; i++) {
        const x = raw[first + i];
        values[i] = scale ? x * scale[Math.floor((first + i) / this.hs)] : this.dtype === "float16" ? half(x) : x;
        limit = Math.max(limit, Math.abs(values[i]));
      }
      found = { values, limit: limit || 1 };
      this.slices.set(key, found);
    }
    return found;
  }

  // One row of one head: hs numbers.
  row(t, run, which, layer, head, i) {
    const start = i * this.n_embd + head * this.hs;
    return this.slice(t, run, which, layer).values.subarray(start, start + this.hs);
  }

  // Whether the query at row j looks at the key at row i.
  sees(j, i) {
    return i <= j && (this.window === null || i > j - this.window || i < this.sinks);
  }

  // The scores q·k / √hs and the weights of query j over the tokens 0 … j; 0 for those that it does not see.
  attention(t, run, layer, head, j) {
    const q = this.row(t, run, 0, layer, head, j), turned = this.sinks ? this.row(t, run, 3, layer, head, j) : q, scores = new Float64Array(j + 1), weights = new Float64Array(j + 1);
    const keys = this.slice(t, run, 1, layer).values, root = Math.sqrt(this.hs);
    let most = -Infinity, sum = 0;
    for (let i = 0; i <= j; i++) {
      const start = i * this.n_embd + head * this.hs;
      let dot = 0;
      for (let c = 0; c < this.hs; c++) dot += (i < this.sinks ? turned : q)[c] * keys[start + c];
      scores[i] = this.sees(j, i) ? dot / root : -Infinity;
      most = Math.max(most, scores[i]);
    }
    for (let i = 0; i <= j; i++) sum += weights[i] = Math.exp(scores[i] - most);
    for (let i = 0; i <= j; i++) weights[i] /= sum;
    return { q, turned, scores, weights, most, sum };
  }

  // The output of the head for these weights: hs numbers.
  output(t, run, layer, head, weights) {
    const out = new Float32Array(this.hs);
    weights.forEach((w, i) => this.row(t, run, 2, layer, head, i).forEach((v, c) => (out[c] += w * v)));
    return out;
  }

  // The state of each row of a step's window, and of the places that will be filled later.
  states(step, cache) {
    const before = cache ? (step.P ? "read" : "new") : "again", S = step.P + step.T;
    const old = (i) => (before === "read" && !this.sees(step.P, i) ? "left" : before);
    return Array.from({ length: this.length }, (_, i) => (i >= S ? "none" : i < step.known ? old(i) : "new"));
  }

  // Which rows to show, null for a gap: the first three, then the newest. Always as many, whatever S.
  visible(S, limit = this.rows) {
    const count = (n, from = 0) => Array.from({ length: n }, (_, i) => i + from);
    if (this.length <= limit) return count(this.length);
    if (S < limit) return count(limit);
    const last = Math.min(S + 1, this.length); // one place that is still empty
    return [0, 1, 2, null, ...count(limit - 4, last - limit + 4)];
  }
}

// A number in at most four digits: 1234567 → 1.23 M.
function amount(n, unit = "") {
  for (const [prefix, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (n >= size) return `${+(n / size).toPrecision(3)} ${prefix}${unit}`;
  }
  return `${n} ${unit}`.trim();
}

function seconds(s) {
  return s >= 1 ? `${s.toFixed(2)} s` : s >= 1e-3 ? `${+(s * 1e3).toPrecision(3)} ms` : `${+(s * 1e6).toPrecision(3)} µs`;
}

// Two digits, a true minus, and no minus in front of a zero.
function short(x, digits = 2) {
  const s = x.toFixed(digits);
  return (+s === 0 ? s.replace("-", "") : s).replace("-", "−");
}

// .42, or 1.0: three characters.
const weightText = (w) => (w > 0.995 ? "1.0" : w.toFixed(2).slice(1));

const shownName = (s) => s.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
