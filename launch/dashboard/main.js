// Controls, and the start: views from the exported page if it carries any, else from the server.

const stillness = matchMedia("(prefers-reduced-motion: reduce)");

function fillSelect(id, choices, chosen) {
  const list = byId(id);
  const wanted = choices.map(([value, words]) => `${value}|${words}`).join("\n");
  if (list.dataset.choices !== wanted) {
    list.replaceChildren(...choices.map(([value, words]) => new Option(words, value)));
    list.dataset.choices = wanted;
  }
  list.value = String(chosen);
}

// Everything outside of the figures follows the state, too.
function showControls() {
  const run = firstRun();
  const frames = run.steps.length;
  const [slider, frame] = [byId("step"), shownFrame()];
  slider.max = Math.max(frames - 1, 0);
  slider.value = frame;
  slider.disabled = byId("play").disabled = frames < 2;
  const words = frames ? `${whole(run.steps[frame])} of ${whole(run.steps.at(-1))}` : NONE;
  slider.setAttribute("aria-valuetext", `step ${words}`);
  byId("position").textContent = words;
  byId("newest").setAttribute("aria-pressed", state.step === null);
  byId("play").textContent = state.playing ? "Pause" : "Play";
  byId("play").setAttribute("aria-label", state.playing ? "Pause" : "Play the steps");
  fillSelect("layer", run.layers.map((name, layer) => [layer, name]), state.layer);
  byId("order").parentElement.hidden = run.homes < 2;
  byId("order").value = state.order;
  const fitted = state.reach === null ? `fit (${reachOf()} ×)` : "fit";
  fillSelect("reach", [["", fitted], ...REACHES.map((reach) => [reach, `${reach} ×`])], state.reach ?? "");
  const names = arrived().map(({ index, name }) => [index, name]);
  fillSelect("first", names, state.first);
  const others = names.filter(([index]) => index !== state.first);
  fillSelect("second", [["", "none"], ...others], state.second ?? "");
  for (const label of document.querySelectorAll(".several")) label.hidden = names.length < 2;
}

// Something arrived: words are written anew, figures when they are seen.
function changed() {
  if (!firstRun()?.version) return;
  document.querySelector("main").hidden = false;
  refreshWords();
  select({});
}

function refreshWords() {
  showHeader();
  showTiles();
  showComparison();
  showAlarms();
}

function listenToControls() {
  byId("step").addEventListener("input", ({ target }) => {
    const newest = Number(target.value) === Number(target.max);
    select({ step: newest ? null : firstRun().steps[target.value] });
  });
  byId("newest").addEventListener("click", () => select({ step: null, playing: false }));
  byId("play").addEventListener("click", () => (state.playing ? select({ playing: false }) : play()));
  byId("layer").addEventListener("change", ({ target }) => select({ layer: Number(target.value) }));
  byId("order").addEventListener("change", ({ target }) => select({ order: target.value }));
  byId("reach").addEventListener("change", ({ target }) => select({ reach: Number(target.value) || null }));
  byId("first").addEventListener("change", ({ target }) => show(Number(target.value)));
  byId("second").addEventListener("change", ({ target }) => {
    select({ second: target.value === "" ? null : Number(target.value) });
    refreshWords();
  });
  addEventListener("beforeprint", () => Figure.all.forEach((figure) => figure.refresh()));
}

// All frames one after the other, from the start if the newest is shown.
function play() {
  const next = (frame) => {
    const { steps } = firstRun();
    const last = frame >= steps.length - 1;
    select({ step: last ? null : steps[frame], playing: !last });
    if (!last) setTimeout(() => state.playing && next(shownFrame() + 1), stillness.matches ? 500 : 80);
  };
  next(state.step === null ? 0 : shownFrame() + 1);
}

function makeFigures() {
  metricChart("loss", "loss", "Loss over steps", { points: true, height: 260 });
  metricChart("speed", "tokens_per_second", "Tokens per second over steps", { zero: true });
  metricChart("norm", "grad_norm", "Gradient norm over steps", { log: true, floor: 1e-6 });
  metricChart("violation", "max_vio", "Mean MaxVio over steps", { log: true, floor: 0.01 });
  const load = new LoadMap();
  new History();
  biasChart();
  layerChart();
  new TrafficMatrix();
  new RankLoads();
  new DomainMap();
  preferredTable();
  pairTable();
  new Timeline();
  return load;
}

async function start() {
  const load = makeFigures();
  listenToControls();
  // What tests look at: nothing here can be set.
  window.dashboard = Object.freeze({
    get runs() {
      return arrived().map(({ name, steps, layers, num_experts, state: now }) =>
        ({ name, frames: steps.length, layers: [...layers], experts: num_experts, state: now }));
    },
    get state() {
      const frame = state.runs.length ? shownFrame() : -1;
      return { ...state, runs: undefined, frame, frames: firstRun()?.steps.length ?? 0 };
    },
    cell: (side, layer, expert) => ({ ...load.cell(side, layer, expert) }),
  });
  const views = await exportedViews();
  if (views) {
    views.forEach((view, index) => (state.runs[index] = new Run(index)).take(view));
    changed();
    return;
  }
  byId("state").textContent = "Waiting for the first steps.";
  new Live(state.runs, changed, (sentence) => (byId("link").textContent = sentence)).start();
}

start();
