// Hover: a vertical cursor at the nearest point of any line, and the values of all lines there.
"use strict";

const figures = JSON.parse(document.getElementById("points").textContent);

for (const chart of document.querySelectorAll("figure.chart")) {
  const data = figures[Number(chart.dataset.figure)];
  const svg = chart.querySelector("svg");
  const cursor = chart.querySelector(".cursor");
  const tip = chart.querySelector(".tip");
  const area = chart.querySelector(".catch");

  const hide = () => {
    cursor.style.visibility = "hidden";
    tip.style.visibility = "hidden";
  };

  area.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const at = nearest(data.series, (event.clientX - box.left) * scale);
    cursor.setAttribute("x1", at.px);
    cursor.setAttribute("x2", at.px);
    cursor.style.visibility = "visible";
    tip.replaceChildren(...describe(data, at));
    tip.style.visibility = "visible";
    const frame = chart.getBoundingClientRect();
    const left = event.clientX - frame.left + 16;
    const isTooFar = left + tip.offsetWidth > frame.width;
    tip.style.left = `${isTooFar ? left - tip.offsetWidth - 32 : left}px`;
    tip.style.top = `${event.clientY - frame.top - tip.offsetHeight / 2}px`;
  });
  area.addEventListener("pointerleave", hide);
}

// The point of all lines whose horizontal position is nearest.
function nearest(series, px) {
  let best = null;
  for (const line of series) {
    const i = indexAt(line.px, px);
    if (best === null || Math.abs(line.px[i] - px) < Math.abs(best.px - px)) {
      best = { px: line.px[i], x: line.x[i] };
    }
  }
  return best;
}

function indexAt(sorted, value) {
  let best = 0;
  for (let i = 1; i < sorted.length; i += 1) {
    if (Math.abs(sorted[i] - value) < Math.abs(sorted[best] - value)) best = i;
  }
  return best;
}

function describe(data, at) {
  const head = document.createElement("div");
  head.textContent = `${data.xLabel}: ${at.x}`;
  const rows = [head];
  for (const line of data.series) {
    const i = indexAt(line.px, at.px);
    if (Math.abs(line.px[i] - at.px) > 3) continue; // this line has no value here
    const row = document.createElement("div");
    const dot = document.createElement("i");
    dot.style.background = line.colour;
    let text = `${line.name}: ${line.y[i]}${data.unit}`;
    if (line.low.length) text += ` (${line.low[i]} to ${line.high[i]})`;
    if (line.front[i]) text += ", on the Pareto front";
    row.append(dot, text);
    rows.push(row);
  }
  return rows;
}
