// Lines over steps: what the run measures, MaxVio of every layer, and biases.

// Words, each after its colour if it has one: a square, or a ring for what is drawn as circles.
function legend(output, items) {
  output.replaceChildren(
    ...items.map(([colour, words, ring]) => {
      const item = document.createElement("span");
      const swatch = ring ? { border: `2px solid ${colour}`, borderRadius: "50%" } : { background: colour };
      if (colour) Object.assign(item.appendChild(document.createElement("b")).style, swatch);
      item.append(words);
      return item;
    }),
  );
}

// `series()`, `items(step)` as of `legend`, and `span()` of steps may depend on what is selected.
// Series are {name, steps, values, colour, width, alpha, dots}; those without a name are not read out.
class Chart {
  constructor(id, { label, key, missing, ...options }) {
    const items = (step) => this.values(step);
    const span = () => this.widest();
    Object.assign(this, { height: 200, log: false, floor: 0, zero: false, span, items }, options);
    this.figure = new Figure(id, { key, missing, paint: () => this.paint() });
    this.figure.mark = () => this.mark();
    this.plot = new Plot(this.figure.element, label);
    this.plot.listen(
      (x) => this.readOut(x === null ? null : this.x.invert(x)),
      (x) => goToStep(Math.round(this.x.invert(x))),
    );
  }

  paint() {
    this.drawn = this.series();
    const context = this.plot.begin(this.height);
    const [right, bottom] = [this.plot.width - RIGHT, this.height - BOTTOM];
    const [low, high] = this.range();
    this.x = axis(...this.span(), LEFT, right);
    this.y = axis(low, high, bottom, TOP, this.log);
    const marks = this.log ? logTicks(low, high) : ticks(low, high, this.height / 45);
    verticalAxis(context, this.y, LEFT, right, marks);
    horizontalAxis(context, this.x, bottom, right);
    for (const one of this.drawn) this.paintSeries(context, one);
    this.readOut(null);
  }

  paintSeries(context, { steps, values, colour, width = 1.75, alpha = 1, dots = false }) {
    const xs = steps.map(this.x);
    const ys = values.map((value) => this.y(this.clip(value)));
    if (dots) xs.forEach((x, i) => dot(context, x, ys[i], 3.5, colour, true));
    else line(context, xs, ys, colour, width, alpha);
  }

  clip(value) {
    return this.log ? Math.max(value, this.floor) : value;
  }

  widest() {
    const ends = this.drawn.filter(({ steps }) => steps.length);
    const low = Math.min(...ends.map(({ steps }) => steps[0]));
    return [low, Math.max(low + 1, ...ends.map(({ steps }) => steps.at(-1)))];
  }

