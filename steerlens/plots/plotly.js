// Draws the figures of a page, once plotly is there.
const scheme = matchMedia("screen and (prefers-color-scheme: dark)");
const PAPER = 680; // pixels between the margins of a page of paper
let isPrinted = false;
const isDark = () => scheme.matches && !isPrinted;
const clear = "rgba(0,0,0,0)", buttons = ["toImage", "zoom2d", "pan2d", "resetScale2d"];
// On a dark page a dark colour is mixed with white until it can be seen.
function seen(color) {
  const hex = /^#[0-9a-f]{6}$/i.test(color);
  let [, ...parts] = /^rgba\((\d+), *(\d+), *(\d+), *([\d.]+)\)$/.exec(color) ?? [];
  if (!isDark() || !(hex || parts.length)) return color;
  const alpha = parts[3] ?? 1;
  parts = hex ? [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16))
    : parts.slice(0, 3).map(Number);
  const light = () => 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  while (light() < 118) parts = parts.map((part) => part + 0.1 * (255 - part));
  return `rgba(${parts.map(Math.round)}, ${alpha})`;
}
function recolour(element, given) {
  const ink = isDark() ? "#d8d8d8" : "#222", grid = isDark() ? "#3a3a3a" : "#e4e4e4";
  const change = {paper_bgcolor: clear, plot_bgcolor: clear, "font.color": ink,
    "legend.bgcolor": clear, "modebar.bgcolor": clear, "modebar.color": ink,
    "modebar.activecolor": ink};
  for (const key of Object.keys(element.layout))
    if (/^[xy]axis/.test(key)) {
      change[key + ".gridcolor"] = grid; change[key + ".zerolinecolor"] = grid;
      change[key + ".linecolor"] = ink;
    }
  const drawn = given.data.flatMap((trace, i) => trace.type === "scatter" ? [i] : []);
  const scatter = drawn.map((i) => given.data[i]);
  const traces = {
    "line.color": scatter.map((trace) => seen(trace.line?.color)),
    "marker.color": scatter.map((trace) => seen(trace.marker?.color)),
    fillcolor: scatter.map((trace) => seen(trace.fillcolor)),
  };
  return drawn.length ? Plotly.update(element, traces, change, drawn)
    : Plotly.relayout(element, change);
}
// A slider that the keyboard reaches, in place of plotly's.
function slider(element, {steps, active, currentvalue}) {
  const label = document.createElement("label"), input = document.createElement("input");
  const value = document.createElement("output");
  Object.assign(input, {type: "range", min: 0, max: steps.length - 1, step: 1, value: active ?? 0});
  const text = (html) => new DOMParser().parseFromString(html ?? "", "text/html").body.textContent;
  const say = () => {
    value.value = text(steps[input.value].label);
    input.setAttribute("aria-valuetext", value.value);
  };
  input.addEventListener("input", () => {
    say();
    Plotly.update(element, ...steps[input.value].args);
  });
  say();
  label.className = "frames";
  label.append(text(currentvalue?.prefix), value, input);
  element.parentElement.before(label);
}
for (const data of document.querySelectorAll("script.plotly-data")) {
  const element = document.getElementById(data.dataset.for), given = JSON.parse(data.textContent);
  // The page has the title, and the slider is not plotly's: their room is not needed.
  const {width, title, sliders, ...layout} = given.layout;
  layout.margin = {...layout.margin, t: 45};
  layout.height -= sliders?.length ? 105 : 35;
  element.replaceChildren();
  element.style.minHeight = "";
  if (sliders?.length) slider(element, sliders[0]);
  // Panels side by side get no narrower than they can be read; the element around scrolls.
  const panels = Object.keys(layout).filter((key) => /^xaxis/.test(key)).length;
  if (panels > 1) element.style.minWidth = `${width}px`;
  // A copy: plotly writes into what it is given, and `given` keeps the colours of a light page.
  Plotly.newPlot(element, structuredClone(given.data), {...layout, autosize: true},
    {responsive: true, displaylogo: false, modeBarButtons: [buttons]})
    .then(() => recolour(element, given));
  scheme.addEventListener("change", () => recolour(element, given));
  for (const [name, starts] of [["beforeprint", true], ["afterprint", false]])
    addEventListener(name, () => {
      isPrinted = starts;
      recolour(element, given);
      const shown = element.offsetWidth;
      element.style.width = starts ? `${shown}px` : "";
      element.style.zoom = starts ? Math.min(1, PAPER / shown) : "";
    });
}
