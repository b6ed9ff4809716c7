"use strict";
const charts = [...document.querySelectorAll(".chart")].map((figure) => {
  const plot = figure.querySelector(".plot"), numbers = JSON.parse(plot.dataset.chart);
  const lines = [...plot.querySelectorAll(".line")].map((path) =>
    path.getAttribute("d").slice(1).split("L").map((point) => point.split(",").map(Number)));
  const hair = figure.querySelector(".hair"), outputs = [...figure.querySelectorAll(".legend b")];
  return {plot, lines, hair, outputs, last: outputs.map((output) => output.textContent), ...numbers};
});
const figure = (value, percent) => percent ? (100 * value).toFixed(1) + "%"
  : Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en")
  : Math.abs(value) >= 1e-3 || value === 0 ? value.toLocaleString("en", {maximumSignificantDigits: 4})
  : value.toExponential(2);
const stepAt = (chart, x) =>
  chart.span[0] + (x - chart.left) / (chart.right - chart.left) * (chart.span[1] - chart.span[0]);
function valueAt(chart, y) {
  const part = (chart.bottom - y) / (chart.bottom - chart.top), [low, high] = chart.limits;
  return chart.logarithmic ? low * (high / low) ** part : low + part * (high - low);
}
function show(step) {
  for (const chart of charts) {
    const share = (step - chart.span[0]) / (chart.span[1] - chart.span[0]);
    const x = chart.left + share * (chart.right - chart.left);
    chart.hair.style.display = share >= 0 && share <= 1 ? "block" : "none";
    chart.hair.style.left = 100 * x / chart.width + "%";
    chart.hair.firstElementChild.textContent = "step " + Math.round(step).toLocaleString("en");
    const texts = chart.lines.map((line) => {
      const [, y] = line.reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best);
      return figure(valueAt(chart, y), chart.percent);
    });
    texts.forEach((text, i) => { chart.outputs[i].textContent = text; });
    chart.plot.setAttribute("aria-valuenow", Math.round(step));
    chart.plot.setAttribute("aria-valuetext", "step " + Math.round(step) + ": " + texts.join(", "));
  }
}
function rest() {
  for (const chart of charts) {
    chart.hair.style.display = "none";
    chart.outputs.forEach((output, i) => { output.textContent = chart.last[i]; });
  }
}
for (const chart of charts) {
  let step = chart.span[1];
  const [first, last] = chart.span;
  const go = (to) => show(step = Math.min(last, Math.max(first, to)));
  chart.plot.setAttribute("role", "slider");
  chart.plot.tabIndex = 0;
  chart.plot.setAttribute("aria-valuemin", first);
  chart.plot.setAttribute("aria-valuemax", last);
  chart.plot.setAttribute("aria-valuenow", last);
  chart.plot.addEventListener("pointermove", (event) => {
    const box = chart.plot.getBoundingClientRect();
    go(stepAt(chart, (event.clientX - box.left) / box.width * chart.width));
  });
  chart.plot.addEventListener("pointerleave", rest);
  chart.plot.addEventListener("blur", rest);
  chart.plot.addEventListener("keydown", (event) => {
    const stride = (last - first) / 100;
    const moves = {ArrowLeft: step - stride, ArrowRight: step + stride, Home: first, End: last};
    if (event.key === "Escape") rest();
    if (!(event.key in moves)) return;
    event.preventDefault();
    go(moves[event.key]);
  });
}
