// Colours, numbers as text, and axes. Every colour is told apart under the common colour blindnesses.

const INK = "#1f2933";
const MUTED = "#66727f";
const GRID = "#e4e7eb";
const BLUE = "#0072b2";
const ORANGE = "#d55e00";
const GREEN = "#009e73";
const RUN_COLOURS = [BLUE, ORANGE, GREEN, "#cc79a7", "#56b4e9", "#e69f00", "#000000"]; // Okabe and Ito
// ColorBrewer's RdBu without its darkest ends: for a reader without red cones they look like a dead expert.
const DIVERGING = [
  "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#c63d3d",
];
// Viridis, up to where it is too pale for white paper.
const DEPTH = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39"];
const [LESS, MORE] = [DIVERGING[0], DIVERGING.at(-1)];
const REACHES = [1.25, 1.5, 2, 4, 8, 16];

const hexParts = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

// The colour at 0..1 of a row of stops, as [red, green, blue].
function blend(stops, at) {
  const place = Math.min(Math.max(at, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const [from, to] = [hexParts(stops[low]), hexParts(stops[low + 1])];
  return from.map((value, i) => Math.round(value + (to[i] - value) * (place - low)));
}

const css = (rgb) => `rgb(${rgb.join(" ")})`;
// As ImageData lies in memory: red, green, blue, opacity.
const pixel = ([red, green, blue]) => (0xff000000 | (blue << 16) | (green << 8) | red) >>> 0;

// Where a load (1 is even) stands on the colours, 0..1: twice and half are equally far from the middle.
const place = (load, reach) => 0.5 + Math.log2(load) / Math.log2(reach) / 2;

// The pixel of every load there is, so that painting a cell is one look-up. 0 is black: no token at all.
const loadPixels = (() => {
  const made = new Map();
  return (reach) => {
    if (!made.has(reach)) {
      const ramp = Array.from({ length: 256 }, (_, i) => pixel(blend(DIVERGING, i / 255)));
      const shade = (load) => ramp[Math.round(255 * Math.min(Math.max(place(load, reach), 0), 1))];
      const of = (load) => (load ? shade(load / EVEN) : 0xff000000);
      made.set(reach, Uint32Array.from({ length: 65536 }, (_, load) => of(load)));
    }
    return made.get(reach);
  };
})();

// The least reach that shows 98 % of the later half's loads without clipping; dead experts do not count.
function fittingReach(runs) {
  const far = [];
  for (const run of runs) {
    const rows = run.rows.get("load");
    if (!rows) continue;
    const [from, to] = [(rows.length >> 1) * rows.width, rows.length * rows.width];
    const stride = Math.max(1, Math.floor((to - from) / 20000)) | 1; // odd: no column is met each time
    for (let i = from; i < to; i += stride) {
      if (rows.data[i]) far.push(Math.abs(Math.log2(rows.data[i] / EVEN)));
    }
  }
  far.sort((a, b) => a - b);
  const wanted = far[Math.floor(0.98 * (far.length - 1))] ?? 0;
  return REACHES.find((reach) => Math.log2(reach) >= wanted) ?? REACHES.at(-1);
}

const NONE = "–";
const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);
const whole = (value) => (known(value) ? grouped.format(value) : NONE);
const fixed = (value, digits) => (known(value) ? value.toFixed(digits) : NONE);
const percent = (value, digits = 1) => (known(value) ? `${(100 * value).toFixed(digits)} %` : NONE);
const signed = (value, digits) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(digits);

// Of any size, to about three digits.
function short(value) {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 10000) return compact.format(value).replace("K", "k");
  if (size >= 100 || Number.isInteger(value)) return whole(value);
  if (size >= 0.001) return String(Number(value.toPrecision(3)));
  return value.toExponential(1);
}

// [divisor, name] in which the greatest of some byte counts reads well.
function byteUnit(most) {
  const names = ["B", "kB", "MB", "GB", "TB", "PB"];
  const at = Math.min(Math.max(Math.floor(Math.log10(Math.max(most, 1)) / 3), 0), names.length - 1);
  return [1000 ** at, names[at]];
}

function bytes(count) {
  const [divisor, name] = byteUnit(count);
  return `${short(count / divisor)} ${name}`;
}

// Round numbers from low to high, about `wanted` of them.
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const first = Math.ceil(low / step - 1e-9);
  const count = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length: count }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

// Powers of ten, with their doubles and fives where there are few; plain ones where even these are too far apart.
function logTicks(low, high) {
  const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const factors = to - from > 3 ? [1] : [1, 2, 5];
  const all = [];
  for (let power = from; power <= to; power++) for (const factor of factors) all.push(factor * 10 ** power);
  const found = all.map((value) => Number(value.toPrecision(6))).filter((value) => value >= low && value <= high);
  return found.length > 1 ? found : ticks(low, high, 6);
}

// A number to a place on paper and back.
function axis(low, high, from, to, log = false) {
  const turn = log ? Math.log : (value) => value;
  const back = log ? Math.exp : (value) => value;
  const [start, length] = [turn(low), turn(high) - turn(low) || 1];
  const scale = (value) => from + ((turn(value) - start) / length) * (to - from);
  scale.invert = (at) => back(start + ((at - from) / (to - from)) * length);
  scale.low = low;
  scale.high = high;
  return scale;
}

// The mean of each value's neighbours, a fiftieth of all to either side; NaN are passed over.
function smooth(values) {
  const reach = Math.ceil(values.length / 50);
  const sums = new Float64Array(values.length + 1);
  const counts = new Uint32Array(values.length + 1);
  values.forEach((value, i) => {
    sums[i + 1] = sums[i] + (value || 0);
    counts[i + 1] = counts[i] + (Number.isNaN(value) ? 0 : 1);
  });
  return values.map((_, i) => {
    const [low, high] = [Math.max(0, i - reach), Math.min(values.length, i + reach + 1)];
    return (sums[high] - sums[low]) / (counts[high] - counts[low]);
  });
}
