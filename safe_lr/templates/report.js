// Reads the curves under the pointer; the figures are those of the last drawn point at or before it.
const figure = (v) => v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(2) : `${+v.toPrecision(3)}`;
for (const svg of document.querySelectorAll(".plot > svg")) {
  const first = +svg.dataset.first, last = +svg.dataset.last, low = +svg.dataset.low, high = +svg.dataset.high;
  const value = (y) => svg.dataset.log === "1" ? high * (low / high) ** (y / 240) : high + (low - high) * y / 240;
  const curves = [...svg.querySelectorAll("polyline")].map((line) => ({
    label: line.dataset.label,
    points: line.getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number)),
  }));
  const cross = svg.querySelector(".cross"), readout = svg.closest("figure").querySelector(".readout");
  svg.parentElement.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = 1000 * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const parts = curves.map((curve) => {
      const point = curve.points.filter((p) => p[0] <= x).pop();
      return point && `${curve.label} ${figure(value(point[1]))}`;
    });
    cross.setAttribute("x1", `${x / 10}%`);
    cross.setAttribute("x2", `${x / 10}%`);
    cross.setAttribute("visibility", "visible");
    const step = Math.floor(first + (last - first) * x / 1000).toLocaleString("en");
    readout.textContent = [`step ${step}`, ...parts.filter(Boolean)].join("  ·  ");
  });
  svg.parentElement.addEventListener("pointerleave", () => {
    cross.setAttribute("visibility", "hidden");
    readout.textContent = "\u00a0";
  });
}
