"""The page's style sheet: light and dark as the system prefers, one column on a phone."""

CSS = """
:root {
  color-scheme: light dark;
  --surface: #ffffff; --page: #f4f5f7; --text: #16191d; --muted: #59616b; --line: #dcdfe4; --accent: #1d63d8;
  --healthy: #157f3d; --degraded: #9a5b00; --stalled: #c0261c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --surface: #171b21; --page: #0e1116; --text: #e7eaee; --muted: #a0a9b4; --line: #2c333c; --accent: #6ea8fe;
    --healthy: #4cc36f; --degraded: #f0a93b; --stalled: #ff8a80;
  }
}
body { background: var(--page) !important; color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
.nicegui-content { display: block; max-width: 1160px; margin: 0 auto; padding: 20px; }
h1, h2, p, dl, dd { margin: 0; }
h1 { font-size: 22px; line-height: 1.3; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 16px; line-height: 1.4; font-weight: 650; margin-bottom: 8px; }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 16px;
  margin-top: 16px; }
.muted, dt { color: var(--muted); }
.visually-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }

section.verdict { border-left: 6px solid var(--level); --level: var(--degraded); }
.verdict.healthy { --level: var(--healthy); }
.verdict.stalled { --level: var(--stalled); }
.headline { display: flex; align-items: baseline; gap: 12px; }
.level { font-size: 26px; line-height: 1.25; font-weight: 700; color: var(--level); }
.cause { font-size: 17px; min-height: 1.5em; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.cause .since { font-size: 14px; margin-left: 8px; white-space: nowrap; }
.also:empty { display: none; }
dl { display: grid; grid-template-columns: 1.6fr repeat(3, 1fr) 2.2fr; gap: 12px 24px; margin-top: 12px; }
dl > div { min-width: 0; }
dt { font-size: 13px; }
dd { font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
dd .muted { font-size: 14px; font-weight: 400; margin-left: 8px; }
progress { display: block; width: 100%; height: 8px; margin-top: 6px; appearance: none; border: 0;
  border-radius: 4px; background: var(--line); overflow: hidden; }
progress::-webkit-progress-bar { background: var(--line); }
progress::-webkit-progress-value { background: var(--accent); }
progress::-moz-progress-bar { background: var(--accent); }

.legend > span { margin-right: 20px; font-variant-numeric: tabular-nums; }
.legend > span::before { content: ""; display: inline-block; width: 18px; height: 3px; margin-right: 8px;
  vertical-align: middle; background: #3b82f6; }
.legend > .held_out_loss::before { background: #f97316; }
.nicegui-echart { width: 100%; height: 280px; }
.nicegui-echart text { fill: var(--muted) !important; font-family: inherit; }
.tooltip { background: var(--surface) !important; border-color: var(--line) !important; }
.tooltip * { color: var(--text) !important; }

table { width: 100%; table-layout: fixed; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px 7px 0; text-align: left; font-weight: 400; border-bottom: 1px solid var(--line);
  unicode-bidi: isolate; overflow-wrap: anywhere; vertical-align: top; }
thead th { width: 8%; font-size: 13px; color: var(--muted); white-space: nowrap; }
thead th:nth-child(1) { width: 20%; }
thead th:nth-child(4), thead th:nth-child(5) { width: 17%; }
tbody th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
th:nth-child(n+6), td:nth-child(n+6) { text-align: right; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
tbody td:nth-child(4), tbody td:nth-child(5) { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
tr.gone { opacity: 0.6; }

code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.command { display: block; margin-top: 8px; padding: 12px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--page); white-space: pre-wrap; }
.buttons { display: flex; flex-wrap: wrap; align-items: center; gap: 10px; margin-top: 12px; }
button { font: inherit; font-weight: 600; padding: 8px 14px; border: 1px solid var(--line); border-radius: 8px;
  color: var(--text); background: var(--surface); cursor: pointer; }
button:hover { border-color: var(--accent); }
footer { margin-top: 20px; color: var(--muted); font-size: 13px; }
footer nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 6px; }

@media (max-width: 760px) {
  .nicegui-content { padding: 12px; }
  .headline { flex-wrap: wrap; gap: 0 12px; }
  .cause { min-height: 3em; }
  dl { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 12px; }
  dl > div:first-child { grid-column: 1 / -1; }
  dd { font-size: 16px; }
  dl .wide { grid-column: 1 / -1; }
  table, tbody, th, td { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tbody tr { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 4px 16px; padding: 12px 0;
    border-bottom: 1px solid var(--line); }
  tbody tr:last-child { border-bottom: 0; }
  tbody th, tbody td { padding: 0; border: 0; text-align: left !important; }
  tbody th, tbody td:nth-child(4), tbody td:nth-child(5) { grid-column: 1 / -1; }
  tbody td::before { content: attr(data-label) " "; color: var(--muted); }
}
"""
