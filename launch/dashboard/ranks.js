// What lies between ranks: traffic, each rank's share of rows and time, and the schedule of a step.

const MATRIX_NUMBERS = 16; // ranks up to which the cells of the matrix hold numbers

class TrafficMatrix {
  constructor() {
    const sent = () => firstRun().traffic?.bytes.flat().some(Boolean);
    const missing = () => (sent() ? "" : "No bytes between expert ranks were recorded.");
    const key = () => versions([firstRun()]);
    this.figure = new Figure("traffic", { key, missing, paint: () => this.paint() });
    this.plot = new Plot(this.figure.element, "Bytes from each expert rank to each other");
    this.plot.listen((x, y) => this.readOut(x === null ? null : this.grid.at(x, y)));
  }

  paint() {
    const { bytes: rows } = firstRun().traffic;
    const count = rows.length;
    const [left, top] = [44, 24];
    const cell = Math.min(44, wholePixels(this.plot.width - left - 2, count));
    const context = this.plot.begin(top + count * cell + 2);
    this.grid = new Grid({ rows: count, columns: count, left, top, cellWidth: cell, cellHeight: cell });
    const all = rows.flat();
    const mean = all.reduce((sum, value) => sum + value, 0) / all.length;
    this.reach = REACHES.find((reach) => reach * mean >= Math.max(...all)) ?? REACHES.at(-1);
    const shades = loadPixels(this.reach);
    const shade = (value) => shades[Math.min(Math.ceil((EVEN * value) / mean), 65535)];
    paintCells(context, this.grid, Uint32Array.from(all, shade));
    this.labelRanks(context, count, cell);
    if (count <= MATRIX_NUMBERS) this.writeNumbers(context, rows, cell, mean);
    this.readOut(null);
  }

  labelRanks(context, count, cell) {
    labelEach(count, cell, 18, (rank) => {
      const middle = (rank + 0.5) * cell;
      text(context, rank, this.grid.left + middle, this.grid.top - 10, { align: "center" });
      text(context, rank ? rank : "rank 0", this.grid.left - 6, this.grid.top + middle, { align: "right" });
    });
  }

  writeNumbers(context, rows, cell, mean) {
    const most = Math.max(...rows.flat());
    const [divisor] = byteUnit(most);
    const digits = Math.max(0, (cell < 30 ? 1 : 2) - Math.floor(Math.log10(most / divisor)));
    rows.forEach((row, from) => row.forEach((value, to) => {
      const [x, y] = [this.grid.x(to) + cell / 2, this.grid.y(from) + cell / 2];
      const colour = Math.abs(place(value / mean, this.reach) - 0.5) > 0.35 ? "#fff" : INK;
      text(context, (value / divisor).toFixed(digits), x, y, { align: "center", colour });
    }));
  }

  readOut(cell) {
    const { bytes: rows } = firstRun().traffic;
    const [, unit] = byteUnit(Math.max(...rows.flat()));
    const about = rows.length <= MATRIX_NUMBERS ? `in ${unit}` : "point at a cell for its bytes";
    if (!cell) return say(this.figure, [about, `colours to ${this.reach} × the mean`]);
    const [from, to] = cell;
    const way = from === to ? `kept on rank ${from}` : `rank ${from} to rank ${to}`;
    say(this.figure, [way, bytes(rows[from][to])]);
  }
}

// The mean of what is known: a rank that the run no longer had was not timed.
function average(values) {
  const taken = values.filter(known);
  return taken.reduce((sum, value) => sum + value, 0) / taken.length;
}

// Of one frame, each rank's mean over layers of a number that is NaN where it was not taken.
function rankMeans(run, name, frame) {
  const rows = run.rows.get(name)?.row(frame);
  if (!rows || Number.isNaN(rows[0])) return null;
  const sums = new Array(run.num_ranks).fill(0);
  rows.forEach((value, i) => (sums[i % run.num_ranks] += value));
  return sums.map((sum) => sum / run.layers.length);
}

// Layers wait for their slowest rank one after the other: the share of time that the mean rank waits.
function straggling(run, frame) {
  let [worked, lasted] = [0, 0];
  run.layers.forEach((_, layer) => {
    const seconds = run.layerRow("expert_seconds", frame, layer);
    worked += average(seconds);
    lasted += Math.max(...seconds.filter(known));
  });
  return 1 - worked / lasted;
}

// The newest frame up to a given one in which experts were timed, or -1.
function timedFrame(run, frame) {
  while (frame >= 0 && !rankMeans(run, "expert_seconds", frame)) frame -= 1;
  return frame;
}

class RankLoads {
  constructor() {
    const spread = () => firstRun().rows.has("received") && firstRun().num_ranks > 1;
    const missing = () => noLoad() || (spread() ? "" : "One rank holds all experts.");
    const key = () => `${versions([firstRun()])} ${shownFrame()}`;
    this.figure = new Figure("ranks", { key, missing, paint: () => this.paint() });
    this.plot = new Plot(this.figure.element, "Rows received and expert time of each rank over the mean");
  }

  paint() {
    const run = firstRun();
    const received = rankMeans(run, "received", shownFrame());
    const timed = run.rows.has("expert_seconds") ? timedFrame(run, shownFrame()) : -1;
    const seconds = timed < 0 ? null : rankMeans(run, "expert_seconds", timed);
    const mean = seconds && average(seconds);
    const relative = seconds?.map((value) => value / mean);
    this.paintBars(received ?? [], relative ?? []);
    const fullest = received ? Math.max(...received) : NaN;
    const waits = () => `time: the mean rank waits ${percent(straggling(run, timed))} for the slowest`;
    legend(this.figure.output, [
      [BLUE, `rows: fullest rank ${received?.indexOf(fullest)}, ${fixed(fullest, 2)} × mean`],
      ...(seconds ? [[ORANGE, waits(), true]] : []),
    ]);
    paintLinks(run.traffic);
  }

