// The stepper: draws every step, layer and head of a Trace (trace.js) in the page, with or without a kernel.
// `mount` draws into an element. `initialize` ties what is drawn to the widget's model; `render` is the widget by itself.

// What the page holds, by key: models of the kernel that is there, and steppers that are drawn.
const hub = (globalThis.kvcacheSteppers ??= { models: new Map(), views: new Map() });
const SAID = { new: "computed now", again: "computed again", read: "read from the cache", left: "out of sight", none: "not there yet" };
const REST = ["new", "again", "read", "left", "none"];
const quiet = matchMedia("(prefers-reduced-motion: reduce)");

// An element: make("p.head", {id: "x"}, child, …). Names that begin with "on" are listeners.
function make(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// Radio buttons of our own: one tab stop; ↑ and ↓ move, see Stepper.arrow. pick(value) is called with the value chosen.
class Radios {
  constructor(label, options, pick, className = "") {
    this.buttons = options.map(([value, text]) => {
      const button = make("button", { type: "button", role: "radio", title: `${label} ${text}`, onclick: () => pick(value) }, String(text));
      button.value = value;
      return button;
    });
    this.element = make(`div.radios${className && "." + className}`, { role: "radiogroup", "aria-label": label }, ...this.buttons);
  }
  move(by) {
    const next = this.buttons[this.buttons.findIndex((button) => button.tabIndex === 0) + by];
    if (next) next.focus(), next.click();
  }
  show(value) {
    for (const button of this.buttons) {
      const on = button.value === String(value);
      button.setAttribute("aria-checked", on);
      button.tabIndex = on ? 0 : -1;
    }
  }
}

// The colour of the ground that the element lies on, [r, g, b]: the nearest ancestor's that has one, else the system's.
function groundOf(element) {
  for (let e = element; e; e = e.parentElement ?? e.getRootNode().host) {
    const [r, g, b, a = 1] = (getComputedStyle(e).backgroundColor.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
    if (a > 0.5) return [r, g, b];
  }
  return matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
}

class Stepper {
  constructor(host, buffer, state, css) {
    this.trace = new Trace(buffer);
    this.host = host;
    this.state = { step: 1, layer: 0, head: 0, cache: true, race: false, text: 0, query: null, pick: null, hover: null, ...state };
    this.motion = !quiet.matches;
    this.listeners = [];
    this.build(css);
    this.stop = new AbortController();
    const signal = this.stop.signal;
    // JupyterLab takes keys at the document, before they come down to us: so we listen one level above.
    addEventListener("keydown", (e) => this.key(e), { capture: true, signal });
    const looks = () => (this.measure(), this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", looks, { signal });
    quiet.addEventListener("change", () => this.setMotion(!quiet.matches), { signal });
    this.watch = [new MutationObserver(looks), new ResizeObserver(() => host.clientWidth === this.width || looks())];
    for (const e of [document.documentElement, document.body]) this.watch[0].observe(e, { attributes: true });
    this.watch[1].observe(host);
    looks();
  }

  // What depends on the page: widths and colours. Asked for only when they change, for the browser must lay out first.
  measure() {
    const { frame, host } = this, [r, g, b] = groundOf(host);
    frame.style.setProperty("--ground", `rgb(${r}, ${g}, ${b})`);
    frame.classList.toggle("dark", 0.3 * r + 0.59 * g + 0.11 * b < 128);
    this.width = host.clientWidth;
    this.side.width = this.side.matrix.clientWidth || this.side.width;
    const style = getComputedStyle(frame), read = (name) => style.getPropertyValue(name).split(",").map(Number);
    this.colours = { positive: read("--positive"), negative: read("--negative"), weight: read("--weight") };
  }

  get text() { return this.trace.texts[this.state.text]; }
  get step() { return this.text.steps[this.state.step - 1]; }
  get count() { return this.text.steps.length; }
  get S() { return this.step.P + this.step.T; }
  get first() { return this.state.cache ? this.step.P : 0; } // the first query that is computed
  get asker() { return this.state.query ?? this.S - 1; }

  name(i) { // of the text's token i, from 0
    return this.text.tokens.length ? this.trace.names[this.text.tokens[i]] : `x${i}`;
  }

  ofHead(head) { // whose keys and values a head reads, where heads share them
    return this.trace.shared > 1 ? ` of head ${Math.floor(head / this.trace.shared)}` : "";
  }

  close() {
    this.pause();
    this.stop.abort();
    this.watch.forEach((w) => w.disconnect());
  }

  // Change the state, draw, and tell whoever listens.
  set(change, motion = false) {
    const s = this.state, before = s.step;
    const limits = { step: [1, this.count], layer: [0, this.trace.n_layer - 1], head: [0, this.trace.n_head - 1], text: [0, this.trace.texts.length - 1] };
    for (const [name, [least, most]] of Object.entries(limits)) if (name in change) change[name] = Math.min(Math.max(Math.round(change[name]), least), most);
    const told = Object.keys(change).filter((name) => ["step", "layer", "head", "cache", "race", "text"].includes(name) && s[name] !== change[name]);
    if (told.some((name) => name === "step" || name === "cache" || name === "text")) Object.assign(s, { query: null, pick: null, hover: null });
    Object.assign(s, change);
    if (told.includes("race") && !s.race) this.pause();
    this.draw(motion && s.step === before + 1);
    if (told.length) this.listeners.forEach((f) => f(told));
  }

  build(css) {
    const { trace } = this, root = this.host.shadowRoot ?? this.host.attachShadow({ mode: "open" });
    const button = (text, label, act, more = {}) => make("button", { type: "button", "aria-label": label, title: label, onclick: act, ...more }, text);
    this.back = button("◀", "previous step", () => this.go(-1));
    this.forward = button("▶", "next step", () => this.go(1));
    this.player = button("play", "play the steps", () => this.play(), { "aria-pressed": "false", class: "wide" });
    this.slider = make("input", { type: "range", min: 1, max: this.count, "aria-label": "step", oninput: (e) => (this.state.race ? this.seek(e.target.value - 1) : this.set({ step: +e.target.value })) });
    this.where = make("span.where");
    const modes = [["with", "with the cache"], ["without", "without"]].concat(trace.seconds ? [["race", "race"]] : []);
    this.mode = new Radios("mode", modes, (m) => this.set(m === "race" ? { race: true } : { race: false, cache: m === "with" }), "modes");
    const numbers = (n) => Array.from({ length: n }, (_, i) => [i, i]);
    this.layers = new Radios("layer", numbers(trace.n_layer), (layer) => this.set({ layer }), trace.n_layer > 12 ? "narrow" : "plain");
    this.layerLabel = make("span.label");
    this.texts = new Radios("text of the batch", numbers(trace.texts.length), (text) => this.set({ text }), "plain");
    this.mover = make("input", { type: "checkbox", onchange: (e) => this.setMotion(e.target.checked) });
    this.mover.checked = this.motion;
    const field = (label, element) => make("div.field", {}, make("span.label", { "aria-hidden": "true" }, label), element);
    this.bar = make("div.bar", { role: "group", "aria-label": "controls" },
      make("div.field", {}, this.back, this.forward, this.player), make("div.field", {}, this.slider, this.where), this.mode.element,
      ...(trace.n_layer > 1 ? [make("div.field", {}, this.layerLabel, this.layers.element)] : []),
      ...(trace.texts.length > 1 ? [field("text", this.texts.element)] : []), make("label.field", {}, this.mover, "motion"));
    this.head = make("p.head", { role: "status", "aria-live": "polite" });
    this.why = make("p.why");
    this.strip = make("div.strip", { role: "img" });
    this.legend = make("div.legend", {}, ...REST.map((s) => make(`span.${s}`, {}, make(`i.state.${s}`), SAID[s])),
      make("span.void", {}, make("b", {}, "✕"), trace.window === null ? "its cached row was thrown away" : "its row of the ring is written over"), make("span", {}, make("i.negative"), "negative"), make("span", {}, make("i.positive"), "positive"));
    this.rows = new Rows(this);
    this.side = new Side(this);
    this.race = new Race(this);
    this.say = make("div.say", { "aria-live": "off" });
    this.note = make("p.note");
    this.panels = make("div.panels", {}, make("div.left", {}, this.rows.element, this.why, this.say, this.side.table), this.side.element);
    this.frame = make("section.kvs", { tabindex: 0, "aria-label": "KV cache stepper. Left and right arrow: step. Space: play." },
      make("div.top", {}, this.bar, this.head), this.strip, this.legend, this.panels, this.race.element, this.note);
    root.replaceChildren(make("style", {}, css), make("div.sizer", {}, this.frame));
  }

  draw(moved = false) {
    const { state: s, step } = this, { host, frame } = this;
    frame.classList.toggle("racing", s.race);
    frame.classList.toggle("still", !this.motion);
    frame.classList.toggle("slides", this.text.steps.some((each) => each.why)); // keeps room for the reason
    frame.classList.toggle("ring", this.text.steps.some((each) => each.over.length));
    Object.assign(host.dataset, { step: s.step, layer: s.layer, head: s.head, cache: s.cache, text: s.text, read: s.cache ? step.P : 0, encoded: s.cache ? step.T : this.S });
    this.slider.min = s.race ? 0 : 1;
    this.slider.max = this.count;
    this.slider.value = s.step;
    this.where.textContent = `${s.step} of ${this.count}`;
    this.slider.setAttribute("aria-valuetext", `step ${s.step} of ${this.count}`);
    this.back.setAttribute("aria-disabled", !s.race && s.step === 1);
    this.forward.setAttribute("aria-disabled", !s.race && s.step === this.count);
    this.layerLabel.textContent = `layer ${s.layer} (0–${this.trace.n_layer - 1})`;
    this.mode.show(s.race ? "race" : s.cache ? "with" : "without");
    this.layers.show(s.layer);
    this.texts.show(s.text);
    if (s.race) return this.race.draw();
    const say = step.say[s.cache ? 0 : 1];
    if (this.head.textContent !== say) this.head.textContent = say;
    this.why.textContent = s.cache ? step.why : "";
    this.states = this.trace.states(step, s.cache);
    this.shown = this.trace.visible(this.S);
    this.seen = this.trace.attention(s.text, step.run, s.layer, s.head, this.asker);
    for (const kind of REST) this.legend.querySelector(`span.${kind}`).hidden = (s.cache ? ["again"] : ["read", "left"]).includes(kind) || (kind === "left" && this.trace.window === null);
    this.drawStrip();
    this.rows.draw(moved && this.motion);
    this.side.draw();
    this.light();
  }

  drawStrip() {
    const { step, text } = this, end = step.start + this.S, room = Math.max(this.width - 30, 200);
    const longest = (text.longest ??= Math.max(...text.tokens.map((_, i) => [...shownName(this.name(i))].length), 2));
    const width = Math.min(Math.max(14 + 8 * longest, 32), 92);
    const from = Math.max(0, end - Math.max(2, Math.floor(room / (width + 4)) - 2));
    const chips = from ? [make("span.more", { title: `${from} earlier tokens` }, `+${from}`)] : [];
    for (let i = from; i < end; i++) {
      const gone = i < step.start;
      chips.push(this.chip(`state.${gone ? "none.gone" : this.states[i - step.start]}`, this.name(i), i, i - step.start));
    }
    if (step.taken !== null) chips.push(make("span.arrow", {}, "→"), this.chip("next", this.trace.names[step.taken], "next", null));
    this.strip.style.setProperty("--chip", `${width}px`);
    this.strip.replaceChildren(...chips);
    this.strip.setAttribute("aria-label", `The model sees ${this.S} token${this.S > 1 ? "s" : ""}${step.taken === null ? "" : `; next: ${this.trace.names[step.taken]}`}`);
  }

  chip(kind, name, above, row) {
    const chip = make("span.chip", { title: name }, make("small", {}, String(above)), make(`span.${kind}`, {}, make("bdi", {}, shownName(name))));
    if (row !== null && row >= 0 && row < this.S) {
      chip.dataset.row = row;
      chip.addEventListener("mouseenter", () => this.hover(row));
      chip.addEventListener("mouseleave", () => this.hover(null));
      chip.addEventListener("click", () => this.set({ pick: row }));
    }
    return chip;
  }

  hover(row) {
    this.state.hover = row;
    this.light();
  }

  // Light up one token's key, weight and value, and spell its arithmetic out.
  light() {
    const { weights } = this.seen, s = this.state;
    const best = weights.reduce((b, w, i) => (w > weights[b] ? i : b), 0), i = s.hover ?? s.pick ?? best;
    for (const e of this.frame.querySelectorAll("[data-row]")) e.classList.toggle("lit", +e.dataset.row === i);
    this.rows.active(i);
    this.say.replaceChildren(...this.arithmetic(i));
  }

  arithmetic(i) {
    const { turned, scores, weights, most, sum } = this.seen, { step, trace, state: s } = this, j = this.asker;
    const who = (n) => `“${shownName(this.name(step.start + n))}”`, line = (title, text) => make("div", {}, make("b", {}, title), text);
    if (i > j) return [make("p", {}, `Token ${step.start + i}, ${who(i)}, comes after token ${step.start + j}, ${who(j)}: masked, weight 0.`)];
    if (!trace.sees(j, i)) return [make("p", {}, `Token ${step.start + i}, ${who(i)}, is out of sight of token ${step.start + j}, ${who(j)}, which sees ${trace.window} tokens${trace.sinks ? ` and the first ${trace.sinks}` : ""}: masked, weight 0.`)];
    const q = i < trace.sinks ? turned : this.seen.q;
    const k = trace.row(s.text, step.run, 1, s.layer, s.head, i), v = trace.row(s.text, step.run, 2, s.layer, s.head, i);
    const few = (z, f) => Array.from(z.slice(0, 4), f).join(" + ") + (z.length > 4 ? " + …" : "");
    const signed = (x) => (x < 0 ? `(${short(x)})` : short(x));
    const vector = (z) => `(${Array.from(z.slice(0, 6), (x) => short(x)).join(", ")}${z.length > 6 ? ", …" : ""})`;
    const dot = scores[i] * Math.sqrt(trace.hs), w = weights[i];
    return [
      make("p", {}, `Token ${step.start + j}, ${who(j)}, asks. Token ${step.start + i}, ${who(i)}, answers:`),
      line("q · k", `${few(q, (x, c) => `${signed(x)}·${signed(k[c])}`)} = ${short(dot)}`),
      line("÷ √hs", `${short(dot)} / √${trace.hs} = ${short(scores[i])}`),
      line("softmax", `e^(${short(scores[i])} − ${signed(most)}) / ${short(sum)} = ${short(Math.exp(scores[i] - most), 3)} / ${short(sum, 3)} = ${short(w, 3)}`),
      line("× v", `${short(w, 3)} · ${vector(v)} = ${vector(v.map((x) => w * x))}`),
    ];
  }

  go(by) {
    if (this.state.race) return this.race.nudge(by);
    this.set({ step: this.state.step + by }, by === 1);
  }

  setMotion(on) {
    this.motion = this.mover.checked = on;
    this.draw();
  }

  seek(step) {
    this.pause();
    this.race.seek(step);
  }

  play() {
    if (this.timer) return this.pause();
    if (this.state.race) this.race.start();
    else if (this.state.step === this.count) this.set({ step: 1 });
    const tick = () => (this.state.race ? this.race.tick() : (this.go(1), this.state.step < this.count)) || this.pause();
    this.timer = setInterval(tick, this.state.race ? 40 : 900);
    this.player.textContent = "pause";
    this.player.setAttribute("aria-pressed", "true");
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.player.textContent = "play";
    this.player.setAttribute("aria-pressed", "false");
  }

  // Our keys, and only those: the page gets all others. What a control does with a key by itself, it still does.
  key(e) {
    const path = e.composedPath(), target = path[0];
    if (!path.includes(this.frame) || e.ctrlKey || e.metaKey || e.altKey || e.isComposing) return;
    const inButton = target.tagName === "BUTTON" || target.type === "checkbox";
    const end = this.state.race ? () => this.seek(this.count) : () => this.set({ step: this.count });
    const start = this.state.race ? () => this.seek(0) : () => this.set({ step: 1 });
    const act = { ArrowLeft: () => this.go(-1), ArrowRight: () => this.go(1), Home: start, End: end, " ": () => this.play() }[e.key];
    const own = act && !(e.key === " " && inButton);
    const inner = inButton || path.some((p) => p.role === "listbox" || p.role === "radiogroup" || p.type === "range");
    if (own || (inner && ["ArrowUp", "ArrowDown", " ", "Enter"].includes(e.key))) {
      e.stopImmediatePropagation();
      if (own) e.preventDefault(), act();
      else if (e.key.startsWith("Arrow")) e.preventDefault(), this.arrow(path, e.key === "ArrowDown" ? 1 : -1);
    }
  }

  arrow(path, by) {
    const radios = [this.mode, this.layers, this.texts, this.side.heads].find((r) => path.includes(r.element));
    if (radios) radios.move(by);
    else if (path.includes(this.rows.list)) this.rows.move(by);
    else if (path.includes(this.slider)) this.go(-by);
  }

  // Follow the kernel's model, and let it follow us, as long as it is there.
  bind(model) {
    const names = ["step", "layer", "head", "cache", "race", "text"];
    const pull = () => this.set(Object.fromEntries(names.map((n) => [n, model.get(n)]).filter(([n, v]) => v !== this.state[n])));
    const push = (told) => { told.forEach((n) => model.set(n, this.state[n])); model.save_changes(); };
    const measured = () => this.race.measured(model);
    const gone = () => {
      this.listeners = this.listeners.filter((f) => f !== push);
      this.race.measured(null);
      this.note.textContent = "The kernel that made this is gone. The page steps on by itself.";
    };
    this.note.textContent = "";
    this.listeners.push(push);
    names.forEach((n) => model.on(`change:${n}`, pull));
    model.on("change:measured", measured);
    model.on("comm_live_update", gone);
    this.unbind = gone;
    pull();
    measured();
  }
}

// Draw into an element, in the page's own life: live, saved, exported. buffer: a trace, inflated.
// key: that of the kernel's model, which may come before, later or never.
export function mount(host, buffer, key, state = {}) {
  // A box that does not scroll but might would keep the controls from sticking to the top of the view.
  for (let e = host.parentElement; e && !e.matches("body, .jp-Cell"); e = e.parentElement) {
    if (/auto|hidden|scroll/.test(getComputedStyle(e).overflowY) && e.scrollHeight <= e.clientHeight + 1) e.style.overflow = "clip";
  }
  const stepper = new Stepper(host, buffer, state, CSS);
  stepper.note.textContent = "No kernel: the page steps by itself, from the record that it holds.";
  if (key) {
    hub.views.set(key, [...(hub.views.get(key) ?? []), stepper]);
    if (hub.models.has(key)) stepper.bind(hub.models.get(key));
  }
  return stepper;
}

// anywidget calls this when the kernel makes a model, drawn or not.
function initialize({ model }) {
  const key = model.get("key"), views = () => hub.views.get(key) ?? [];
  hub.models.set(key, model);
  views().forEach((view) => view.bind(model));
  return () => {
    hub.models.delete(key);
    for (const view of views()) view.unbind?.(), view.host.isConnected || view.close();
  };
}

// The widget by itself: inside other widgets, and where a front end draws models rather than HTML.
function render({ model, el }) {
  const host = el.appendChild(document.createElement("div"));
  let stepper;
  const draw = async () => {
    const data = model.get("data");
    if (stepper || !data?.byteLength) return;
    stepper = "soon";
    const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("deflate"));
    stepper = new Stepper(host, await new Response(stream).arrayBuffer(), {}, CSS);
    stepper.bind(model);
  };
  model.on("change:data", draw);
  draw();
  if (!stepper) model.set("wanted", true), model.save_changes();
  return () => stepper?.close?.();
}

export default { initialize, render };
