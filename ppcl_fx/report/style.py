"""The style sheet of the report: light and dark, no fonts or files from anywhere else."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbf9; --card: #ffffff; --ink: #1c2126; --soft: #5b6570; --line: #dfe2e6; --grid: #e9ebee;
  --c0: #2563a8; --c1: #c2560c; --c2: #15803d; --c3: #9333a8; --c4: #a16207; --c5: #0e7490;
  --c6: #be3455; --c7: #52606d;
  --good: #15803d; --bad: #b42318; --wash: #f1f4f8; --accent: #2563a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1c2024; --ink: #e8eaed; --soft: #a3acb6; --line: #343a41; --grid: #2a3036;
    --c0: #6ab0f3; --c1: #f49b5c; --c2: #5cc98a; --c3: #cf8ee6; --c4: #e0b84a; --c5: #4cc3d9;
  --c6: #f2849e; --c7: #a3acb6;
    --good: #5cc98a; --bad: #f58a7d; --wash: #232930; --accent: #6ab0f3;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main, header.top { max-width: 1160px; margin: 0 auto; padding: 0 24px; }
header.top { padding-top: 40px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; text-wrap: balance; }
h2 { font-size: 21px; margin: 0 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 15px; margin: 24px 0 6px; }
p { margin: 4px 0 12px; max-width: 76ch; }
.lead, .note, figcaption, caption { color: var(--soft); }
figcaption, .note, caption { font-size: 13px; }
nav { margin: 16px 0 0; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; }
a { color: var(--accent); text-underline-offset: 3px; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 3px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 22px 24px; margin: 24px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 1px;
  background: var(--line);
  border: 1px solid var(--line); border-radius: 10px; overflow: hidden; margin: 24px 0 0; }
.cards div { background: var(--card); padding: 14px 18px; }
.cards b { display: block; font-size: 24px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.cards span { font-size: 13px; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
caption { text-align: left; padding: 0 0 8px; caption-side: top; }
th, td { padding: 7px 8px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { font-weight: 600; font-size: 12.5px; color: var(--soft); vertical-align: bottom;
  white-space: normal; }
tbody th, th.left, td.left { text-align: left; }
tbody th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
td.bar { background: linear-gradient(to right, var(--wash) var(--share), transparent var(--share)); }
td.strong { font-weight: 650; }
small { color: var(--soft); font-weight: 400; font-size: 12px; }
figure { margin: 8px 0 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 11.5px; font-family: inherit; }
svg text.strong { fill: var(--ink); font-weight: 600; }
svg text.on { fill: #fff; font-weight: 600; }
@media (prefers-color-scheme: dark) { svg text.on { fill: #14171a; } }
svg .heat { shape-rendering: crispEdges; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--line); }
svg .rule { stroke: var(--bad); stroke-dasharray: 5 4; }
svg .series { fill: none; stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
svg .faint { opacity: 0.35; stroke-dasharray: 3 3; }
svg .band { fill: var(--c0); opacity: 0.11; }
svg .outline { fill: none; stroke: var(--ink); stroke-width: 1.3; }
svg .cell { fill: var(--wash); } svg .gone { fill: var(--wash); opacity: 0.5; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 12px 32px; }
.many { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 18px 24px; }
.many figcaption { color: var(--ink); font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 3px 16px; font-size: 12.5px; color: var(--soft);
  margin: 6px 0 0; padding: 0;
  list-style: none; }
.legend i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.pill { display: inline-block; font-size: 11.5px; font-weight: 600; padding: 0 7px; border-radius: 9px;
  border: 1px solid var(--line);
  color: var(--soft); margin-left: 6px; }
.pill.yes { border-color: transparent; background: var(--c0); color: var(--card); }
.k0 { --k: var(--c0); } .k1 { --k: var(--c1); } .k2 { --k: var(--c2); } .k3 { --k: var(--c3); }
.k4 { --k: var(--c4); } .k5 { --k: var(--c5); } .k6 { --k: var(--c6); } .k7 { --k: var(--c7); }
i.k0, i.k1, i.k2, i.k3, i.k4, i.k5, i.k6, i.k7 { background: var(--k); }
svg .series.k0, svg .series.k1, svg .series.k2, svg .series.k3, svg .series.k4, svg .series.k5,
  svg .series.k6,
svg .series.k7 { stroke: var(--k); }
svg .fill { fill: var(--k); }
.pictures { border-collapse: separate; border-spacing: 8px; width: auto; }
.pictures th, .pictures td { border: 0; padding: 0; text-align: left; vertical-align: middle; }
.pictures thead th { text-align: left; padding-bottom: 4px; color: var(--ink); font-size: 13px;
  white-space: nowrap; }
.pictures tbody th { font-weight: 500; white-space: normal; width: 190px; padding-right: 10px;
  line-height: 1.35; }
.frame { position: relative; display: inline-block; vertical-align: top; }
small.under { display: block; line-height: 1.2; }
.pictures img { display: block; width: 128px; height: 128px; object-fit: contain; border-radius: 6px;
  border: 1px solid var(--line);
  background: var(--wash); }
.pictures img.small { image-rendering: pixelated; }
.mark { position: absolute; right: 5px; bottom: 5px; min-width: 19px; height: 19px; border-radius: 10px;
  text-align: center;
  font-size: 12px; line-height: 19px; font-weight: 700; color: #fff; background: #15803d; }
.mark.no { background: #b42318; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 6px 28px;
  margin: 8px 0; font-size: 13.5px; }
.facts dt { color: var(--soft); font-size: 12.5px; } .facts dd { margin: 0; overflow-wrap: anywhere; }
.reasons { padding-left: 18px; margin: 8px 0; max-width: 84ch; font-size: 13.5px; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; margin-top: 12px; }
footer { max-width: 1160px; margin: 0 auto; padding: 0 24px 40px; color: var(--soft); font-size: 13px; }
@media (max-width: 640px) { main, header.top, footer { padding-left: 12px; padding-right: 12px; }
  section { padding: 16px 14px; } }
@media print { section { break-inside: avoid; } nav { display: none; } }
"""
