// Figures on canvases. A figure says by `key()` what its picture depends on, and is painted anew when that
// changed and it is on the screen; a step marker is moved without painting.

const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif";
const LABEL = 11; // px, of axis labels
const [LEFT, RIGHT, TOP, BOTTOM] = [56, 14, 8, 22]; // px around a plot

class Figure {
  static all = [];
  static pending = false;
  static watch = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) entry.target.figure.visible = entry.isIntersecting;
      Figure.update();
    },
    { rootMargin: "300px" },
  );
  static sizes = new ResizeObserver(() => Figure.update());

  // `missing()` is a sentence where there is nothing to draw; `key()` is compared as text.
  constructor(id, { key, paint, missing = () => "" }) {
    Object.assign(this, { key, paint, missing, drawn: "", visible: false });
    this.element = document.getElementById(id);
    this.element.figure = this;
    this.output = this.element.querySelector("output");
    this.sentence = this.element.appendChild(document.createElement("p"));
    this.sentence.className = "missing";
    Figure.watch.observe(this.element);
    Figure.sizes.observe(this.element);
    Figure.all.push(this);
  }

  // Paints what changed, once per frame of the screen.
  static update() {
    if (Figure.pending) return;
    Figure.pending = true;
    requestAnimationFrame(() => {
      Figure.pending = false;
      for (const figure of Figure.all) if (figure.visible) figure.refresh();
    });
  }

  refresh() {
    const sentence = this.missing();
    this.sentence.textContent = sentence;
    this.element.classList.toggle("empty", Boolean(sentence));
    if (sentence) return;
    const key = `${this.key()} ${this.element.clientWidth} ${devicePixelRatio}`;
    if (key !== this.drawn) this.paint(this);
    this.drawn = key;
    this.mark?.();
  }
}

// A canvas in a figure with what lies over it: the marker of the step, and of the cell.
class Plot {
  constructor(parent, label) {
    this.box = document.createElement("div");
    this.box.className = "plot";
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", label);
    this.marker = document.createElement("i");
    this.box.append(this.canvas, this.marker);
    const below = parent.querySelector(":scope > .legend, :scope > figcaption");
    parent.insertBefore(this.box, below);
  }

  get width() {
    return this.box.clientWidth;
  }

  // A clean context of the plot's width and `height`, in CSS px; one canvas pixel is one of the screen.
  begin(height) {
    const { canvas, width } = this;
    canvas.width = Math.round(width * devicePixelRatio);
    canvas.height = Math.round(height * devicePixelRatio);
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(devicePixelRatio, devicePixelRatio);
    context.font = `${LABEL}px ${FONT}`;
    context.lineJoin = "round";
    return context;
  }

  // `at(x, y)` on moving over the canvas, `at(null)` on leaving; `click(x, y)`.
  listen(at, click) {
    const point = (event) => [event.offsetX, event.offsetY];
    this.canvas.addEventListener("pointermove", (event) => at(...point(event)));
    this.canvas.addEventListener("pointerleave", () => at(null));
    if (click) this.canvas.addEventListener("click", (event) => click(...point(event)));
  }

  mark(left, top, width, height) {
    Object.assign(this.marker.style, {
      display: "block",
      transform: `translate(${left}px, ${top}px)`,
      width: `${width}px`,
      height: `${height}px`,
    });
  }

  unmark() {
    this.marker.style.display = "none";
  }
}

const snap = (value) => Math.round(value * devicePixelRatio) / devicePixelRatio;

// The greatest cell size of whole screen pixels, so that all columns are equally wide and have sharp edges.
const wholePixels = (room, count) =>
  Math.max(1, Math.floor((room * devicePixelRatio) / count)) / devicePixelRatio;

// Where cells lie: blocks of `block` columns with gaps between them.
class Grid {
  constructor({ rows, columns, block = columns, left, top, cellWidth, cellHeight, gap = 0 }) {
    Object.assign(this, { rows, columns, block, cellWidth, cellHeight, gap });
    this.left = snap(left);
    this.top = snap(top);
  }

  x(column) {
    return this.left + column * this.cellWidth + Math.floor(column / this.block) * this.gap;
  }

  y(row) {
    return this.top + row * this.cellHeight;
  }

