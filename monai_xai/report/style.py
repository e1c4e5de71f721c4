"""How the page looks: light, readable without color, and a sheet of paper for every part when printed."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem 1.5rem 4rem; background: #fff; color: #1b1e22;
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: .5rem 0; line-height: 1.2; }
h2 { font-size: 1.3rem; margin: 0 0 .6rem; padding-top: 1rem; line-height: 1.25; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; }
nav { margin: .6rem 0 1.2rem; font-size: .9rem; }
nav a { margin-right: 1rem; }
a { color: #0b4f9e; }
section.page { border-top: 2px solid #c9ced6; margin-top: 2rem; }
.verdict { border-left: .6rem solid #777; background: #f3f4f6; padding: .7rem 1rem; margin: .8rem 0; }
.verdict strong { font-size: 1.25rem; display: block; }
.verdict.green { border-color: #1c7c3c; background: #eaf5ed; }
.verdict.amber { border-color: #b97700; background: #fdf4e3; }
.verdict.red { border-color: #b3261e; background: #fbeae9; }
.lamps { display: grid; grid-template-columns: repeat(auto-fit, minmax(13.5rem, 1fr)); gap: .7rem; margin: .8rem 0; }
.lamp { border: 1px solid #c9ced6; border-top-width: .45rem; border-radius: .3rem; padding: .5rem .7rem; }
.lamp h4 { margin: 0; font-size: 1rem; }
.lamp p { font-size: .9rem; }
.lamp.green { border-top-color: #1c7c3c; } .lamp.amber { border-top-color: #e09600; }
.lamp.red { border-top-color: #b3261e; } .lamp.grey { border-top-color: #9aa0a8; color: #555b63; }
.chip { display: inline-block; min-width: 1.5em; padding: 0 .45em; border-radius: 1em; color: #fff; background: #6b7178;
  font-weight: 600; font-size: .85rem; text-align: center; white-space: nowrap; }
.chip.green { background: #1c7c3c; } .chip.amber { background: #9a6300; } .chip.red { background: #b3261e; }
.faint { color: #555b63; font-size: .9rem; }
.caveat { border: 1px solid #c9ced6; background: #f7f8fa; padding: .5rem .8rem; font-size: .88rem; margin-top: 1rem; }
figure { margin: .8rem 0; }
figcaption { font-size: .88rem; color: #40464d; }
img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .4rem 0; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .5rem; border-bottom: 1px solid #dde1e6; }
th { overflow-wrap: normal; }
td:first-child { min-width: 6.5rem; } table.tests td:first-child { min-width: 11rem; }
table.tests td:last-child { min-width: 14rem; }
thead th { border-bottom: 2px solid #9aa0a8; background: #f3f4f6; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bad { background: #fbeae9; font-weight: 600; }
.test { border: 1px solid #c9ced6; border-radius: .3rem; padding: .6rem .9rem; margin: .8rem 0;
  display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 1rem; }
.test h4 { margin: 0 0 .2rem; font-size: 1rem; grid-column: 1 / -1; }
.test dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .3rem 0; font-size: .9rem; }
.test dt { color: #555b63; } .test dd { margin: 0; }
.test figure { margin: 0; max-width: 22rem; }
code { font: .85rem/1.4 "DejaVu Sans Mono", Consolas, monospace; }
.plots figure { display: inline-block; vertical-align: top; width: 48%; min-width: 19rem; margin: .4rem .5rem 0 0; }
@media (max-width: 42rem) { .test { grid-template-columns: minmax(0, 1fr); } }
@page { size: A4; margin: 14mm 13mm; }
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  html, body { background: #fff; }
  body { max-width: none; padding: 0; font-size: 9.5pt; line-height: 1.35; }
  nav { display: none; }
  section.page { break-before: page; border-top: 0; margin-top: 0; }
  h2, h3, h4 { break-after: avoid; }
  .test, .lamp, figure, tr, .verdict, .caveat { break-inside: avoid; }
  thead { display: table-header-group; }
  .wide { overflow: visible; }
  .lamps { grid-template-columns: repeat(4, 1fr); gap: .4rem; }
  .lamp { padding: .3rem .5rem; }
  .map img { max-height: 92mm; width: auto; }
  a { color: inherit; text-decoration: none; }
}
"""
