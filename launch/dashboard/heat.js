// Heat maps of expert load: layers x experts, one layer over time, domains x experts.

// What is said of a cell, or of a whole layer.
function describe(run, frame, layer, expert) {
  const load = run.layerRow("load", frame, layer);
  const at = (number) => (load[number] === 65535 ? "at least 256" : short(load[number] / EVEN));
  if (expert !== null) {
    const share = load[expert] / EVEN / run.num_experts;
    const bias = run.rows.has("bias") ? run.layerRow("bias", frame, layer)[expert] : NaN;
    return [
      `layer ${run.layers[layer]}, expert ${expert} on rank ${run.placement[layer][expert]}`,
      load[expert] ? `${at(expert)} × mean` : "no token",
      `${percent(share, 2)} of assignments`,
      Number.isNaN(bias) ? "no bias" : `bias ${signed(bias, 4)}`,
    ];
  }
  const scalar = (name) => run.rows.get(name)?.row(frame)[layer];
  const experts = [...load.keys()].sort((a, b) => load[b] - load[a]);
  const [fullest, emptiest] = [experts[0], experts.at(-1)];
  return [
    `layer ${run.layers[layer]}`,
    `MaxVio ${short(scalar("max_vio"))}`,
    `fullest expert ${fullest} (${at(fullest)} × mean), emptiest ${emptiest} (${at(emptiest)})`,
    `${whole(load.filter((count) => count === 0).length)} without a token`,
    ...(known(scalar("entropy")) ? [`entropy ${fixed(scalar("entropy"), 3)}`] : []),
    ...(known(scalar("margin")) ? [`margin ${short(scalar("margin"))}`] : []),
  ];
}

const say = (figure, parts) => legend(figure.output, parts.map((words) => [null, words]));

// A grid of experts as columns, in blocks of a rank where they are ordered so.
function expertGrid(plot, run, { rows, cellHeight, left, right, top }) {
  const blocks = byRank(run) ? run.homes : 1;
  const room = plot.width - left - right;
  const gap = blocks > 1 && room / run.num_experts > 1.5 ? 2 : 0;
  const cellWidth = Math.min(40, wholePixels(room - gap * (blocks - 1), run.num_experts));
  const block = Math.ceil(run.num_experts / blocks);
  return new Grid({ rows, columns: run.num_experts, block, left, top, cellWidth, cellHeight, gap });
}

// Above: ranks. Below: numbers of experts, where every row has the same.
function labelExperts(context, run, grid, layers) {
  if (byRank(run)) {
    const blockWidth = grid.block * grid.cellWidth + grid.gap;
    labelEach(run.homes, blockWidth, 50, (rank) => {
      const middle = grid.x(rank * grid.block) + (grid.block * grid.cellWidth) / 2;
      const words = blockWidth > 48 || !rank ? `rank ${rank}` : rank;
      text(context, words, middle, grid.top - 10, { align: "center" });
    });
  }
  const orders = layers.map((layer) => run.order(layer, byRank(run)));
  const [order] = orders;
  if (!orders.every((other) => other.every((expert, column) => expert === order[column]))) return;
  labelEach(run.num_experts, grid.cellWidth, 26, (column) => {
    const x = grid.x(column) + grid.cellWidth / 2;
    text(context, order[column], x, grid.bottom + 5, { align: "center", baseline: "top" });
  });
}

// Layers x experts at one step, of one run or of two side by side.
class LoadMap {
  constructor() {
    this.figure = new Figure("load", { key: () => this.key(), missing: noLoad, paint: () => this.paint() });
    this.figure.mark = () => this.mark();
    const pair = this.figure.element.querySelector(".pair");
    this.sides = [0, 1].map((side) => this.makeSide(pair.appendChild(document.createElement("div")), side));
  }

  makeSide(element, side) {
    const title = element.appendChild(document.createElement("h3"));
    const output = element.appendChild(document.createElement("output"));
    output.className = "readout";
    const plot = new Plot(element, "Load of every expert in every layer");
    const { canvas } = plot;
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.addEventListener("keydown", (event) => this.pressed(event));
    const here = { element, title, output, plot, grid: null };
    const cell = (x, y) => here.grid?.at(x, y);
    plot.listen(
      (x, y) => this.readOut(x === null ? null : this.named(side, cell(x, y))),
      (x, y) => {
        const found = this.named(side, cell(x, y));
        if (found) select(found);
      },
    );
    return here;
  }

