// Shows the views of a page, once circuitsvis is there.
for (const data of document.querySelectorAll("script.circuitsvis-data")) {
  const given = JSON.parse(data.textContent);
  CircuitsVis.render(data.dataset.for, CircuitsVis[given.view], given.props);
}
