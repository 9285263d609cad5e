"use strict";
(() => {
  const OTHER = { fixed: "moved", moved: "fixed", before: "after", after: "before", checker: "rechecker", flicker: "moved", outlined: "before" };
  const NAMES = { fixed: "fixed", moved: "moved", start: "moving, before", before: "before", after: "after", outlined: "fixed",
    checker: "checkerboard", rechecker: "checkerboard, swapped" };
  const HALF_PERIOD = 250; // ms: two full changes a second
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const viewers = all(".viewer");
  const cases = all(".case");
  const timers = new Map();
  let current = viewers[0];

  /* What is to be seen: the chosen mode, or the other scan while someone asks for it. */
  function show(viewer, other = false) {
    const mode = viewer.dataset.mode, moved = viewer.dataset.has === "after";
    let now = mode === "flicker" ? "fixed" : mode;
    if (now === "after" && viewer.dataset.has === "outlines") now = "outlined";
    if (other) now = OTHER[mode === "after" ? now : mode];
    if (!moved && now === "moved") now = "start";
    if (!moved && now === "after") now = viewer.dataset.has === "outlines" ? "outlined" : "fixed";
    viewer.dataset.show = now;
    viewer.dataset.time = now === "before" || now === "start" || viewer.dataset.has === "before" ? "before" : "after";
    for (const word of all(".now", viewer)) word.textContent = NAMES[now];
  }

  function stop(viewer) {
    clearInterval(timers.get(viewer));
    timers.delete(viewer);
  }

  function choose(viewer, mode) {
    const button = viewer.querySelector(`.modes [data-mode=${mode}]`);
    if (!button || button.disabled) return;
    stop(viewer);
    viewer.dataset.mode = mode;
    for (const one of all(".modes button", viewer)) one.setAttribute("aria-pressed", one === button);
    show(viewer);
    // who asked for less motion changes the scans by hand, with space
    if (mode !== "flicker" || still.matches) return;
    let other = false;
    timers.set(viewer, setInterval(() => { other = !other; show(viewer, other); }, HALF_PERIOD));
  }

  function flicker(viewer) {
    if (viewer.dataset.mode === "flicker") return choose(viewer, viewer.dataset.earlier || "after");
    viewer.dataset.earlier = viewer.dataset.mode;
    choose(viewer, "flicker");
  }

  function toggle(viewer, what) {
    const button = viewer.querySelector(`[data-toggle=${what}]`);
    if (!button) return;
    viewer.dataset[what] = viewer.dataset[what] === "on" ? "off" : "on";
    button.setAttribute("aria-pressed", viewer.dataset[what] === "on");
  }

  function take(viewer) {
    if (!viewer) return;
    current = viewer;
    for (const one of cases) one.classList.toggle("here", one.contains(viewer));
  }

  for (const viewer of viewers) {
    viewer.addEventListener("focusin", () => take(viewer));
    viewer.addEventListener("pointerenter", () => take(viewer));
    for (const button of all("[data-mode]", viewer)) button.addEventListener("click", () => choose(viewer, button.dataset.mode));
    for (const button of all("[data-toggle]", viewer)) button.addEventListener("click", () => toggle(viewer, button.dataset.toggle));
    const hold = (event) => {
      if (event.pointerType !== "mouse" && event.type === "pointerenter") return; // a finger that only scrolls past
      if (viewer.dataset.mode === "flicker") stop(viewer);
      show(viewer, true);
    };
    const free = () => (viewer.dataset.mode === "flicker" ? choose(viewer, "flicker") : show(viewer));
    for (const stage of all(".stage", viewer)) {
      stage.addEventListener("pointerenter", hold);
      stage.addEventListener("pointerleave", free);
      stage.addEventListener("pointerdown", (event) => event.pointerType !== "mouse" && hold(event));
      stage.addEventListener("pointerup", (event) => event.pointerType !== "mouse" && free());
      stage.addEventListener("pointercancel", free);
    }
  }

  /* Next or previous case that the filter leaves; it opens, and what was focused does not matter. */
  function go(step) {
    const left = cases.filter((one) => !one.hidden);
    if (!left.length) return;
    const at = left.findIndex((one) => one.contains(document.activeElement) || one.classList.contains("here"));
    const next = left[Math.min(left.length - 1, Math.max(0, at + step))];
    open(next);
  }

  function open(one) {
    one.open = true;
    for (const other of cases) other.classList.toggle("here", other === one);
    current = one.querySelector(".viewer") || current;
    one.querySelector("summary").focus({ preventScroll: true });
    one.scrollIntoView({ block: "start", behavior: still.matches ? "auto" : "smooth" });
  }

  for (const link of all("[data-open]")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      open(document.getElementById(link.dataset.open));
    });
  }

  const filter = document.getElementById("filter");
  filter?.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const one of cases) {
      one.hidden = !words.every((word) => one.dataset.text.includes(word));
      count += !one.hidden;
    }
    document.getElementById("count").textContent = `${count} of ${cases.length} cases`;
  });

  const keys = document.getElementById("keys");
  for (const button of all("[data-do=keys]")) button.addEventListener("click", () => keys.showModal());

  function seen(element) {
    const box = element.getBoundingClientRect();
    return box.height > 0 && box.bottom > 0 && box.top < innerHeight;
  }

  const MODES = ["fixed", "moved", "before", "after", "checker", "flicker"];
  const owns = (target) => target.closest("button, a") || target.closest("summary")?.parentElement.open === false;

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, dialog")) return;
    const key = event.key;
    if (key === " ") {
      // a button or a link does with space what it always does; so does a page without a viewer in sight
      if (owns(event.target) || !current || !seen(current)) return;
      event.preventDefault();
      if (event.repeat) return;
      stop(current);
      show(current, true);
    } else if (key === "j") go(1);
    else if (key === "k") go(-1);
    else if (key === "?") keys.showModal();
    else if (key === "/" && filter) { event.preventDefault(); filter.focus(); }
    else if (!current) return;
    else if (key === "f") flicker(current);
    else if (key === "c") toggle(current, "lines");
    else if (key === "a") toggle(current, "arrows");
    else if (MODES[key - 1]) choose(current, MODES[key - 1]);
  });
  document.addEventListener("keyup", (event) => {
    if (event.key !== " " || !current || event.target.closest("input, dialog") || owns(event.target) || !seen(current)) return;
    event.preventDefault();  // an open case's heading, where j and k lead, would close it
    if (current.dataset.mode === "flicker") choose(current, "flicker");
    else show(current);
  });

  for (const viewer of viewers) show(viewer);
})();