  key() {
    const frames = shownRuns().map(frameOf);
    return `${versions(shownRuns())} ${frames} ${state.layer} ${state.order} ${reachOf()}`;
  }

  // {layer, expert} of a cell.
  named(side, cell) {
    const run = shownRuns()[side];
    return cell ? { layer: cell[0], expert: run.order(cell[0], byRank(run))[cell[1]] } : null;
  }

  paint() {
    const runs = shownRuns();
    this.sides.forEach((side, i) => (side.element.hidden = !runs[i]));
    runs.forEach((run, i) => this.paintSide(this.sides[i], run, frameOf(run)));
    paintScale(document.getElementById("scale"), reachOf());
  }

  paintSide(side, run, frame) {
    side.element.hidden = !run.layers.length || !run.steps.length;
    if (side.element.hidden) return;
    const [step, span] = [run.steps[frame], run.spans[frame]];
    const steps = span > 1 ? `steps ${whole(step - span + 1)} to ${whole(step)}` : `step ${whole(step)}`;
    legend(side.title, [[state.runs.length > 1 ? colourOf(run) : null, `${run.name}, ${steps}`]]);
    const rows = run.layers.length;
    const cellHeight = snap(Math.min(Math.max(Math.floor(480 / rows), 9), 24));
    const context = side.plot.begin(rows * cellHeight + 42);
    const grid = expertGrid(side.plot, run, { rows, cellHeight, left: LEFT, right: 92, top: 20 });
    side.grid = grid;
    paintCells(context, grid, this.pixels(run, frame));
    labelExperts(context, run, grid, run.layers.map((_, layer) => layer));
    labelEach(rows, cellHeight, 11, (layer, every) => {
      if (every === 1 || Math.abs(layer - state.layer) >= every) this.labelLayer(context, run, grid, layer);
    });
    if (state.layer < rows) this.labelLayer(context, run, grid, state.layer, { weight: 700, colour: INK });
    this.paintViolation(context, run, frame, grid, side.plot.width);
  }

  pixels(run, frame) {
    const load = run.rows.get("load").row(frame);
    const shades = loadPixels(reachOf());
    const pixels = new Uint32Array(load.length);
    const experts = run.num_experts;
    for (let layer = 0; layer < run.layers.length; layer++) {
      const order = run.order(layer, byRank(run));
      for (let column = 0; column < experts; column++) {
        pixels[layer * experts + column] = shades[load[layer * experts + order[column]]];
      }
    }
    return pixels;
  }

  labelLayer(context, run, grid, layer, style) {
    const y = grid.y(layer) + grid.cellHeight / 2;
    text(context, run.layers[layer], grid.left - 6, y, { align: "right", ...style });
  }

  paintViolation(context, run, frame, grid, width) {
    const values = run.rows.get("max_vio")?.row(frame);
    if (!values) return;
    const [left, room] = [grid.right + 44, width - grid.right - 46];
    text(context, "MaxVio", grid.right + 10, grid.top - 10);
    values.forEach((value, layer) => {
      const [y, height] = [grid.y(layer), grid.cellHeight];
      context.fillStyle = layer === state.layer ? ORANGE : "#9aa5b1";
      const length = room * Math.min(value / (reachOf() - 1), 1);
      context.fillRect(left, snap(y + height / 4), length || 0, snap(Math.min(height / 2, 8)));
    });
    labelEach(values.length, grid.cellHeight, 11, (layer) => {
      const y = grid.y(layer) + grid.cellHeight / 2;
      text(context, fixed(values[layer], 2), grid.right + 38, y, { align: "right" });
    });
  }

  // The same layer and expert of both runs: those pointed at, else those selected.
  readOut(pointed) {
    const { layer, expert } = pointed ?? state;
    shownRuns().forEach((run, i) => {
      const there = run.steps.length && layer < run.layers.length && (expert ?? 0) < run.num_experts;
      say(this.sides[i], there ? describe(run, frameOf(run), layer, expert) : []);
    });
  }

  // The selected cell, or the selected layer.
  mark() {
    this.sides.forEach(({ element, plot, grid }, side) => {
      if (element.hidden || !grid) return;
      if (state.layer >= grid.rows || state.expert >= grid.columns) return plot.unmark();
      const { x, y, width, height } = this.cell(side, state.layer, state.expert);
      plot.mark(x - 2, y - 2, width + 4, height + 4);
    });
    this.readOut(null);
  }

