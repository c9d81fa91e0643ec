// What the page does by itself: the list of LoRAs, the theme, wiping, and keyboard shortcuts.
(() => {
  const root = document.documentElement;

  // The theme follows the system until somebody chooses.
  const dark = (on) => {
    root.classList.toggle("dark", on);
    document.body && document.body.classList.toggle("dark", on);
    document.querySelectorAll("[data-act=theme]").forEach((b) => b.setAttribute("aria-pressed", on));
  };
  const wanted = () => {
    const asked = new URLSearchParams(location.search).get("__theme");
    const kept = asked || localStorage.getItem("cmlora-theme");
    return kept ? kept === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  document.addEventListener("DOMContentLoaded", () => dark(wanted()));

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
    const button = event.target.closest && event.target.closest("[data-act=theme]");
    if (!button) return;
    const on = !document.body.classList.contains("dark");
    localStorage.setItem("cmlora-theme", on ? "dark" : "light");
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
