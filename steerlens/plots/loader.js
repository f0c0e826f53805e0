// The compressed script is text of a type that no browser runs: it is inflated, then run as if it
// had stood in the page.
(async () => {
  const packed = document.getElementById("packed-NAME").textContent;
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  THEN
})().catch((error) => {
  for (const element of document.querySelectorAll(".figure"))
    element.textContent = "This browser cannot show the figure: " + error;
});
