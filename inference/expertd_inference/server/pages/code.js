// Colours code: strings, comments, numbers and keywords, which most languages write alike.
import { element } from "./elements.js";

const KEYWORDS = new Set(
  ("abstract and as assert async await begin bool boolean break case catch char class const constexpr continue " +
  "crate def default defer del delete do done double elif else end enum esac except export extends extern false " +
  "False fi final finally float fn for foreach from func function global go if impl implements import in " +
  "instanceof int interface is lambda let local long loop match mod module mut namespace new nil none None " +
  "nonlocal not null nullptr or override package pass private protected pub public raise return self short " +
  "signed sizeof static struct super switch template then this throw trait true True try type typedef typename " +
  "typeof union unsafe unsigned use using var virtual void volatile when where while with yield " +
  "select from where insert into values update set join on group by order limit create table").split(" "),
);
const HASH_COMMENTS = /^(py|python|sh|bash|shell|zsh|rb|ruby|pl|perl|r|ya?ml|toml|make|makefile|dockerfile|nix|elixir)$/i;
const DASH_COMMENTS = /^(sql|lua|haskell|hs|ada|elm)$/i;
const NO_COLOURS = /^(text|txt|plain|markdown|md)$/i;

function pattern(language) {
  let comment = "//[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)";
  if (HASH_COMMENTS.test(language)) comment = "#[^\\n]*";
  if (DASH_COMMENTS.test(language)) comment = "--[^\\n]*";
  if (/^(html|xml|svg)$/i.test(language)) comment = "<!--[\\s\\S]*?(?:-->|$)";
  return new RegExp(
    `(?<comment>${comment})|` +
    `(?<string>"""[\\s\\S]*?(?:"""|$)|'''[\\s\\S]*?(?:'''|$)|"(?:\\\\.|[^"\\\\\\n])*"?|'(?:\\\\.|[^'\\\\\\n])*'|\`(?:\\\\.|[^\`\\\\])*\`?)|` +
    "(?<number>\\b(?:0[xXbBoO][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b)|" +
    "(?<word>[A-Za-z_][\\w]*)",
    "g",
  );
}

// The nodes of a text of code.
export function coloured(code, language) {
  if (NO_COLOURS.test(language)) return [code];
  const nodes = [];
  let end = 0;
  for (const found of code.matchAll(pattern(language))) {
    const { comment, string, number, word } = found.groups;
    const kind = comment ? "comment" : string ? "string" : number ? "number" : KEYWORDS.has(word) ? "keyword" : null;
    if (kind === null) continue;
    nodes.push(code.slice(end, found.index), element("span", { className: kind }, found[0]));
    end = found.index + found[0].length;
  }
  nodes.push(code.slice(end));
  return nodes;
}
