// Two matrices beside each other: what of one is not in the other, entry by entry and block by block.

// The blocks' norms of the difference of two titles; null where the page has none.
function blocksOfDifference(stop, titles, a, b) {
  if (a === b) return stop.blocks[titles[a]].map(() => 0);
  if (!stop.pairs.length) return null;
  const [low, high] = [Math.min(a, b), Math.max(a, b)];
  let place = 0; // the order is that of Python's combinations
  for (let k = 0; k < low; k++) place += titles.length - 1 - k;
  return stop.pairs[place + high - low - 1];
}

// What is not told apart is drawn as zero.
function difference(stop, a, b) {
  const [one, other] = [stop.sheets[a].values, stop.sheets[b].values];
  const errors = errorsOfDifference(stop, a, b);
  const gaps = new Float64Array(one.length);
  for (let k = 0; k < one.length; k++) if (toldApart(one[k] - other[k], errors?.[k])) gaps[k] = one[k] - other[k];
  return gaps;
}

// One by one: a call takes no more than some ten thousands of arguments.
const frobenius = (norms) => norms.reduce((sum, norm) => Math.hypot(sum, norm), 0);

// Standard errors of the differences of two titles' norms; null where both are exact.
function errorsOfDifference(stop, a, b) {
  const given = [a, b].map((title) => stop.sheets[title].errors).filter(Boolean);
  if (a === b || !given.length) return null;
  const errors = Array.from(given[0], (_, k) => Math.hypot(...given.map((one) => one[k])));
  return errors.some((error) => error !== 0) ? errors : null;
}

// Whether a difference is more than what its error may be; what has no error is, unless it is none.
const toldApart = (gap, error = 0) => Math.abs(gap) >= 2 * error;

// A table of relative errors, a row and a column for each group, with the standard errors of estimates.
function showBlocks(table, groups, errors, norms, caption, doubt = null) {
  const shade = (share) => (share > 0 ? Math.min(Math.max(Math.log10(share) / 6 + 1, 0.02), 1) : 0);
  const name = (scope, { label }) => element("th", { scope, title: label }, shortened(label));
  const upright = groups.length > 4 && groups.some(({ label }) => label.length > 6);
  const head = element("tr", { class: upright ? "upright" : "" }, element("td"), ...groups.map((g) => name("col", g)));
  const rows = groups.map((group, i) => {
    const cells = groups.map((_, j) => {
      const k = i * groups.length + j;
      const share = errors[k] / norms[k];
      const told = toldApart(errors[k], doubt?.[k]);
      const known = percent(share, doubt && doubt[k] / norms[k]);
      const text = !told ? "not told apart" : errors[k] === 0 ? "0 %" : norms[k] === 0 ? "only here" : known;
      const size = doubt ? measured(errors[k], doubt[k]) : roughly(errors[k]);
      const cell = element("td", { class: "number", title: `${size} of ${roughly(norms[k])}` }, text);
      const deep = errors[k] === 0 || !told ? 0 : norms[k] === 0 ? 1 : shade(share);
      cell.style.background = `rgba(${ink("heat")}, ${(0.55 * deep).toFixed(3)})`;
      return cell;
    });
    return element("tr", {}, name("row", group), ...cells);
  });
  table.replaceChildren(element("caption", {}, element("span", {}, caption)), element("thead", {}, head), element("tbody", {}, ...rows));
}

// Gives a table that is wider than its column a row of its own, and says so where even that is too narrow.
function showWide(table, note) {
  const [place, columns] = [table.closest(".scroll"), table.closest(".columns")];
  const wide = () => place.scrollWidth > place.clientWidth + 1;
  columns.classList.remove("stacked");
  columns.classList.toggle("stacked", wide());
  note.hidden = !wide();
}
