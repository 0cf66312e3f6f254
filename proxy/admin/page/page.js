// Reads /status every two seconds and shows it. Text is set as text, never as HTML. While the page is hidden
// it asks for nothing. If no answer comes, it says since when, and greys out what it last knew.
"use strict";

(() => {
  const { chart, node, clock } = charts;
  const EVERY_MS = 2000, PATIENCE_MS = 5000;
  const WORDS = { ok: "● well", warn: "▲ look", bad: "■ act", quiet: "○ quiet" };
  const RANK = ["quiet", "ok", "warn", "bad"];
  const HEADLINES = {
    callers: { bad: "Callers are not all served.", warn: "Some callers get errors." },
    cache: { warn: "The cache helps little." },
    upstream: { bad: "The upstream does not answer.", warn: "The upstream is short or failing." },
    machinery: { bad: "The machinery needs you.", warn: "This replica is not at its best." },
  };
  const $ = (id) => document.getElementById(id);
  const number = (value) => Number(value).toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
  const rate = (value) => value == null ? "–" : number(value);
  const percent = (part) => part == null ? "–" : part === 1 || part === 0 ? `${part * 100} %`
    : `${Math.min(Math.max(part * 100, 0.1), 99.9).toFixed(1)} %`;
  const seconds = (value) => value == null ? "–" : value < 0.001 ? `${Math.round(value * 1e6)} µs`
    : value < 0.9995 ? `${Number((value * 1000).toPrecision(2))} ms` : `${value.toFixed(1)} s`;
  const duration = (value) => value < 90 ? `${Math.round(value)} s` : value < 5400 ? `${Math.round(value / 60)} min`
    : value < 172800 ? `${Math.round(value / 3600)} h` : `${Math.round(value / 86400)} days`;
  const bytes = (value) => value < 1048576 ? `${number(value / 1024)} KiB` : `${number(value / 1048576)} MiB`;
  const fill = (id, rows, otherwise, columns) => $(id).replaceChildren(...(rows.length ? rows
    : [columns ? node("tr", {}, node("td", { colspan: columns, class: "idle" }, otherwise)) : node("li", { class: "idle" }, otherwise)]));

  const traffic = chart($("traffic"), { write: rate, stacked: true, series: [
    { label: "from the cache", colour: "cached" }, { label: "waited for the upstream", colour: "waited" },
    { label: "429 or 5xx", colour: "failed" }] });
  const ratio = chart($("ratio"), { write: percent, top: 1, series: [{ label: "hit ratio", colour: "cached" }] });
  const calls = chart($("calls"), { write: rate, series: [
    { label: "made", colour: "cached" }, { label: "429, 5xx or no answer", colour: "failed" }] });

  let lastAt = null, lastSaid = "", awaySince = null;

  const headline = (verdicts) => {
    const worst = Math.max(...verdicts.map(({ state }) => RANK.indexOf(state)));
    if (worst === 0 || (worst === 1 && verdicts[0].state === "quiet")) return "All is well, and quiet: no traffic.";
    if (worst === 1) return "All is well.";
    const { about, state } = verdicts.find((verdict) => verdict.state === RANK[worst]);
    return HEADLINES[about][state];
  };

  const showVerdicts = (verdicts) => {
    for (const { about, state, figure, says } of verdicts) {
      const card = $(`verdict-${about}`);
      card.className = `verdict ${state}`;
      card.querySelector(".figure").textContent = figure;
      card.querySelector(".state").className = `state ${state}`;
      card.querySelector(".state").textContent = WORDS[state];
      card.querySelector(".says").textContent = says;
    }
    const said = headline(verdicts);
    $("headline").textContent = said;
    document.title = `${said} snapshot-proxy`;
    const states = said + verdicts.map(({ state }) => state).join();
    if (lastSaid && states !== lastSaid) // only a change is told: numbers change all the time
      $("announce").textContent = [said, ...verdicts.filter(({ state }) => state === "bad" || state === "warn").map(({ says }) => says)].join(" ");
    lastSaid = states;
  };

  const showHistory = ({ at, history }) => {
    const length = history.cached_per_s.length, step = history.step_s;
    const times = Array.from({ length }, (_, index) => Math.round(at) - (length - 1 - index) * step);
    const pad = Math.max(0, Math.round(900 / step) - length); // the axis is 15 minutes wide from the start
    const before = Array.from({ length: pad }, (_, index) => (times[0] ?? Math.round(at)) - (pad - index) * step);
    const padded = (values) => [...Array(pad).fill(null), ...values];
    const show = (plot, keys, nothing) => plot([...before, ...times], keys.map((key) => padded(history[key])), nothing);
    show(traffic, ["cached_per_s", "waited_per_s", "failed_per_s"], "No request yet.");
    show(ratio, ["hit_ratio"], "No read yet.");
    show(calls, ["calls_per_s", "calls_failed_per_s"], "No call yet.");
  };

  const left = (some, most) => {
    const cell = node("td", { class: "n" });
    if (some == null) { cell.append("–"); return cell; }
    const part = Math.max(0, Math.min(1, some / most)), inner = node("i");
    inner.style.width = `${part * 100}%`;
    cell.append(`${number(some)} of ${number(most)}`,
      node("span", { class: `bar ${part < 0.1 ? "bad" : part < 0.25 ? "warn" : ""}`, "aria-hidden": "true" }, inner));
    return cell;
  };

  const showTables = ({ quotas, outcomes, invalidations, configuration }) => {
    fill("quotas", quotas.map((each) => node("tr", {}, node("th", { scope: "row" }, each.caller),
      left(each.minute_left, each.minute_limit), left(each.hour_left, each.hour_limit),
      each.cooldown_s ? node("td", { class: "warn" }, `▲ ${Math.ceil(each.cooldown_s)} s`)
        : node("td", { class: "idle" }, each.hour_left == null ? "no call yet" : "none"))), "No caller yet.", 4);
    const idle = outcomes.filter((each) => !each.requests).map((each) => each.cache);
    fill("outcomes", outcomes.filter((each) => each.requests).map((each) => node("tr", {}, node("th", { scope: "row" }, each.cache),
      ...[number(each.requests), seconds(each.p50_s), seconds(each.p95_s), seconds(each.p99_s)].map((text) => node("td", { class: "n" }, text)))),
    "No request in the last minute.", 5);
    if (idle.length < outcomes.length)
      $("outcomes").append(node("tr", { class: "idle" }, node("td", { colspan: "5" }, `None: ${idle.join(", ")}.`)));
    fill("invalidations", invalidations.map((each) => node("li", {}, each.cause,
      node("time", { datetime: new Date(each.at * 1000).toISOString() }, clock(each.at, true)))), "None since the start.");
    const changed = configuration.filter(({ origin }) => origin && origin !== "default");
    $("changed").textContent = `${changed.length} of ${configuration.length} settings are set, the others have their defaults`;
    if (!$("configuration").firstChild || $("configuration").dataset.said !== JSON.stringify(configuration)) {
      fill("configuration", configuration.map((each) => node("tr", changed.includes(each) ? { class: "changed" } : {},
        node("th", { scope: "row" }, `${each.section}.${each.name}`), node("td", {}, each.value), node("td", {}, each.origin))), "", 3);
      $("configuration").dataset.said = JSON.stringify(configuration);
    }
  };

  const showHealth = ({ upstream, store, process, uptime_s: uptime }) => {
    const failure = (event, of) => event ? `${clock(event.at, true)}, ${of(event)}` : "none since the start";
    const word = (state, text) => node("span", { class: state }, `${WORDS[state].split(" ")[0]} ${text}`);
    const rows = [
      ["Upstream", word(upstream.breakers_open.length ? "bad" : "ok", upstream.breakers_open.length
        ? `breaker open: ${upstream.breakers_open.join(", ")}` : "breakers closed"), ` ${upstream.address}`],
      ["Its last failure", failure(upstream.last_failure, ({ route, cause }) => `${route}: ${cause}`)],
      ["Redis", word(store.up ? "ok" : "bad", store.up ? "usable" : "not usable"), ` ${store.address}${store.shared ? ", shared" : ", for this replica alone"}`],
      ["Its last failure", failure(store.last_failure, ({ operation, outcome }) => `${operation}: ${outcome}`)],
      ["Replicas", String(store.replicas), store.secret_mismatch ? word("bad", " secrets differ") : ""],
      ["Invalidations", store.pending_invalidations ? word("bad", `${store.pending_invalidations} pending`) : "none pending"],
      ["Memory", `${bytes(process.memory_bytes)} of ${bytes(process.memory_max_bytes)}, ${number(process.memory_entries)} entries`],
      ["Connections", `${number(process.connections)} of ${number(process.max_connections)}, ${number(process.flights)} fetches in flight`],
      ["Runs for", duration(uptime)],
    ];
    $("health").replaceChildren(...rows.flatMap(([term, ...said]) => [node("dt", {}, term), node("dd", {}, ...said)]));
  };

  const show = (status) => {
    awaySince = null;
    lastAt = Date.now();
    document.body.dataset.state = "live";
    $("away").hidden = true;
    $("version").textContent = status.version;
    $("live").textContent = `Live, ${clock(status.at, true)}`;
    showVerdicts(status.verdicts);
    showHistory(status);
    showTables(status);
    showHealth(status);
  };

  const away = () => {
    if (awaySince === null) {
      awaySince = lastAt ?? Date.now();
      $("away").textContent = lastAt === null ? `The proxy has not answered since ${clock(awaySince / 1000, true)}.`
        : `The proxy has not answered since ${clock(awaySince / 1000, true)}. What you see is from then.`;
      $("away").hidden = false;
      $("headline").textContent = "The proxy does not answer.";
      document.title = "No answer: snapshot-proxy";
      lastSaid = "away";
    }
    document.body.dataset.state = "away";
    $("live").textContent = `No answer for ${duration((Date.now() - awaySince) / 1000)}`;
  };

  const round = async () => {
    if (!document.hidden) {
      try {
        const response = await fetch("status", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
        if (!response.ok) throw new Error(String(response.status));
        show(await response.json());
      } catch { away(); }
    }
    setTimeout(round, EVERY_MS);
  };
  round();
})();
