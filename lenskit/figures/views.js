// What a view does in the browser. In scope: `key` and `props` (its name and packed data), `bundle`
// (circuitsvis, packed). Each view brings everything along; what is loaded once serves the page.
const inflate = async (packed) => {
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Response(bytes).body.pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
};
const load = async () => {
  // The names of module systems are hidden from the bundle: exported notebooks load RequireJS, and
  // libraries inside the bundle would register with it instead of with each other.
  const script = document.createElement("script");
  script.text = "window.lenskitVis = (function (define, module, exports, require) {" +
    (await inflate(bundle)) + "\n;return CircuitsVis;})()";
  document.head.append(script);
  return window.lenskitVis;
};
const find = async () => {
  // JupyterLab attaches an output after its script has run.
  for (let tries = 0; tries < 1200; tries++) {
    const view = document.querySelector(`[data-lenskit="${key}"]:not([data-drawn])`);
    if (view) return view;
    await new Promise((done) => setTimeout(done, 50));
  }
};
const view = await find();
if (!view) return;
view.dataset.drawn = "";
const vis = await (window.lenskitLoading ??= load());
const given = JSON.parse(await inflate(props));
const page = document.createElement("div");
const make = (tag, into, text = "", style = "") => {
  const made = document.createElement(tag);
  made.textContent = text;
  made.style.cssText = style;
  into.append(made);
  return made;
};
const draw = (into, component, data) => {
  const place = document.createElement("div");
  window.lenskitCount = (window.lenskitCount ?? 0) + 1;
  place.id = `lenskit-view-${window.lenskitCount}`;
  into.replaceChildren(place);
  vis.render(place.id, vis[component], data);
};
const choose = (into, name, options, start, changed) => {
  const label = make("label", into, `${name} `, "margin-right:1.2em;white-space:nowrap");
  const select = make("select", label, "", "max-width:16em");
  options.forEach((text, place) => (make("option", select, text).value = place));
  select.value = start;
  select.onchange = () => changed(Number(select.value));
  return select;
};
const short = (value) => Number(value.toPrecision(2));
const colours = (bound) => ({
  positiveColor: given.positive, negativeColor: given.negative, maxValue: bound, minValue: -bound,
});
const explain = (into, bound, most) => {
  into.replaceChildren();
  into.style.cssText = "display:flex;align-items:center;gap:8px;font-size:12px;margin:4px 0 6px";
  const low = given.signed ? `${given.negative},white` : "white";
  const ramp = `linear-gradient(to right,${low},${given.positive})`;
  make("span", into, given.signed ? `−${bound}` : "0");
  make("span", into, "", `width:140px;height:10px;border:1px solid #999;background:${ramp}`);
  make("span", into, `${bound}${most > bound * 1.001 ? " and more" : ""}`);
  make("span", into, given.unit);
};
const controls = make("div", page);
const legend = make("div", page);
const text = make("div", page);
view.replaceChildren(page);

const paint = (values, bound) =>
  draw(text, "ColoredTokens", { tokens: given.tokens, values, paddingBottom: 4, ...colours(bound) });

if (given.kind === "tokens") {
  explain(legend, given.bound, given.largest);
  const buttons = given.labels.length < 2 ? [] : given.labels.map((label, series) => {
    const look = "margin:0 4px 4px 0;font:inherit;font-size:12px;cursor:pointer;color:#262626;" +
      "border:1px solid #999;border-radius:3px";
    const button = make("button", controls, label, look);
    button.onmouseenter = button.onfocus = () => pick(series);
    return button;
  });
  const pick = (series) => {
    buttons.forEach((one, place) => {
      one.style.background = place === series ? "#cfe3f1" : "#f4f4f4";
    });
    paint(given.values[series], given.bound);
  };
  pick(0);
} else {
  const heads = given.attention[0].map((_, head) => `head ${head}`);
  const rows = given.queries.length;
  const before = Array(given.tokens.length - rows).fill([]);
  const at = { block: given.start, query: rows - 1, heads: given.heads };
  const tokens = () => {
    const own = given.attention[at.block].map((head) => head[at.query]);
    const pool = (values) =>
      at.heads === 0 ? values.reduce((a, b) => a + b) / values.length
        : at.heads === 1 ? Math.max(...values) : values[at.heads - 2];
    const values = given.tokens.map((_, key) =>
      Number(pool(own.map((head) => head[key])).toPrecision(3)));
    // The first token, on which idle attention rests, may exceed the scale.
    const others = values.length > 1 ? values.slice(1) : values;
    const bound = given.fixed ? given.bound : short(Math.max(...others)) || 1;
    explain(legend, bound, Math.max(...values));
    paint(values, bound);
  };
  const patterns = () =>
    draw(wide, "AttentionHeads", {
      tokens: given.plain, maskUpperTri: false, attentionHeadNames: heads, ...colours(given.bound),
      attention: given.attention[at.block].map((head) => [...before, ...head]),
    });
  choose(controls, "block", given.blocks, at.block, (to) => {
    at.block = to;
    tokens();
    patterns();
  });
  choose(controls, "tokens coloured by the attention of", given.queries, at.query, (to) => {
    at.query = to;
    tokens();
  });
  choose(controls, "heads", ["mean", "maximum", ...heads], at.heads, (to) => {
    at.heads = to;
    tokens();
  });
  const scale = make("div", page);
  const wide = make("div", page);
  wide.className = "lenskit-heads";
  explain(scale, given.bound, given.largest);
  make("span", scale, "in each head: rows are the candidate tokens, columns all tokens");
  tokens();
  patterns();
}
