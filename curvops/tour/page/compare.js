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

function difference(stop, a, b) {
  const [one, other] = [stop.sheets[a].values, stop.sheets[b].values];
  const gaps = new Float64Array(one.length);
  for (let k = 0; k < one.length; k++) gaps[k] = one[k] - other[k];
  return gaps;
}

const frobenius = (norms) => Math.hypot(...norms);

// A table of relative errors, a row and a column for each group.
function showBlocks(table, groups, errors, norms, caption) {
  const shade = (share) => (share > 0 ? Math.min(Math.max(Math.log10(share) / 6 + 1, 0.02), 1) : 0);
  const name = (scope, { label }) => element("th", { scope, title: label }, shortened(label));
  const upright = groups.length > 4 && groups.some(({ label }) => label.length > 6);
  const head = element("tr", { class: upright ? "upright" : "" }, element("td"), ...groups.map((g) => name("col", g)));
  const rows = groups.map((group, i) => {
    const cells = groups.map((_, j) => {
      const k = i * groups.length + j;
      const share = errors[k] / norms[k];
      const text = errors[k] === 0 ? "0 %" : norms[k] === 0 ? "only here" : percent(share);
      const cell = element("td", { class: "number", title: `${roughly(errors[k])} of ${roughly(norms[k])}` }, text);
      const deep = errors[k] === 0 ? 0 : norms[k] === 0 ? 1 : shade(share);
      cell.style.background = `rgba(${ink("heat")}, ${(0.55 * deep).toFixed(3)})`;
      return cell;
    });
    return element("tr", {}, name("row", group), ...cells);
  });
  table.replaceChildren(element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...rows));
}

// Gives a table that is wider than its column a row of its own, and says so where even that is too narrow.
function showWide(table, note) {
  const [place, columns] = [table.closest(".scroll"), table.closest(".columns")];
  const wide = () => place.scrollWidth > place.clientWidth + 1;
  columns.classList.remove("stacked");
  columns.classList.toggle("stacked", wide());
  note.hidden = !wide();
}
