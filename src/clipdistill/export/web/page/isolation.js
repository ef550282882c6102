// A service worker that adds the two headers with which a browser allows threads, for hosts that do not send them.
self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (new URL(request.url).origin !== self.location.origin || (request.cache === "only-if-cached" && request.mode !== "same-origin")) { return; }
  event.respondWith(fetch(request).then((answer) => {
    if (answer.status === 0) { return answer; }
    const headers = new Headers(answer.headers);
    headers.set("Cross-Origin-Opener-Policy", "same-origin");
    headers.set("Cross-Origin-Embedder-Policy", "require-corp");
    headers.set("Cross-Origin-Resource-Policy", "same-origin");
    return new Response([204, 205, 304].includes(answer.status) ? null : answer.body, { status: answer.status, statusText: answer.statusText, headers });
  }));
});
