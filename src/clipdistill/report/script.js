"use strict";
(function () {
  var tip = document.createElement("div");
  tip.id = "tip";
  tip.setAttribute("role", "tooltip");
  document.body.appendChild(tip);
  function show(element, x, y) {
    tip.textContent = element.getAttribute("data-tip");
    tip.style.visibility = "visible";
    var box = tip.getBoundingClientRect();
    tip.style.left = Math.max(6, Math.min(x + 12, document.documentElement.clientWidth - box.width - 6)) + "px";
    tip.style.top = (y - box.height - 12 > 6 ? y - box.height - 12 : y + 16) + "px";
  }
  function hide() { tip.style.visibility = "hidden"; }
  document.querySelectorAll("svg .hover > title").forEach(function (title) {
    var element = title.parentNode;
    element.setAttribute("data-tip", title.textContent);
    element.setAttribute("aria-label", title.textContent);
    title.remove(); // the browser's own slow tooltip would appear as well
    ["pointerenter", "pointermove"].forEach(function (name) {
      element.addEventListener(name, function (event) { show(element, event.clientX, event.clientY); });
    });
    element.addEventListener("pointerleave", hide);
    element.addEventListener("focus", function () {
      var box = element.getBoundingClientRect();
      show(element, box.left + box.width / 2, box.top);
    });
    element.addEventListener("blur", hide);
  });
  addEventListener("scroll", hide, { passive: true });
  var closed = [];
  addEventListener("beforeprint", function () {
    closed = Array.from(document.querySelectorAll("details:not([open])"));
    closed.forEach(function (e) { e.open = true; });
  });
  addEventListener("afterprint", function () { closed.forEach(function (e) { e.open = false; }); });
  var root = document.documentElement, button = document.getElementById("theme"), order = ["auto", "light", "dark"], at = 0;
  button.hidden = false;
  button.addEventListener("click", function () {
    at = (at + 1) % 3;
    if (at === 0) { root.removeAttribute("data-theme"); } else { root.setAttribute("data-theme", order[at]); }
    button.textContent = "Theme: " + order[at];
  });
})();
