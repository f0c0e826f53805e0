// From a folder (file:) a browser starts no worker, which the search runs in: there the same script
// runs in a hidden frame.
(() => {
  if (location.protocol !== "file:") return;

  const load = (scope, url) =>
    new Promise((resolve, reject) => {
      const script = scope.document.createElement("script");
      script.src = url;
      script.onload = resolve;
      script.onerror = reject;
      scope.document.body.append(script);
    });

  class FrameWorker extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const scope = this.frame.contentWindow;
      const chain = (done, next) => done.then(() => load(scope, next));
      scope.importScripts = (...urls) => urls.reduce(chain, Promise.resolve());
      scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.ready = load(scope, url).then(() => scope);
      this.addEventListener("message", (event) => this.onmessage?.(event));
    }

    postMessage(data) {
      this.ready.then((scope) => scope.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  }

  // The first name is what the theme's script looks for in the frame's parent.
  window.IFrameWorker = window.Worker = FrameWorker;
})();
