"use strict";
// Draws the charts of a report when they come into view, and all of them before printing.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const AT_ONCE = 3; // charts that are drawn wherever they stand
  const views = new Map(), drawing = new Map();
  const one = (name, value) => document.querySelector(`[data-${name}="${CSS.escape(value)}"]`);

  const WORDS = { symbol: "points", rect: "bars or areas", line: "line", rule: "lines", group: "lines" };
  function described(spec) { // for screen readers: what marks of a kind are
    const each = (marks) => {
      for (const mark of marks ?? []) {
        mark.description ??= WORDS[mark.type] ?? mark.type;
        each(mark.marks);
      }
    };
    each(spec.marks);
    return spec;
  }

  const options = {
    patch: described,
    ast: true, logLevel: vega.Error, renderer: "svg", actions: false, defaultStyle: false,
    tooltip: { disableDefaultStyle: true, formatTooltip: (value, sanitize) => sanitize(value.tip ?? "") },
  };

  function draw(name) {
    if (!drawing.has(name)) drawing.set(name, redraw(name));
    return drawing.get(name);
  }

  async function redraw(name) {
    const place = one("chart", name);
    const live = place.querySelector(".live") ?? place.appendChild(document.createElement("div"));
    live.className = "live";
    views.get(name)?.finalize();
    const { view } = await vegaEmbed(live, data.charts[name], options);
    views.set(name, view);
    place.querySelector(".still")?.remove();
    place.dataset.drawn = "yes";
    if (one("limit", name)) interact(name, view);
    if (one("least", name)) filter(name, view);
  }

  // -- the slider that hides small differences ------------------------------------------------------------------------

  function filter(name, view) {
    const slider = one("least", name), told = data.least[name], start = param(name, "least").value;
    const rows = data.charts[name].layer.flatMap((each) => (each.data.values ?? [])).filter((row) => row.size !== undefined);
    const names = (least) => new Set(rows.filter((row) => row.size >= least).map((row) => row.y)).size;
    const every = names(0), each = data.charts[name].height / Math.max(1, names(start));
    slider.max = Math.max(...rows.map((row) => row.size));
    slider.step = slider.max / 1000 || 0.001;
    slider.value = start;
    const show = (least) => {
      view.signal("least", least).height(Math.max(60, each * names(least))).run();
      const value = `${Number(least.toPrecision(3))} ${told.unit}`;
      one("shown", name).textContent = `${value}: ${names(least)} of ${every} are shown`;
      slider.setAttribute("aria-valuetext", value);
    };
    show(start);
    slider.oninput = () => show(Number(slider.value) <= Number(slider.step) ? 0 : Number(slider.value));
  }

  // -- the axis switch, the slider, pinned candidates ----------------------------------------------------------------

  const param = (name, key) => data.charts[name].params.find((each) => each.name === key);
  const points = (name) => data.charts[name].layer.flatMap((each) => (each.data.values ?? [])).filter((row) => row.key);

  function switchTo(name, by) {
    param(name, "by").value = by;
    param(name, "limit").value = null;
    for (const layer of data.charts[name].layer) {
      const x = layer.encoding.x;
      if (x) { x.title = data.switches[name][by]; x.axis.title = data.switches[name][by]; }
    }
    drawing.set(name, redraw(name));
  }

  function interact(name, view) {
    const slider = one("limit", name), by = param(name, "by").value;
    const known = points(name).map((row) => row.xs[by]).filter((x) => x !== undefined);
    slider.min = Math.min(...known); slider.max = Math.max(...known); slider.value = slider.max;
    slider.step = (slider.max - slider.min) / 200 || 0.001;
    const say = (limit) => {
      const within = points(name).filter((row) => row.key !== "baseline" && row.xs[by] <= limit + 1e-9);
      const best = within.reduce((a, b) => (a === null || b.y > a.y ? b : a), null);
      const share = `${limit.toFixed(3)} of the baseline's ${data.nouns[by]}`;
      const ms = by === "latency" && data.base_ms ? `${(limit * data.base_ms).toPrecision(3)} ms (${share})` : share;
      one("best", name).textContent = `At ${ms} or less ` + (best ? `the best is ${best.tip}.` : "there is no candidate.");
      slider.setAttribute("aria-valuetext", ms);
    };
    say(Number(slider.max));
    slider.oninput = () => {
      const limit = Number(slider.value);
      view.signal("limit", limit).run();
      say(limit);
    };
    view.addEventListener("click", (_, item) => item?.datum?.key && pin(name, item.datum.key));
  }

  function pin(name, key) {
    const place = one("pinned", name), row = points(name).find((each) => each.key === key);
    const widths = data.widths?.widths[key];
    place.replaceChildren();
    if (!row) return;
    const told = document.createElement("p");
    told.textContent = row.tip;
    place.append(told);
    if (!widths) return;
    const list = document.createElement("p");
    list.textContent = data.widths.groups.map((group, i) => `${group} ${widths[i]}/${data.widths.sizes[i]}`).join(", ");
    place.append(list);
    one("pin", name).value = key;
  }

  for (const controls of document.querySelectorAll("[data-controls]")) {
    const name = controls.dataset.controls, select = one("switch", name), pins = one("pin", name);
    controls.hidden = false;
    if (select) select.onchange = () => switchTo(name, select.value);
    if (!pins) continue;
    const listed = new Set(["baseline"]); // two marks may stand for one candidate
    for (const row of points(name)) {
      if (listed.has(row.key)) continue;
      listed.add(row.key);
      const choice = document.createElement("option");
      choice.value = row.key; choice.textContent = row.tip.split(":")[0];
      pins.append(choice);
    }
    pins.onchange = () => pin(name, pins.value);
  }

  // -- when to draw ----------------------------------------------------------------------------------------------------

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      draw(entry.target.dataset.chart);
    }
  }, { rootMargin: "400px" });
  const places = [...document.querySelectorAll("[data-chart]")];
  places.slice(0, AT_ONCE).forEach((place) => draw(place.dataset.chart));
  places.slice(AT_ONCE).forEach((place) => seen.observe(place));
  const all = () => Promise.all(Object.keys(data.charts).map(draw));
  window.addEventListener("beforeprint", all);
  window.reportCharts = { all, views };
})();