  get right() {
    return this.x(this.columns - 1) + this.cellWidth;
  }

  get bottom() {
    return this.y(this.rows);
  }

  // [row, column] under a point, or null.
  at(x, y) {
    const row = Math.floor((y - this.top) / this.cellHeight);
    const blockWidth = this.block * this.cellWidth + this.gap;
    const block = Math.floor((x - this.left) / blockWidth);
    const inside = Math.floor((x - this.left - block * blockWidth) / this.cellWidth);
    const column = block * this.block + Math.min(inside, this.block - 1);
    const hit = row >= 0 && row < this.rows && x >= this.left && column < this.columns;
    return hit ? [row, column] : null;
  }
}

// A picture of one pixel per cell.
function picture(pixels, columns, rows) {
  const small = new OffscreenCanvas(columns, rows);
  const data = new Uint8ClampedArray(pixels.buffer);
  small.getContext("2d").putImageData(new ImageData(data, columns, rows), 0, 0);
  return small;
}

// Paints [rows, columns] of pixels over a grid, and a hairline around each block.
function paintCells(context, grid, pixels) {
  const { rows, columns, block, cellWidth } = grid;
  const small = picture(pixels, columns, rows);
  context.imageSmoothingEnabled = false;
  for (let from = 0; from < columns; from += block) {
    const count = Math.min(block, columns - from);
    const [x, width, height] = [grid.x(from), count * cellWidth, grid.bottom - grid.top];
    context.drawImage(small, from, 0, count, rows, x, grid.top, width, height);
    outline(context, x, grid.top, width, height);
  }
}

// A hairline just outside of a rectangle.
function outline(context, x, y, width, height) {
  const line = 1 / devicePixelRatio;
  context.strokeStyle = MUTED;
  context.lineWidth = line;
  context.strokeRect(x - line / 2, y - line / 2, width + line, height + line);
}

function text(context, words, x, y, style = {}) {
  const { align = "left", baseline = "middle", colour = MUTED, weight = 400 } = style;
  context.font = `${weight} ${LABEL}px ${FONT}`;
  context.textAlign = align;
  context.textBaseline = baseline;
  context.fillStyle = colour;
  context.fillText(words, x, y);
}

// Labels of a row of things: of all, or from the first on of every second, fourth, ..., so that they fit.
function labelEach(count, spacing, room, draw) {
  const rounded = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128];
  const every = rounded.find((step) => step * spacing >= room) ?? count;
  for (let i = 0; i < count; i += every) draw(i, every);
}

// `words` of each value below a line at y; the last one stays inside of the plot.
function horizontalAxis(context, scale, y, right, words = whole) {
  const end = right + RIGHT - 1;
  for (const value of ticks(scale.low, scale.high, Math.max(2, (right - LEFT) / 90))) {
    const half = context.measureText(words(value)).width / 2;
    const x = Math.min(scale(value), end - half);
    text(context, words(value), x, y + 5, { align: "center", baseline: "top" });
  }
}

function verticalAxis(context, scale, left, right, values) {
  context.fillStyle = GRID;
  for (const value of values) context.fillRect(left, snap(scale(value)), right - left, 1);
  for (const value of values) text(context, short(value), left - 6, scale(value), { align: "right" });
}

// A line through points; NaN interrupts it, and a lone point is a dot.
function line(context, xs, ys, colour, width, alpha = 1) {
  context.globalAlpha = alpha;
  context.strokeStyle = context.fillStyle = colour;
  context.lineWidth = width;
  context.beginPath();
  let open = false;
  ys.forEach((y, i) => {
    if (Number.isNaN(y)) open = false;
    else if (open) context.lineTo(xs[i], y);
    else if (Number.isNaN(ys[i + 1] ?? NaN)) context.rect(xs[i] - 0.75, y - 0.75, 1.5, 1.5);
    else context.moveTo(xs[i], y);
    open = !Number.isNaN(y);
  });
  context.stroke();
  context.globalAlpha = 1;
}

function dot(context, x, y, radius, colour, hollow = false) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fillStyle = hollow ? "#fff" : colour;
  context.fill();
  context.strokeStyle = colour;
  context.lineWidth = 1.5;
  context.stroke();
}
