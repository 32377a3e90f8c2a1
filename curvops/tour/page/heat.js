// Heat maps side by side, all showing the same rows and columns.

const GAP = { x: 22, y: 34 };
const LETTER = { width: 7.4, height: 17 }; // pixels of a heading's

// Where rows and columns are seen from and to: [[first, last] of rows, of columns].
const whole = (axis) => [[-0.5, axis.rows - 0.5], [-0.5, axis.rows - 0.5]];

// Values as plotly takes them, drawn on a scale: one array for each row.
function drawn(values, rows, of) {
  const places = new Float64Array(values.length); // linear places are the numbers: in single precision 1e200 is infinite
  for (let k = 0; k < values.length; k++) places[k] = of(values[k]);
  return Array.from({ length: rows }, (_, r) => places.subarray(r * rows, (r + 1) * rows));
}

// The names at an axis: of what the boundaries are drawn between, and of the parameters within a single group.
function namesIn(axis, [low, high], edges) {
  const seen = (parts) =>
    parts
      .map((part) => ({ from: Math.max(part.start - 0.5, low), to: Math.min(part.start + part.rows - 0.5, high), text: part.label ?? part.name }))
      .filter(({ from, to }) => from < to)
      .map(({ from, to, text }) => ({ at: (from + to) / 2, size: to - from, text }));
  const groups = seen(axis.groups);
  return edges === "parameters" || (groups.length === 1 && axis.pieces.length > 1) ? seen(axis.pieces) : groups;
}

// Lines between parts, all in one trace.
function linesBetween(parts, rows, style, at) {
  const x = [], y = [];
  for (const { start } of parts.filter((part) => part.start > 0 && part.rows)) {
    x.push(-0.5, rows - 0.5, null, start - 0.5, start - 0.5, null);
    y.push(start - 0.5, start - 0.5, null, -0.5, rows - 0.5, null);
  }
  return { type: "scatter", mode: "lines", x, y, line: style, hoverinfo: "skip", showlegend: false, ...at };
}

// Lines on wider ones of the opposite lightness, so that they are seen on dark and on light blocks.
function boundaries(parts, rows, dash, at) {
  const styles = [{ color: ink("halo"), width: dash === "solid" ? 3 : 2 }, { color: ink("edge"), width: 1, dash }];
  return styles.map((style) => linesBetween(parts, rows, style, at));
}

// Sizes in pixels of a grid of square panels in a place that is so wide.
function gridOf(place, count, axis) {
  const width = place.clientWidth;
  const columns = Math.min(count, width >= 640 ? 3 : width >= 480 ? 2 : 1);
  const longest = Math.max(...[...axis.groups, ...axis.pieces].map((part) => shortened(part.label ?? part.name).length));
  const names = Math.min(18 + 6.2 * longest, 0.3 * width);
  const letters = Math.max(Math.floor((names - 17.9) / 6.2), 4);
  const side = Math.min((width - names - 8 - (columns - 1) * GAP.x) / columns, 620);
  const rows = Math.ceil(count / columns);
  const margin = { l: names, r: Math.max(width - names - columns * side - (columns - 1) * GAP.x, 0), t: 28, b: names };
  return { columns, rows, side, margin, letters, height: rows * side + (rows - 1) * GAP.y + margin.t + margin.b };
}

// The lines of a panel's heading, as plotly takes them, in so many pixels.
function headingOf({ title, range }, width) {
  const letters = Math.floor(width / LETTER.width);
  const lines = inLines(title, letters);
  const beside = range && lines.at(-1).length + 2 + range.length <= letters;
  const bold = lines.map((line) => `<b>${plain(line)}</b>`);
  return !range ? bold : beside ? [...bold.slice(0, -1), `${bold.at(-1)}  ${plain(range)}`] : [...bold, plain(range)];
}

// Ranges and names of both axes of every panel, for plotly's layout.
function viewLayout(axis, view, grid, count, edges) {
  const [rows, columns] = view;
  const layout = {};
  for (let k = 0; k < count; k++) {
    const id = k ? k + 1 : "";
    const pixels = ([low, high]) => grid.side / (high - low);
    const names = (range) => ticksOf(namesIn(axis, range, edges), pixels(range), 15, grid.letters, range);
    layout[`xaxis${id}`] = { range: [...columns], ...names(columns) };
    layout[`yaxis${id}`] = { range: [rows[1], rows[0]], ...names(rows) };
  }
  return layout;
}