  // Where a cell is on its canvas, or with no expert a whole layer.
  cell(side, layer, expert) {
    const { grid } = this.sides[side];
    const run = shownRuns()[side];
    const column = expert === null ? 0 : run.order(layer, byRank(run)).indexOf(expert);
    const width = expert === null ? grid.right - grid.left : grid.cellWidth;
    return { x: grid.x(column), y: grid.y(layer), width, height: grid.cellHeight };
  }

  pressed(event) {
    const run = firstRun();
    const order = run.order(state.layer, byRank(run));
    const beside = (way) => {
      const column = state.expert === null ? (way > 0 ? -1 : order.length) : order.indexOf(state.expert);
      return { expert: order[Math.min(Math.max(column + way, 0), order.length - 1)] };
    };
    const changes = {
      ArrowUp: () => ({ layer: state.layer - 1 }),
      ArrowDown: () => ({ layer: state.layer + 1 }),
      ArrowLeft: () => beside(-1),
      ArrowRight: () => beside(1),
      Home: () => ({ layer: 0 }),
      End: () => ({ layer: run.layers.length - 1 }),
      Escape: () => ({ expert: null }),
    };
    const change = changes[event.key];
    if (!change || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    select(change());
  }
}

// The colours of load, with what they stand for.
function paintScale(element, reach) {
  const swatch = (colour, words) => {
    const item = document.createElement("span");
    item.appendChild(document.createElement("b")).style.background = colour;
    item.append(words);
    return item;
  };
  const values = [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1].map((part) => reach ** part);
  const words = values.map((value) => Number(value.toPrecision(2)));
  const shown = values.map((value, i) => swatch(css(blend(DIVERGING, place(value, reach))), `${words[i]}`));
  shown[0].append(" or less");
  shown.at(-1).append(" or more");
  element.replaceChildren(swatch("#000", "no token"), ...shown);
}

// One layer's experts over time.
class History {
  constructor() {
    const key = () => `${layerKey()} ${reachOf()}`;
    this.figure = new Figure("history", { key, missing: noLoad, paint: () => this.paint() });
    this.figure.mark = () => this.mark();
    this.plot = new Plot(this.figure.element, "Load of each expert of the selected layer over steps");
    this.plot.listen(
      (x, y) => this.readOut(x, y),
      (x, y) => select({ step: this.stepAt(x), expert: this.expertAt(y) ?? state.expert }),
    );
  }

  paint() {
    const run = firstRun();
    const rows = run.num_experts;
    this.cellHeight = snap(Math.min(Math.max(Math.floor(384 / rows), 2), 14));
    this.bottom = TOP + rows * this.cellHeight;
    const context = this.plot.begin(this.bottom + BOTTOM);
    const right = this.plot.width - RIGHT;
    this.x = axis(...frameSpan(), LEFT, right);
    this.paintFrames(context, run);
    this.labelRows(context, run);
    horizontalAxis(context, this.x, this.bottom, right);
    this.readOut(null);
  }

  paintFrames(context, run) {
    const [frames, rows] = [run.steps.length, run.num_experts];
    const order = run.order(state.layer, byRank(run));
    const shades = loadPixels(reachOf());
    const pixels = new Uint32Array(frames * rows);
    for (let frame = 0; frame < frames; frame++) {
      const load = run.layerRow("load", frame, state.layer);
      for (let row = 0; row < rows; row++) pixels[row * frames + frame] = shades[load[order[row]]];
    }
    const small = picture(pixels, frames, rows);
    context.imageSmoothingEnabled = false;
    run.steps.forEach((step, frame) => {
      const [from, to] = [snap(this.x(step - run.spans[frame])), snap(this.x(step))];
      if (to > from) context.drawImage(small, frame, 0, 1, rows, from, TOP, to - from, this.bottom - TOP);
    });
    outline(context, LEFT, TOP, this.plot.width - RIGHT - LEFT, this.bottom - TOP);
  }

