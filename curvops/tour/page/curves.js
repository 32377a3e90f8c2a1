// Eigenvalues, spectral densities, diagonals and traces: all matrices on one axis each.

const MARKS = 50; // numbers of a title up to which each has a mark of its own
const SPECTRUM_DECADES = 8; // that a logarithmic axis shows below the largest magnitude

const rangeOf = (arrays) => {
  let least = Infinity, most = 0;
  for (const array of arrays) {
    for (const x of array) {
      const size = Math.abs(x);
      if (size > 0 && size < least) least = size;
      if (size > most) most = size;
    }
  }
  return most > 0 ? { least, most, usual: most } : { least: 0.1, most: 1, usual: 1 };
};

// The scale of a chart's vertical axis and plotly's settings for it.
function verticalScale(kind, arrays, title) {
  const scale = scaleOf(kind, rangeOf(arrays), SPECTRUM_DECADES);
  const negative = arrays.some((array) => array.some((x) => x < 0));
  const room = 0.04 * (scale.high - scale.low);
  const low = kind === "log" || negative ? scale.low : 0;
  const y = { title: { text: title }, range: [low - room, scale.high + room] };
  if (kind !== "linear") Object.assign(y, { tickvals: scale.ticks.map((t) => t.at), ticktext: scale.ticks.map((t) => t.text) });
  return { of: scale.of, y };
}

// A line that breaks, with a dash for each number instead of a mark: hundreds of marks are slow to draw.
function dashes(trace) {
  const tripled = (list, last) => Array.from(list, (one, k) => last(one, k)).flat();
  return {
    ...trace,
    x: tripled(trace.x, (x) => [x - 0.45, x + 0.45, null]),
    y: tripled(trace.y, (y) => [y, y, null]),
    text: tripled(trace.text, (text) => [text, text, ""]),
    line: { color: trace.line.color, width: 2.5 },
  };
}

// How far from its place a mark of a title stands, so that those of all titles are seen.
const beside = (k, count) => (0.6 * (k + 0.5)) / count - 0.3;

// One trace for each title; `points` gives x, the numbers, their errors and what is said of each. Many are drawn by a
// line: joined where their order allows it.
function seriesOf(titles, of, points, joined = false) {
  return titles.flatMap((title, k) => {
    const given = points(title, k);
    if (!given) return [];
    const { symbol, color, size } = seriesStyle(k);
    const many = given.values.length > MARKS;
    const symbols = Array.from(given.values, (x) => symbol + (x < 0 ? "-open" : ""));
    const trace = {
      type: "scatter", mode: many ? "lines" : "markers", name: plain(title), x: given.x, y: Array.from(given.values, of), text: given.texts.map(plain),
      hovertemplate: "%{text}<extra></extra>",
      line: { color, width: 1.6, dash: DASHES[k % 6] },
      marker: { color, size, symbol: symbols, line: { color, width: 1 } },
    };
    if (given.errors?.some((e) => e > 0)) {
      const upper = Array.from(given.values, (x, i) => of(x + given.errors[i]) - of(x));
      const lower = Array.from(given.values, (x, i) => of(x) - of(x - given.errors[i]));
      trace.error_y = { type: "data", array: upper, arrayminus: lower, color, thickness: 1.2, width: 3 };
    }
    return [many && !joined ? dashes(trace) : trace];
  });
}

function showEigenvalues(place, page, stop, kind) {
  if (!Object.keys(stop.eigenvalues).length) return false;
  const all = page.stops.flatMap((one) => Object.values(one.eigenvalues).map((e) => e.values));
  const { of, y } = verticalScale(kind, all, "eigenvalue");
  const most = Math.max(...all.map((values) => values.length));
  const few = most <= MARKS; // which have marks, side by side
  const traces = seriesOf(page.titles, of, (title, k) => {
    const given = stop.eigenvalues[title];
    if (!given) return null;
    const aside = few ? beside(k, page.titles.length) : 0;
    const order = Array.from(given.values.keys());
    if (kind === "log") order.sort((a, b) => Math.abs(given.values[b]) - Math.abs(given.values[a]));
    const [values, errors] = [given.values, given.residuals].map((numbers) => numbers?.map((_, k) => numbers[order[k]]));
    const texts = Array.from(values, (x, k) => `${title}: λ${k + 1} = ${errors ? measured(x, errors[k], "residual") : exactly(x, values)}`);
    return { x: Array.from(values, (_, k) => k + 1 + aside), values, texts, errors };
  }, true);
  const ranks = few ? { tick0: 1, dtick: Math.ceil(most / 20), range: [0.5, most + 0.5], showgrid: false } : {};
  drawCurves(place, traces, { x: { title: { text: kind === "log" ? "rank by magnitude" : "rank" }, ...ranks }, y });
  return true;
}