  paintBars(received, relative) {
    const height = 220;
    const context = this.plot.begin(height);
    const [right, bottom] = [this.plot.width - RIGHT, height - BOTTOM];
    const count = firstRun().num_ranks;
    const high = Math.max(1.25, ...received, ...relative.filter(known)) * 1.05;
    const y = axis(0, high, bottom, TOP);
    const slot = (right - LEFT) / count;
    verticalAxis(context, y, LEFT, right, ticks(0, high, 5));
    received.forEach((value, rank) => {
      context.fillStyle = BLUE;
      const width = Math.min(slot * 0.7, 46);
      context.fillRect(LEFT + (rank + 0.5) * slot - width / 2, y(value), width, bottom - y(value));
    });
    context.fillStyle = INK;
    context.fillRect(LEFT, snap(y(1)), right - LEFT, 1);
    const middle = (rank) => LEFT + (rank + 0.5) * slot;
    const radius = Math.min(4, slot / 3);
    relative.forEach((value, rank) => dot(context, middle(rank), y(value), radius, ORANGE, true));
    labelEach(count, slot, 26, (rank) => {
      const words = slot > 60 ? `rank ${rank}` : rank;
      text(context, words, middle(rank), bottom + 5, { align: "center", baseline: "top" });
    });
  }
}

// Where the rows' bytes went, as one bar.
function paintLinks(traffic) {
  const parts = [
    ["kept on their rank", traffic?.kept ?? 0, "#bcc4cd"],
    ["within a node", traffic?.nvlink ?? 0, BLUE],
    ["over the network", traffic?.network ?? 0, ORANGE],
  ];
  const total = parts.reduce((sum, [, count]) => sum + count, 0);
  const bar = document.createElement("div");
  bar.className = "bar";
  const words = document.createElement("p");
  const told = (name, count) => `${bytes(count)} ${name} (${percent(count / total)})`;
  legend(words, parts.map(([name, count, colour]) => [colour, told(name, count)]));
  for (const [, count, colour] of parts) {
    const part = bar.appendChild(document.createElement("i"));
    part.hidden = !count;
    Object.assign(part.style, { flexGrow: count / total, background: colour });
  }
  document.getElementById("links").replaceChildren(...(total ? [bar, words] : []));
}

// Ranks x time; a pair that is stepped in turn has both colours, one above the other.
class Timeline {
  static colours = { F: BLUE, B: ORANGE, W: GREEN };

  constructor() {
    const timed = () => firstRun().timeline?.spans.length;
    const missing = () => (timed() ? "" : "No step of a pipeline has been timed yet.");
    const key = () => versions([firstRun()]);
    this.figure = new Figure("timeline", { key, missing, paint: () => this.paint() });
    this.plot = new Plot(this.figure.element, "What each pipeline rank did when");
    this.plot.listen((x, y) => this.readOut(x, y));
  }

  paint() {
    const { spans, ranks } = firstRun().timeline;
    this.rowHeight = Math.min(34, Math.max(16, 320 / ranks));
    const bottom = TOP + ranks * this.rowHeight;
    const context = this.plot.begin(bottom + BOTTOM);
    const right = this.plot.width - RIGHT;
    const end = Math.max(...spans.map(([, , , until]) => until));
    this.x = axis(0, end, LEFT, right);
    const words = (value) => (end < 1 ? `${short(1000 * value)} ms` : `${short(value)} s`);
    horizontalAxis(context, this.x, bottom, right, words);
    for (let rank = 0; rank < ranks; rank++) {
      text(context, `rank ${rank}`, LEFT - 8, TOP + (rank + 0.5) * this.rowHeight, { align: "right" });
    }
    for (const span of spans) this.paintSpan(context, span);
    outline(context, LEFT, TOP, right - LEFT, bottom - TOP);
    this.readOut(null);
  }

  paintSpan(context, [rank, words, begin, end]) {
    const parts = words.split("&");
    const [x, width] = [this.x(begin), Math.max(this.x(end) - this.x(begin) - 0.5, 0.5)];
    const height = (this.rowHeight - 2) / parts.length;
    parts.forEach((part, i) => {
      const y = TOP + rank * this.rowHeight + 1 + i * height;
      context.fillStyle = Timeline.colours[part[0]] ?? MUTED;
      context.fillRect(x, y, width, height);
      const number = part.slice(1);
      if (width > 7 * number.length + 2 && height >= 11) {
        text(context, number, x + width / 2, y + height / 2, { align: "center", colour: "#fff" });
      }
    });
  }

  readOut(x, y) {
    const { spans, step, schedule, microbatches, ranks } = firstRun().timeline;
    const [rank, at] = x === null ? [-1, 0] : [Math.floor((y - TOP) / this.rowHeight), this.x.invert(x)];
    const span = spans.find(([where, , begin, end]) => where === rank && begin <= at && at < end);
    const busy = spans.reduce((sum, [, , begin, end]) => sum + end - begin, 0);
    const end = Math.max(...spans.map(([, , , until]) => until));
    const waiting = percent(1 - busy / (end * ranks));
    const about = span
      ? `rank ${rank}: ${span[1]} from ${short(1000 * span[2])} to ${short(1000 * span[3])} ms`
      : `step ${whole(step)}, ${schedule}, ${microbatches} microbatches, waiting ${waiting}`;
    const colours = [[BLUE, "forward"], [ORANGE, "backward"], [GREEN, "weight gradients"]];
    legend(this.figure.output, [...colours, [null, about]]);
  }
}
