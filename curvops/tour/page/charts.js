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

// Which of several labels to write where there are so many pixels to a unit, that none runs into the next.
function ticksOf(labels, pixels, room = 15, letters = 24) {
  let last = -Infinity;
  const kept = labels.filter(({ at }) => {
    const free = (at - last) * pixels >= room;
    if (free) last = at;
    return free;
  });
  return { tickvals: kept.map((l) => l.at), ticktext: kept.map((l) => plain(shortened(l.text, letters))) };
}
