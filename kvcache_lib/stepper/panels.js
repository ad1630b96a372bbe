// The stepper's panels: the rows of the cache, what is beside them, and the race. Each is built once and redrawn.

// Numbers as colours in a canvas of one row: how far from zero is how opaque, so that zero is the ground's colour.
function paint(canvas, values, limit, positive, negative = positive) {
  if (canvas.width !== values.length) canvas.width = values.length;
  canvas.height = 1;
  const context = canvas.getContext("2d"), image = context.createImageData(values.length, 1);
  values.forEach((x, i) => {
    const hue = x < 0 ? negative : positive, at = 4 * i;
    for (let c = 0; c < 3; c++) image.data[at + c] = hue[c];
    image.data[at + 3] = 255 * Math.min(1, Math.abs(x) / limit) ** 0.7; // lifts what is small
  });
  context.putImageData(image, 0, 0);
}

// Set a text only if it is another one: what stays need not be laid out again.
function put(element, text) {
  if (element.textContent !== `${text}`) element.textContent = text;
}

// Up to four numbers are written, too.
function digits(values) {
  return values.length > 4 ? [] : Array.from(values, (x) => make("span", {}, `${+x.toFixed(values.length > 2 ? 1 : 2) + 0}`.replace("-", "−")));
}

class Rows {
  constructor(stepper) {
    this.stepper = stepper;
    const title = (name, axis) => make("span", {}, make("b", {}, name), make("small", {}, axis));
    this.titles = { K: title("K", "key →"), V: title("V", "val →") };
    const { hs } = stepper.trace;
    this.asks = make("span.to-key");
    this.query = this.vector();
    this.out = this.vector();
    this.lines = Array.from({ length: Math.min(stepper.trace.length, stepper.trace.rows) }, (_, r) => this.line(r));
    this.list = make("div.rows", { role: "listbox", tabindex: 0, "aria-label": "tokens: up and down arrow choose one" }, ...this.lines.map((l) => l.element));
    this.element = make("div.cache", {},
      make("div.line.titles", {}, make("span", {}, make("small", {}, "seq")), title("token", ""), title("its row", ""), this.titles.K,
        title("weight", `softmax(q·k / √${hs})`), this.titles.V),
      make("div.line.query", {}, this.asks, this.query.element),
      this.list,
      make("div.line.out", {}, make("span.to-value", {}, "output: values × weights, summed"), this.out.element));
  }

  vector() {
    const canvas = make("canvas", { "aria-hidden": "true" }), text = make("span.digits");
    return { canvas, text, element: make("span.cell", {}, canvas, text) };
  }

  line(r) {
    const line = { place: make("span.place"), token: make("bdi"), state: make("span.state"), key: this.vector(), value: this.vector(), bar: make("i"), weight: make("span.number") };
    const { stepper } = this, row = () => stepper.shown[r];
    line.element = make("div.line.row", { role: "option", id: `row${r}`,
      onmouseenter: () => row() !== null && row() < stepper.S && stepper.hover(row()),
      onmouseleave: () => stepper.hover(null),
      onclick: () => row() !== null && row() < stepper.S && stepper.set({ pick: row() }),
    }, line.place, make("span.token", {}, line.token), line.state, line.key.element, make("span.weight", {}, make("span.track", {}, line.bar), line.weight), line.value.element);
    return line;
  }

