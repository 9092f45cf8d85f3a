"""How the report looks: one style sheet, light and dark, narrow and wide, no script and nothing from outside."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f6f3; --card: #ffffff; --ink: #1d1b19; --soft: #6f6a64; --line: #e4e1db;
  --accent: #b8630a; --wash: #f1efea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131211; --card: #1c1a19; --ink: #ece9e5; --soft: #a39d95; --line: #322f2c;
    --accent: #f0a13a; --wash: #272422;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; font-variant-numeric: tabular-nums;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1260px; margin: 0 auto; padding: 44px 16px 72px; }
h1 { font-size: clamp(26px, 4.4vw, 38px); line-height: 1.15; letter-spacing: -0.02em; font-weight: 650;
  margin: 0 0 10px; }
h2 { font-size: 19px; letter-spacing: -0.01em; font-weight: 620; margin: 52px 0 14px; }
h2 small { font-size: 14px; font-weight: 400; color: var(--soft); letter-spacing: 0; margin-left: 8px; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 10px; }
p { margin: 0; }
a { color: inherit; }
.lede { max-width: 70ch; font-size: 17px; color: var(--soft); }
.made { margin-top: 8px; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.note { max-width: 90ch; margin-top: 18px; padding: 9px 14px; border-left: 3px solid var(--accent);
  background: var(--wash); }
.soft { color: var(--soft); font-size: 13px; }

.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 1px; margin: 28px 0 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.figures div { background: var(--card); padding: 13px 16px 12px; }
.figures dt { color: var(--soft); font-size: 13px; }
.figures dd { margin: 0; font-size: 23px; font-weight: 620; letter-spacing: -0.01em; }
.figures dd small { display: block; min-height: 20px; font-size: 13px; font-weight: 400; color: var(--soft);
  letter-spacing: 0; }

.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
.panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; min-width: 0;
  display: flex; flex-direction: column; }
.panel .soft { margin-top: auto; padding-top: 8px; }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
.chart text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .even { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 4; }
.chart .dot { fill: var(--accent); fill-opacity: .6; stroke: var(--card); stroke-width: 1; }
.chart a:hover .dot, .chart a:focus .dot { fill-opacity: 1; stroke: var(--ink); }
.chart .area { fill: var(--accent); fill-opacity: .22; stroke: var(--accent); stroke-width: 1.5; }

.rows { display: grid; grid-template-columns: auto auto 1fr auto; gap: 5px 12px; align-items: center; font-size: 13px; }
.rows .glyph { display: flex; align-items: flex-end; gap: 2px; height: 18px; }
.rows .glyph i { width: 7px; background: var(--accent); }
.rows .count { height: 10px; background: var(--wash); border-radius: 2px; }
.rows .count i { display: block; height: 100%; background: var(--accent); opacity: .75; border-radius: 2px; }
table.levels { width: 100%; border-collapse: separate; border-spacing: 3px; font-size: 13px; text-align: center; }
.levels th { font-weight: 400; color: var(--soft); padding: 2px 6px; }
.levels tbody td { height: 41px; border-radius: 4px; background: var(--wash); }
.levels td[style] { background: color-mix(in srgb, var(--accent) var(--share), var(--card)); }
.levels tfoot td { font-weight: 600; padding-top: 4px; }

.clips { display: grid; grid-template-columns: repeat(auto-fill, 294px); gap: 16px; justify-content: center; }
.clip { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px;
  scroll-margin: 16px; }
.clip:target { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
.pair { display: flex; justify-content: space-between; }
.pair figure { margin: 0; }
.pair figcaption { font-size: 12px; color: var(--soft); margin-bottom: 3px; }
.film { background-image: var(--film); background-repeat: no-repeat; image-rendering: pixelated; border-radius: 3px; }
.ours { background-position-y: 100%; }
.blocks { position: relative; display: flex; gap: 3px; height: 46px; margin: 9px 0 11px; }
.blocks div { position: relative; flex: 1; background: var(--wash); border-radius: 3px; overflow: hidden; }
.blocks div i { position: absolute; inset: auto 0 0 0; background: var(--accent); opacity: .55; }
.blocks div b { position: absolute; left: 6px; top: 3px; font-size: 12px; font-weight: 600; }
.blocks .head { position: absolute; top: -2px; bottom: -2px; width: 2px; margin-left: -1px; background: var(--ink); }
.clip h3 { margin: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.clip h3 span { color: var(--soft); font-weight: 400; }
.numbers { display: grid; grid-template-columns: repeat(4, auto); justify-content: space-between; margin: 7px 0 0; }
.numbers dt { font-size: 12px; color: var(--soft); line-height: 1.3; }
.numbers dd { margin: 0; font-weight: 600; font-size: 14px; }
.clip .why { font-size: 13px; color: var(--soft); margin-top: 8px; line-height: 1.42; overflow-wrap: anywhere; }
@keyframes play { from { background-position-x: 0%; } to { background-position-x: 100%; } }
.bar { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; }
.pause { font-size: 13px; color: var(--soft); cursor: pointer; }
.pause input { margin: 0 5px 0 0; vertical-align: -1px; }
body:has(#pause:checked) :is(.film, .head) { animation-play-state: paused; }

dl.protocol { display: grid; grid-template-columns: minmax(110px, 190px) minmax(0, 1fr); gap: 5px 16px; margin: 0;
  font-size: 14px; }
.protocol dt { color: var(--soft); }
.protocol dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13px ui-monospace, "SF Mono", Consolas, monospace; }
ul.skipped { margin: 0; padding-left: 18px; font-size: 14px; overflow-wrap: anywhere; }
"""
