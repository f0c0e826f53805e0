// Draws the figures of a page, once Vega is there.
// A slider that the keyboard reaches, in place of the chart's list of frames; says how to move it.
function slider(element, {options, name}, start, show) {
  const label = document.createElement("label"), input = document.createElement("input");
  const output = document.createElement("output");
  Object.assign(input, {type: "range", min: 0, max: options.length - 1, step: 1});
  const move = (value) => {
    const index = options.indexOf(value);
    if (index < 0) return;
    input.value = index;
    output.value = value;
    input.setAttribute("aria-valuetext", value);
  };
  input.addEventListener("input", () => { move(options[input.value]); show(output.value); });
  move(start);
  label.className = "frames";
  label.append(name, output, input);
  element.parentElement.before(label);
  return (value) => { move(value); show(output.value); };
}
// The chart in the room that there is: fewer panels side by side, then legends below and narrower.
async function draw(element, spec) {
  const place = element.parentElement, panels = spec.concat ?? [spec];
  let drawn;
  const excess = async () => {
    drawn?.finalize();
    // The interpreter (ast) evaluates expressions without eval, which the page's policy forbids.
    drawn = await vegaEmbed(element, spec, {
      ast: true, renderer: "svg", downloadFileName: "figure",
      actions: {export: true, source: false, compiled: false, editor: false},
    });
    return place.scrollWidth - place.clientWidth;
  };
  let over = await excess();
  while (over > 0 && spec.columns > 1) { spec.columns -= 1; over = await excess(); }
  if (over > 0) {
    const layout = {bottom: {direction: "vertical"}};
    Object.assign(spec.config.legend, {orient: "bottom", columns: 1, labelLimit: 200, layout});
    spec.config.axis.labelLimit = 100;
    over = await excess();
  }
  // What stands beside the panels hangs on their ticks, so on their width.
  for (let turn = 0; over > 0 && turn < 3; turn += 1) {
    for (const panel of panels) {
      const isSquare = panel.width === panel.height;
      panel.width = Math.max(120, panel.width - over);
      if (isSquare) panel.height = panel.width;  // both axes have one unit
    }
    over = await excess();
  }
  return drawn.view;
}
for (const data of document.querySelectorAll("script.vega-data")) {
  const element = document.getElementById(data.dataset.for), spec = JSON.parse(data.textContent);
  const param = (name) => spec.params?.find((param) => param.name === name);
  const frame = param("frame"), bind = frame?.bind, picked = param("picked");
  delete frame?.bind;
  const view = await draw(element, spec);
  const show = (label) => view.signal("frame", label).runAsync();
  const move = bind && slider(element, bind, frame.value, show);
  // A layer that is picked in one place is picked in every figure and table of the run.
  const run = element.closest("[data-run]") ?? document;
  if (picked) view.addSignalListener("picked_layer", (_, label) =>
    run.dispatchEvent(new CustomEvent("pick-layer", {detail: label ?? null})));
  run.addEventListener("pick-layer", ({detail: label}) => {
    const isNew = picked?.bind.options.includes(label) && view.signal("picked_layer") !== label;
    if (isNew) view.signal("picked_layer", label).runAsync();
    if (bind?.options.includes(label)) move(label);
  });
}
