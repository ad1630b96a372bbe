// What scrolls inside itself can be reached with the keyboard. On paper, all that is folded is open.
const wide = "pre, .output, .table-wrapper, mjx-container[display='true']";

function reachable() {
  for (const box of document.querySelectorAll(wide)) {
    const scrolls = box.scrollWidth > box.clientWidth + 1;
    if (scrolls && !box.querySelector("[data-kvcache]")) box.tabIndex = 0;
    else if (!scrolls) box.removeAttribute("tabindex");
  }
}

new ResizeObserver(reachable).observe(document.documentElement);
addEventListener("load", () => (window.MathJax?.startup?.promise ?? Promise.resolve()).then(reachable));
document.addEventListener("toggle", reachable, true);

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("article details:not([open])")];
  for (const box of opened) box.open = true;
});
addEventListener("afterprint", () => opened.forEach((box) => (box.open = false)));