  draw(moved) {
    const { stepper } = this, { trace, step, state: s, S, shown, states, seen } = stepper;
    const { positive, negative } = stepper.colours;
    const limits = [0, 1, 2].map((which) => trace.slice(s.text, step.run, which, s.layer).limit);
    const fill = (vector, values, limit) => {
      paint(vector.canvas, values, limit, positive, negative);
      if (values.length <= 4) vector.text.replaceChildren(...digits(values));
    };
    this.asks.textContent = `the query q of “${shownName(stepper.name(step.start + stepper.asker))}”`;
    fill(this.query, seen.q, limits[0]);
    for (const [name, element] of Object.entries(this.titles)) put(element.firstChild, name + stepper.ofHead(s.head));
    fill(this.out, trace.output(s.text, step.run, s.layer, s.head, seen.weights), limits[2]);
    const known = new Set(shown);
    this.lines.forEach((line, r) => {
      const i = shown[r], gap = i === null, there = !gap && i < S;
      const state = gap ? "gap" : states[i], lost = s.cache && there && (i < step.lost || step.over.includes(i));
      line.element.className = `line row ${state}${lost ? " lost" : ""}`;
      line.state.className = gap ? "" : `state ${state}`;
      put(line.state, gap || state === "none" ? "" : state);
      put(line.place, gap ? "⋮" : i);
      put(line.token, gap ? `${shown[r + 1] - shown[r - 1] - 1} more` : there ? shownName(stepper.name(step.start + i)) : "");
      line.token.title = line.token.textContent;
      for (const [which, vector] of [[1, line.key], [2, line.value]]) {
        if (there && state !== "left") fill(vector, trace.row(s.text, step.run, which, s.layer, s.head, i), limits[which]);
        else paint(vector.canvas, [0], 1, positive), put(vector.text, "");
      }
      let w = there && trace.sees(stepper.asker, i) ? seen.weights[i] : null;
      if (gap) w = seen.weights.reduce((sum, x, n) => (known.has(n) ? sum : sum + x), 0);
      line.bar.style.width = `${100 * (w ?? 0)}%`;
      put(line.weight, w === null ? (there ? "masked" : "") : w.toFixed(2));
      if (there) line.element.dataset.row = i;
      else delete line.element.dataset.row;
      line.element.setAttribute("aria-label", there
        ? `token ${step.start + i}, ${line.token.textContent}, ${SAID[state]}${lost ? (state === "left" ? ", its row is written over" : ", its old row is void") : ""}, weight ${w === null ? "masked" : w.toFixed(2)}`
        : gap ? `${line.token.textContent} tokens` : `place ${i}, not there yet`);
    });
    if (moved) this.move_in();
  }

  // The new rows slide in, the query sweeps over the keys, the weights feed the output: 300 ms in all.
  move_in() {
    const there = this.lines.filter((line) => line.element.dataset.row);
    for (const line of there) {
      if (!line.element.classList.contains("new")) continue;
      for (const { element } of [line.key, line.value]) element.animate([{ transform: "translateX(-30px)", opacity: 0 }, {}], { duration: 180, easing: "ease-out" });
    }
    there.forEach((line, n) => line.key.element.animate([{}, { boxShadow: "0 0 0 3px var(--ring)" }, {}], { delay: (n * 120) / there.length, duration: 120 }));
    this.out.element.animate([{ opacity: 0.1 }, { opacity: 1 }], { delay: 100, duration: 200, fill: "backwards" });
  }

  active(i) {
    const r = this.stepper.shown.indexOf(i);
    this.lines.forEach((line, n) => line.element.setAttribute("aria-selected", n === r));
    if (r >= 0) this.list.setAttribute("aria-activedescendant", `row${r}`);
    else this.list.removeAttribute("aria-activedescendant");
  }

  move(by) { // to the next token that is shown
    const there = this.stepper.shown.filter((i) => i !== null && i < this.stepper.S);
    const at = there.indexOf(this.stepper.state.pick);
    this.stepper.set({ hover: null, pick: there[Math.min(Math.max(at < 0 ? there.length - 1 : at + by, 0), there.length - 1)] });
  }
}

const GUTTER = 58; // pixels left of the attention matrix

