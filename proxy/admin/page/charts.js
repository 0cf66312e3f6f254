// Charts of the last minutes, each with the same numbers as a table. A chart has fixed series; `show` gives it
// numbers. Colours come from the style sheet, so that both themes have their own.
"use strict";

const charts = (() => {
  const node = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const clock = (at, seconds = false) => new Date(at * 1000).toLocaleTimeString([], {
    hour: "2-digit", minute: "2-digit", hourCycle: "h23", ...(seconds && { second: "2-digit" }),
  });
  const all = [];

  // series: [{key, label, colour}], write: number → text, top: the largest value of the axis if it is fixed.
  const chart = (root, { series, write, top, stacked }) => {
    const legend = node("p", { class: "legend" });
    const values = series.map(({ label, colour: name }) => {
      const value = node("b", {}, "–");
      legend.append(node("span", {}, node("i", { class: `key ${name}`, "aria-hidden": "true" }), `${label} `, value));
      return value;
    });
    const plot = node("div", { class: "plot", "aria-hidden": "true" });
    const empty = node("p", { class: "empty" });
    const body = node("tbody");
    const table = node("details", {}, node("summary", {}, "As a table"),
      node("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "The chart's numbers" },
        node("table", {},
          node("thead", {}, node("tr", {}, node("th", { scope: "col" }, "Time"),
            ...series.map(({ label }) => node("th", { scope: "col", class: "n" }, label)))),
          body)));
    root.append(legend, plot, table);
    plot.append(empty);
    let drawn = null, data = null;

    const stack = (columns) => {
      if (!stacked) return columns;
      const sums = columns.map((column) => [...column]);
      for (let row = sums.length - 2; row >= 0; row--) sums[row] = sums[row].map((value, at) => value + sums[row + 1][at]);
      return sums;
    };
    const draw = () => {
      drawn?.destroy();
      drawn = new uPlot({
        width: plot.clientWidth, height: plot.clientHeight, padding: [8, 18, 0, 0], legend: { show: false },
        cursor: { show: false }, select: { show: false },
        scales: { y: { range: (_, __, most) => [0, top ?? Math.max(most * 1.15, 1)] } },
        axes: [
          { stroke: colour("soft"), grid: { show: false }, ticks: { show: false }, font: "12px system-ui", space: 90, size: 28,
            values: (_, splits) => splits.map((at) => clock(at)) },
          { stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, size: 52,
            font: "12px system-ui", space: 38, values: (_, splits) => splits.map((at) => write(at).replace(".0 %", " %")) },
        ],
        series: [{}, ...series.map(({ colour: name }) => ({
          stroke: colour(name), width: 1.75, points: { show: false }, spanGaps: false,
          fill: stacked || !stacked && series[0].colour === name ? `${colour(name)}${stacked ? "59" : "26"}` : undefined,
        }))],
      }, data, plot);
    };
    all.push(() => { if (data && plot.clientWidth) draw(); });
    new ResizeObserver(() => {
      if (drawn && plot.clientWidth) drawn.setSize({ width: plot.clientWidth, height: plot.clientHeight });
    }).observe(plot);

    return (times, columns, nothing) => {
      data = [times, ...stack(columns)];
      if (!drawn) draw(); else drawn.setData(data);
      const some = columns.some((column) => column.some((value) => value));
      empty.textContent = some ? "" : nothing;
      values.forEach((value, at) => { value.textContent = write(columns[at].at(-1) ?? null); });
      if (!table.open && body.firstChild) return;
      body.replaceChildren(...times.map((_, at) => times.length - 1 - at).filter((_, at) => at % 6 === 0).map((at) =>
        node("tr", {}, node("th", { scope: "row" }, clock(times[at], true)),
          ...columns.map((column) => node("td", { class: "n" }, write(column[at]))))));
    };
  };

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => all.forEach((draw) => draw()));
  return { chart, node, clock };
})();
