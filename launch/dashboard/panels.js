// What is words: facts, tiles, alarms, tables.

const byId = (id) => document.getElementById(id);

function element(tag, words = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = words;
  return Object.assign(made, attributes);
}

const STATES = { running: "running", finished: "finished", ended: "ended before its last step" };
const KINDS = {
  dead_expert: "Dead expert",
  max_vio: "MaxVio",
  bias: "Bias running away",
  rank_share: "Rank over its share",
  domain: "Domain starved",
  loss_spike: "Loss spike",
  not_finite: "Not finite",
  fp8_error: "FP8 error",
};

// The latest known value of a metric.
const latest = (run, name) => run.metrics[name]?.findLast((value) => !Number.isNaN(value));

function progress(run) {
  const step = whole(run.lastStep);
  return run.steps_total ? `step ${step} of ${whole(run.steps_total)}` : `step ${step}`;
}

function pairs(items) {
  return items.map(([name, value]) => {
    const pair = document.createElement("div");
    pair.append(element("dt", name), element("dd", value ?? NONE));
    return pair;
  });
}

function showHeader() {
  const run = firstRun();
  const title = arrived().map(({ name }) => name).join(", ");
  byId("name").textContent = document.title = title;
  const which = state.runs.length > 1 ? `${run.name}: ` : "";
  byId("state").textContent = `${which}${STATES[run.state]}, ${progress(run)}`;
  byId("facts").replaceChildren(...pairs(run.facts));
}

function deadExperts(run) {
  const dead = run.rows.get("dead");
  return dead?.length ? dead.row(dead.length - 1).reduce((sum, value) => sum + (value || 0), 0) : NaN;
}

const evaluated = (run) => run.evaluations?.all?.at(-1)?.[1];

function showTiles() {
  const run = firstRun();
  byId("tiles").replaceChildren(...pairs([
    ["Loss", fixed(latest(run, "loss"), 3)],
    ["Loss, held out", fixed(evaluated(run), 3)],
    ["Tokens per second", whole(latest(run, "tokens_per_second"))],
    ["MFU", percent(latest(run, "mfu"))],
    ["MaxVio", fixed(latest(run, "max_vio"), 3)],
    ["Dead experts", whole(deadExperts(run))],
    ["Alarms", whole(run.alarms.length)],
  ]));
}

const COMPARED = [
  ["State", (run) => run.state],
  ["Step", (run) => whole(run.lastStep)],
  ["Loss", (run) => fixed(latest(run, "loss"), 3)],
  ["Held out", (run) => fixed(evaluated(run), 3)],
  ["Tokens/s", (run) => whole(latest(run, "tokens_per_second"))],
  ["MFU", (run) => percent(latest(run, "mfu"))],
  ["MaxVio", (run) => fixed(latest(run, "max_vio"), 3)],
  ["Dead experts", (run) => whole(deadExperts(run))],
  ["Alarms", (run) => whole(run.alarms.length)],
];

function row(cells, tag = "td") {
  const made = document.createElement("tr");
  made.append(...cells.map((cell) => (cell instanceof Node ? cell : element(tag, cell))));
  return made;
}

// New content in place of the old, while whoever reads keeps their place and their focus.
function refill(parent, nodes) {
  const focused = [...parent.querySelectorAll("button")].indexOf(document.activeElement);
  const top = parent.scrollTop;
  parent.replaceChildren(...nodes);
  parent.scrollTop = top;
  if (focused >= 0) parent.querySelectorAll("button")[focused]?.focus({ preventScroll: true });
}

function fillTable(table, names, rows) {
  refill(table.tHead ?? table.createTHead(), [row(names, "th")]);
  refill(table.tBodies[0] ?? table.createTBody(), rows);
}

// A table cell whose button goes somewhere.
function linkCell(words, click) {
  const cell = document.createElement("td");
  cell.append(element("button", words, { onclick: click, className: "link" }));
  return cell;
}

function showComparison() {
  byId("comparison").hidden = state.runs.length < 2;
  const rows = arrived().map((run) => {
    const name = linkCell(run.name, () => show(run.index));
    name.prepend(element("b", "", { style: `background: ${colourOf(run)}` }));
    const made = row([name, ...COMPARED.map(([, value]) => value(run))]);
    made.className = run === firstRun() ? "chosen" : "";
    return made;
  });
  fillTable(byId("comparison").querySelector("table"), ["Run", ...COMPARED.map(([name]) => name)], rows);
}

function show(index) {
  select({ first: index, second: state.second === index ? state.first : state.second });
  refreshWords();
}

function showAlarms() {
  const section = byId("alarms");
  const runs = arrived();
  const alarms = runs.flatMap((run) => run.alarms.map((alarm) => ({ ...alarm, run })));
  alarms.sort((a, b) => b.step - a.step);
  section.querySelector(".missing").hidden = alarms.length > 0;
  refill(section.querySelector("ol"), alarms.slice(0, 200).map((alarm) => {
    const item = document.createElement("li");
    const button = element("button", "", { className: "link", onclick: () => goToAlarm(alarm) });
    const where = runs.length > 1 ? `${alarm.run.name}, step` : "step";
    button.append(element("strong", KINDS[alarm.kind] ?? alarm.kind));
    button.append(element("span", `${where} ${whole(alarm.step)}`), element("q", alarm.message));
    item.append(button);
    return item;
  }));
}

function goToAlarm({ step, layer, expert, run }) {
  if (run !== firstRun()) show(run.index);
  const index = run.layers.indexOf(String(layer));
  goToStep(step);
  if (index >= 0) select({ layer: index, expert });
  byId("controls").scrollIntoView({ behavior: stillness.matches ? "auto" : "smooth" });
}

// Rows of view.py's `preferred` and `pairs`, those of the selected layer first.
function selectedFirst(rows, column, count) {
  const here = (one) => one[column] === firstRun().layers[state.layer];
  return [...rows.filter(here), ...rows.filter((one) => !here(one))].slice(0, count);
}

const toExpert = (layer, expert) => () => select({ layer: firstRun().layers.indexOf(layer), expert });

function preferredTable() {
  const missing = () => (firstRun().domains?.preferred.length ? "" : "No preference beyond chance was seen.");
  return new Figure("preferred", { key: layerKey, missing, paint: ({ element: figure }) => {
    const rows = selectedFirst(firstRun().domains.preferred, 1, 12).map(([domain, layer, expert, lift, z]) =>
      row([domain, layer, linkCell(expert, toExpert(layer, expert)), `${fixed(lift, 2)} ×`, signed(z, 1)]));
    fillTable(figure.querySelector("table"), ["Domain", "Layer", "Expert", "Over all text", "z"], rows);
  } });
}

function pairTable() {
  const missing = () => (firstRun().pairs?.length ? "" : "Pairs of experts were not counted.");
  return new Figure("pairs", { key: layerKey, missing, paint: ({ element: figure }) => {
    const rows = selectedFirst(firstRun().pairs, 0, 12).map(([layer, one, other, ratio, count]) => {
      const experts = [one, other].map((expert) => linkCell(expert, toExpert(layer, expert)));
      return row([layer, ...experts, `${fixed(ratio, 2)} ×`, whole(count)]);
    });
    fillTable(figure.querySelector("table"), ["Layer", "Expert", "With", "Over chance", "Tokens"], rows);
  } });
}