  range() {
    let [low, high] = [Infinity, -Infinity];
    for (const { values } of this.drawn) {
      for (const value of values) {
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    if (this.log) return [Math.max(low, this.floor) / 1.1, Math.max(high, this.floor * 2) * 1.1];
    const margin = 0.04 * (high - low || Math.abs(high) || 1);
    return [this.zero ? 0 : low - margin, high + margin];
  }

  values(step) {
    return this.drawn.filter(({ name }) => name).map(({ name, steps, values, colour, dots }) => {
      const at = step === null ? values.length - 1 : Math.min(lowerBound(steps, step), values.length - 1);
      return [colour, `${name} ${short(values[at])}`, dots];
    });
  }

  readOut(step) {
    const said = step === null ? [] : [[null, `step ${whole(Math.round(step))}`]];
    legend(this.figure.output, [...said, ...this.items(step)]);
  }

  // Where the slider is.
  mark() {
    const run = firstRun();
    const step = run.steps[shownFrame()];
    if (state.step === null || step === undefined) this.plot.unmark();
    else this.plot.mark(snap(this.x(step)), TOP, 1, this.height - TOP - BOTTOM);
  }
}

const measured = (run, name) => Boolean(run.metrics[name]?.some((value) => !Number.isNaN(value)));

// One of the metrics, of all runs.
function metricChart(id, name, label, { points = false, ...options } = {}) {
  const series = () => {
    const runs = arrived().filter((run) => measured(run, name));
    const of = (run, values, style) => ({ steps: run.metrics.step, values, colour: colourOf(run), ...style });
    const thin = runs.map((run) => of(run, run.metrics[name], { width: 1, alpha: 0.3 }));
    const title = (run) => (runs.length > 1 ? run.name : "running mean");
    const thick = runs.map((run) => of(run, smooth(run.metrics[name]), { name: title(run) }));
    const evaluated = points ? runs.flatMap((run) => evaluations(run, runs.length > 1)) : [];
    return [...thin, ...thick, ...evaluated];
  };
  return new Chart(id, {
    label, series, key: () => versions(state.runs), ...options,
    missing: () => (arrived().some((run) => measured(run, name)) ? "" : "Not measured."),
  });
}

function evaluations(run, several) {
  const rows = run.evaluations?.all ?? [];
  if (!rows.length) return [];
  const [steps, values] = [rows.map(([step]) => step), rows.map(([, loss]) => loss ?? NaN)];
  return [{ name: several ? "" : "held out", steps, values, colour: colourOf(run), dots: true }];
}

// MaxVio of every layer, over the mean of all.
function layerChart() {
  const rows = () => firstRun().rows.get("max_vio");
  const depth = (layer) => css(blend(DEPTH, layer / Math.max(firstRun().layers.length - 1, 1)));
  const mean = (frame) => {
    const values = rows().row(frame).filter((value) => !Number.isNaN(value));
    return values.reduce((sum, value) => sum + value, 0) / values.length;
  };
  const series = () => {
    const run = firstRun();
    const layers = run.layers.map((_, layer) => ({
      steps: run.steps, values: run.overTime("max_vio", layer), colour: depth(layer), width: 1, alpha: 0.75,
    }));
    const chosen = { ...layers[state.layer], colour: ORANGE, width: 2, alpha: 1 };
    const means = run.steps.map((_, frame) => mean(frame));
    return [...layers, chosen, { steps: run.steps, values: means, colour: INK, width: 2 }];
  };
  const items = (step) => {
    const run = firstRun();
    const frame = run.frameAt(step);
    const of = (layer) => short(rows().row(frame)[layer]);
    const last = run.layers.length - 1;
    return [
      [depth(0), `layer ${run.layers[0]} ${of(0)}`],
      [depth(last), `layer ${run.layers[last]} ${of(last)}`],
      [ORANGE, `selected layer ${run.layers[state.layer]} ${of(state.layer)}`],
      [INK, `mean ${short(mean(frame))}`],
    ];
  };
  return new Chart("layers", {
    label: "MaxVio of every layer over steps", series, items, span: frameSpan, height: 260,
    log: true, floor: 0.01, key: layerKey,
    missing: () => noLoad() || (rows() ? "" : "MaxVio was not recorded."),
  });
}

// The biases of the selected layer's experts.
function biasChart() {
  const extremes = () => {
    const run = firstRun();
    const load = run.layerRow("load", shownFrame(), state.layer);
    const experts = [...load.keys()].sort((a, b) => load[b] - load[a]);
    return { full: experts.slice(0, 3), empty: experts.slice(-3).reverse() };
  };
  const series = () => {
    const run = firstRun();
    const { full, empty } = extremes();
    const of = (expert, colour, width, alpha) => ({
      steps: run.steps, values: run.overTime("bias", state.layer, expert), colour, width, alpha,
    });
    const all = Array.from({ length: run.num_experts }, (_, expert) => of(expert, "#9aa5b1", 1, 0.4));
    const marked = [...empty.map((e) => of(e, LESS, 1.75)), ...full.map((e) => of(e, MORE, 1.75))];
    return [...all, ...marked, ...(state.expert === null ? [] : [of(state.expert, INK, 2)])];
  };
  const items = (step) => {
    const run = firstRun();
    const bias = run.layerRow("bias", step === null ? shownFrame() : run.frameAt(step), state.layer);
    const { full, empty } = extremes();
    const say = (expert) => `expert ${expert} ${signed(bias[expert], 4)}`;
    const chosen = state.expert === null ? [] : [[INK, say(state.expert)]];
    return [[MORE, `fullest: ${say(full[0])}`], [LESS, `emptiest: ${say(empty[0])}`], ...chosen];
  };
  return new Chart("bias", {
    label: "Bias of every expert of the selected layer over steps", series, items, span: frameSpan,
    key: () => `${layerKey()} ${shownFrame()}`,
    missing: () => noLoad() || (firstRun().rows.has("bias") ? "" : "No bias was recorded."),
  });
}
