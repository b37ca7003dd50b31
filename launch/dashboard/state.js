// What the page shows, and the one way to change it.

const state = {
  runs: [],
  first: 0, // index of the run in the figures
  second: null, // and of the one beside it
  step: null, // null sticks to the newest
  layer: 0,
  expert: null,
  order: "rank",
  reach: null, // where colours end; null fits the data
  playing: false,
};

function select(change) {
  Object.assign(state, change);
  const layers = firstRun().layers.length;
  state.layer = Math.min(Math.max(state.layer, 0), Math.max(layers - 1, 0));
  if (state.expert !== null && state.expert >= firstRun().num_experts) state.expert = null;
  showControls();
  Figure.update();
}

const firstRun = () => state.runs[state.first];
const secondRun = () => (state.second === null ? null : state.runs[state.second]);
const shownRuns = () => [firstRun(), secondRun()].filter(Boolean);
const arrived = () => state.runs.filter((run) => run.version);
const colourOf = (run) => RUN_COLOURS[run.index % RUN_COLOURS.length];

// The frame of the first run, and of another run the one at the same step.
const shownFrame = () => firstRun().frameAt(state.step);
const frameOf = (run) => (run === firstRun() ? shownFrame() : run.frameAt(firstRun().steps[shownFrame()]));

// Past the last frame but one, the newest is meant.
function goToStep(step) {
  const newest = step > (firstRun().steps.at(-2) ?? -1);
  select({ step: newest ? null : Math.max(step, 0) });
}

// The steps that the first run's frames hold, from before the first to the last.
const frameSpan = () => [firstRun().steps[0] - firstRun().spans[0], firstRun().steps.at(-1)];

// Whether the experts' columns follow the ranks that hold them.
const byRank = (run) => state.order === "rank" && run.homes > 1;

const reachOf = (() => {
  const fitted = new Map();
  return () => {
    if (state.reach !== null) return state.reach;
    const key = versions(shownRuns());
    if (!fitted.has(key)) {
      fitted.clear();
      fitted.set(key, fittingReach(shownRuns()));
    }
    return fitted.get(key);
  };
})();

const versions = (runs) => runs.map((run) => `${run.index}.${run.version}`).join(" ");
const layerKey = () => `${versions([firstRun()])} ${state.layer} ${state.expert} ${state.order}`;

const noLoad = () =>
  firstRun().rows.has("load") && firstRun().steps.length ? "" : "No step with experts has been recorded yet.";