class Side {
  constructor(stepper) {
    this.stepper = stepper;
    const { trace } = stepper;
    this.choice = make("div.choice");
    this.title = make("h4");
    this.matrix = make("div.matrix", { onclick: (e) => this.click(e) });
    this.note = make("small");
    this.heads = new Radios("head", Array.from({ length: trace.n_head }, (_, h) => [h, h]), (head) => stepper.set({ head }), trace.n_head > 12 ? "heads.thin" : "heads");
    this.heads.canvases = this.heads.buttons.map((button, h) => {
      const canvas = make("canvas");
      button.replaceChildren(make("span", { title: `head ${h}${trace.shared > 1 ? ", K and V" + stepper.ofHead(h) : ""}` }, `head ${h}`), make("span.cell", {}, canvas));
      if (trace.shared > 1 && h && h % trace.shared === 0) button.style.marginTop = "5px"; // groups that share keys stand apart
      return canvas;
    });
    this.headTitle = make("h4");
    this.table = make("table.counters");
    this.element = make("div.side", {}, this.choice, make("div.weights", {}, this.title, this.matrix, this.note),
      ...(trace.n_head > 1 ? [make("div.of-heads", {}, this.headTitle, this.heads.element)] : []));
  }

  draw() {
    const { stepper } = this, { step, trace, state: s, S, shown, first } = stepper;
    this.choice.replaceChildren(...(step.top.length ? this.choices(step) : []));
    const count = S - first;
    this.title.textContent = `attention weights: ${count} row${count > 1 ? "s" : ""} computed`;
    const width = Math.min(this.width ?? 360, GUTTER + 25 * shown.length);
    this.matrix.innerHTML = this.attention((width - GUTTER) / shown.length);
    if (trace.n_head > 1) {
      this.headTitle.textContent = `token ${step.start + stepper.asker} asks, in every head`;
      this.heads.element.style.width = `${width}px`;
      this.heads.canvases.forEach((canvas, h) => {
        const { weights } = trace.attention(s.text, step.run, s.layer, h, stepper.asker);
        paint(canvas, shown.map((i) => (i === null ? 0 : (weights[i] ?? 0))), 1, stepper.colours.weight);
      });
      this.heads.show(s.head);
    }
    const counters = this.counters();
    if (this.table.children.length) counters.cells.forEach((text, n) => put(this.table.tBodies[0].querySelectorAll("td")[n], text));
    else this.table.innerHTML = counters.html;
    for (const [n, cell] of this.table.tBodies[0].querySelectorAll("td").entries()) cell.classList.toggle("on", s.cache === (n % 2 === 0));
  }

  choices(step) {
    const { trace } = this.stepper;
    return [make("h4", {}, "the next token"), ...step.top.map(([token, p]) => {
      const taken = token === step.taken;
      return make(`div.option${taken ? ".taken" : ""}`, {}, make("bdi", { title: trace.names[token] }, shownName(trace.names[token])),
        make("span.track", {}, make("i", { style: `width:${100 * p}%` })), make("span.number", {}, p.toFixed(3) + (taken ? " ◂ taken" : "")));
    })];
  }

