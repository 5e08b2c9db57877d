"use strict";
// Hover, touch or the arrow keys show the values of a chart's curves at one place of its x axis.
function shown(value) {
  return String(Number(value.toPrecision(5)));
}

function nearest(places, at) {
  let best = 0;
  places.forEach((place, i) => { if (Math.abs(place - at) < Math.abs(places[best] - at)) best = i; });
  return best;
}

for (const figure of document.querySelectorAll("figure.chart")) {
  const svg = figure.querySelector("svg.wide"), output = figure.querySelector("output"), cross = svg.querySelector(".cross");
  const dots = [...svg.querySelectorAll(".dot")];
  const { axis, series } = JSON.parse(figure.querySelector("script").textContent);
  const places = [...new Set(series.flatMap((s) => s.px))].sort((a, b) => a - b);
  let current = -1;

  function show(i) {
    current = Math.min(places.length - 1, Math.max(0, i));
    const at = places[current];
    cross.setAttribute("x1", at);
    cross.setAttribute("x2", at);
    cross.style.visibility = "visible";
    let where = null;
    const texts = series.map((s, n) => {
      const i = nearest(s.px, at);
      if (where === null || s.px[i] === at) where = s.x[i];
      dots[n].setAttribute("cx", s.px[i]);
      dots[n].setAttribute("cy", s.py[i]);
      dots[n].style.visibility = "visible";
      return s.name + " " + shown(s.y[i]);
    });
    output.textContent = axis + " " + shown(where) + ": " + texts.join("; ");
  }

  function point(event) {
    const inside = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    show(nearest(places, inside.x));
  }

  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: current - 1, ArrowRight: current + 1, PageUp: current - 10, PageDown: current + 10, Home: 0, End: places.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
}
