"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (id) => document.getElementById(id);
  const sites = all("tbody.site");

  // ---- a site opens under its row
  const open = (site, on) => {
    site.querySelector(".detail").hidden = !on;
    site.querySelector(".toggle").setAttribute("aria-expanded", String(on));
  };
  const isOpen = (site) => !site.querySelector(".detail").hidden;
  sites.forEach((site) => {
    open(site, sites.length === 1);
    site.querySelector(".toggle").addEventListener("click", () => open(site, !isOpen(site)));
  });

  // ---- filters
  const choices = ["verdict", "kind", "mask"].map(one).filter(Boolean);
  const filter = () => {
    const words = one("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0, total = 0;
    sites.forEach((site) => {
      const fits = words.every((word) => site.dataset.text.includes(word))
        && choices.every((choice) => !choice.value || site.dataset[choice.id] === choice.value);
      const count = Number(site.dataset.count);
      site.hidden = !fits;
      total += count;
      shown += fits ? count : 0;
    });
    one("shown").textContent = `${shown} of ${total} sites`;
    one("none").hidden = shown > 0;
  };
  if (one("search")) {
    one("search").addEventListener("input", filter);
    choices.forEach((choice) => choice.addEventListener("change", filter));
    document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
  }

  // ---- order: that of the model, or the slowest first
  const sorts = all("[data-sort]");
  sorts.forEach((button) => button.addEventListener("click", () => {
    const slowest = button.dataset.sort === "seconds";
    const value = (site) => (slowest ? -Number(site.dataset.seconds) : Number(site.dataset.order));
    const table = document.querySelector("table.sites");
    [...sites].sort((a, b) => value(a) - value(b)).forEach((site) => table.append(site));
    sorts.forEach((other) => other.closest("th").removeAttribute("aria-sort"));
    button.closest("th").setAttribute("aria-sort", slowest ? "descending" : "ascending");
  }));

  // ---- the graph
  all("[data-open]").forEach((button) => button.addEventListener("click", () => {
    const wanted = button.dataset.open;
    all(".graph details.part").forEach((part) => {
      part.open = wanted === "all" || (wanted === "changed" && part.classList.contains("changed"));
    });
  }));
  const only = one("only");
  if (only) only.addEventListener("change", () => one("graph").classList.toggle("only", only.checked));
  const zoom = one("zoom");
  if (zoom) zoom.addEventListener("input", () => {
    one("graph").style.setProperty("--zoom", zoom.value / 100);
    zoom.nextElementSibling.textContent = `${zoom.value} %`;
  });

  // ---- kernels
  all(".copy").forEach((button) => button.addEventListener("click", async () => {
    const text = button.closest("details").querySelector("pre").textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "The browser does not allow it";
    }
  }));

  // ---- a link shows what it leads to
  const show = () => {
    const target = location.hash.length > 1 && one(location.hash.slice(1));
    if (!target) return;
    if (target.matches("tbody.site")) {
      target.hidden = false;
      open(target, true);
    }
    for (let part = target.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", show);
  show();
})();