  // Who asks goes down, who answers goes right. Cells hold data-j and data-i, positions from 0.
  attention(cell) {
    const { stepper } = this, { trace, step, state: s, S, shown, first, asker } = stepper, top = 24, n = shown.length;
    const asked = shown.map((j, r) => [j, r]).filter(([j]) => j !== null && j >= first && j < S);
    const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
    const label = (i, most) => { const name = [...shownName(stepper.name(step.start + i))]; return escape(name.length > most ? name.slice(0, most - 1).join("") + "…" : name.join("")); };
    const parts = [`<rect class="ground" x="${GUTTER}" y="${top}" width="${cell * n}" height="${cell * n}"/>`];
    shown.forEach((i, c) => {
      if (i !== null && i >= S) return;
      const middle = cell * (c + 0.5), own = i !== null && i >= first ? ' class="own"' : "";
      parts.push(`<text${own} x="${GUTTER + middle}" y="${top - 8}" text-anchor="middle">${i === null ? "⋮" : label(i, cell < 22 ? 2 : 3)}</text>`);
      parts.push(`<text${own} x="${GUTTER - 7}" y="${top + middle + 4}" text-anchor="end">${i === null ? "⋮" : label(i, 6)}</text>`);
    });
    for (const [j, r] of asked) {
      const { weights } = trace.attention(s.text, step.run, s.layer, s.head, j);
      shown.forEach((i, c) => {
        if (i === null || i >= S) return;
        const at = `x="${GUTTER + cell * c}" y="${top + cell * r}" width="${cell}" height="${cell}" data-j="${j}" data-i="${i}"`;
        if (!trace.sees(j, i)) return parts.push(`<rect class="masked" ${at}/>`);
        parts.push(`<rect class="seen" ${at} fill-opacity="${weights[i].toFixed(3)}"><title>${weights[i].toFixed(4)}</title></rect>`);
        if (cell >= 20 && (j === asker || asked.length <= 6)) parts.push(`<text class="in${weights[i] > 0.5 ? " strong" : ""}" x="${GUTTER + cell * (c + 0.5)}" y="${top + cell * (r + 0.5) + 3.5}" text-anchor="middle">${weightText(weights[i])}</text>`);
      });
    }
    const wide = cell * shown.filter((i) => i === null || i < S).length, r0 = asked[0][1], r1 = asked.at(-1)[1] + 1;
    parts.push(`<rect class="asks" x="${GUTTER}" y="${top + cell * r0}" width="${wide}" height="${cell * (r1 - r0)}"/>`);
    const mine = shown.indexOf(asker);
    if (asked.length > 1) parts.push(`<rect class="asker" x="${GUTTER + 2}" y="${top + cell * mine + 2}" width="${wide - 4}" height="${cell - 4}"/>`);
    if (r0 * cell >= 34 && wide > 120) parts.push(`<text x="${GUTTER + wide / 2}" y="${top + (cell * r0) / 2 + 4}" text-anchor="middle">done in earlier steps</text>`);
    const alt = `Attention of layer ${s.layer}, head ${s.head}: ${S - first} of ${S} rows computed. Rows ask, columns answer.`;
    this.note.textContent = asked.length > 1 ? "Hatched is masked. Click a row: its token asks." : "↓ who asks, → who answers";
    return `<svg role="img" aria-label="${alt}" width="${GUTTER + cell * n + 2}" height="${top + cell * n + 3}"><defs><pattern id="mask" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="1.5" height="5"/></pattern></defs>${parts.join("")}</svg>`;
  }

  click(e) {
    const { j, i } = e.target.dataset ?? {};
    if (j !== undefined) this.stepper.set({ query: +j, pick: Math.min(+i, +j), hover: null });
  }

  // The table as HTML, and the texts of its cells: this step with the cache and without, then all steps so far.
  counters() {
    const { text, state: s, trace } = this.stepper, here = text.steps[s.step - 1].cost;
    const costs = [...here, ...[0, 1].map((m) => total_cost(text.steps.slice(0, s.step), m))], body = [], cells = [];
    trace.counters.forEach(([name, unit], row) => {
      if (here[0][row] === null) return;
      const texts = costs.map((cost) => amount(cost[row], unit));
      cells.push(...texts);
      body.push(`<tr><th scope="row">${name}</th>${texts.map((t) => `<td>${t}</td>`).join("")}</tr>`);
    });
    return { cells, html: `<thead><tr><td></td><th colspan="2" scope="colgroup">this step</th><th colspan="2" scope="colgroup">so far</th></tr><tr><td></td>${'<th scope="col">cache</th><th scope="col">without</th>'.repeat(2)}</tr></thead><tbody>${body.join("")}</tbody>` };
  }
}

// What some steps cost together; mode 0 with the cache, 1 without. The last counter, what the cache holds, is the latest.
function total_cost(steps, mode) {
  const add = (sum, step) => step.cost[mode].map((x, n) => (x === null ? null : n === step.cost[mode].length - 1 ? x : x + sum[n]));
  return steps.reduce(add, [0, 0, 0, 0, 0]);
}

