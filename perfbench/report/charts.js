// Draws the charts of the report. All text reaches the page as text nodes; nothing is ever parsed as HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const GREY = "var(--c0)", INK = "var(--ink)", SOFT = "var(--soft)";
  const FONT = { fontSize: "13px", fontFamily: "inherit", color: INK, background: "none", overflow: "visible" };
  const measure = document.createElement("canvas").getContext("2d");
  measure.font = "13px system-ui, sans-serif";

  const color = (name) => {
    const place = data.colors[name.split(", ")[0]];
    return place === 0 ? GREY : `var(--c${place === undefined ? 1 : 1 + (place - 1) % 7})`;
  };
  const textWidth = (text) => measure.measureText(text).width * 1.08;
  // Three digits that count, and none behind the point from 100 on; `like`: the value whose digits it shares.
  const number = (value, like = value) => {
    if (value === null || value === undefined) return "-";
    if (typeof value !== "number") return String(value);
    const size = Math.abs(like), digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.1 || size === 0 ? 2 : 4;
    return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  };
  // In a table whole numbers stay whole.
  const cellText = (value) => Number.isInteger(value) ? value.toLocaleString("en") : number(value);

  // The left margin that the names need, and the names cut where they would take over a third of the chart.
  const names = (rows, width) => {
    const widest = Math.max(...rows.map((row) => textWidth(row[0])));
    const margin = Math.min(widest + 14, Math.max(70, width * 0.36));
    const cut = (name) => {
      let shown = name;
      while (shown.length > 4 && textWidth(shown) > margin - 12) shown = shown.slice(0, -2);
      return shown === name ? name : shown.slice(0, -1) + "…";
    };
    return { marginLeft: margin, y: { label: null, domain: rows.map((row) => row[0]), tickFormat: cut, tickSize: 0 } };
  };
  const axis = (label, more) => ({ label, labelAnchor: "left", labelArrow: "none", grid: true, nice: true, ticks: 5, ...more });
  const base = (chart, width, height) => ({ width, height, marginRight: 16, marginTop: 8, marginBottom: 42, style: FONT });

  function bars(chart, width) {
    const rows = chart.rows, fromZero = chart.kind === "bars";
    const unit = chart.data?.unit ?? "", like = (row) => unit ? Math.min(99, row[1]) : row[1];
    const label = (row) => number(row[1], like(row)) + unit + (row[2] === null || width < 400 ? "" : ` [${number(row[2], like(row))}, ${number(row[3], like(row))}]`);
    const room = Math.max(...rows.map((row) => textWidth(label(row)))) + 10;
    const reach = rows.flatMap((row) => row.slice(1, 4)).filter((value) => value !== null);
    const most = Math.max(...reach, fromZero ? 0 : chart.data?.reference ?? -Infinity);
    const least = fromZero ? 0 : Math.min(...reach, chart.data?.reference ?? Infinity);
    const pad = (most - least || 1) * 0.06;
    const kinds = {
      bars: [Plot.barX(rows, { x: (row) => row[1], y: (row) => row[0], fill: (row) => color(row[0]), fillOpacity: 0.75, insetTop: 2, insetBottom: 2 })],
      dots: [Plot.dot(rows, { x: (row) => row[1], y: (row) => row[0], fill: (row) => color(row[0]), r: width < 500 ? 3.5 : 5 })],
    };
    const reference = chart.data?.reference;
    return Plot.plot({
      ...base(chart, width), ...names(rows, width), height: rows.length * 30 + 56,
      marginRight: room,
      marginLeft: names(rows, width).marginLeft,
      x: axis(chart.axis, { domain: fromZero ? [0, most] : [least - pad, most + pad], nice: fromZero, ticks: width < 420 ? 4 : 6 }),
      color: { type: "identity" },
      marks: [
        reference === undefined ? null : Plot.ruleX([reference], { stroke: SOFT, strokeDasharray: "4 3" }),
        ...kinds[chart.kind],
        Plot.ruleY(rows.filter((row) => row[2] !== null), { x1: (row) => row[2], x2: (row) => row[3], y: (row) => row[0], stroke: fromZero ? INK : (row) => color(row[0]), strokeWidth: fromZero ? 1.5 : 2.5 }),
        Plot.text(rows, { y: (row) => row[0], text: label, frameAnchor: "right", textAnchor: "start", dx: 8, fill: INK }),
        fromZero ? Plot.ruleX([0], { stroke: SOFT }) : null,
      ],
    });
  }

  // Not the colours of the methods: a part is no method.
  const PARTS = ["var(--p0)", "var(--p1)", "var(--p2)", "var(--p3)", "var(--p4)", "var(--p5)"];
  function stack(chart, width) {
    const count = chart.data?.parts ?? chart.columns.length - 1;
    const parts = chart.columns.slice(1, 1 + count);
    const cells = chart.rows.flatMap((row) => parts.map((part, place) => ({ name: row[0], part, value: row[1 + place] ?? 0, place })));
    const totals = chart.rows.map((row, at) => {
      const values = row.slice(1, 1 + count).map((value) => value ?? 0);
      const sum = values.reduce((a, b) => a + b, 0);
      const extra = chart.data?.labels?.[at];
      return { name: row[0], end: values.filter((v) => v > 0).reduce((a, b) => a + b, 0), text: number(sum) + (extra && width > 380 ? ` · ${extra}` : "") };
    });
    const room = Math.max(...totals.map((one) => textWidth(one.text))) + 10;
    return Plot.plot({
      ...base(chart, width), ...names(chart.rows, width), height: chart.rows.length * 30 + 56, marginRight: room,
      x: axis(chart.axis, { ticks: width < 420 ? 4 : 6 }),
      color: { type: "identity" },
      marks: [
        Plot.barX(cells, { x: "value", y: "name", fill: (cell) => PARTS[cell.place], fillOpacity: 0.85, insetTop: 2, insetBottom: 2, insetRight: 0.5, order: null }),
        Plot.ruleX([0], { stroke: SOFT }),
        Plot.text(totals, { y: "name", text: "text", frameAnchor: "right", textAnchor: "start", dx: 8, fill: INK }),
      ],
    });
  }
  const keysOf = (chart) => chart.kind !== "stack" ? [] :
    chart.columns.slice(1, 1 + (chart.data?.parts ?? chart.columns.length - 1)).map((part, place) => [part, PARTS[place]]);

  function lines(chart, width) {
    const ends = new Map(chart.rows.map((row) => [row[0], row]));
    const xs = [...new Set(chart.rows.map((row) => row[1]))];
    const log = xs.length > 2 && Math.min(...xs) > 0 && Math.max(...xs) / Math.min(...xs) >= 8;
    const room = Math.max(...[...ends.keys()].map(textWidth)) + 14;
    const height = Math.max(240, ends.size * 20 + 70);
    // A tick at each value that has room beside the one before it.
    const tick = (x) => x.toLocaleString("en"), scale = log ? Math.log : (x) => x;
    const least = scale(Math.min(...xs)), reach = scale(Math.max(...xs)) - least || 1;
    const at = (x) => (scale(x) - least) / reach * (width - 52 - room);
    const ticks = [];
    for (const x of [...xs].sort((a, b) => a - b)) {
      const last = ticks[ticks.length - 1];
      if (last === undefined || at(x) - at(last) > (textWidth(tick(x)) + textWidth(tick(last))) / 2 + 6) ticks.push(x);
    }
    // Labels at the lines' ends, pushed apart where lines end close to each other.
    const values = chart.rows.flatMap((row) => row.slice(2, 5)).filter((value) => value !== null);
    const low = Math.min(...values), high = Math.max(...values), pad = (high - low || high || 1) * 0.05;
    const domain = [low - pad, high + pad], inner = height - 16 - 46;
    const labels = [...ends.values()].sort((a, b) => a[2] - b[2]).map((row) => ({ row, at: (row[2] - domain[0]) / (domain[1] - domain[0]) * inner }));
    for (let place = 1; place < labels.length; place++) labels[place].at = Math.max(labels[place].at, labels[place - 1].at + 16);
    const over = labels.length ? labels[labels.length - 1].at - inner - 4 : 0;
    if (over > 0) for (const label of labels) label.at -= over;
    for (let place = labels.length - 2; place >= 0; place--) labels[place].at = Math.min(labels[place].at, labels[place + 1].at - 16);
    return Plot.plot({
      ...base(chart, width), height, marginTop: 34, marginLeft: 52, marginRight: room, marginBottom: 44, height: height + 18,
      x: axis(chart.data.x, { type: log ? "log" : "linear", ...(log ? { base: 2 } : {}), ticks, tickFormat: tick, nice: false, grid: false, labelAnchor: "center" }),
      y: { label: chart.axis, labelArrow: "none", grid: true, domain, ticks: 5 },
      color: { type: "identity" },
      marks: [
        Plot.ruleX(chart.rows.filter((row) => row[3] !== null), { x: (row) => row[1], y1: (row) => row[3], y2: (row) => row[4], stroke: (row) => color(row[0]), strokeWidth: 1.5, strokeOpacity: 0.6 }),
        Plot.line(chart.rows, { x: (row) => row[1], y: (row) => row[2], z: (row) => row[0], stroke: (row) => color(row[0]), strokeWidth: 2 }),
        Plot.dot(chart.rows, { x: (row) => row[1], y: (row) => row[2], fill: (row) => color(row[0]), r: 3.5 }),
        Plot.text(labels, { x: (label) => label.row[1], y: (label) => domain[0] + label.at / inner * (domain[1] - domain[0]), text: (label) => label.row[0], fill: (label) => color(label.row[0]), textAnchor: "start", dx: 9, fontWeight: 600 }),
      ],
    });
  }

  // One small panel for each row, one above the other; `marks` draws a panel's own marks.
  function panels(chart, width, x, yDomain, marks, label) {
    const rows = chart.rows, each = 46;
    const side = names(rows, width);
    return Plot.plot({
      ...base(chart, width), marginLeft: side.marginLeft, marginRight: 12, marginTop: 4,
      height: rows.length * each + 50,
      fy: { domain: rows.map((row) => row[0]), label: null, axis: null, padding: 0.12 },
      x: axis(x.label, { grid: true, ...x.more }),
      y: { axis: null, domain: yDomain },
      color: { type: "identity" },
      marks: [
        ...marks,
        Plot.text(rows, { fy: (row) => row[0], text: (row) => side.y.tickFormat(row[0]), frameAnchor: "left", textAnchor: "end", dx: -8, fill: INK }),
        label ? Plot.text(rows, { fy: (row) => row[0], text: label, frameAnchor: "top-right", textAnchor: "end", dx: -2, dy: 1, fill: INK, stroke: "var(--ground)", strokeWidth: 4, fontSize: 12 }) : null,
      ],
    });
  }

  function histogram(chart, width) {
    const { low, high, counts } = chart.data, step = (high - low) / counts[0].length;
    const cells = chart.rows.flatMap((row, at) => {
      const most = Math.max(...counts[at]);
      return counts[at].map((count, bin) => ({ name: row[0], x1: low + bin * step, x2: low + (bin + 1) * step, y: count / most })).filter((cell) => cell.y > 0);
    });
    return panels(chart, width, { label: chart.axis, more: { domain: [low, high], nice: false, ticks: width < 420 ? 4 : 7 } }, [0, 1.25], [
      Plot.rect(cells, { fy: "name", x1: "x1", x2: "x2", y1: 0, y2: "y", fill: (cell) => color(cell.name), fillOpacity: 0.7, insetLeft: 0.3, insetRight: 0.3 }),
      Plot.ruleY(chart.rows, { fy: (row) => row[0], y: 0, stroke: "var(--line)" }),
      Plot.ruleX(chart.rows.filter((row) => row[1] <= high), { fy: (row) => row[0], x: (row) => row[1], stroke: INK, strokeWidth: 1.5, y1: 0, y2: 1.1 }),
    ], (row) => `median ${number(row[1])}`);
  }

  function drift(chart, width) {
    const { series, rounds } = chart.data;
    const points = chart.rows.flatMap((row, at) => series[at].map((value, place) => ({ name: row[0], x: (place + 0.5) * rounds / series[at].length + 0.5, value })));
    const sizes = points.map((point) => Math.abs(point.value)).sort((a, b) => a - b);
    const reach = Math.max(5, (sizes[Math.floor(sizes.length * 0.97)] ?? 0) * 1.1);
    const clipped = points.map((point) => ({ ...point, value: Math.max(-reach, Math.min(reach, point.value)) }));
    const shifts = chart.rows.filter((row) => String(row[1]).startsWith("shifts"));
    return panels(chart, width, { label: `repetition (height of a band: ±${number(reach)}%)`, more: { domain: [1, Math.max(2, rounds)], nice: false, ticks: 5 } }, [-reach, reach * 2.4], [
      Plot.ruleY(chart.rows, { fy: (row) => row[0], y: 0, stroke: "var(--line)" }),
      Plot.line(clipped, { fy: "name", x: "x", y: "value", stroke: (point) => color(point.name), strokeWidth: 1.3 }),
      Plot.ruleX(shifts, { fy: (row) => row[0], x: (row) => row[3], stroke: INK, strokeWidth: 1.5, strokeDasharray: "3 2" }),
    ], (row) => row[1]);
  }

  function history(chart, width) {
    const rows = chart.rows.map((row, at) => ({ at, name: row[1], value: row[2], low: row[3], high: row[4], mark: row[5] }));
    const marks = rows.filter((row) => row.mark);
    const shown = (at) => rows[at] ? rows[at].name : "";
    const every = Math.max(1, Math.ceil(rows.length / (width / 95)));
    return Plot.plot({
      ...base(chart, width), height: 300, marginTop: 40, marginLeft: 60, marginRight: 24, marginBottom: 70,
      x: { label: "run, oldest first", labelAnchor: "center", labelArrow: "none", ticks: rows.map((row) => row.at).filter((at) => at % every === 0), tickFormat: shown, tickRotate: -30, domain: [-0.5, Math.max(0.5, rows.length - 0.5)] },
      y: { label: chart.axis, labelArrow: "none", grid: true, ticks: 6, nice: true },
      color: { type: "identity" },
      marks: [
        Plot.ruleX(rows.filter((row) => row.low !== null), { x: "at", y1: "low", y2: "high", stroke: "var(--c1)", strokeOpacity: 0.6 }),
        Plot.line(rows, { x: "at", y: "value", stroke: "var(--c1)", strokeWidth: 1.5 }),
        Plot.dot(rows, { x: "at", y: "value", fill: (row) => row.mark ? "var(--c2)" : "var(--c1)", r: (row) => row.mark ? 5 : 3.5 }),
        Plot.ruleX(marks, { x: (row) => row.at - 0.5, stroke: "var(--c2)", strokeDasharray: "4 3", strokeWidth: 1.5 }),
        Plot.text(marks, { x: (row) => row.at - 0.5, text: "mark", frameAnchor: "top", dy: -14, textAnchor: (row) => row.at > rows.length * 0.7 ? "end" : "start", fill: "var(--c2)", fontWeight: 600 }),
      ],
    });
  }

  // Points with a size; those on the front are ringed. Names stand beside their points, pushed apart.
  function scatter(chart, width) {
    const rows = chart.rows.map(([name, x, y, low, high, size, front]) => ({ name, x, y, low, high, size, front: front === "yes" }));
    const height = Math.max(300, Math.min(380, width * 0.62)), most = Math.max(...rows.map((row) => row.size ?? 0));
    const pad = (values) => {
      const low = Math.min(...values), high = Math.max(...values), more = (high - low || Math.abs(high) * 0.1 || 1) * 0.14;
      return [low - more, high + more];
    };
    const ys = pad(rows.flatMap((row) => [row.low ?? row.y, row.high ?? row.y])), xs = pad(rows.map((row) => row.x));
    const radius = (row) => row.size && most ? 3 + 9 * Math.sqrt(row.size / most) : 5;
    const text = (row) => row.size ? `${row.name} · ${number(row.size)} MiB` : row.name;
    const inner = height - 70, left = (row) => (row.x - xs[0]) / (xs[1] - xs[0]) > 0.55;
    const labels = rows.map((row) => ({ row, at: (row.y - ys[0]) / (ys[1] - ys[0]) * inner })).sort((a, b) => a.at - b.at);
    for (let place = 1; place < labels.length; place++) labels[place].at = Math.max(labels[place].at, labels[place - 1].at + 17);
    for (const label of labels) label.y = ys[0] + label.at / inner * (ys[1] - ys[0]);
    const best = rows.filter((row) => row.front);
    return Plot.plot({
      ...base(chart, width), height, marginLeft: 52, marginTop: 22, marginBottom: 48,
      x: axis(chart.data.x, { domain: xs, ticks: width < 420 ? 4 : 6, nice: false }),
      y: { label: chart.axis, labelArrow: "none", domain: ys, grid: true, ticks: 6 },
      color: { type: "identity" },
      r: { type: "identity" },
      marks: [
        Plot.ruleX(rows.filter((row) => row.low !== null), { x: "x", y1: "low", y2: "high", stroke: (row) => color(row.name), strokeOpacity: 0.7, strokeWidth: 1.5 }),
        Plot.dot(rows, { x: "x", y: "y", r: radius, fill: (row) => color(row.name), fillOpacity: 0.8 }),
        Plot.dot(best, { x: "x", y: "y", r: (row) => radius(row) + 4, stroke: INK, strokeWidth: 1.5 }),
        ...[true, false].map((before) => Plot.text(labels.filter((label) => left(label.row) === before), {
          x: (label) => label.row.x, y: "y", text: (label) => text(label.row), textAnchor: before ? "end" : "start",
          dx: before ? -20 : 20, fill: (label) => color(label.row.name), fontWeight: 600, stroke: "var(--ground)", strokeWidth: 4,
        })),
      ],
    });
  }

  // A cell for each row and stretch of time; beyond the target in another colour.
  function heat(chart, width) {
    const cells = chart.rows.map(([name, from, to, value]) => ({ name, from, to, value }));
    const margin = names(chart.rows, width), target = chart.data.target;
    const rows = [...new Set(cells.map((cell) => cell.name))];
    const over = (cell) => cell.value > target, most = Math.max(...cells.map((cell) => cell.value), 2 * target);
    return Plot.plot({
      ...base(chart, width), ...margin, height: rows.length * 17 + 60, y: { ...margin.y, domain: rows },
      x: axis(chart.axis, { ticks: width < 420 ? 4 : 6, grid: false, nice: false }),
      color: { type: "identity" },
      opacity: { type: "identity" },
      marks: [Plot.barX(cells, {
        x1: "from", x2: "to", y: "name", inset: 0.5, fill: (cell) => over(cell) ? "var(--c2)" : "var(--c1)",
        fillOpacity: (cell) => over(cell) ? 0.5 + 0.5 * (cell.value - target) / (most - target) : 0.12 + 0.7 * cell.value / target,
        title: (cell) => `${cell.name}, ${number(cell.from)} s: ${number(cell.value)} ms`,
      })],
    });
  }

  const KINDS = { bars, dots: bars, stack, lines, histogram, drift, history, scatter, heat };

  const element = (tag, text, into, attributes = {}) => {
    const made = document.createElement(tag);
    if (text !== null) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    into?.append(made);
    return made;
  };

  function fillTable(details, chart) {
    if (details.querySelector("table")) return;
    const table = element("table", null, element("div", null, details, { class: "scroll", tabindex: "0" }));
    const head = element("tr", null, element("thead", null, table));
    for (const column of chart.columns) element("th", column, head, { scope: "col" });
    const body = element("tbody", null, table);
    for (const row of chart.rows) {
      const line = element("tr", null, body);
      row.forEach((cell, place) => element(place ? "td" : "th", cellText(cell), line, place ? {} : { scope: "row" }));
    }
  }

  function draw(figure, width = Math.floor(figure.querySelector(".drawing").clientWidth)) {
    const chart = figure.chart, place = figure.querySelector(".drawing");
    if (!width || figure.drawnWidth === width) return;
    figure.drawnWidth = width;
    const svg = KINDS[chart.kind](chart, width);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${chart.title}. The figures are in the table below it.`);
    place.replaceChildren(svg);
  }

  // Drawn when it comes near the screen, and again when its width changes.
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "600px" });
  const sized = new ResizeObserver((entries) => {
    for (const entry of entries) if (entry.target.drawnWidth && !printing) draw(entry.target);
  });
  let printing = false;
  const PRINTED_WIDTH = 342;  // half of an A4 page or of a letter, in CSS pixels

  function fill(charts) {
    if (charts.childElementCount) return;
    for (const chart of data.charts[Number(charts.dataset.charts)]) {
      const figure = element("figure", null, charts);
      figure.chart = chart;
      element("figcaption", chart.title, figure);
      if (chart.note) element("p", chart.note, figure, { class: "note" });
      const keys = keysOf(chart);
      if (keys.length) {
        const list = element("ul", null, figure, { class: "keys" });
        for (const [text, fill] of keys) {
          const item = element("li", null, list);
          element("i", "", item).style.background = fill;
          item.append(text);
        }
      }
      element("div", null, figure, { class: "drawing" });
      const details = element("details", null, figure);
      element("summary", "The figures as a table", details);
      details.addEventListener("toggle", () => fillTable(details, chart));
      near.observe(figure);
      sized.observe(figure);
    }
  }

  for (const charts of document.querySelectorAll(".charts")) {
    const group = charts.closest("details.comparison");
    if (!group || group.open) fill(charts);
    group?.addEventListener("toggle", () => { if (group.open) fill(charts); });
  }
  document.getElementById("open-all")?.addEventListener("click", () => {
    for (const group of document.querySelectorAll("details.comparison")) group.open = true;
  });
  addEventListener("beforeprint", () => {
    printing = true;
    for (const figure of document.querySelectorAll("figure")) draw(figure, PRINTED_WIDTH);
  });
  addEventListener("afterprint", () => {
    printing = false;
    for (const figure of document.querySelectorAll("figure")) draw(figure);
  });
})();
