// Filters over what the page already holds: without this script everything is shown.
"use strict";
(() => {
  const STEP = 6;
  const READ = ".said, .key, .rounds .principle, .label > .by .principle";
  const lists = {};

  function wordsOf(item) {
    return [...item.querySelectorAll(READ)].map((part) => part.textContent).join(" ").toLowerCase();
  }

  function fits(item, want) {
    const named = item.dataset.principles.split(" ");
    if (want.principle && !named.includes(want.principle)) return false;
    if (want.which && item.dataset.which !== want.which) return false;
    if (!want.text) return true;
    item.words ??= wordsOf(item);
    return want.text.split(/\s+/).every((word) => item.words.includes(word));
  }

  function told(list, found, shown) {
    const { all, file } = list.form.dataset;
    const here = list.items.length;
    const count = (n) => Number(n).toLocaleString("en");
    const rest = here < all ? `; ${count(all - here)} more in ${file}` : "";
    if (found === 0) return `None of the ${count(here)} on this page fits${rest}.`;
    const fit = found < here ? `${count(found)} that fit, of ` : "";
    return `${count(shown)} of ${fit}${count(here)} on this page${rest}`;
  }

  function show(list) {
    const { form, items, more, box } = list;
    const want = {
      principle: form.elements.principle.value,
      which: form.elements.which.value,
      text: form.elements.text.value.trim().toLowerCase(),
    };
    const found = items.filter((item) => fits(item, want));
    const shown = new Set(found.slice(0, list.limit));
    for (const item of items) item.hidden = !shown.has(item);
    for (const part of box.querySelectorAll("[data-principle]")) {
      part.classList.toggle("chosen", want.principle !== "" && part.dataset.principle === want.principle);
    }
    more.hidden = found.length <= list.limit;
    more.textContent = `Show ${Math.min(STEP, found.length - list.limit)} more`;
    form.querySelector("output").textContent = told(list, found.length, shown.size);
  }

  function restart(list) {
    list.limit = STEP;
    show(list);
  }

  function choose(principle) {
    for (const list of Object.values(lists)) {
      list.form.elements.principle.value = principle;
      restart(list);
    }
    for (const card of document.querySelectorAll("[data-card]")) {
      card.classList.toggle("chosen", card.dataset.card === principle);
    }
  }

  for (const form of document.querySelectorAll("[data-tools]")) {
    const name = form.dataset.tools;
    const box = document.querySelector(`[data-list="${name}"]`);
    const more = document.querySelector(`[data-more="${name}"]`);
    const list = { form, box, more, items: [...box.children], limit: STEP };
    lists[name] = list;
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.elements.principle.addEventListener("change", (event) => choose(event.target.value));
    form.elements.which.addEventListener("change", () => restart(list));
    form.elements.text.addEventListener("input", () => restart(list));
    more.addEventListener("click", () => {
      const next = list.limit;
      list.limit += STEP;
      show(list);
      const opened = list.items.filter((item) => !item.hidden)[next];
      if (opened) {
        opened.tabIndex = -1;
        opened.focus({ preventScroll: true });
      }
    });
    show(list);
  }
  for (const link of document.querySelectorAll("[data-filter]")) {
    link.addEventListener("click", () => choose(link.dataset.filter));
  }
})();