// The same text, written with the cache and without it, on one clock.
class Race {
  constructor(stepper) {
    this.stepper = stepper;
    this.time = 0;
    this.lanes = ["with the cache", "without"].map((name) => {
      const lane = { text: make("div.written"), bar: make("i"), clock: make("span.number") };
      lane.element = make("div.lane", {}, make("h4", {}, name), lane.text, make("span.track", {}, lane.bar), lane.clock);
      return lane;
    });
    this.table = make("table.counters");
    this.source = make("p.source");
    this.button = make("button", { type: "button", class: "wide", hidden: true, onclick: () => this.measure() }, "measure it in the kernel");
    this.element = make("div.race", {}, ...this.lanes.map((l) => l.element), this.table, this.source, this.button);
  }

  get ends() { // when each step of each lane ends, in seconds
    const times = this.times ?? [0, 1].map((m) => this.stepper.text.steps.map((step) => step.seconds[m]));
    return times.map((lane) => lane.reduce((ends, t) => [...ends, (ends.at(-1) ?? 0) + t], []));
  }

  done(lane) { return lane.filter((end) => end <= this.time * (1 + 1e-9)).length; }

  start() {
    const total = Math.max(...this.ends.map((l) => l.at(-1)));
    if (this.time >= total) this.time = 0;
    if (!this.stepper.motion) this.time = total;
  }

  tick() {
    const total = Math.max(...this.ends.map((l) => l.at(-1)));
    this.time = Math.min(total, this.time + total / 150);
    this.draw();
    return this.time < total;
  }

  seek(step) { // of the slower lane, 0 for the start
    const slow = this.ends.reduce((a, b) => (a.at(-1) > b.at(-1) ? a : b));
    this.time = step > 0 ? slow[Math.min(step, slow.length) - 1] : 0;
    this.draw();
  }

  nudge(by) {
    this.stepper.pause();
    this.seek(Math.min(...this.ends.map((l) => this.done(l))) + by);
  }

  measure() {
    this.button.textContent = "measuring …";
    this.model.set("measuring", true);
    this.model.save_changes();
  }

  measured(model) { // seconds of each step of both lanes, from the kernel; none while there is no kernel
    this.model = model;
    const times = model?.get("measured");
    this.times = times?.length ? times : (model ? null : this.times);
    this.button.hidden = !model?.get("measurable");
    this.button.textContent = "measure it in the kernel";
    if (this.stepper.state.race) this.draw();
  }

  draw() {
    const { stepper } = this, { text, trace } = stepper, ends = this.ends, count = text.steps.length;
    const done = ends.map((l) => this.done(l)), over = done.every((n) => n === count), totals = ends.map((l) => l.at(-1));
    const start = text.tokens.length - count;
    this.lanes.forEach((lane, m) => {
      const from = Math.max(0, start + done[m] - 40);
      lane.text.replaceChildren(...text.tokens.slice(from, start + done[m]).map((token, n) => make(`bdi${from + n >= start ? ".fresh" : ""}`, {}, shownName(trace.names[token]))));
      lane.bar.style.width = `${(100 * done[m]) / count}%`;
      lane.clock.textContent = `${done[m]} of ${count} tokens, ${seconds(Math.min(this.time, totals[m]))}`;
    });
    const costs = [0, 1].map((m) => total_cost(text.steps.slice(0, done[m]), m));
    this.table.innerHTML = `<thead><tr><td></td><th scope="col">with the cache</th><th scope="col">without</th></tr></thead><tbody>${trace.counters.map(([name, unit], row) => `<tr><th scope="row">${name}</th><td>${amount(costs[0][row], unit)}</td><td>${amount(costs[1][row], unit)}</td></tr>`).join("")}</tbody>`;
    this.source.textContent = this.times ? "Time: measured in this kernel, each step once." : `Time: by the cost model, ${trace.machine}; not measured.`;
    const said = over
      ? `The same text: ${seconds(totals[0])} with the cache, ${seconds(totals[1])} without, ${(totals[1] / totals[0]).toPrecision(2)} times as long.`
      : "The same text is written with the cache and without it. Play starts the race.";
    if (stepper.head.textContent !== said) stepper.head.textContent = said;
    stepper.slider.value = Math.min(...done);
  }
}
