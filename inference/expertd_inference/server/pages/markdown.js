// Shows Markdown: paragraphs, headings, lists, quotes, tables, code, bold, italic and links.
import { coloured } from "./code.js";
import { element } from "./elements.js";

const FENCE = /^\s*(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^\s*([-*_])(?:\s*\1){2,}\s*$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const MOST_NESTED = 8;

// Shows `text` in `place`. What has not changed since the last time stays: a stream only adds.
export function show(place, text) {
  const parts = blocks(text);
  parts.forEach((part, at) => {
    const source = part.kind + "\n" + part.lines.join("\n");
    const old = place.children[at];
    if (old && old.source === source) return;
    const made = build(part);
    made.source = source;
    if (old) old.replaceWith(made);
    else place.append(made);
  });
  while (place.children.length > parts.length) place.lastElementChild.remove();
}

function blocks(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const found = [];
  let at = 0;
  const take = (kind, goesOn) => {
    const part = { kind, lines: [lines[at++]] };
    while (at < lines.length && goesOn(lines[at])) part.lines.push(lines[at++]);
    found.push(part);
    return part;
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (!line.trim()) at += 1;
    else if (fence) {
      const closes = (one) => one.trim().startsWith(fence[1]) && !one.trim().slice(fence[1].length).trim();
      const part = take("code", (one) => !closes(one));
      part.lines[0] = fence[2];
      at += 1;
    } else if (HEADING.test(line)) take("heading", () => false);
    else if (RULE.test(line)) take("rule", () => false);
    else if (/^\s*>/.test(line)) take("quote", (one) => /^\s*>/.test(one));
    else if (line.includes("|") && DIVIDER.test(lines[at + 1] ?? "")) take("table", (one) => one.includes("|"));
    else if (ITEM.test(line)) {
      const [, indent, number] = ITEM.exec(line);
      const listed = (one) => {
        const item = ITEM.exec(one);
        if (!item || item[1].length > indent.length + 1) return /^\s{2,}\S/.test(one);
        return (item[2] === undefined) === (number === undefined);
      };
      take("list", (one) => listed(one) || (!one.trim() && listed(lines[at + 1] ?? "")));
    } else take("paragraph", (one) => one.trim() && !begins(one));
  }
  return found;
}

const begins = (line) => [FENCE, HEADING, RULE, ITEM, /^\s*>/].some((one) => one.test(line));

function build(part, depth = 0) {
  const { kind, lines } = part;
  if (depth > MOST_NESTED) return element("p", {}, lines.join("\n"));
  if (kind === "code") return codeBlock(lines[0], lines.slice(1).join("\n"));
  if (kind === "rule") return element("hr");
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    return element(`h${Math.min(6, marks.length + 2)}`, {}, ...spans(text)); // below the page's own
  }
  if (kind === "quote") {
    const inner = lines.map((line) => line.replace(/^\s*> ?/, "")).join("\n");
    return element("blockquote", {}, ...blocks(inner).map((one) => build(one, depth + 1)));
  }
  if (kind === "table") return table(lines);
  if (kind === "list") return list(lines, depth);
  return element("p", {}, ...spans(lines.join("\n")));
}

function list(lines, depth) {
  const [, indent, number, words] = ITEM.exec(lines[0]);
  const inner = new RegExp(`^\\s{1,${lines[0].length - words.length}}`);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push([item[3]]);
    else items.at(-1).push(line.replace(inner, ""));
  }
  const made = items.map((item) => {
    const [first, ...more] = blocks(item.join("\n"));
    const tight = first?.kind === "paragraph" ? spans(first.lines.join("\n")) : first ? [build(first, depth + 1)] : [];
    return element("li", {}, ...tight, ...more.map((one) => build(one, depth + 1)));
  });
  return number === undefined ? element("ul", {}, ...made) : element("ol", { start: Number(number) }, ...made);
}

function table(lines) {
  const cells = (line) =>
    line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const row = (line, name) => element("tr", {}, ...cells(line).map((cell) => element(name, {}, ...spans(cell))));
  const head = element("thead", {}, row(lines[0], "th"));
  const body = element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  // It scrolls by itself, by keyboard as well.
  const made = element("table", {}, head, body);
  return element("div", { className: "wide-table", tabIndex: 0, role: "group", "aria-label": "Table" }, made);
}

function codeBlock(language, code) {
  const copy = element("button", { type: "button", className: "quiet" }, "Copy");
  copy.addEventListener("click", async () => {
    copy.textContent = (await copyText(code)) ? "Copied" : "The browser refuses";
    setTimeout(() => { copy.textContent = "Copy"; }, 2000);
  });
  const text = element("pre", { tabIndex: 0, role: "group", "aria-label": "Code" }, element("code", {}, ...coloured(code, language)));
  return element("figure", { className: "code" }, element("figcaption", {}, element("span", {}, language || "code"), copy), text);
}

// Whether `text` is in the clipboard now. Pages of plain HTTP have no navigator.clipboard.
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = element("textarea", { value: text, className: "hidden" });
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

const SPAN = new RegExp(
  [
    "(?<ticks>`+)(?<code>[\\s\\S]*?[^`])\\k<ticks>(?!`)",
    "\\*\\*(?<bold>(?=\\S)[\\s\\S]*?\\S)\\*\\*",
    "(?<![\\w*])\\*(?<italic>(?=[^\\s*])[^*]*?[^\\s*])\\*(?!\\w)",
    "\\[(?<label>[^\\]\\n]+)\\]\\((?<target>[^\\s)]+)(?:\\s+\"[^\"]*\")?\\)",
    "(?<url>https?://[^\\s<>\"`]*[^\\s<>\"`.,;:!?)*])",
    "\\\\(?<escaped>[\\\\`*_{}\\[\\]()#+.!|>~-])",
    "(?<break> {2,}\\n)",
  ].join("|"),
  "g",
);

// The nodes of a line of text.
function spans(text, depth = 0) {
  if (depth > MOST_NESTED) return [text];
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(SPAN)) {
    const { code, bold, italic, label, target, url, escaped } = found.groups;
    nodes.push(text.slice(end, found.index));
    end = found.index + found[0].length;
    if (code !== undefined) nodes.push(element("code", {}, code));
    else if (bold !== undefined) nodes.push(element("strong", {}, ...spans(bold, depth + 1)));
    else if (italic !== undefined) nodes.push(element("em", {}, ...spans(italic, depth + 1)));
    else if (label !== undefined) nodes.push(link(label, target, depth) ?? found[0]);
    else if (url !== undefined) nodes.push(link(url, url, MOST_NESTED));
    else nodes.push(escaped ?? element("br"));
  }
  nodes.push(text.slice(end));
  return nodes;
}

// Only to the web and to mail: another scheme could be a script.
function link(label, target, depth) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return null;
  return element("a", { href: target, rel: "noopener noreferrer nofollow", target: "_blank" }, ...spans(label, depth + 1));
}
