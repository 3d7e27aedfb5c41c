"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const still = matchMedia("(prefers-reduced-motion: reduce)");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const hex = (colour) => "#" + colour.toString(16).padStart(6, "0");
const config = { displayModeBar: false, responsive: true, displaylogo: false };

// --- charts ---------------------------------------------------------------------------------

// The mean over the neighbours on both sides: unlike a mean over the past it does not lag behind.
function smooth(values) {
  const most = Math.round(values.length / 40);
  return values.map((_, i) => {
    const half = Math.min(most, i, values.length - 1 - i);
    const near = values.slice(i - half, i + half + 1).filter((v) => v != null);
    return near.length ? near.reduce((sum, v) => sum + v, 0) / near.length : null;
  });
}

// From dark noise to clean data, on both schemes' papers.
function ramp(share) {
  const hue = 265 - 225 * share;
  return `hsl(${hue} ${dark.matches ? 78 : 62}% ${dark.matches ? 66 : 48}%)`;
}

function line(x, y, name, colour, more = {}) {
  return { x, y, name, mode: "lines", line: { color: colour, width: 2.2 }, ...more };
}

function traces(kind, run) {
  if (kind === "bins") {
    const { steps, bins } = data.runs[run];
    const names = Object.keys(bins);
    return names.map((name, i) =>
      line(steps, smooth(bins[name]), name.replace("..", " to "), ramp(i / Math.max(1, names.length - 1)), { connectgaps: true }));
  }
  return data.runs.flatMap((one, i) => {
    const colour = css(`--run-${i % 6}`);
    if (kind === "heldout") {
      const [x, y] = [0, 1].map((k) => one.heldout.map((pair) => pair[k]));
      return x.length ? [line(x, y, one.name, colour, { mode: "lines+markers", marker: { size: 8 } })] : [];
    }
    const y = one.series[kind];
    if (kind !== "loss" && kind !== "grad_norm") return [line(one.steps, y, one.name, colour)];
    const faint = { opacity: 0.28, hoverinfo: "skip", showlegend: false };
    return [line(one.steps, y, one.name, colour, faint), line(one.steps, smooth(y), one.name, colour)];
  });
}

function chart(box) {
  const { chart: kind, run } = box.dataset;
  const lines = traces(kind, run);
  const heights = lines.flatMap((l) => l.y).filter((v) => v > 0);
  const broad = Math.max(...heights) > 5 * Math.min(...heights);
  const axis = { gridcolor: css("--line"), zeroline: false, linecolor: css("--line"), automargin: true };
  const steps = kind !== "heldout", logarithmic = ["loss", "bins", "heldout"].includes(kind);
  const layout = {
    paper_bgcolor: "#0000", plot_bgcolor: "#0000", dragmode: false, hovermode: "x unified",
    font: { family: "system-ui, sans-serif", size: 12, color: css("--quiet") },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
    margin: { l: 8, r: 8, t: 10, b: 8 },
    xaxis: { ...axis, title: { text: steps ? "training step" : "log-SNR" }, fixedrange: true },
    yaxis: { ...axis, fixedrange: true, nticks: 7,
      type: logarithmic ? "log" : "linear", ...(logarithmic && broad && { dtick: "D2" }), tickformat: kind === "lr" ? "~e" : ".3~g" },
    showlegend: lines.filter((l) => l.showlegend !== false).length > 1,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
  };
  Plotly.react(box, lines, layout, config);
}

// --- scenes: balls and cylinders as one mesh ---------------------------------------------------

const around = (n) => Array.from({ length: n }, (_, i) => (2 * Math.PI * i) / n);

function mesh({ balls, sticks }) {
  const m = { x: [], y: [], z: [], i: [], j: [], k: [], vertexcolor: [] };
  const point = (p, colour) => {
    m.x.push(p[0]); m.y.push(p[1]); m.z.push(p[2]); m.vertexcolor.push(colour);
    return m.x.length - 1;
  };
  const face = (a, b, c) => { m.i.push(a); m.j.push(b); m.k.push(c); };
  const rings = (rows) => rows.slice(1).forEach((row, r) => row.forEach((p, s) => {
    const next = (s + 1) % row.length, before = rows[r];
    face(before[s], p, row[next]); face(before[s], row[next], before[next]);
  }));
  const fine = balls.length > 60 ? 8 : 14;
  for (const [x, y, z, r, colour] of balls) {
    const rows = Array.from({ length: fine + 1 }, (_, i) => (Math.PI * i) / fine);
    rings(rows.map((a) => around(2 * fine).map((b) => point(
      [x + r * Math.sin(a) * Math.cos(b), y + r * Math.cos(a), z + r * Math.sin(a) * Math.sin(b)], hex(colour)))));
  }
  for (const [ax, ay, az, bx, by, bz, r, colour] of sticks) {
    const d = [bx - ax, by - ay, bz - az], length = Math.hypot(...d) || 1;
    const u = d.map((v) => v / length);
    const cross = (p, q) => [p[1] * q[2] - p[2] * q[1], p[2] * q[0] - p[0] * q[2], p[0] * q[1] - p[1] * q[0]];
    let e = cross(u, Math.abs(u[0]) < 0.7 ? [1, 0, 0] : [0, 1, 0]);
    const size = Math.hypot(...e);
    e = e.map((v) => v / size);
    const f = cross(u, e);
    rings([[ax, ay, az], [bx, by, bz]].map((end) => around(12).map((a) => point(
      end.map((v, k) => v + r * (Math.cos(a) * e[k] + Math.sin(a) * f[k])), hex(colour)))));
  }
  return m;
}

