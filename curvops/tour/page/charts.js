// What all charts have in common: the page's inks, plotly's options, lines of several matrices.

let Plotly;

const SERIES = ["#4477aa", "#ee6677", "#228833", "#b8a520", "#33aacc", "#aa3377"]; // Paul Tol's bright colours, two darkened
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "cross"];
const DASHES = ["solid", "6px,3px", "2px,2px", "10px,3px", "8px,3px,2px,3px", "4px,4px"];
const CONFIG = { displayModeBar: false, responsive: false, doubleClick: false, showTips: false };

const dark = () => document.documentElement.dataset.theme === "dark";
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const seriesStyle = (k) => ({ color: SERIES[k % 6], symbol: SYMBOLS[k % 6], size: 8 });
const touched = () => matchMedia("(pointer: coarse)").matches;

function axisStyle(more = {}) {
  return {
    color: ink("muted"), gridcolor: ink("line"), linecolor: ink("line"), zerolinecolor: ink("muted"), zeroline: false,
    ticks: "outside", ticklen: 4, tickcolor: ink("line"), showline: true, mirror: true, ...more,
  };
}

function draw(place, traces, layout) {
  const common = {
    width: place.clientWidth,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink("ink") },
    hoverlabel: { bgcolor: ink("ground"), bordercolor: ink("line"), font: { color: ink("ink") } },
    dragmode: touched() ? false : "zoom",
  };
  return Plotly.react(place, traces, { ...common, ...layout }, CONFIG);
}

// A chart over the parameters, ranks or layers, with a legend below that leaves matrices out when clicked.
function drawCurves(place, traces, { x, y, height = 380, shapes = [] }) {
  const listed = place.clientWidth < 560 ? traces.length : 0; // a narrow legend has a line for each
  height += uprightRoom(x);
  return draw(place, traces, {
    height: height + 18 * listed,
    margin: { l: 62, r: 12, t: 8, b: 40 },
    xaxis: axisStyle({ automargin: true, ...x }),
    yaxis: axisStyle({ automargin: true, ...y }),
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0 },
    shapes,
    hovermode: "closest",
    uirevision: place.id,
  });
}

// Ascending places at least `room` apart that are nearest to others, by the weighted squares of the distances, and
// between two ends as far as there is room. As in the figure.
function spread(centres, weights, room, low, high) {
  const pools = []; // with k · room taken off, places only have to ascend: pools of equal ones are at their mean
  centres.forEach((centre, k) => {
    let pool = { at: centre - k * room, weight: weights[k], count: 1 };
    while (pools.length && pools.at(-1).at > pool.at) {
      const { at, weight, count } = pools.pop();
      const both = weight + pool.weight;
      pool = { at: (at * weight + pool.at * pool.weight) / both, weight: both, count: count + pool.count };
    }
    pools.push(pool);
  });
  const top = Math.max(low, high - (centres.length - 1) * room);
  return pools
    .flatMap(({ at, count }) => Array(count).fill(at))
    .map((at, k) => Math.min(Math.max(at, low), top) + k * room);
}

// Which of several labels to write, and where, so that none runs into the next where there are so many pixels to a
// unit: they are moved by at most the room of one, and beyond that those of the smallest parts are left out.
function ticksOf(labels, pixels, room = 15, letters = 24, [low, high] = [-Infinity, Infinity]) {
  let kept = labels.map((label) => ({ size: 1, ...label }));
  let places = [];
  while (kept.length) {
    places = spread(kept.map((l) => l.at * pixels), kept.map((l) => l.size), room, low * pixels, high * pixels);
    const moved = kept.map((l, k) => Math.abs(places[k] - l.at * pixels));
    if (Math.max(...moved) <= room) break;
    const near = kept.filter((_, k) => Math.max(moved[k - 1] ?? 0, moved[k], moved[k + 1] ?? 0) > room);
    const least = near.reduce((a, b) => (b.size < a.size ? b : a));
    kept = kept.filter((l) => l !== least);
  }
  return { tickvals: places.map((at) => at / pixels), ticktext: kept.map((l) => plain(shortened(l.text, letters))) };
}

// The same below a chart: side by side where all have room, else upright.
function ticksBelow(labels, pixels, range) {
  const widths = labels.map(({ text }) => 6.6 * Math.min(text.length, 24) + 10);
  const sorted = labels.map((l) => l.at * pixels);
  const fit = sorted.every((at, k) => !k || at - sorted[k - 1] >= (widths[k] + widths[k - 1]) / 2);
  return { ...ticksOf(labels, pixels, fit ? 0 : 16, 24, range), tickangle: fit ? 0 : -90 };
}

// How much higher a chart is for names that stand upright.
const uprightRoom = ({ tickangle, ticktext }) => (tickangle ? 6.6 * Math.max(...ticktext.map((text) => text.length)) : 0);
