"use strict";
// Runs as typed arrays, from the server or out of the exported page: both speak the views of view.py.
// Legend: F frames, L layers, E experts, R expert-parallel ranks, D domains.

const EVEN = 256; // what `load` says of an expert that got its layer's mean

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const decode = (base64, Type) => new Type(bytesOf(base64).buffer);

// The first index whose value is at least `wanted`, in ascending values.
function lowerBound(values, wanted) {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Rows of `width` numbers; row(i) is a window into them, no copy. Room grows by half, so appending is cheap.
class Rows {
  constructor(Type, width, length) {
    this.width = width;
    this.length = length;
    this.data = new Type(width * length).fill(NaN);
  }

  row(index) {
    return this.data.subarray(index * this.width, (index + 1) * this.width);
  }

  append(values) {
    const used = this.length * this.width;
    if (used + values.length > this.data.length) {
      const room = used ? Math.ceil(1.5 * (used + values.length)) : values.length;
      const grown = new this.data.constructor(room);
      grown.set(this.data.subarray(0, used));
      this.data = grown;
    }
    this.data.set(values, used);
    this.length += values.length / this.width;
  }
}

class Run {
  constructor(index) {
    this.index = index;
    this.version = 0; // grows whenever there is something new to draw
    this.forget();
  }

  forget() {
    this.metrics = { step: [] };
    this.alarms = [];
    this.steps = []; // [F] last step of each frame
    this.spans = []; // [F] how many steps it sums
    this.rows = new Map(); // by name, Rows of [F]: L x E, L x R or L numbers each
    this.orders = new Map();
  }

  // Takes in a whole view, or what came after a step.
  take(view) {
    const { metrics, alarms, frames, domains, partial, ...whole } = view;
    if (!partial) this.forget();
    Object.assign(this, whole);
    this.domains = domains && { ...domains, share: decode(domains.share, Float32Array) }; // [D, L, E]
    this.takeMetrics(metrics);
    this.takeAlarms(alarms);
    this.takeFrames(frames);
    this.version += 1;
  }

  takeMetrics(metrics) {
    const known = this.metrics.step.length;
    const skip = known ? lowerBound(metrics.step, this.metrics.step[known - 1] + 1) : 0;
    for (const [name, values] of Object.entries(metrics)) {
      const mine = (this.metrics[name] ??= new Array(known).fill(NaN));
      for (let i = skip; i < values.length; i++) mine.push(values[i] ?? NaN);
    }
  }

  takeAlarms(alarms) {
    const known = new Set(this.alarms.map((alarm) => JSON.stringify(alarm)));
    this.alarms.push(...alarms.filter((alarm) => !known.has(JSON.stringify(alarm))));
  }

  takeFrames(frames) {
    const skip = this.steps.length ? lowerBound(frames.step, this.steps.at(-1) + 1) : 0;
    const { length: L } = this.layers;
    const take = (name, Type, width, base64) => {
      if (base64 == null && !this.rows.has(name)) return;
      if (!this.rows.has(name)) this.rows.set(name, new Rows(Type, width, this.steps.length));
      const values = base64 == null ? new Type(width * frames.step.length).fill(NaN) : decode(base64, Type);
      this.rows.get(name).append(values.subarray(skip * width));
    };
    take("load", Uint16Array, L * this.num_experts, frames.load);
    take("bias", Float32Array, L * this.num_experts, frames.bias);
    take("received", Float32Array, L * this.num_ranks, frames.received);
    take("expert_seconds", Float32Array, L * this.num_ranks, frames.expert_seconds);
    for (const [name, base64] of Object.entries(frames.scalars)) take(name, Float32Array, L, base64);
    this.steps.push(...frames.step.slice(skip));
    this.spans.push(...frames.span.slice(skip));
  }

  get lastStep() {
    return Math.max(this.metrics.step.at(-1) ?? 0, this.steps.at(-1) ?? 0);
  }

  // How many ranks hold experts: less than num_ranks where the run went on with fewer.
  get homes() {
    return 1 + Math.max(0, ...(this.placement[0] ?? []));
  }

  // The frame that holds a step, or the nearest; null is the newest step.
  frameAt(step) {
    if (step === null) return this.steps.length - 1;
    return Math.min(lowerBound(this.steps, step), this.steps.length - 1);
  }

  // One frame's numbers of one layer: E or R of them.
  layerRow(name, frame, layer) {
    const rows = this.rows.get(name);
    const width = rows.width / this.layers.length;
    return rows.row(frame).subarray(layer * width, (layer + 1) * width);
  }

  // [F] of one layer: load, bias, ... of one expert (or rank), or the layer's scalar.
  overTime(name, layer, item = 0) {
    const rows = this.rows.get(name);
    const at = (layer * rows.width) / this.layers.length + item;
    return Array.from({ length: rows.length }, (_, frame) => rows.data[frame * rows.width + at]);
  }

  // Which expert stands in which column: by the rank that holds it, or by its number.
  order(layer, byRank) {
    const key = byRank ? layer : "number";
    if (!this.orders.has(key)) {
      const experts = Array.from({ length: this.num_experts }, (_, expert) => expert);
      const ranks = this.placement[layer];
      if (byRank) experts.sort((a, b) => ranks[a] - ranks[b] || a - b);
      this.orders.set(key, experts);
    }
    return this.orders.get(key);
  }
}

// The views that an exported page carries, or null in a live one.
async function exportedViews() {
  const packed = JSON.parse(document.getElementById("export").textContent);
  if (!packed) return null;
  const stream = new Blob([bytesOf(packed.views)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

async function json(path) {
  const response = await fetch(path, { cache: "no-store" });
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

// Follows the server. Calls `changed()` after a run took something in, and `said(sentence)` when the server
// is lost, or with no words when it is back.
class Live {
  constructor(runs, changed, said) {
    Object.assign(this, { runs, changed, said, asked: new Set(), asking: false });
  }

  async start() {
    try {
      const listed = await json("runs");
      for (const { index } of listed) if (!this.runs[index]) this.runs.push(new Run(index));
    } catch {
      this.lose();
      setTimeout(() => this.start(), 2000);
      return;
    }
    this.listen();
  }

  listen() {
    const events = new EventSource("events");
    events.onopen = () => {
      this.ask(...this.runs.map((run) => run.index)); // whatever was missed meanwhile
    };
    events.onmessage = (event) => this.ask(JSON.parse(event.data).index);
    events.onerror = () => {
      this.lose();
      if (events.readyState === EventSource.CLOSED) setTimeout(() => this.listen(), 2000);
    };
  }

  lose() {
    for (const run of this.runs) run.epoch = undefined; // another server counts anew: ask for all
    this.said("No answer from the server; what was read stays here. Trying again.");
  }

  // Asks for one run at a time; what changes meanwhile is asked for once more, however often it changed.
  async ask(...indices) {
    for (const index of indices) this.asked.add(index);
    if (this.asking) return;
    this.asking = true;
    try {
      while (this.asked.size) {
        const [index] = this.asked;
        this.asked.delete(index);
        await this.refresh(this.runs[index]);
      }
    } catch {
      this.lose();
    } finally {
      this.asking = false;
    }
  }

  async refresh(run) {
    const known = run.epoch === undefined ? "" : `?after=${this.after(run)}&epoch=${run.epoch}`;
    run.take(await json(`view/${run.index}${known}`));
    this.said("");
    this.changed();
  }

  // Metrics and frames may end at different steps: what comes twice is skipped when it is taken in.
  after(run) {
    return Math.min(run.metrics.step.at(-1) ?? 0, run.steps.at(-1) ?? Infinity);
  }
}
