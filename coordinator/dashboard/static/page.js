// What the browser does by itself: the colour scheme, copying, and charts as files. Nothing here asks another host.
const manyhands = (() => {
  const themes = ["system", "light", "dark"];

  function readTheme() {
    try {
      return themes.includes(localStorage.theme) ? localStorage.theme : "system";
    } catch {
      return "system";
    }
  }

  function applyTheme(theme) {
    document.documentElement.dataset.theme = theme;
    const button = document.querySelector("button.theme");
    if (button) {
      button.textContent = { system: "Auto", light: "Light", dark: "Dark" }[theme];
      button.setAttribute("aria-label", `${button.textContent} colours; change`);
    }
    if (typeof setDark === "function") setDark(theme === "system" ? null : theme === "dark");
  }

  function nextTheme() {
    const theme = themes[(themes.indexOf(readTheme()) + 1) % themes.length];
    try {
      localStorage.theme = theme;
    } catch {
      // without storage it holds for this page
    }
    applyTheme(theme);
  }

  function copy(selector, button) {
    const say = (words) => {
      button.parentElement.querySelector(".copied").textContent = words;
    };
    const text = document.querySelector(selector).textContent;
    const failed = () => say("Copying failed: select it by hand.");
    if (!navigator.clipboard) return failed(); // not over plain http from another machine
    navigator.clipboard.writeText(text).then(() => say("Copied."), failed);
  }

  // The chart as it looks now: a copy in which the style sheet's colours are written out.
  function drawChart(section) {
    const svg = section.querySelector(".nicegui-echart svg");
    const copy = svg.cloneNode(true);
    const texts = svg.querySelectorAll("text");
    copy.querySelectorAll("text").forEach((text, index) => {
      text.setAttribute("style", `${text.getAttribute("style") || ""};fill:${getComputedStyle(texts[index]).fill}`);
    });
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.style.background = getComputedStyle(section).backgroundColor;
    copy.style.fontFamily = "sans-serif";
    return { source: new XMLSerializer().serializeToString(copy), width: svg.clientWidth, height: svg.clientHeight };
  }

  function offer(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  function saveChart(button, name, kind) {
    const { source, width, height } = drawChart(button.closest("section"));
    const blob = new Blob([source], { type: "image/svg+xml" });
    if (kind === "svg") return offer(blob, `${name}.svg`);
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [2 * width, 2 * height];
      const context = canvas.getContext("2d");
      context.fillStyle = getComputedStyle(button.closest("section")).backgroundColor;
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((drawn) => offer(drawn, `${name}.png`), "image/png");
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(source)}`;
  }

  applyTheme(readTheme());
  document.addEventListener("DOMContentLoaded", () => {
    applyTheme(readTheme());
    const current = document.querySelector("nav a[aria-current]"); // on a phone it may be out of sight
    if (current) current.parentElement.scrollLeft = current.offsetLeft - 40;
  });
  return { nextTheme, copy, saveChart };
})();