function drawHeat(place, panels, { axis, view, edges, drag }) {
  const grid = gridOf(place, panels.length, axis);
  const headings = panels.map((panel) => headingOf(panel, grid.side));
  const more = (Math.max(...headings.map((lines) => lines.length)) - 1) * LETTER.height;
  grid.margin.t += more;
  grid.height += grid.rows * more;
  const inner = { width: place.clientWidth - grid.margin.l - grid.margin.r, height: grid.height - grid.margin.t - grid.margin.b };
  const layout = viewLayout(axis, view, grid, panels.length, edges);
  const traces = [], annotations = [];
  panels.forEach((panel, k) => {
    const id = k ? k + 1 : "";
    const [row, column] = [Math.floor(k / grid.columns), k % grid.columns];
    const left = (column * (grid.side + GAP.x)) / inner.width;
    const top = 1 - (row * (grid.side + GAP.y + more)) / inner.height;
    const [right, bottom] = [left + grid.side / inner.width, top - grid.side / inner.height];
    const lowest = k + grid.columns >= panels.length;
    const limits = { minallowed: -0.5, maxallowed: axis.rows - 0.5 };
    const style = axisStyle({ ...limits, showgrid: false, ticks: "" });
    Object.assign(layout[`xaxis${id}`], style, { domain: [left, Math.min(right, 1)], anchor: `y${id}`, matches: k ? "x" : undefined, showticklabels: lowest, tickangle: -90 });
    Object.assign(layout[`yaxis${id}`], style, { domain: [Math.max(bottom, 0), top], anchor: `x${id}`, matches: k ? "y" : undefined, showticklabels: column === 0 });
    const at = { xaxis: `x${id}`, yaxis: `y${id}` };
    traces.push({
      type: "heatmap", z: panel.z, zmin: panel.scale.low, zmax: panel.scale.high, colorscale: colorscale(panel.colors),
      showscale: false, zsmooth: false, hoverinfo: "none", hoverongaps: true, name: panel.title, ...at,
    });
    if (edges === "parameters") traces.push(...boundaries(axis.pieces, axis.rows, "dot", at));
    if (edges !== "none") traces.push(...boundaries(axis.groups, axis.rows, "solid", at));
    annotations.push({
      text: headings[k].join("<br>"), showarrow: false, font: { size: 13 }, align: "left",
      xref: "paper", yref: "paper", x: left, y: top, xanchor: "left", yanchor: "bottom",
    });
  });
  return draw(place, traces, {
    ...layout, annotations, height: grid.height, margin: grid.margin, plot_bgcolor: ink("zero"), hovermode: "closest",
    dragmode: drag === "false" ? false : drag,
  });
}

// Shows other rows and columns in a drawn heat map.
function moveHeat(place, count, axis, view, edges) {
  const changes = {};
  for (const [name, values] of Object.entries(viewLayout(axis, view, gridOf(place, count, axis), count, edges))) {
    for (const [key, value] of Object.entries(values)) changes[`${name}.${key}`] = value;
  }
  return Plotly.relayout(place, changes);
}

// Calls back on a pointer's coming to an entry, leaving, a click, and on zoom and pan by dragging.
function listen(place, { enter, leave, open, move, reset }) {
  const cell = (event) => event.points.find((point) => point.data.type === "heatmap");
  place.on("plotly_hover", (event) => {
    const point = cell(event);
    if (point) enter(...point.pointNumber, point.data.name, event.event);
  });
  place.on("plotly_unhover", leave);
  place.on("plotly_click", (event) => cell(event) && open(...cell(event).pointNumber, cell(event).data.name));
  place.on("plotly_doubleclick", reset);
  place.on("plotly_relayout", (changes) => {
    if (Object.keys(changes).some((key) => /axis\d*\.range\[/.test(key))) {
      const { xaxis, yaxis } = place.layout;
      move([[...yaxis.range].reverse(), [...xaxis.range]]);
    }
  });
}
