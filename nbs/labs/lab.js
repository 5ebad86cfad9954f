// What all labs share: Python in the page, the lock before the simulator, and small helpers.

const CDN = "https://cdn.jsdelivr.net/pyodide/v314.0.7/full/";
const PACKAGE = "../../nano_vllm/";
const MODULES = ["sampling_params", "kv_blocks", "prefix_cache", "scheduler"];

// ---- Python

// `?pyodide=folder/` takes the runtime from a folder of the page's own host instead.
function runtimeFolder() {
  const asked = new URLSearchParams(location.search).get("pyodide");
  if (!asked) return CDN;
  const url = new URL(asked, location.href);
  if (url.origin !== location.origin) throw new Error(`${asked} is on another host`);
  return url.href;
}

async function text(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status} ${response.statusText}`);
  return response.text();
}

export async function json(path) { return JSON.parse(await text(path)); }

// A ValueError is an answer to show; anything else is a mistake in the lab.
const CALL = `
import json
def call(function, arguments):
    try: return json.dumps(dict(value=function(*json.loads(arguments))))
    except ValueError as error: return json.dumps(dict(error=str(error)))
call`;

// The functions of the lab's Python file, over the engine's own modules:
// `const call = await startPython("scheduler_lab"); call("run", settings, requests)`.
export async function startPython(name) {
  const folder = runtimeFolder();
  const { loadPyodide } = await import(`${folder}pyodide.mjs`);
  const sources = Promise.all(MODULES.map(module => text(`${PACKAGE}${module}.py`)));
  const python = await loadPyodide({ indexURL: folder });
  await python.loadPackage("xxhash", { messageCallback: () => {} });
  python.FS.mkdirTree("/lab/nano_vllm");
  python.FS.writeFile("/lab/nano_vllm/__init__.py", "");
  (await sources).forEach((source, i) =>
    python.FS.writeFile(`/lab/nano_vllm/${MODULES[i]}.py`, source));
  python.FS.writeFile(`/lab/${name}.py`, await text(`${name}.py`));
  python.runPython("import sys; sys.path.insert(0, '/lab')");
  const module = python.pyimport(name), call = python.runPython(CALL);
  return (f, ...args) => {
    const { value, error } = JSON.parse(call(module[f], JSON.stringify(args)));
    if (error !== undefined) throw new RangeError(error);
    return value;
  };
}

// ---- The lock

function compare(guess, truth, unit) {
  const difference = Math.abs(guess - truth);
  if (difference < 1e-9) return `Exactly: ${number(truth)}${unit}.`;
  const side = guess < truth ? "too low" : "too high";
  return `You said ${number(guess)}, the answer is ${number(truth)}${unit}: `
    + `${number(difference)} ${side}.`;
}

// Asks `question`; after a number is given, `answer()` is compared with it and `open` is called.
export function lock(element, { question, unit = "", answer, open }) {
  const form = make("form", {}, [
    make("label", { for: "guess" }, question),
    make("div", { class: "row" }, [
      make("input", { id: "guess", type: "number", step: "any", required: "", autocomplete: "off" }),
      make("button", { class: "main" }, "Guess and open the lab")])]);
  const result = make("output", { "aria-live": "polite", tabindex: "-1" });
  element.replaceChildren(make("h2", {}, "First a guess"), form, result);
  form.addEventListener("submit", async event => {
    event.preventDefault();
    const guess = form.elements.guess.valueAsNumber;
    for (const control of form.elements) control.disabled = true;
    result.textContent = "Python is on its way (some 6 MB, once) ...";
    try {
      const truth = await answer();
      if (!form.isConnected) return;      // another scenario was chosen meanwhile
      result.textContent = compare(guess, truth, unit);
      open();
      result.focus();       // the form is closed, and reading goes on here
    } catch (error) {
      result.textContent = `That did not work, try to load the page again: ${error.message}`;
      for (const control of form.elements) control.disabled = false;
    }
  });
}

// ---- Elements

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...[children ?? []].flat());
  return element;
}

export function make(tag, attributes = {}, children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

export function byId(id) { return document.getElementById(id); }

// At most `digits` decimals, with thin gaps between thousands.
export function number(value, digits = 3) {
  return value.toLocaleString("en", { maximumFractionDigits: digits }).replaceAll(",", "\u202f");
}

export function tile(value, name) {
  return make("div", { class: "tile" }, [make("b", {}, String(value)), make("span", {}, name)]);
}

// A row of buttons of which one is pressed; `choose(i)` is called with its number.
export function choice(element, titles, choose) {
  const buttons = titles.map((title, i) => {
    const button = make("button", { type: "button", "aria-pressed": "false" }, title);
    button.addEventListener("click", () => press(i));
    return button;
  });
  function press(i) {
    buttons.forEach((b, j) => b.setAttribute("aria-pressed", String(i === j)));
    choose(i);
  }
  element.replaceChildren(...buttons);
  press(0);
}

// A labelled slider whose value stands beside its name; `changed` is called when it moves.
export function slider(id, label, { min, max, step = 1, value, show = String }, changed) {
  const input = make("input", { id, type: "range", min, max, step, value });
  const output = make("output", { for: id }, show(value));
  input.addEventListener("input", () => {
    output.textContent = show(input.valueAsNumber);
    changed(input.valueAsNumber);
  });
  return make("div", { class: "slider" }, [make("label", { for: id }, label), output, input]);
}

// Links to chapters lead to the site's pages, or to the notebooks where there is no site.
for (const link of document.querySelectorAll("a[data-chapter]")) {
  link.addEventListener("click", async event => {
    event.preventDefault();
    const page = await fetch(link.href, { method: "HEAD" });
    location.href = page.ok ? link.href : link.href.replace(".html", ".ipynb");
  });
}
