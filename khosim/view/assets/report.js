// The page of `khosim report`: draws what khosim recorded. No network, no state but the page's own.
"use strict";
(async function () {
  const $ = (id) => document.getElementById(id);
  const facts = JSON.parse($("facts").textContent);
  const blob = await unpack($("columns").textContent);
  const sheets = facts.sheets.map(readSheet);
  const layers = Object.keys(facts.layers);
  const rank = ["image", "handover", "preserved", "incoming", "scratch", "reserved", "held", "ram"];
  const state = { event: 0, moment: 0, layer: "preserved", place: null };
  const low = facts.low, high = facts.high;
  let view = [low, high];

  // -- reading -------------------------------------------------------------------------------

  async function unpack(text) {
    const packed = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }

  function readSheet(sheet) {
    const n = sheet.n;
    return {
      n, start: new Float64Array(blob, sheet.start, n), end: new Float64Array(blob, sheet.end, n),
      order: new Int8Array(blob, sheet.order, n), owner: new Int32Array(blob, sheet.owner, n),
      writer: new Int32Array(blob, sheet.writer, n), hash: new BigUint64Array(blob, sheet.hash, n),
    };
  }

  const momentNow = () => facts.moments[state.moment];
  const sheetOf = (moment, layer) => sheets[moment.layers[layer]];

  function firstEndingAfter(sheet, phys) {  // ranges of a sheet do not overlap
    let a = 0, b = sheet.n;
    while (a < b) { const m = (a + b) >> 1; if (sheet.end[m] <= phys) a = m + 1; else b = m; }
    return a;
  }

  function rangeAt(sheet, phys) {
    const i = firstEndingAfter(sheet, phys);
    return i < sheet.n && sheet.start[i] <= phys ? i : -1;
  }

  const hex = (value) => "0x" + value.toString(16);
  function size(bytes) {
    const units = [["T", 2 ** 40], ["G", 2 ** 30], ["M", 2 ** 20], ["K", 2 ** 10]];
    for (const [letter, unit] of units) {
      if (bytes >= unit) return (+(bytes / unit).toPrecision(4)).toString() + letter;
    }
    return bytes + " B";
  }
  const name = (index) => (index < 0 ? "" : facts.strings[index]);
  const colour = (layer) => getComputedStyle(document.documentElement).getPropertyValue("--" + layer);

  function content(hash) {
    return hash === 0n ? "all zeros" : hash.toString(16).padStart(16, "0");
  }

  // -- drawing -------------------------------------------------------------------------------

  const map = $("map"), bands = $("bands"), rowHeight = 24, gutter = 92;
  let scale = d3.scaleLinear();

  function prepare(canvas, height) {
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth || 900;
    canvas.style.height = height + "px";
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    return [pen, width];
  }

  function strip(pen, sheet, fill, top, height, width) {
    // Ranges that share a pixel with what is drawn already are passed over, by halving.
    pen.fillStyle = fill;
    const unit = (width - gutter) / (view[1] - view[0]);
    let drawn = -1;
    for (let i = firstEndingAfter(sheet, view[0]); i < sheet.n && sheet.start[i] < view[1];) {
      const x0 = Math.max(gutter, gutter + (sheet.start[i] - view[0]) * unit);
      const x1 = Math.min(width, gutter + (sheet.end[i] - view[0]) * unit);
      const wide = Math.max(1, x1 - x0);
      if (x0 + wide > drawn) { pen.fillRect(x0, top, wide, height); drawn = x0 + wide; }
      const following = view[0] + (drawn - gutter) / unit;
      i = Math.max(i + 1, following > sheet.end[i] ? firstEndingAfter(sheet, following) : i + 1);
    }
  }

  function drawMap() {
    const [pen, width] = prepare(map, layers.length * rowHeight + 6);
    const ink = colour("ink"), moment = momentNow();
    pen.font = "12px system-ui, sans-serif";
    layers.forEach((layer, row) => {
      const top = row * rowHeight + 4;
      pen.fillStyle = ink;
      pen.fillText(layer, 6, top + 14);
      strip(pen, sheetOf(moment, layer), colour(layer), top, rowHeight - 6, width);
    });
    const unit = (width - gutter) / (view[1] - view[0]);
    mark(pen, facts.touched.start[state.event], facts.touched.end[state.event], unit, width, ink, 1.5);
    for (const place of facts.findings) {
      mark(pen, place.phys, place.phys + facts.page_size, unit, width, colour("bad"), 3);
    }
    if (state.place !== null) {
      mark(pen, state.place, state.place + facts.page_size, unit, width, colour("accent"), 2);
    }
    scale = d3.scaleLinear().domain(view).range([gutter, width]);
    // Ticks at round addresses: multiples of a power of two.
    const step = 2 ** Math.max(8, Math.ceil(Math.log2((view[1] - view[0]) / (width / 150))));
    const places = d3.range(Math.ceil(view[0] / step) * step, view[1], step);
    const ticks = d3.axisBottom(scale).tickValues(places).tickFormat((value) => hex(value));
    d3.select("#axis").attr("viewBox", `0 0 ${width} 22`).call(ticks);
    $("span").textContent = `${size(view[1] - view[0])} shown, from ${hex(Math.floor(view[0]))}`;
  }

  function mark(pen, start, end, unit, width, stroke, thick) {
    if (!(end > start) || end <= view[0] || start >= view[1]) return;
    const x0 = Math.max(gutter, gutter + (start - view[0]) * unit);
    const x1 = Math.min(width, gutter + (end - view[0]) * unit);
    pen.strokeStyle = stroke;
    pen.lineWidth = thick;
    pen.strokeRect(x0, 2, Math.max(2, x1 - x0), layers.length * rowHeight);
  }

  const bandHeight = 9;
  function drawBands() {
    const [pen, width] = prepare(bands, facts.moments.length * bandHeight + 2);
    facts.moments.forEach((moment, row) => {
      const top = row * bandHeight + 1;
      for (const layer of [...rank].reverse()) {
        strip(pen, sheetOf(moment, layer), colour(layer), top, bandHeight - 2, width);
      }
      pen.fillStyle = colour(row === state.moment ? "accent" : "quiet");
      pen.font = (row === state.moment ? "bold " : "") + "8px system-ui, sans-serif";
      pen.fillText(`${moment.generation}: ${moment.title}`.slice(0, 20), 2, top + 7);
    });
    pen.strokeStyle = colour("accent");
    pen.strokeRect(0.5, state.moment * bandHeight + 0.5, width - 1, bandHeight);
  }

  let waiting = false;
  function draw(withBands) {
    drawMap();
    if (withBands && !waiting) {  // many moments: not more often than the screen shows them
      waiting = true;
      requestAnimationFrame(() => { waiting = false; drawBands(); });
    }
  }

  // -- time ----------------------------------------------------------------------------------

  function momentOf(event) {
    let found = 0;
    facts.moments.forEach((moment, index) => { if (moment.event <= event) found = index; });
    return found;
  }

  function showEvent(event, moment) {
    state.event = Math.max(0, Math.min(facts.events.text.length - 1, event));
    const before = state.moment;
    state.moment = moment === undefined ? momentOf(state.event + 1) : moment;
    const { generation, phase, symbol, text } = facts.events, at = state.event;
    const here = $("event");
    here.replaceChildren();
    if (text.length) {
      const where = document.createElement("span");
      where.className = "where";
      where.textContent = `event ${at + 1} of ${text.length}, kernel ${generation[at]}, ` +
        `${name(phase[at])}: `;
      const what = document.createElement("code");
      what.textContent = `${name(symbol[at])}(${text[at][0]})` + (text[at][1] && ` = ${text[at][1]}`);
      here.append(where, what);
    }
    const slider = $("slider");
    slider.value = String(state.event);
    slider.setAttribute("aria-valuetext", here.textContent);
    const now = momentNow();
    $("moment").textContent = `moment ${now.index}: generation ${now.generation}, ` +
      `Linux ${now.release}, ${now.title}`;
    draw(before !== state.moment);
    if (before !== state.moment) {
      fillRanges(); fillTrees();
      if (state.place !== null) fillPlace();
    }
  }

  function showMoment(index) {
    const moment = facts.moments[Math.max(0, Math.min(facts.moments.length - 1, index))];
    showEvent(moment.event - 1, moment.index);
  }

  // -- panels --------------------------------------------------------------------------------

  function table(headings, rows) {
    const made = document.createElement("table"), head = made.createTHead().insertRow();
    for (const [title, kind] of headings) {
      const cell = document.createElement("th");
      cell.textContent = title; cell.className = kind; cell.scope = "col";
      head.append(cell);
    }
    const body = made.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      row.forEach((value, i) => {
        const cell = line.insertCell();
        cell.className = headings[i][1];
        if (value instanceof Node) cell.append(value); else cell.textContent = value;
      });
    }
    return made;
  }

  function link(text, action) {
    const made = document.createElement("button");
    made.type = "button"; made.className = "link mono"; made.textContent = text;
    made.addEventListener("click", action);
    return made;
  }

  const rowsShown = 300;
  function fillRanges() {
    const sheet = sheetOf(momentNow(), state.layer), rows = [];
    for (let i = 0; i < Math.min(sheet.n, rowsShown); i++) {
      const start = sheet.start[i];
      rows.push([link(hex(start), () => choose(start, true)), size(sheet.end[i] - start),
        sheet.order[i] < 0 ? "" : String(sheet.order[i]), name(sheet.owner[i])]);
    }
    const more = document.createElement("p");
    more.className = "quiet";
    more.textContent = sheet.n > rowsShown ? `the first ${rowsShown} of ${sheet.n} ranges`
      : `${sheet.n} ranges; ${facts.layers[state.layer]}`;
    $("ranges").replaceChildren(more, table(
      [["from", "mono"], ["size", "number"], ["order", "number"], ["owner", ""]], rows));
  }

  function choose(phys, zoomTo) {
    state.place = Math.floor(phys / facts.page_size) * facts.page_size;
    if (zoomTo && (state.place < view[0] || state.place >= view[1])) {
      const half = (view[1] - view[0]) / 2;
      setView(state.place - half, state.place + half);
    }
    fillPlace();
    draw(false);
  }

  function fillPlace() {
    const phys = state.place, now = momentNow(), rows = [], history = [];
    for (const layer of layers) {
      const sheet = sheetOf(now, layer), i = rangeAt(sheet, phys);
      if (i < 0) continue;
      rows.push([layer, `${hex(sheet.start[i])} to ${hex(sheet.end[i])}`,
        sheet.order[i] < 0 ? "" : String(sheet.order[i]), name(sheet.owner[i]),
        name(sheet.writer[i]), sheet.writer[i] < 0 ? "" : content(sheet.hash[i])]);
    }
    let last = "";
    for (const moment of facts.moments) {
      const found = [];
      for (const layer of layers) {
        const sheet = sheetOf(moment, layer), i = rangeAt(sheet, phys);
        if (i >= 0 && layer !== "ram") found.push(`${layer} (${name(sheet.owner[i])})`);
      }
      const text = found.join(", ") || (rangeAt(sheetOf(moment, "ram"), phys) < 0 ? "no RAM" : "free");
      if (text === last) continue;
      last = text;
      history.push([link(`moment ${moment.index}`, () => showMoment(moment.index)),
        `kernel ${moment.generation}, ${moment.title}`, text]);
    }
    const events = [], { start, end } = facts.touched;
    for (let i = 0; i < start.length && events.length < 60; i++) {
      if (start[i] < phys + facts.page_size && end[i] > phys) {
        events.push([link(`event ${i + 1}`, () => showEvent(i)),
          `kernel ${facts.events.generation[i]}`, name(facts.events.symbol[i])]);
      }
    }
    const title = document.createElement("h3");
    title.id = "chosen"; title.textContent = `page ${hex(phys)}`;
    const parts = [title, table([["layer", ""], ["range", "mono"], ["order", "number"], ["owner", ""],
      ["written by", ""], ["content", "mono"]], rows)];
    const said = facts.findings.filter((it) => it.phys <= phys && phys < it.phys + facts.page_size);
    for (const finding of said) {
      const line = document.createElement("p");
      line.className = "verdict-bad"; line.textContent = `${finding.invariant}: ${finding.message}`;
      parts.push(line);
    }
    const past = document.createElement("h3");
    past.textContent = "its history";
    parts.push(past, table([["", ""], ["when", ""], ["it is", ""]], history));
    if (events.length) {
      const heading = document.createElement("h3");
      heading.textContent = "events that name it";
      parts.push(heading, table([["", ""], ["kernel", ""], ["function", ""]], events));
    }
    $("place").replaceChildren(...parts);
  }

  function tree(title, value, open) {
    if (value === null || typeof value !== "object") {
      const leaf = document.createElement("div");
      leaf.style.marginLeft = "14px";
      leaf.textContent = `${title}: `;
      const code = document.createElement("code");
      code.textContent = String(value);
      leaf.append(code);
      return leaf;
    }
    const made = document.createElement("details"), summary = document.createElement("summary");
    const entries = Array.isArray(value) ? value.map((v, i) => [String(i), v]) : Object.entries(value);
    summary.textContent = `${title} (${entries.length})`;
    made.append(summary);
    made.open = Boolean(open);
    const fill = () => { for (const [key, part] of entries) made.append(tree(key, part, false)); };
    if (open) fill(); else made.addEventListener("toggle", fill, { once: true });
    return made;
  }

  function fillTrees() {
    const found = momentNow().tree;
    if (found < 0) {
      $("trees").textContent = "No handover is being written at this moment.";
      return;
    }
    const parts = Object.entries(facts.trees[found]).map(([key, part]) => tree(key, part, true));
    $("trees").replaceChildren(...parts);
  }

  function fillInvariants() {
    const list = document.createElement("div");
    for (const invariant of facts.invariants) {
      const made = document.createElement("details"), summary = document.createElement("summary");
      const broken = invariant.violations.length > 0;
      summary.className = broken ? "broken" : "holds";
      summary.textContent = invariant.name;
      const protects = document.createElement("p");
      protects.textContent = invariant.protects;
      made.append(summary, protects);
      made.open = broken;
      for (const violation of invariant.violations) {
        const line = document.createElement("p");
        line.append(link(hex(violation.phys), () => choose(violation.phys, true)),
          ` in generation ${violation.generation}: ${violation.text}`);
        made.append(line);
      }
      if (broken) list.prepend(made); else list.append(made);
    }
    $("invariants").replaceChildren(list);
  }

  // -- where one looks -----------------------------------------------------------------------

  function setView(from, to) {
    const least = facts.page_size / 4, wide = Math.max(least, Math.min(high - low, to - from));
    const start = Math.max(low, Math.min(high - wide, from));
    view = [start, start + wide];
    const k = (high - low) / wide, width = (map.clientWidth || 900) - gutter;
    map.__zoom = d3.zoomIdentity.translate(-((start - low) / (high - low)) * width * k, 0).scale(k);
    draw(true);
  }

  const zoom = d3.zoom().scaleExtent([1, ((high - low) / facts.page_size) * 4])
    .filter((event) => !event.button && event.type !== "dblclick")
    .on("zoom", ({ transform, sourceEvent }) => {
      if (!sourceEvent) return;
      const width = (map.clientWidth || 900) - gutter, whole = high - low;
      const wide = whole / transform.k;
      const pan = sourceEvent.type !== "wheel";
      const focus = pan ? 0 : Math.max(0, d3.pointer(sourceEvent, map)[0] - gutter) / width;
      const from = pan ? low - (transform.x / width) * wide
        : view[0] + focus * (view[1] - view[0]) - focus * wide;
      setView(from, from + wide);
    });
  d3.select(map).call(zoom);

  const physAt = (event) => scale.invert(d3.pointer(event, map)[0]);
  map.addEventListener("click", (event) => {
    if (d3.pointer(event, map)[0] >= gutter) choose(Math.max(low, physAt(event)), false);
  });
  map.addEventListener("mousemove", (event) => {
    const [x, y] = d3.pointer(event, map), layer = layers[Math.floor((y - 2) / rowHeight)];
    const tip = $("tip"), sheet = layer && sheetOf(momentNow(), layer);
    const near = 2 * (view[1] - view[0]) / ((map.clientWidth || 900) - gutter);
    let i = -1;
    if (sheet && x >= gutter) {
      i = rangeAt(sheet, physAt(event));
      if (i < 0) {  // thin ranges are drawn a pixel wide
        const next = firstEndingAfter(sheet, physAt(event) - near);
        if (next < sheet.n && sheet.start[next] < physAt(event) + near) i = next;
      }
    }
    tip.style.display = i < 0 ? "none" : "block";
    if (i < 0) return;
    const order = sheet.order[i] < 0 ? "" : `, order ${sheet.order[i]}`;
    tip.textContent = `${layer}: ${name(sheet.owner[i])}${order}, ${hex(sheet.start[i])}, ` +
      size(sheet.end[i] - sheet.start[i]);
    tip.style.left = Math.min(event.clientX + 14, window.innerWidth - 430) + "px";
    tip.style.top = event.clientY + 16 + "px";
  });
  map.addEventListener("mouseleave", () => { $("tip").style.display = "none"; });
  map.addEventListener("keydown", (event) => {
    const wide = view[1] - view[0], middle = (view[0] + view[1]) / 2;
    const moves = {
      ArrowLeft: () => setView(view[0] - wide / 5, view[1] - wide / 5),
      ArrowRight: () => setView(view[0] + wide / 5, view[1] + wide / 5),
      "+": () => setView(middle - wide / 4, middle + wide / 4),
      "-": () => setView(middle - wide, middle + wide),
      Home: () => setView(low, high),
      Enter: () => choose(middle, false),
    };
    if (moves[event.key]) { event.preventDefault(); moves[event.key](); }
  });
  bands.addEventListener("click", (event) => {
    showMoment(Math.floor(d3.pointer(event, bands)[1] / bandHeight));
  });

  // -- the page ------------------------------------------------------------------------------

  function useTheme(theme) {
    document.documentElement.dataset.theme = theme;
    $("theme").textContent = theme === "dark" ? "light" : "dark";
    $("theme").setAttribute("aria-label", `use the ${$("theme").textContent} colours`);
    draw(true);
  }

  $("title").textContent = facts.title;
  const broken = facts.invariants.filter((it) => it.violations.length).map((it) => it.name);
  $("verdict").textContent = broken.length ? `broken: ${broken.join(", ")}` : "every invariant holds";
  if (broken.length) $("verdict").className = "verdict-bad";
  $("footer").textContent = facts.footer;
  for (const [layer, what] of Object.entries(facts.layers)) {
    const item = document.createElement("li"), box = document.createElement("span");
    box.style.background = `var(--${layer})`;
    item.append(box, layer); item.title = what;
    $("legend").append(item);
    $("layer").add(new Option(layer, layer, layer === state.layer, layer === state.layer));
  }
  $("slider").max = String(Math.max(0, facts.events.text.length - 1));
  $("slider").addEventListener("input", (event) => showEvent(Number(event.target.value)));
  $("back").addEventListener("click", () => showEvent(state.event - 1));
  $("forward").addEventListener("click", () => showEvent(state.event + 1));
  $("previous").addEventListener("click", () => showMoment(state.moment - 1));
  $("next").addEventListener("click", () => showMoment(state.moment + 1));
  $("whole").addEventListener("click", () => setView(low, high));
  $("in").addEventListener("click", () => map.dispatchEvent(new KeyboardEvent("keydown", { key: "+" })));
  $("out").addEventListener("click", () => map.dispatchEvent(new KeyboardEvent("keydown", { key: "-" })));
  $("layer").addEventListener("change", (event) => { state.layer = event.target.value; fillRanges(); });
  $("goto").addEventListener("submit", (event) => {
    event.preventDefault();
    const phys = Number($("address").value.trim());
    if (Number.isFinite(phys) && phys >= 0 && $("address").value.trim() !== "") choose(phys, true);
    else $("place").textContent = "That is no address: 0x and hexadecimal digits, or a number.";
  });
  $("theme").addEventListener("click", () =>
    useTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  window.addEventListener("resize", () => draw(true));
  fillInvariants();
  useTheme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  state.moment = -1;
  const jump = facts.moments.findIndex((moment) => moment.stage === "jump");
  showMoment(facts.findings.length ? facts.moments.length - 1 : Math.max(0, jump));
  document.documentElement.dataset.ready = "yes";
})();
