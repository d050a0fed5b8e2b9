"""The look of a page: light and dark, on a phone and on a desk."""

STYLE = """
:root { color-scheme: light dark; --fg: #1c2024; --dim: #5d6670; --bg: #fff; --card: #f6f7f9;
  --soft: #e3e6ea; --bar: #2f74d0; --old: #a9bfdd; --gone: #cdb59a; --bad: #c2571a;
  --warn: #8f4a00; --warnbg: #fff4e5; }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e6e8; --dim: #9aa3ad; --bg: #16181b;
  --card: #1e2125; --soft: #33373c; --bar: #6aa5f0; --old: #48628a; --gone: #6f5f4c;
  --bad: #ef8a4e; --warn: #f5b878; --warnbg: #2d2316; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg);
  max-width: 70rem; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
p { max-width: 46rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--soft); text-align: left;
  overflow-wrap: anywhere; }
/* Without a least width, anywhere lets a name shrink to one letter a line. */
td { min-width: 6.5em; } td:first-child { min-width: 11em; }
.share { white-space: nowrap; }
td.n, th.n { text-align: right; overflow-wrap: normal; } td.n { min-width: 0; white-space: nowrap; }
rect.all { fill: var(--soft); } rect.new { fill: var(--bar); } rect.old { fill: var(--old); }
.warnings { background: var(--warnbg); border-left: 4px solid var(--warn); padding: .6rem 1rem;
  border-radius: 4px; }
.warning { color: var(--warn); margin: .2rem 0; }
pre { overflow-x: auto; background: var(--card); padding: .7rem 1rem; border-radius: 6px; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif; }
svg .grid { stroke: var(--soft); } svg .axis { stroke: var(--dim); }
svg .dense { stroke: var(--dim); stroke-dasharray: 2 4; }
figure { margin: 0; } figcaption { color: var(--dim); font-size: .85em; }

.answer { background: var(--card); border-radius: 10px; padding: 1rem 1.2rem; margin: 1rem 0; }
.fact { display: grid; grid-template-columns: 13rem 6.5rem 1fr 17rem; gap: 0 1rem;
  align-items: center; padding: .35rem 0; }
.fact b { font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.fact.error b, .fact.error .after { --bar: var(--bad); } .fact.error b { color: var(--bad); }
.fact .words { color: var(--dim); font-size: .9em; }
.track { display: block; background: var(--soft); border-radius: 3px; overflow: hidden; }
.track i { display: block; height: 8px; min-width: 1px; }
.answer .track { background: none; } .answer .track i { border-radius: 2px; margin: 1px 0; }
i.before { background: var(--old); } i.after, i.kept { background: var(--bar); }
i.error { background: var(--bad); } i.gone { background: var(--gone); }
.key { color: var(--dim); font-size: .85em; margin: .4rem 0 0; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-left: .6em; }
.key i:first-child { margin-left: 0; }
.key i.cut { width: 2px; background: var(--fg); border-radius: 0; }
.key i.hollow { border: 2px solid var(--bar); border-radius: 50%; }

.layers { font-size: .9rem; }
.layer { display: grid; grid-template-columns: minmax(8rem, 2fr) 3fr 3fr; gap: 0 1.2rem;
  align-items: center; padding: .15rem 0; border-bottom: 1px solid var(--soft); }
.layer.two { grid-template-columns: minmax(8rem, 2fr) 6fr; }
.layer.head { color: var(--dim); font-size: .85em; }
.layer .what { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.layer > span:not(.what):has(.track) { display: grid; grid-template-columns: 1fr 5.5rem;
  gap: .7rem; align-items: center; }
.layer b { font-weight: 500; font-variant-numeric: tabular-nums; white-space: nowrap; }
.layer .track { position: relative; height: 10px; }
.layer .track i { position: absolute; left: 0; top: 0; height: 10px; }
.layer.two .track i.after, .layer .track i.before { z-index: 1; }
.layer.two .track i.before { z-index: 0; }
.times .layer .track { height: 18px; background: none; } .times .layer .track i { height: 8px; }
.times .layer .track i.after { top: 9px; }
.times .layer > span:not(.what):has(.track) { grid-template-columns: 1fr 10rem; }
.layer small { display: none; color: var(--dim); }
.omitted { color: var(--dim); }

.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
.card { background: var(--card); border-radius: 8px; padding: .8rem 1rem; min-width: 0; }
.card p { color: var(--dim); font-size: .85em; margin: 0 0 .6rem; }
.mask img { display: block; width: 100%; height: auto; max-height: 14rem; object-fit: contain;
  object-position: left; image-rendering: pixelated; }
.mask { margin-bottom: .7rem; }
svg.histogram, svg.columns, svg.scatter, svg.search { display: block; width: 100%; height: auto; }
.histogram .kept { fill: var(--bar); } .histogram .gone { fill: var(--gone); }
.histogram .cut { stroke: var(--fg); stroke-width: 1.5; }
.pair { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-end; margin-bottom: 1rem; }
.pair figure { flex: 1 1 18rem; max-width: 26rem; } .pair figure + figure { max-width: 36rem; }
.scatter .dots { stroke: var(--bar); stroke-width: 4; stroke-linecap: round; opacity: .6; }
.columns .error { fill: var(--bad); }
svg.search { max-width: 42rem; }
.search .way { fill: none; stroke: var(--old); stroke-width: 2; }
.search .within { fill: var(--bar); }
.search .beyond { fill: var(--bg); stroke: var(--bar); stroke-width: 2; }
@media (max-width: 45rem) {
  .fact { grid-template-columns: 1fr auto; }
  .fact .track, .fact .words { grid-column: 1 / -1; }
  .layer, .layer.two { grid-template-columns: 1fr; padding: .4rem 0; }
  .layer.head { display: none; }
  .layer > span:not(.what):has(.track) { grid-template-columns: 4rem 1fr 5.5rem; }
  .times .layer > span:not(.what):has(.track) { grid-template-columns: 2rem 1fr 10rem; }
  .layer small { display: inline; }
}
"""
