"use strict";
const LEFT = 52, RIGHT = 10, TOP = 10, BOTTOM = 24;
function vertices(path) {
  const found = [];
  for (const [, x, y] of path.getAttribute("d").matchAll(/[ML]([-\d.e]+) ([-\d.e]+)/g)) found.push([+x, +y]);
  return found;
}
function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return x - points[low][0] < points[high][0] - x ? points[low] : points[high];
}
function number(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e7) ? value.toExponential(2) : String(+value.toPrecision(4));
}
for (const svg of document.querySelectorAll("svg")) {
  const figure = svg.closest("figure"), readout = figure.querySelector(".readout"), cursor = svg.querySelector(".cursor");
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  const from = name => Number(svg.dataset[name]);
  let lines = null;
  svg.addEventListener("pointermove", event => {
    lines ??= [...svg.querySelectorAll(".line")].map(path => [path.dataset.name, vertices(path)]).filter(l => l[1].length);
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    if (!lines.length) return;
    const found = lines.map(([name, points]) => [name, nearest(points, at.x)]);
    const x = found.reduce((a, b) => Math.abs(b[1][0] - at.x) < Math.abs(a[1][0] - at.x) ? b : a)[1][0];
    cursor.setAttribute("d", `M${x} ${TOP}V${height - BOTTOM}`);
    const step = from("x0") + (x - LEFT) / (width - LEFT - RIGHT) * (from("x1") - from("x0"));
    const said = found.filter(f => Math.abs(f[1][0] - x) < 4).map(([name, [, y]]) => {
      const value = from("y0") + (height - BOTTOM - y) / (height - TOP - BOTTOM) * (from("y1") - from("y0"));
      const told = number("log" in svg.dataset ? 10 ** value : value);
      return lines.length > 1 ? `${name} ${told}` : told;
    });
    readout.textContent = `step ${Math.round(step)}: ${said.join(", ")}`;
  });
  svg.addEventListener("pointerleave", () => { readout.textContent = ""; cursor.setAttribute("d", ""); });
}
const every = document.querySelector("#every");
if (every) every.addEventListener("change", () => document.querySelector("#settings").classList.toggle("all", every.checked));
