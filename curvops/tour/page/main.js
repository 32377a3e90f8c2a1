// The page itself: its state, its controls, and which part is drawn when.

const page = JSON.parse(byId("data").textContent);
page.axis.pieces = withStarts(page.axis.pieces);
page.axis.groups = withStarts(page.axis.groups);
const { axis, titles } = page;
const state = { stop: 0, view: whole(axis) };
const tip = element("div", { id: "tip", hidden: "" });

const value = (id) => byId(id).value;
const current = () => page.stops[state.stop];
const nameOf = (row) => rowName(axis.pieces, row);
const option = (text, value) => element("option", { value }, text);

// The matrices of a stop, when it is first seen; what else there is of all stops is unpacked at once.
async function load(k) {
  const stop = page.stops[k];
  if (!stop.ready) Object.assign(stop, { sheets: await unpacked(stop.sheets), ready: true });
}

async function loadRest(stop) {
  return { ...(await unpacked({ ...stop, sheets: null })), sheets: stop.sheets };
}

// Of a matrix or of a difference: the numbers that are drawn, which for cells on the logarithm are the largest in each.
function shownValues({ values, low, high }, kind) {
  return kind === "log" && low ? values.map((_, k) => Math.max(Math.abs(low[k]), Math.abs(high[k]))) : values;
}

function colorsOf(kind) {
  const { sequential, diverging } = page.palettes[dark() ? "dark" : "light"];
  return kind === "log" || page.kind === "norms" ? sequential : diverging;
}

function scaleFor(some) {
  return scaleOf(value("colors"), magnitudes(page.stops, some), DECADES, page.kind === "norms");
}

const QUANTITIES = { entries: "entry", cells: "entry", norms: "norm of a block" };

const palest = (scale) => (scale.cut ? `; ${dark() ? "the darkest" : "the palest"} is everything below ${roughly(10 ** scale.low, 2)}` : "");

function legendTitle(scale) {
  const what = QUANTITIES[page.kind];
  if (scale.kind === "log") {
    const shown = page.kind === "cells" ? "Largest |entry| of a cell" : page.kind === "norms" ? "Frobenius norm of a block" : "|entry|";
    return `${shown}, logarithmic${palest(scale)}`;
  }
  const name = page.kind === "cells" ? "Mean entry of a cell" : what[0].toUpperCase() + what.slice(1);
  return scale.kind === "signed" ? `${name}, with its sign, logarithmic` : `${name}, linear${scale.cut ? "; larger ones have the ends' colours" : ""}`;
}

function drawMatrices() {
  const [kind, own, colors] = [value("colors"), value("scale") === "own", colorsOf(value("colors"))];
  const shared = scaleFor(titles);
  const panels = titles.map((title) => {
    const scale = own ? scaleFor([title]) : shared;
    const { most } = magnitudes(page.stops, [title]);
    const range = own ? `to ${roughly(kind === "linear" ? scale.high : most, 2)}` : "";
    return { title, scale, colors, range, z: drawn(shownValues(current().sheets[title], kind), axis.rows, scale.of) };
  });
  drawHeat(byId("panels"), panels, { axis, view: state.view, edges: edges(), drag: value("drag") });
  showLegend(byId("legend"), shared, colors, {
    title: legendTitle(shared),
    own: own ? "each panel from its own smallest to its own largest" : null,
  });
}

const edges = () => (page.kind === "norms" ? "none" : value("edges"));
const pair = () => [Number(value("minuend")), Number(value("subtrahend"))];

function drawDifference() {
  if (titles.length < 2) return;
  const [a, b] = pair();
  const [one, other] = [titles[a], titles[b]];
  showErrors(a, b); // first: the table has a say in the heat map's width
  const scale = scaleOf(value("colors"), magnitudes(page.stops, value("scale") === "own" ? [one, other] : titles), DECADES);
  const colors = page.palettes[dark() ? "dark" : "light"][scale.kind === "log" ? "sequential" : "diverging"];
  const panel = { title: `${one} − ${other}`, scale, colors, z: drawn(difference(current(), one, other), axis.rows, scale.of) };
  drawHeat(byId("difference"), [panel], { axis, view: state.view, edges: edges(), drag: value("drag") });
  const what = page.kind === "cells" ? "difference of mean entries" : page.kind === "norms" ? "difference of norms" : "difference";
  const title = scale.kind === "log" ? `|${what}|, logarithmic${palest(scale)}` : `${what}, ${scale.kind === "signed" ? "with its sign, logarithmic" : "linear"}`;
  const zero = errorsOfDifference(current(), one, other) ? "zero, or not told apart" : undefined;
  showLegend(byId("difference-legend"), scale, colors, { title, own: null, zero });
}

