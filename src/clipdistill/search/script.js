"use strict";
(function () {
  var body = document.body, root = document.documentElement, problem = document.getElementById("problem");
  function say(text) { body.classList.remove("busy"); problem.textContent = text; }
  function send(file) {
    if (!file || file.type.indexOf("image/") !== 0) { say("That is no picture."); return; }
    body.classList.add("busy");
    fetch("picture", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } }).then(function (answer) {
      if (!answer.ok) { return answer.text().then(say); }
      return answer.json().then(function (found) { location.href = "?picture=" + encodeURIComponent(found.picture); });
    }).catch(function () { say("The page no longer answers: was the command ended?"); });
  }
  var file = document.getElementById("file");
  document.getElementById("upload").hidden = false;
  file.addEventListener("change", function () { send(file.files[0]); });
  var inside = 0;
  addEventListener("dragenter", function (event) { event.preventDefault(); inside += 1; body.classList.add("drop"); });
  addEventListener("dragleave", function () { inside -= 1; if (inside <= 0) { inside = 0; body.classList.remove("drop"); } });
  addEventListener("dragover", function (event) { event.preventDefault(); });
  addEventListener("drop", function (event) {
    event.preventDefault(); inside = 0; body.classList.remove("drop");
    if (event.dataTransfer.files.length) { send(event.dataTransfer.files[0]); }
  });
  addEventListener("paste", function (event) {
    var files = event.clipboardData ? event.clipboardData.files : [];
    if (files.length) { event.preventDefault(); send(files[0]); }
  });
  document.querySelector("form[role=search]").addEventListener("submit", function () { body.classList.add("busy"); });
  addEventListener("pageshow", function () { body.classList.remove("busy"); });
  var large = document.getElementById("large"), picture = large.querySelector("img"), text = large.querySelector("p");
  document.querySelectorAll("a.picture[data-name]").forEach(function (link) {
    link.addEventListener("click", function (event) {
      if (event.ctrlKey || event.metaKey || event.shiftKey || !large.showModal) { return; }
      event.preventDefault();
      picture.src = link.href; picture.alt = link.dataset.name;
      text.textContent = link.dataset.name + "  (cosine " + link.dataset.score + ")";
      large.showModal();
    });
  });
  large.addEventListener("click", function (event) { if (event.target === large) { large.close(); } });
  large.addEventListener("close", function () { picture.removeAttribute("src"); });
  document.querySelectorAll(".picture img").forEach(function (image) {
    function gone() { image.parentNode.classList.add("gone"); }
    image.addEventListener("error", gone);
    if (image.complete && image.naturalWidth === 0) { gone(); }
  });
  document.querySelectorAll(".hit[data-number]").forEach(function (hit) { // point at one, see its twin
    var twins = document.querySelectorAll('.hit[data-number="' + hit.dataset.number + '"]');
    hit.addEventListener("pointerenter", function () { twins.forEach(function (t) { t.classList.add("twin"); }); });
    hit.addEventListener("pointerleave", function () { twins.forEach(function (t) { t.classList.remove("twin"); }); });
  });
  var button = document.getElementById("theme"), order = ["auto", "light", "dark"], at = 0;
  button.hidden = false;
  try { at = Math.max(0, order.indexOf(localStorage.getItem("theme") || "auto")); } catch (error) { at = 0; }
  function paint() {
    if (at === 0) { root.removeAttribute("data-theme"); } else { root.setAttribute("data-theme", order[at]); }
    button.textContent = "Theme: " + order[at];
  }
  paint();
  button.addEventListener("click", function () {
    at = (at + 1) % 3;
    try { localStorage.setItem("theme", order[at]); } catch (error) { /* private mode: the choice lasts for this page */ }
    paint();
  });
})();
