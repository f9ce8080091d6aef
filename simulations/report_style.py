"""The style sheet and the script of report.html."""

CSS = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --text: #16191d; --muted: #5c6570; --line: #e1e4e9;
  --c1: #2563c9; --c2: #d9730d; --c3: #14866d; --c4: #8b4fc6; --c5: #b8860b; --c6: #c2385a; --c7: #aab2bd; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1216; --card: #181c22; --text: #e8ebef; --muted: #9aa4b0;
  --line: #2b323b; --c1: #6aa5ff; --c2: #f2a154; --c3: #46c2a4; --c4: #bb91ee; --c5: #dcb64b; --c6: #f07c98;
  --c7: #55606d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 24px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0; font-size: 26px; } h2 { margin: 0; font-size: 16px; } p { margin: 4px 0 0; }
.muted, footer, dt { color: var(--muted); font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(112px, 1fr)); gap: 10px; margin: 18px 0; }
.tiles div, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
dd { margin: 0; font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; }
main { columns: 2 520px; column-gap: 14px; }
section { padding: 16px; margin-bottom: 14px; break-inside: avoid; position: relative; }
svg { display: block; width: 100%; height: auto; margin-top: 8px; overflow: visible; }
svg text { fill: var(--muted); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .name { text-anchor: middle; }
.grid { stroke: var(--line); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke: var(--c); }
.area { fill: var(--c); opacity: .85; } .bar, .dot { fill: var(--c); } .fault { fill: var(--c6); opacity: .18; }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-top: 8px; font-size: 13px; }
.legend i { display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 3px;
  background: var(--c); vertical-align: -1px; }
.scroll { overflow-x: auto; }
table { width: 100%; margin-top: 8px; border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 5px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 400; } th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tbody tr:last-child td { border: 0; }
.tip { position: absolute; pointer-events: none; padding: 6px 10px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); font-size: 12px; white-space: nowrap; box-shadow: 0 2px 8px rgb(0 0 0 / .18); }
footer { margin-top: 20px; }
"""

# The values under the pointer, beside it.
SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-hover]")) {
  const data = JSON.parse(svg.dataset.hover), card = svg.closest("section"), tip = document.createElement("div");
  tip.className = "tip"; tip.hidden = true; card.append(tip);
  const mark = document.createElementNS(svg.namespaceURI, "line");
  mark.setAttribute("class", "grid"); mark.setAttribute("y1", 10); mark.setAttribute("y2", 226); svg.append(mark);
  const show = (value) => value === null ? "none" : Math.abs(value) >= 1e4
    ? Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(value) : +value.toPrecision(4);
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * 720;
    const x = data.low + (at - data.start) / (data.end - data.start) * (data.high - data.low);
    if (x < data.low || x > data.high) { tip.hidden = true; return; }
    const lines = data.series.map((one) => {
      let best = 0;
      one.x.forEach((value, index) => { if (Math.abs(value - x) < Math.abs(one.x[best] - x)) best = index; });
      return `${one.name}: ${show(one.y[best])}`;
    });
    tip.textContent = ""; [`${x.toFixed(2)}`, ...lines].forEach((line) => {
      const row = document.createElement("div"); row.textContent = line; tip.append(row);
    });
    mark.setAttribute("x1", at); mark.setAttribute("x2", at);
    const outer = card.getBoundingClientRect();
    tip.style.left = `${Math.min(event.clientX - outer.left + 14, outer.width - 190)}px`;
    tip.style.top = `${event.clientY - outer.top + 14}px`; tip.hidden = false;
  });
  svg.addEventListener("mouseleave", () => {
    tip.hidden = true; mark.removeAttribute("x1"); mark.removeAttribute("x2");
  });
}
"""
