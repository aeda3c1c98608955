"""The style sheet of the report page: light and dark, wide and narrow, screen and paper."""

CSS = """
:root {
  --page: #f5f6f8; --card: #ffffff; --text: #1b2430; --muted: #566270; --line: #dde2e9;
  --accent: #0b5cad; --alarm: #b3161f; --alarm-back: #fdecec; --note: #7a5600;
  --note-back: #fff6e0; --good: #116b3a; --good-back: #e8f6ee; --code: #f0f2f5;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e1218; --card: #171d26; --text: #dfe5ec; --muted: #9aa7b5; --line: #2c3541;
    --accent: #6cb2f5; --alarm: #ff8d88; --alarm-back: #3a1a1d; --note: #f0c65e;
    --note-back: #332912; --good: #74d69a; --good-back: #14301f; --code: #10151c;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--text); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
    "Liberation Sans", sans-serif;
}
main, header.top, footer { max-width: 1020px; margin: 0 auto; padding: 0 24px; }
header.top { padding-top: 44px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.015em; }
h2 { font-size: 1.32rem; margin: 3rem 0 .35rem; letter-spacing: -.01em; }
h3 { font-size: 1.02rem; margin: 0 0 .2rem; }
p { margin: .4rem 0 .8rem; max-width: 74ch; }
.lead { color: var(--muted); margin: 0 0 1.1rem; }
.eyebrow {
  color: var(--muted); font-size: .8rem; letter-spacing: .09em; text-transform: uppercase;
  margin: 0 0 .4rem;
}
a { color: var(--accent); }
a:focus-visible, summary:focus-visible, .scroll:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px;
}
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; }
nav ul { margin: 1rem 0 0; font-size: .93rem; }
dl.facts { display: flex; flex-wrap: wrap; gap: .7rem 2.2rem; margin: 1.3rem 0 0; }
dl.facts div { min-width: 92px; max-width: 100%; }
dl.facts dt { color: var(--muted); font-size: .8rem; }
dl.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.25rem; margin: 1rem 0;
}
figure.card { padding: 1.1rem 1.25rem 1rem; }
figcaption { color: var(--muted); font-size: .93rem; max-width: 78ch; margin: 0 0 .7rem; }
.scroll { overflow-x: auto; }
.tall { max-height: 640px; overflow-y: auto; }
.tall thead th { position: sticky; top: 0; background: var(--card); }
.scroll img { display: block; height: auto; max-width: 100%; }
ul.findings { list-style: none; padding: 0; margin: 1rem 0; display: grid; gap: .45rem; }
ul.findings li { border-radius: 8px; padding: .5rem .8rem; border-left: 4px solid; }
ul.findings b { margin-right: .45rem; }
.alarm { color: var(--alarm); background: var(--alarm-back); }
.note { color: var(--note); background: var(--note-back); }
.good { color: var(--good); background: var(--good-back); }
ul.says { margin: .4rem 0 0; padding-left: 1.1rem; }
ul.says li { margin: .25rem 0; max-width: 78ch; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
table { width: 100%; }
p.caption { color: var(--muted); font-size: .93rem; margin: 0 0 .6rem; }
th, td { padding: .36rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.words { text-align: left; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; line-height: 1.25; }
tbody th, tbody td { white-space: nowrap; }
tbody th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
td.bad { color: var(--alarm); font-weight: 700; }
td.faint { color: var(--muted); }
details { margin: .8rem 0 0; }
summary { cursor: pointer; color: var(--accent); font-size: .93rem; }
pre {
  background: var(--code); border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0 0;
  padding: .8rem 1rem; overflow-x: auto; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo,
    Consolas, "DejaVu Sans Mono", monospace;
}
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.omitted { color: var(--muted); font-size: .93rem; }
footer { color: var(--muted); font-size: .85rem; padding-top: 2rem; padding-bottom: 3rem; }
@media (max-width: 720px) {
  main, header.top, footer { padding-left: 14px; padding-right: 14px; }
  header.top { padding-top: 26px; }
  h1 { font-size: 1.55rem; }
  .card, figure.card { padding: .9rem .9rem .8rem; }
  .tall { max-height: 640px; overflow-y: auto; }
.tall thead th { position: sticky; top: 0; background: var(--card); }
.scroll img { max-width: none; }
}
@media print {
  :root { --page: #fff; }
  .card { break-inside: avoid; }
  .tall { max-height: none; }
  nav, details:not([open]) { display: none; }
}
"""
