// The layer × expert heat map: drawn, and as a table.
import { byId, element } from "./elements.js";

const NUM_HOTTEST = 4;
const MOST_CELL = 26; // pixels, as are the next
const LEAST_CELL = 3;
const LABEL = 28;

let layers = [];
let cell = MOST_CELL;

export function showHeat(heat) {
  layers = heat ?? [];
  draw();
  byId("heat-table").replaceChildren(...layers.map(({ layer, heat: values, resident }) => {
    const hottest = values
      .map((value, expert) => [value, expert])
      .filter(([value]) => value > 0)
      .sort((a, b) => b[0] - a[0])
      .slice(0, NUM_HOTTEST)
      .map(([, expert]) => expert);
    const inRam = `${resident.filter(Boolean).length} of ${resident.length}`;
    return element("tr", {}, element("td", {}, String(layer)), element("td", {}, inRam), element("td", {}, hottest.join(", ") || "none used yet"));
  }));
}

function draw() {
  const canvas = byId("heat");
  const num = Math.max(1, ...layers.map(({ heat }) => heat.length));
  const room = canvas.parentElement.clientWidth - LABEL;
  cell = Math.max(LEAST_CELL, Math.min(MOST_CELL, Math.floor(room / num)));
  const [width, height, scale] = [LABEL + num * cell, Math.max(1, layers.length) * cell, devicePixelRatio];
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const style = getComputedStyle(document.documentElement);
  const [warm, cold, words] = ["--accent", "--muted", "--muted"].map((name) => style.getPropertyValue(name));
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  context.textBaseline = "middle";
  const gap = cell > 5 ? 1.5 : 0.5;
  const every = Math.ceil(14 / cell); // labels do not touch
  layers.forEach(({ layer, heat, resident }, line) => {
    context.globalAlpha = 1;
    context.fillStyle = words;
    if (line % every === 0) context.fillText(String(layer), 0, (line + 0.5) * cell);
    heat.forEach((value, expert) => {
      const size = resident[expert] ? cell - gap : Math.max(1.5, cell * 0.3);
      context.fillStyle = resident[expert] ? warm : cold;
      context.globalAlpha = (resident[expert] ? 0.12 : 0.3) + (resident[expert] ? 0.88 : 0.7) * (value / 255);
      const inset = (cell - size) / 2;
      context.fillRect(LABEL + expert * cell + inset, line * cell + inset, size, size);
    });
  });
}

function pointAt(event) {
  const found = layers[Math.floor(event.offsetY / cell)];
  const expert = Math.floor((event.offsetX - LABEL) / cell);
  const value = found?.heat[expert];
  byId("heat-at").textContent = value === undefined ? "" :
    `Layer ${found.layer}, expert ${expert}: ${Math.round((value / 255) ** 2 * 100)} % of the hottest, ${found.resident[expert] ? "in RAM" : "not in RAM"}`;
}

byId("heat").onpointermove = pointAt;
byId("heat").onpointerleave = () => { byId("heat-at").textContent = ""; };
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