const reach = (scene) => Math.max(1, ...scene.balls.map((b) => Math.hypot(b[0], b[1], b[2]) + b[3]));

class View {
  // `box` gets the view, `buttons` the ways to turn it without a mouse.
  constructor(box, buttons, size) {
    Object.assign(this, { box, size, spin: !still.matches, seen: false });
    new IntersectionObserver(([entry]) => {
      this.seen = entry.isIntersecting;
      if (this.seen && this.waiting) this.show(this.waiting);
    }).observe(box);
    for (const kind of ["pointerdown", "wheel", "touchstart"])
      box.addEventListener(kind, () => { this.spin = false; }, { capture: true, passive: true });
    buttons.addEventListener("click", ({ target }) => {
      const act = target.dataset.do;
      if (act === "turn") { this.spin = !this.spin; if (this.spin) this.turn(); }
      else if (act) { this.spin = false; this.zoom(act === "closer" ? 0.8 : 1.25); }
    });
  }

  show(scene) {
    this.waiting = scene;
    if (!this.seen) return;
    this.waiting = null;
    const first = !this.plot;
    const range = [-1, 1].map((s) => s * (this.size ?? reach(scene)) * 1.04);
    const axis = { visible: false, range, showspikes: false };
    const layout = {
      paper_bgcolor: "#0000", margin: { l: 0, r: 0, t: 0, b: 0 }, uirevision: "kept",
      scene: {
        xaxis: axis, yaxis: axis, zaxis: axis, aspectmode: "cube", dragmode: "orbit",
        camera: { eye: { x: 0, y: 0, z: 1.3 }, up: { x: 0, y: 1, z: 0 }, projection: { type: "perspective" } },
      },
    };
    const trace = {
      type: "mesh3d", ...mesh(scene), hoverinfo: "skip", flatshading: false,
      lighting: { ambient: 0.5, diffuse: 0.75, specular: 0.35, roughness: 0.35, fresnel: 0.15 },
      lightposition: { x: -3000, y: 6000, z: 9000 },
    };
    this.plot = Plotly.react(this.box, [trace], layout, { ...config, scrollZoom: true });
    if (first) this.plot.then(() => this.turn());
  }

  camera() { return this.box._fullLayout.scene.camera; }

  zoom(factor) {
    const { eye } = this.camera();
    const near = Object.fromEntries(Object.entries(eye).map(([k, v]) => [k, v * factor]));
    Plotly.relayout(this.box, { "scene.camera.eye": near });
  }

  // About the axis that points up on the screen, a turn in 18 seconds.
  turn() {
    let before = performance.now();
    const step = (now) => {
      if (!this.spin) return;
      if (this.seen && now - before > 30) {
        const angle = ((2 * Math.PI) / 18000) * Math.min(now - before, 100), { x, y, z } = this.camera().eye;
        const eye = { x: x * Math.cos(angle) + z * Math.sin(angle), y, z: z * Math.cos(angle) - x * Math.sin(angle) };
        Plotly.relayout(this.box, { "scene.camera.eye": eye });
        before = now;
      }
      requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }
}

function gallery(stage) {
  const view = new View(stage.querySelector(".view"), stage.querySelector(".turning"));
  const figures = all("figure[data-scene]", stage.parentElement);
  const choose = (figure) => {
    figures.forEach((other) => other.classList.toggle("on", other === figure));
    const caption = figure.querySelector("figcaption"), said = stage.querySelector(".said");
    said.replaceChildren(...(caption ? [...caption.children].map((c) => c.cloneNode(true)) : []));
    view.show(data.scenes[figure.dataset.scene]);
  };
  for (const figure of figures) {
    figure.addEventListener("click", () => choose(figure));
    figure.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(figure); }
    });
  }
  choose(figures[0]);
}

// --- players: a strip of frames, one of them large -----------------------------------------------

function player(root) {
  const frames = all(".frame", root), slider = root.querySelector("input");
  const image = root.querySelector(".screen > img"), audio = root.querySelector("audio");
  const box = root.querySelector(".view"), buttons = root.querySelector(".turning");
  const scenes = frames.map((f) => data.scenes[f.dataset.scene]);
  const last = scenes.at(-1);
  const play = root.querySelector(".play");
  let view = null, timer = null;
  if (last) {
    // Estimates are wider on their way; what is very far stays out of the picture.
    const widest = Math.max(...scenes.filter(Boolean).map(reach));
    view = new View(box, buttons, Math.min(widest, 1.6 * reach(last)));
    box.hidden = buttons.hidden = false;
    image.hidden = true;
  }
  const show = (index) => {
    const frame = frames[index], source = frame.querySelector("img");
    frames.forEach((other) => other.classList.toggle("on", other === frame));
    slider.value = index;
    root.querySelector("output").value = frame.dataset.label;
    if (scenes[index]) view.show(scenes[index]);
    if (source) {
      image.src = source.src;
      image.className = source.className;
    }
    audio.hidden = !frame.dataset.sound;
    if (frame.dataset.sound) audio.src = frame.dataset.sound;
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶"; };
  slider.addEventListener("input", () => { stop(); show(+slider.value); });
  frames.forEach((frame, i) => frame.addEventListener("click", () => { stop(); show(i); }));
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (+slider.value === frames.length - 1) show(0);
    play.textContent = "❚❚";
    timer = setInterval(() => {
      show(+slider.value + 1);
      if (+slider.value === frames.length - 1) stop();
    }, 450);
  });
  show(frames.length - 1);
}

const charts = () => all(".chart").forEach(chart);
charts();
dark.addEventListener("change", charts);
all(".stage").forEach(gallery);
all(".player").forEach(player);
