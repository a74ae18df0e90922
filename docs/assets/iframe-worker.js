/* Pages from disk may start no worker, and the search of the theme is one. Here it runs in a hidden frame instead.
   Written for carot_hf; the theme's plugin `offline` would load such a file from another host. */

if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inner = this.frame.contentWindow
      inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      inner.importScripts = async (...urls) => { for (const each of urls) await load(inner, each) }
      this.ready = load(inner, new URL(url, document.baseURI).href)
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() { this.frame.remove() }
  }

  const load = (inner, url) => new Promise((resolve, reject) => {
    const script = inner.document.createElement("script")
    script.src = url
    script.onload = resolve
    script.onerror = reject
    inner.document.head.append(script)
  })
}