  labelRows(context, run) {
    const order = run.order(state.layer, byRank(run));
    const y = (row) => TOP + (row + 0.5) * this.cellHeight;
    const [count, words] = byRank(run)
      ? [run.homes, (rank) => `rank ${rank}`]
      : [run.num_experts, (row) => order[row]];
    const each = run.num_experts / count;
    labelEach(count, each * this.cellHeight, 13, (i) => {
      text(context, words(i), LEFT - 8, y(i * each + (each - 1) / 2), { align: "right" });
    });
    context.fillStyle = MUTED;
    for (let rank = 1; byRank(run) && rank < count; rank++) {
      context.fillRect(LEFT - 6, snap(TOP + rank * each * this.cellHeight), 6, 1);
    }
    if (state.expert === null) return;
    text(context, "▸", LEFT - 1, y(order.indexOf(state.expert)), { align: "right", colour: INK });
  }

  stepAt(x) {
    const run = firstRun();
    const frame = run.frameAt(Math.ceil(this.x.invert(x)));
    return frame === run.steps.length - 1 ? null : run.steps[frame];
  }

  expertAt(y) {
    const run = firstRun();
    return run.order(state.layer, byRank(run))[Math.floor((y - TOP) / this.cellHeight)];
  }

  readOut(x, y) {
    const run = firstRun();
    const expert = x === null ? undefined : this.expertAt(y);
    if (expert === undefined) return say(this.figure, [`layer ${run.layers[state.layer]} of ${run.name}`]);
    const frame = run.frameAt(this.stepAt(x));
    say(this.figure, [`step ${whole(run.steps[frame])}`, ...describe(run, frame, state.layer, expert)]);
  }

  mark() {
    const step = firstRun().steps[shownFrame()];
    if (state.step === null) this.plot.unmark();
    else this.plot.mark(snap(this.x(step)) - 1, TOP, 1, this.bottom - TOP);
  }
}

const DOMAIN_REACH = 4; // specialisation is meant to be uneven: its colours reach further, and never change

// Domains x experts of the selected layer.
class DomainMap {
  constructor() {
    const key = () => layerKey();
    const missing = () => noLoad() || (firstRun().domains ? "" : "Data domains were not recorded.");
    this.figure = new Figure("domains", { key, missing, paint: () => this.paint() });
    this.plot = new Plot(this.figure.element, "Load of each expert of the selected layer by data domain");
    this.plot.listen((x, y) => this.readOut(x === null ? null : this.grid.at(x, y)));
  }

  // Over an even share.
  value(row, expert) {
    const { layers, num_experts: experts, domains } = firstRun();
    return domains.share[(row * layers.length + state.layer) * experts + expert] * experts;
  }

  paint() {
    const run = firstRun();
    const { names, preferred } = run.domains;
    const context = this.plot.begin(names.length * 20 + 42);
    const widest = Math.max(...names.map((name) => context.measureText(name).width));
    const left = Math.max(LEFT, Math.ceil(widest) + 12);
    const rows = names.length;
    this.grid = expertGrid(this.plot, run, { rows, cellHeight: 20, left, right: RIGHT, top: 20 });
    const order = run.order(state.layer, byRank(run));
    const shades = loadPixels(DOMAIN_REACH);
    const shade = (row, expert) => {
      const value = this.value(row, expert);
      return shades[value ? Math.min(Math.max(Math.round(value * EVEN), 1), 65535) : 0];
    };
    const pixels = names.flatMap((_, row) => order.map((expert) => shade(row, expert)));
    paintCells(context, this.grid, Uint32Array.from(pixels));
    labelExperts(context, run, this.grid, [state.layer]);
    names.forEach((name, row) => text(context, name, left - 8, this.grid.y(row) + 10, { align: "right" }));
    for (const [domain, layer, expert, lift] of preferred) {
      if (layer !== run.layers[state.layer] || lift <= 1) continue;
      const x = this.grid.x(order.indexOf(expert)) + this.grid.cellWidth / 2;
      dot(context, x, this.grid.y(names.indexOf(domain)) + 10, Math.min(2, this.grid.cellWidth / 3), INK);
    }
    paintScale(document.getElementById("domain-scale"), DOMAIN_REACH);
    this.readOut(null);
  }

  readOut(cell) {
    const run = firstRun();
    if (!cell) return say(this.figure, [`layer ${run.layers[state.layer]} of ${run.name}`]);
    const expert = run.order(state.layer, byRank(run))[cell[1]];
    const value = this.value(cell[0], expert);
    const share = value ? `${short(value)} × even` : "no token";
    say(this.figure, [run.domains.names[cell[0]], `expert ${expert}`, share]);
  }
}