function showDensity(place, page, stop) {
  const asinh = (values, t) => Array.from(values, (x) => Math.asinh(x / t));
  const traces = page.titles.flatMap((title, k) => {
    const curve = stop.curves[title];
    if (!curve) return [];
    const { color } = seriesStyle(k);
    const x = asinh(curve.points, stop.threshold);
    const values = Array.from(curve.values);
    const name = plain(title);
    const line = { type: "scatter", mode: "lines", name, legendgroup: name, x, y: values, line: { color, width: 1.6 } };
    line.text = x.map((_, i) => plain(`${title}: λ = ${roughly(curve.points[i])}, density ${roughly(values[i])} ± ${roughly(curve.errors[i])}`));
    line.hovertemplate = "%{text}<extra></extra>";
    const band = { type: "scatter", mode: "lines", x: [...x, ...[...x].reverse()], fill: "toself", fillcolor: `${color}33`, line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: name };
    band.y = [...values.map((v, i) => v + curve.errors[i]), ...values.map((v, i) => Math.max(v - curve.errors[i], 0)).reverse()];
    return [band, line];
  });
  if (!traces.length) return false;
  const largest = Math.max(...Object.values(stop.curves).map((curve) => rangeOf([curve.points]).most));
  const exponents = powers(Math.log10(stop.threshold) + 0.8, Math.log10(largest), 4);
  const at = (x) => Math.asinh(x / stop.threshold);
  const tickvals = [...exponents.map((k) => at(-(10 ** k))).reverse(), 0, ...exponents.map((k) => at(10 ** k))];
  const ticktext = [...exponents.map((k) => `−${power(k)}`).reverse(), "0", ...exponents.map(power)];
  const most = Math.max(...page.stops.flatMap((s) => Object.values(s.curves ?? {})).map((c) => Math.max(...c.values)));
  const reach = Object.values(stop.curves).flatMap((curve) => [at(curve.points[0]), at(curve.points.at(-1))]);
  drawCurves(place, traces, {
    x: { title: { text: "eigenvalue λ" }, tickvals, ticktext, range: [Math.min(...reach), Math.max(...reach)] },
    y: { title: { text: "density" }, range: [0, 1.05 * most] },
  });
  return true;
}

// Lines between the layers of a chart over all parameters, and the layers' names.
function layersBelow(groups, width) {
  let start = 0;
  const middles = [], edges = [];
  for (const { label, size } of groups) {
    if (size) middles.push({ at: start + (size - 1) / 2, text: label, size });
    if (start) edges.push(start - 0.5);
    start += size;
  }
  const shape = (x) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: ink("line"), width: 1 } });
  const range = [-0.5, start - 0.5];
  const x = { range, showgrid: false, ...ticksBelow(middles, width / start, range) };
  return { x, shapes: edges.map(shape) };
}

function showDiagonal(place, page, stop, kind, nameOf) {
  const all = page.stops.flatMap((one) => Object.values(one.diagonals ?? {}));
  if (!all.length) return false;
  const { of, y } = verticalScale(kind, all, "diagonal entry");
  const traces = seriesOf(page.titles, of, (title) => {
    const values = stop.diagonals[title];
    return { x: Array.from(values, (_, k) => k), values, texts: Array.from(values, (v, k) => `${title}: ${nameOf(k)} = ${exactly(v, values)}`) };
  });
  drawCurves(place, traces, { ...layersBelow(page.axis.groups, place.clientWidth), y });
  return true;
}

function showTraces(place, page, stop, kind) {
  const all = page.stops.flatMap((one) => Object.values(one.traces ?? {}).map((trace) => trace.values));
  if (!all.length) return false;
  const { groups } = page.axis;
  const { of, y } = verticalScale(kind, all, "trace of the block");
  const traces = seriesOf(page.titles, of, (title, k) => {
    const given = stop.traces[title];
    if (!given) return null;
    const { values, errors } = given;
    const texts = Array.from(values, (v, i) => `${title}: ${groups[i].label}, trace ${errors ? measured(v, errors[i]) : roughly(v, 6)}`);
    return { x: Array.from(values, (_, i) => i + beside(k, page.titles.length)), values, texts, errors };
  });
  const names = groups.map(({ label }, k) => ({ at: k, text: label }));
  const x = { range: [-0.5, groups.length - 0.5], showgrid: false, ...ticksBelow(names, place.clientWidth / groups.length) };
  drawCurves(place, traces, { x, y });
  return true;
}

// For each leading eigenvector of a matrix its mass in each group.
function showMasses(place, page, stop, title) {
  const given = stop.eigenvalues[title];
  if (!given?.masses) return false;
  const { groups } = page.axis;
  const count = given.values.length;
  const z = Array.from({ length: count }, (_, k) => given.masses.subarray(k * groups.length, (k + 1) * groups.length));
  const text = z.map((row, k) =>
    Array.from(row, (m, g) => plain(`${groups[g].label}: ${percent(m)} of eigenvector ${k + 1} (λ = ${roughly(given.values[k], 5)})`)),
  );
  const colors = page.palettes[dark() ? "dark" : "light"].sequential;
  const trace = { type: "heatmap", z, text, zmin: 0, zmax: 1, colorscale: colorscale(colors), hovertemplate: "%{text}<extra></extra>", colorbar: { thickness: 10, tickformat: ".0%", outlinewidth: 0 } };
  const names = groups.map(({ label }, k) => ({ at: k, text: label }));
  const labels = Array.from(given.values, (v, k) => ({ at: k, text: `${k + 1}: ${roughly(v)}` }));
  const height = Math.max(200, 26 * count + 110);
  drawCurves(place, [trace], {
    height,
    x: { showgrid: false, range: [-0.5, groups.length - 0.5], ...ticksBelow(names, place.clientWidth / groups.length) },
    y: { showgrid: false, range: [count - 0.5, -0.5], ...ticksOf(labels, (height - 110) / count), title: { text: "eigenvalue" } },
  });
  return true;
}