function showErrors(a, b) {
  const [one, other] = [titles[a], titles[b]];
  const norms = current().blocks[other];
  const errors = blocksOfDifference(current(), titles, a, b);
  const between = errors ?? current().blocks[one].map((norm, k) => Math.abs(norm - norms[k]));
  const caption = errors ? `‖${one} − ${other}‖ / ‖${other}‖` : `|‖${one}‖ − ‖${other}‖| / ‖${other}‖`;
  const gap = frobenius(between);
  const overall = gap && gap / frobenius(norms);
  byId("overall").textContent = errors
    ? `Frobenius norm of the difference over that of the ${other}, all blocks together, ${caption}: ${percent(overall)}.`
    : "Of matrices this large only the blocks' norms are known: below is by how much these differ, which says less than the norm of a difference.";
  const doubt = errorsOfDifference(current(), one, other);
  showBlocks(byId("blocks"), axis.groups, between, norms, caption, doubt);
  showWide(byId("blocks"), byId("blocks-more"));
  byId("blocks-note").textContent = page.kind !== "norms"
    ? "Frobenius norms, in double precision, of whole blocks."
    : doubt
      ? "Norms of blocks are estimated from products: ± is a standard error of the difference, the root of both squares. Blocks that differ by less than two of them are not told apart, and drawn as zero."
      : "Frobenius norms of blocks, which are exact for these two.";
}

function drawSpectra() {
  const kind = value("axis");
  byId("eigenvalues").hidden = false;
  const shown = showEigenvalues(byId("eigenvalues"), page, current(), kind);
  byId("eigenvalues").hidden = !shown;
  const marked = Object.values(current().eigenvalues).some((of) => of.values.length <= MARKS);
  const hollow = marked ? " Hollow marks are negative." : "";
  byId("eigenvalues-note").textContent = !shown
    ? page.kind === "norms" ? "Not computed." : `Not computed: the matrices have ${axis.side} rows, and pages compute eigenvalues of up to ${page.eigenvalue_limit}.`
    : page.kind === "norms"
      ? `The largest in magnitude, with the residual of each as its error bar.${hollow}`
      : `All eigenvalues of the symmetric part, in double precision.${hollow} The rounding of a matrix in single precision moves an eigenvalue by about 10⁻⁷ of the largest: smaller ones are noise.`;
  byId("density-part").hidden = false;
  byId("density-part").hidden = !current().threshold || !showDensity(byId("density"), page, current());
  byId("diagonal-part").hidden = !showDiagonal(byId("diagonal"), page, current(), kind, entryName);
  byId("traces-part").hidden = !showTraces(byId("traces"), page, current(), kind);
  drawMasses();
}

function drawMasses() {
  byId("masses-part").hidden = false;
  byId("masses-part").hidden = !showMasses(byId("masses"), page, current(), value("mass-of"));
}

// The name of a parameter's entry, whatever a row of the page's matrices holds.
const singles = withStarts(page.axis.pieces.map((piece) => ({ ...piece, step: 1, rows: piece.size })));
const entryName = (k) => rowName(singles, k);

function drawAll() {
  drawMatrices();
  drawRest();
}

function drawRest() {
  drawDifference();
  drawSpectra();
  showAbout(byId("facts"), byId("explanations"), page, current());
  showEntry();
}

// What is known of an entry of all matrices, for the pointer's tip and for reading by number.
function reading(row, column, here = null) {
  const k = row * axis.rows + column;
  const lines = [["row", nameOf(row), "name"], ["column", nameOf(column), "name"]];
  for (const title of titles) {
    const { values, low, high, errors } = current().sheets[title];
    let text = errors ? measured(values[k], errors[k]) : exactly(values[k], values);
    if (low && low[k] !== high[k]) text = `mean ${roughly(values[k], 4)}, from ${exactly(low[k], low)} to ${exactly(high[k], high)}`;
    lines.push([title, text, title === here ? "here" : ""]);
  }
  if (here === "difference") {
    const [one, other] = pair().map((i) => titles[i]);
    const gap = current().sheets[one].values[k] - current().sheets[other].values[k];
    const doubt = errorsOfDifference(current(), one, other)?.[k];
    const text = doubt !== undefined ? measured(gap, doubt) : page.kind === "entries" ? written(gap) : roughly(gap, 4);
    lines.push([`${one} − ${other}`, toldApart(gap, doubt) ? text : `${text}, not told apart`, "here"]);
  }
  const list = element("dl", { class: "reading" });
  for (const [name, text, mark] of lines) list.append(element("dt", { class: mark === "here" ? mark : "" }, name), element("dd", { class: mark }, text));
  return list;
}

