"""The page that tools.report and tools.compare fill: light and dark colours, no scripts."""

from string import Template

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$name · slotstream</title>
<style>
:root {
  --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #5b6470; --rule: #e1e5ea;
  --s0: #2463c9; --s1: #d1570b; --s2: #1d8a5a; --s3: #8a4fc0;
  --s4: #c2326e; --s5: #0f8f9e; --s6: #8f7410; --s7: #6b7480;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1c2026; --ink: #e7eaee; --soft: #9aa4b1; --rule: #2c323a;
    --s0: #79a9ff; --s1: #ff9e5c; --s2: #5fcf9c; --s3: #c79bf2;
    --s4: #ff85b0; --s5: #5cd3e0; --s6: #dcc25a; --s7: #a9b2bd;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1180px; padding: 48px 28px 72px; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums;
}
h1 { margin: 0; font-size: 34px; line-height: 1.2; letter-spacing: -0.02em; }
h2 { margin: 56px 0 16px; font-size: 22px; letter-spacing: -0.01em; }
h3 { margin: 28px 0 8px; font-size: 16px; }
.summary { margin: 8px 0 28px; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px; }
.tile { padding: 16px 18px; border-radius: 10px; background: var(--card); }
.tile b { display: block; font-size: 28px; line-height: 1.25; letter-spacing: -0.02em; }
.tile span { display: block; }
.tile small { color: var(--soft); }
.charts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 36px 28px; align-items: start;
}
.charts + .charts { margin-top: 36px; }
figure { margin: 0; }
figcaption, .legend { display: flex; flex-wrap: wrap; gap: 0 16px; }
figcaption { justify-content: space-between; font-weight: 600; }
.legend { font-weight: 400; font-size: 14px; color: var(--soft); }
.key::before {
  content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 6px;
  vertical-align: middle; border-radius: 2px; background: var(--series);
}
.s0 { --series: var(--s0); } .s1 { --series: var(--s1); }
.s2 { --series: var(--s2); } .s3 { --series: var(--s3); }
.s4 { --series: var(--s4); } .s5 { --series: var(--s5); }
.s6 { --series: var(--s6); } .s7 { --series: var(--s7); }
svg { display: block; width: 100%; height: auto; font: 13px system-ui, sans-serif; }
.grid { stroke: var(--rule); }
.axis { stroke: var(--soft); }
.reference { stroke: var(--soft); stroke-dasharray: 4 4; }
.tick { fill: var(--soft); font-size: 12px; }
.name { fill: var(--ink); }
.line { fill: none; stroke: var(--series); stroke-width: 2; stroke-linejoin: round; }
.dot { fill: var(--series); }
table { width: 100%; border-collapse: collapse; font-size: 15px; }
th, td {
  padding: 7px 12px 7px 0; border-bottom: 1px solid var(--rule);
  text-align: left; vertical-align: top;
}
th { font-weight: 500; }
tr:first-child th { color: var(--soft); font-size: 13px; }
.numbers td, .numbers tr:first-child th + th { text-align: right; }
.wide { overflow-x: auto; }
.wide + .wide { margin-top: 20px; }
.commands td { overflow-wrap: anywhere; }
.wide .bar { display: block; margin: 0 0 4px; }
.shares { table-layout: fixed; }
.shares th { overflow-wrap: anywhere; }
.shares th:first-child { width: 190px; }
.shares td { white-space: nowrap; }
.note { margin: 0 0 8px; color: var(--soft); font-size: 14px; }
.bar {
  display: inline-block; height: 10px; min-width: 2px; margin-right: 8px; border-radius: 3px;
  background: var(--series);
}
.picture {
  display: block; max-width: 100%; height: auto; border-radius: 10px;
  border: 1px solid var(--rule);
}
code, pre {
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere;
}
pre { padding: 16px 18px; border-radius: 10px; background: var(--card); overflow: auto; }
summary { margin-top: 20px; cursor: pointer; font-weight: 600; }
</style>
</head>
<body>
<h1>$name</h1>
<p class="summary">$summary</p>
$body
</body>
</html>
""")
