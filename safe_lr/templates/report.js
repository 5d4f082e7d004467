// Reads the curves at a step: under the pointer, or with the slider below them, which the keyboard moves. The figures are
// those of the last drawn point at or before it.
const figure = (v) => v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(2) : `${+v.toPrecision(3)}`;
for (const svg of document.querySelectorAll(".plot > svg")) {
  const first = +svg.dataset.first, last = +svg.dataset.last, low = +svg.dataset.low, high = +svg.dataset.high;
  const value = (y) => svg.dataset.log === "1" ? high * (low / high) ** (y / 240) : high + (low - high) * y / 240;
  const curves = [...svg.querySelectorAll("polyline")].map((line) => ({
    label: line.dataset.label,
    points: line.getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number)),
  }));
  const cross = svg.querySelector(".cross"), box = svg.closest("figure");
  const readout = box.querySelector(".readout"), slider = box.querySelector(".cursor");
  const read = (x) => {
    const parts = curves.map((curve) => {
      const point = curve.points.filter((p) => p[0] <= x).pop();
      return point && `${curve.label} ${figure(value(point[1]))}`;
    });
    const step = Math.floor(first + (last - first) * x / 1000).toLocaleString("en");
    return [`step ${step}`, ...parts.filter(Boolean)].join("  ·  ");
  };
  const show = (x) => {
    cross.setAttribute("x1", `${x / 10}%`);
    cross.setAttribute("x2", `${x / 10}%`);
    cross.setAttribute("visibility", "visible");
    readout.textContent = read(x);
  };
  const hide = () => {
    cross.setAttribute("visibility", "hidden");
    readout.textContent = "\u00a0";
  };
  const slide = () => {
    slider.setAttribute("aria-valuetext", read(+slider.value));
    show(+slider.value);
  };
  slider.hidden = false;
  slider.setAttribute("aria-valuetext", read(0));
  slider.addEventListener("input", slide);
  slider.addEventListener("focus", slide);
  slider.addEventListener("blur", hide);
  svg.parentElement.addEventListener("pointermove", (event) => {
    const at = svg.getBoundingClientRect();
    show(1000 * Math.min(1, Math.max(0, (event.clientX - at.left) / at.width)));
  });
  svg.parentElement.addEventListener("pointerleave", () => document.activeElement === slider ? slide() : hide());
}
