// Shows the views of a page, once circuitsvis is there.
for (const data of document.querySelectorAll("script.circuitsvis-data")) {
  const given = JSON.parse(data.textContent);
  document.getElementById(data.dataset.for).replaceChildren();
  CircuitsVis.render(data.dataset.for, CircuitsVis[given.view], given.props);
}