// The row that a field means, whatever was typed into it.
const asked = (id) => Math.min(Math.max(Math.round(Number(value(id))) || 0, 0), axis.rows - 1);

function showEntry() {
  byId("entry").replaceChildren(reading(asked("row"), asked("column")));
  showCode(asked("row"), asked("column"));
}

// A line of Python that computes the entries of a block, of which the page knows the norm.
function showCode(row, column) {
  const operator = current().code[state.title ?? titles[0]];
  byId("code-part").hidden = !operator || !page.group_code.length;
  if (byId("code-part").hidden) return;
  const [above, aside] = [page.group_code[row], page.group_code[column]];
  const key = row === column ? above.names : `${above.names}, ${aside.names}`;
  const slices = above.rows || aside.rows ? `[${above.rows || ":"}, ${aside.rows || ":"}]` : "";
  byId("code").textContent = `${operator}[${key}].to_dense()${slices}`;
}

function copyCode() {
  getSelection().selectAllChildren(byId("code")); // where there is no clipboard, Ctrl+C copies it
  navigator.clipboard?.writeText(byId("code").textContent).catch(() => {});
}

function showTip(row, column, title, event) {
  tip.replaceChildren(reading(row, column, title));
  tip.hidden = false;
  const { clientX: x, clientY: y } = event;
  const left = x + 18 + tip.offsetWidth > innerWidth ? Math.max(x - 18 - tip.offsetWidth, 4) : x + 18;
  const top = y + 18 + tip.offsetHeight > innerHeight ? Math.max(y - 18 - tip.offsetHeight, 4) : y + 18;
  Object.assign(tip.style, { left: `${left}px`, top: `${top}px` });
}

// Looks at other rows and columns, at least one and none outside, in both heat maps.
function look(view) {
  const inside = view.map(([low, high]) => {
    const size = Math.min(Math.max(high - low, 1), axis.rows);
    const first = Math.min(Math.max((low + high - size) / 2, -0.5), axis.rows - 0.5 - size);
    return [first, first + size];
  });
  if (JSON.stringify(inside) === JSON.stringify(state.view)) return;
  state.view = inside;
  moveHeat(byId("panels"), titles.length, axis, inside, edges());
  if (titles.length > 1) moveHeat(byId("difference"), 1, axis, inside, edges());
  const chosen = inside.map(([low, high]) => axis.groups.findIndex((g) => g.start - 0.5 === low && g.start + g.rows - 0.5 === high));
  byId("block-rows").value = String(chosen[0]);
  byId("block-columns").value = String(chosen[1]);
}

const all = () => look(whole(axis));
const span = (group) => [group.start - 0.5, group.start + group.rows - 0.5];

function openBlock(row, column, title) {
  if (page.kind !== "norms") return look([span(partOf(axis.groups, row)), span(partOf(axis.groups, column))]);
  [byId("row").value, byId("column").value] = [row, column];
  if (titles.includes(title)) state.title = title;
  showEntry();
}

function lookAtChosen() {
  const chosen = ["block-rows", "block-columns"].map((id) => axis.groups[Number(value(id))]);
  look(chosen.map((group, k) => (group ? span(group) : whole(axis)[k])));
}

function zoom(factor) {
  look(state.view.map(([low, high]) => [(low + high) / 2 - ((high - low) / 2) * factor, (low + high) / 2 + ((high - low) / 2) * factor]));
}

function pan(down, right) {
  look(state.view.map(([low, high], k) => [low, high].map((end) => end + 0.2 * (high - low) * (k ? right : down))));
}

const KEYS = {
  "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2),
  ArrowUp: () => pan(-1, 0), ArrowDown: () => pan(1, 0), ArrowLeft: () => pan(0, -1), ArrowRight: () => pan(0, 1),
};

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").setAttribute("aria-pressed", String(name === "dark"));
}

