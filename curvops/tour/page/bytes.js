// What the page carries, unpacked: arrays of numbers and plotly.

async function inflated(id) {
  const letters = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(letters.length);
  for (let k = 0; k < letters.length; k++) bytes[k] = letters.charCodeAt(k);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// The same tree with typed arrays where it refers to blobs.
async function unpacked(tree) {
  if (tree === null || typeof tree !== "object") return tree;
  if ("blob" in tree) {
    const kind = tree.type === "f4" ? Float32Array : Float64Array;
    return new kind(await inflated(`blob-${tree.blob}`));
  }
  if (Array.isArray(tree)) return Promise.all(tree.map(unpacked));
  const parts = await Promise.all(Object.entries(tree).map(async ([key, part]) => [key, await unpacked(part)]));
  return Object.fromEntries(parts);
}

// Runs the plotly that the page carries, and returns it.
async function loadPlotly() {
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await inflated("plotly"));
  document.head.append(script);
  return window.Plotly;
}
