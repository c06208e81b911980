// The values under the pointer.
for (const svg of document.querySelectorAll("svg[data-series]")) {
  const series = Object.entries(JSON.parse(svg.dataset.series));
  const steps = series.flatMap(([, points]) => points.map(([step]) => step));
  const first = Math.min(...steps), last = Math.max(...steps);
  const cursor = svg.querySelector(".cursor"), width = svg.viewBox.baseVal.width;
  const left = Number(svg.dataset.left), span = Number(svg.dataset.right) - left;
  let tip = null;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * width - left) / span;
    const wanted = first + Math.min(1, Math.max(0, share)) * (last - first);
    const nearest = series.map(([name, points]) =>
      [name, points.reduce((a, b) => Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a)]);
    const step = nearest[0][1][0];
    const x = left + span * (last > first ? (step - first) / (last - first) : 0.5);
    for (const [key, value] of [["x1", x], ["x2", x], ["visibility", "visible"]]) cursor.setAttribute(key, value);
    if (!tip) {
      tip = svg.parentNode.appendChild(document.createElement("div"));
      tip.className = "tip";
    }
    tip.textContent = [`step ${step}`, ...nearest.map(([name, [, value]]) => `${name}  ${value}`)].join("\n");
    const at = x / width * box.width;
    tip.style.top = "30px";
    tip.style.left = x < width / 2 ? `${at + 10}px` : "";
    tip.style.right = x < width / 2 ? "" : `${box.width - at + 10}px`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    tip?.remove();
    tip = null;
  });
}
