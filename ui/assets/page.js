// What the page does by itself: the list of LoRAs, the theme, wiping, and keyboard shortcuts.
(() => {
  // The theme follows the system until somebody chooses; the page itself looks at the address.
  const address = new URL(location);
  const kept = localStorage.getItem("cmlora-theme");
  const choose = (name) => {
    address.searchParams.set("__theme", name);
    history.replaceState(null, "", address);
  };
  if (kept && !address.searchParams.has("__theme")) choose(kept);
  const dark = (on) => {
    document.body.classList.toggle("dark", on);
    document.querySelectorAll("[data-act=theme]").forEach((b) => b.setAttribute("aria-pressed", on));
  };

  // The selection travels to the server through a hidden field.
  let timer;
  const rows = () => [...document.querySelectorAll(".lora[data-name]")];
  const selection = () => {
    const found = {};
    for (const row of rows()) {
      const box = row.querySelector("input[type=checkbox]");
      if (box && box.checked) found[row.dataset.name] = Number(row.querySelector("input[type=range]").value);
    }
    return JSON.stringify(found);
  };
  const send = (delay) => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const field = document.querySelector("#lora-state textarea, #lora-state input");
      const text = selection();
      if (!field || field.value === text) return;
      field.value = text;
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }, delay);
  };

  // A list that the server draws anew may keep the boxes and sliders of the old one, whatever it
  // says itself: the rows and the numbers in them are right.
  const settle = () => {
    for (const row of rows()) {
      const box = row.querySelector("input[type=checkbox]");
      if (!box) continue;
      const on = row.classList.contains("on");
      const slider = row.querySelector("input[type=range]");
      if (box.checked !== on) box.checked = on;
      if (slider.disabled === on) slider.disabled = !on;
      const shown = row.querySelector("output").textContent;
      if (Number(slider.value).toFixed(2) !== shown) slider.value = shown;
    }
  };
  const watch = () =>
    new MutationObserver(settle).observe(document.body, {
      childList: true, subtree: true, characterData: true, attributeFilter: ["class"],
    });
  // gradio may run this before or after the page has been read
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", watch);
  else watch();

  document.addEventListener("input", (event) => {
    const target = event.target;
    const row = target.closest && target.closest(".lora");
    if (row && target.type === "range") {
      row.querySelector("output").value = Number(target.value).toFixed(2);
      send(250);
    } else if (row && target.type === "checkbox") {
      row.classList.toggle("on", target.checked);
      row.querySelector("input[type=range]").disabled = !target.checked;
      send(0);
    } else if (target.matches && target.matches(".find")) {
      const text = target.value.trim().toLowerCase();
      for (const each of rows()) each.hidden = !each.textContent.toLowerCase().includes(text);
    } else if (target.matches && target.matches(".wipe input")) {
      target.closest(".wipe").style.setProperty("--at", `${target.value}%`);
    }
  });

  document.addEventListener("click", (event) => {
    // on a phone the picture is far below the button
    if (event.target.closest && event.target.closest("#generate") && innerWidth <= 900) {
      document.querySelector("#stage").scrollIntoView({ behavior: "smooth", block: "start" });
    }
    const button = event.target.closest && event.target.closest("[data-act=theme]");
    if (!button) return;
    const on = !document.body.classList.contains("dark");
    localStorage.setItem("cmlora-theme", on ? "dark" : "light");
    choose(on ? "dark" : "light");
    dark(on);
  });

  const visible = (element) => element && element.offsetParent !== null && !element.disabled;
  const press = (id) => {
    const button = document.getElementById(id);
    if (visible(button)) button.click();
    return visible(button);
  };
  const votes = { ArrowLeft: "vote-left", ArrowRight: "vote-right", ArrowDown: "vote-tie", s: "vote-skip" };
  document.addEventListener("keydown", (event) => {
    const target = event.target;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      if (press("generate")) event.preventDefault();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (target.matches && target.matches("input, textarea, select, [contenteditable], [role=tab]")) return;
    if (event.key in votes && press(votes[event.key])) event.preventDefault();
  });
})();
