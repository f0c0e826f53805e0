// Draws the figures of a page, once Vega is there.
// A slider that the keyboard reaches, in place of the chart's list of frames.
function slider(element, {options, name}, show) {
  const label = document.createElement("label"), input = document.createElement("input");
  const value = document.createElement("output");
  Object.assign(input, {type: "range", min: 0, max: options.length - 1, step: 1, value: 0});
  const say = () => {
    value.value = options[input.value];
    input.setAttribute("aria-valuetext", value.value);
  };
  input.addEventListener("input", () => { say(); show(value.value); });
  say();
  label.className = "frames";
  label.append(name, value, input);
  element.parentElement.before(label);
}
for (const data of document.querySelectorAll("script.vega-data")) {
  const element = document.getElementById(data.dataset.for), spec = JSON.parse(data.textContent);
  const frame = spec.params?.find((param) => param.name === "frame"), bind = frame?.bind;
  delete frame?.bind;
  // The interpreter (ast) evaluates expressions without eval, which the page's policy forbids.
  const {view} = await vegaEmbed(element, spec, {
    ast: true, renderer: "svg", downloadFileName: "figure",
    actions: {export: true, source: false, compiled: false, editor: false},
  });
  if (bind) slider(element, bind, (label) => view.signal("frame", label).runAsync());
}