function fillControls() {
  for (const id of ["block-rows", "block-columns"]) {
    byId(id).append(option("all layers", "-1"), ...axis.groups.map((g, k) => option(g.label, String(k))));
  }
  const choices = () => titles.map((title, k) => option(title, String(k)));
  byId("minuend").append(...choices());
  byId("subtrahend").append(...choices());
  const reference = Math.max(titles.indexOf("Hessian"), 0); // what all others are approximations of
  byId("subtrahend").value = String(reference);
  byId("minuend").value = String(titles.findIndex((_, k) => k !== reference));
  byId("mass-of").append(...titles.map((title) => option(title, title)));
  byId("differences").hidden = titles.length < 2;
  for (const id of ["row", "column"]) byId(id).max = axis.rows - 1;
  byId("drag").value = touched() ? "false" : "zoom";
  byId("stops").hidden = page.stops.length < 2;
  byId("stop").max = page.stops.length - 1;
  if (page.kind === "norms") {
    for (const part of document.querySelectorAll(".entries")) part.hidden = true;
    byId("colors").querySelector("[value=signed]").remove();
    byId("read-what").textContent = "Read a block";
    byId("blocks-heading").textContent = "Relative difference of the norms";
    byId("spectra-heading").textContent = "Eigenvalues and traces";
  }
  const hand = page.kind === "norms" ? "Click a block for a line of Python that computes its entries. " : "Click a block of layers to open it, Escape to see the whole. ";
  byId("panels").setAttribute("aria-label", `Heat maps of ${titles.join(", ")}`);
  byId("panels-help").textContent = `${hand}Point at ${page.kind === "norms" ? "a block" : "an entry"} to read it. With the keyboard: + and − zoom, the arrows move, Escape shows the whole.`;
  if (page.kind === "cells") {
    const step = Math.max(...axis.pieces.map((piece) => piece.step));
    byId("cells-note").hidden = false;
    byId("cells-note").textContent = `The matrices are too large for a page. A cell stands for up to ${step} × ${step} neighbouring entries: the logarithm shows the largest of them, the other colours their mean, and the pointer reads their range. Eigenvalues, diagonals and errors are those of the whole matrices.`;
  }
}

function wire() {
  const on = (id, name, act) => byId(id).addEventListener(name, act);
  for (const id of ["colors", "scale", "edges", "drag"]) on(id, "change", () => { drawMatrices(); drawDifference(); });
  for (const id of ["minuend", "subtrahend"]) on(id, "change", drawDifference);
  for (const id of ["block-rows", "block-columns"]) on(id, "change", lookAtChosen);
  for (const id of ["row", "column"]) {
    on(id, "input", showEntry);
    on(id, "change", () => { byId(id).value = asked(id); }); // not while it is typed
  }
  on("axis", "change", drawSpectra);
  on("mass-of", "change", drawMasses);
  on("whole", "click", all);
  on("copy", "click", copyCode);
  on("zoom-in", "click", () => zoom(0.5));
  on("zoom-out", "click", () => zoom(2));
  on("stop", "input", () => show(Number(value("stop"))));
  on("theme", "click", () => { setTheme(dark() ? "light" : "dark"); drawAll(); });
  on("panels", "keydown", (event) => {
    if (!KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") { tip.hidden = true; all(); } });
  const common = { leave: () => { tip.hidden = true; }, open: openBlock, move: look, reset: all };
  listen(byId("panels"), { ...common, enter: showTip });
  if (titles.length > 1) listen(byId("difference"), { ...common, enter: (r, c, _, event) => showTip(r, c, "difference", event) });
}

// Where and in which inks the page is seen may change.
function follow() {
  let width = innerWidth, waiting;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar comes and goes
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => { setTheme(event.matches ? "dark" : "light"); drawAll(); });
  let before;
  addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme;
    setTheme("light");
    document.body.classList.add("printing");
    drawAll();
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
  addEventListener("afterprint", () => { document.body.classList.remove("printing"); setTheme(before); drawAll(); });
}

async function show(k) {
  await load(k);
  if (Number(value("stop")) !== k) return; // the slider has moved on
  state.stop = k;
  byId("stop-label").textContent = current().label;
  byId("stop").setAttribute("aria-valuetext", current().label);
  drawMatrices();
  await new Promise((painted) => setTimeout(painted));
  if (state.stop === k) drawRest();
}

async function start() {
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const problem = page.stops[0].about.settings.setup;
  byId("summary").textContent = `${titles.join(", ")}${problem && problem !== page.title ? ` · ${problem}` : ""}`;
  byId("written-by").textContent = `Written by curvops ${page.written_by}. All of it is in this file, plotly.js (MIT licence) included; nothing is loaded.`;
  document.body.append(tip);
  fillControls();
  page.stops = await Promise.all(page.stops.map(loadRest));
  [Plotly] = await Promise.all([loadPlotly(), load(0)]);
  byId("loading").hidden = true;
  document.querySelector("main").hidden = false;
  await show(0);
  wire();
  follow();
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  byId("loading").hidden = true;
  byId("alert").hidden = false;
  byId("alert").textContent = `The page cannot be shown: ${error.message}. A current version of Chromium, Firefox or Safari shows it.`;
  throw error;
});
