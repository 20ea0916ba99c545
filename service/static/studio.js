// The studio's script. Pages hold what the service knew when they were asked for; this keeps them
// up to date by the API. Texts of others get into a page as text alone, never as HTML.
"use strict";

const API = "/api/model-merger";
const DEBOUNCE = 300; // ms without a change before a plan is asked for
const AGAIN = 2000; // ms until something that may have changed is looked at again

const find = (selector, root = document) => root.querySelector(selector);
const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];
const wait = (time) => new Promise((done) => setTimeout(done, time));

/** An element with attributes and children; texts become text nodes. */
function make(tag, attributes = {}, ...children) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
  found.append(...children);
  return found;
}

/** Ask the service. Gives {ok, status, content}; status 0 where it does not answer. */
async function ask(path, { method = "GET", body } = {}) {
  const headers = { accept: "application/json" };
  if (body !== undefined) headers["content-type"] = "application/json";
  try {
    const answer = await fetch(path, { method, headers, body: JSON.stringify(body) });
    if (answer.status === 401) {
      const { pathname, search } = location;
      location.assign(`/login?next=${encodeURIComponent(pathname + search)}`);
    }
    return { ok: answer.ok, status: answer.status, content: await answer.json() };
  } catch {
    const text = "The service does not answer at the moment";
    return { ok: false, status: 0, content: { error: text, problems: [] } };
  }
}

/** What is wrong, as a list of {where, text}. */
function problemsOf(answer) {
  const { problems, error } = answer.content;
  return problems && problems.length ? problems : [{ where: "", text: error }];
}

// Words

/** A text as a sentence; names that it begins with stay as they are. */
function sentence(text) {
  const whole = /^[a-z]+[ ,]/.test(text) ? text.charAt(0).toUpperCase() + text.slice(1) : text;
  return /[.?!:]$/.test(whole) ? whole : `${whole}.`;
}

function bytes(count) {
  let [value, unit] = [count, "bytes"];
  for (const next of ["KB", "MB", "GB", "TB"]) {
    if (value < 1000) break;
    [value, unit] = [value / 1000, next];
  }
  return `${unit === "bytes" ? value : value.toFixed(2)} ${unit}`;
}

function duration(seconds) {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

const isOpen = (job) => job && ["queued", "running"].includes(job.status);
const several = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;

/** Show moments in the time of whoever looks at them. */
function localTimes(root = document) {
  for (const each of findAll("time[datetime]", root)) {
    const moment = new Date(each.dateTime);
    if (!Number.isNaN(moment.valueOf())) {
      const timeStyle = each.closest(".history") ? "medium" : "short"; // with seconds, or without
      each.textContent = moment.toLocaleString([], { dateStyle: "medium", timeStyle });
      each.title = moment.toLocaleString();
    }
  }
}

function drawState(badge, status) {
  badge.dataset.state = status;
  badge.textContent = { queued: "waiting", completed: "done" }[status] || status;
}

// Problems in their places

/** The field that a problem is about: that of `models[1].weight`, else of `models[1]`, `models`. */
function fieldOf(where, root) {
  for (let path = where; path; path = path.replace(/(\.[^.[]*|\[[^[]*|^[^.[]*)$/, "")) {
    const found = findAll("[data-where]", root).find((each) => each.dataset.where === path);
    if (found && found.closest("[hidden]") === null) return found;
  }
  return null;
}

function clearProblems(root) {
  for (const each of findAll(".problem", root)) {
    each.hidden = true;
    each.replaceChildren();
  }
  for (const each of findAll("[aria-invalid]", root)) {
    for (const name of ["aria-invalid", "aria-errormessage"]) each.removeAttribute(name);
  }
}

function showLine(line, text) {
  line.textContent = text;
  line.hidden = false;
}

let places = 0;

/** Show a problem in its field; false if it belongs to none that is shown. */
function showAt(problem, root) {
  const field = fieldOf(problem.where, root);
  const line = field && [...field.children].find((each) => each.matches(".problem"));
  if (!line) return false;
  line.id = line.id || `problem-${(places += 1)}`;
  if (line.childNodes.length) line.append(make("br"));
  line.append(sentence(problem.text));
  line.hidden = false;
  for (let above = field.closest("details"); above; above = above.parentElement.closest("details")) {
    above.open = true;
  }
  const others = "[type=range], [type=search], [name=model], [name=method]"; // not what is wrong
  const control = find(`input:not(${others}), select, textarea`, field);
  if (control) {
    control.setAttribute("aria-invalid", "true");
    control.setAttribute("aria-errormessage", line.id);
  }
  return true;
}

// Everywhere: copy, dialogs

async function copy(button) {
  const source = document.getElementById(button.dataset.copy);
  const name = button.textContent;
  let done = true;
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    getSelection().selectAllChildren(source); // without HTTPS there is no clipboard but this way
    done = document.execCommand("copy");
  }
  button.textContent = done ? "Copied" : "Press Ctrl+C";
  await wait(1500);
  button.textContent = name;
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy], [data-opens]");
  if (button === null) return;
  if (button.dataset.copy) copy(button);
  else document.getElementById(button.dataset.opens).showModal();
});

/** What the fields for questions hold, as a request; null if they are empty. */
function questionsIn(root) {
  const lines = find("[name=prompts]", root).value.split("\n");
  const prompts = lines.map((line) => line.trim()).filter(Boolean);
  const text = find("[name=text]", root).value.trim();
  if (!prompts.length && !text) return null;
  const tokens = find("[name=max_new_tokens]", root).valueAsNumber;
  return {
    ...(prompts.length ? { prompts } : {}),
    ...(text ? { text } : {}),
    max_new_tokens: Number.isNaN(tokens) ? 64 : tokens,
    chat: find("[name=chat]", root).checked,
  };
}

// The studio

function studio(form) {
  const chosen = []; // ids of models, in the order in which they were chosen
  const rows = new Map(); // of the chosen, with their weights, by id
  const base = find("#base-model");
  const start = find("#start");
  let baseIsChosen = false; // by the user, not by us
  let ready = false;
  let wanted = false; // start as soon as there is a plan
  let timer = null;
  let turn = 0;

  const way = () => form.elements.way.value;
  const method = () => find("[name=method]:checked", form);
  const settings = () => find(`.settings[data-method="${CSS.escape(method().value)}"]`, form);
  const box = (id) => findAll("[name=model]", form).find((each) => each.value === id);
  const weightOf = (id) => Number(find("[type=number]", rowOf(id)).value);

  // Models and their weights

  function choose(id, yes) {
    const at = chosen.indexOf(id);
    if (yes && at < 0) chosen.push(id);
    if (!yes && at >= 0) chosen.splice(at, 1);
    suggestBase();
    drawWeights();
  }

  function rowOf(id) {
    if (rows.has(id)) return rows.get(id);
    const row = find("#weight-row").content.firstElementChild.cloneNode(true);
    const [slider, number] = findAll("input", row);
    const name = find(".card-title", box(id).parentElement).textContent;
    find(".weight-name", row).textContent = name;
    number.setAttribute("aria-label", `Weight of ${name}`);
    slider.setAttribute("aria-label", `Weight of ${name}, slider`);
    const up = find(".up", row);
    up.setAttribute("aria-label", `Move ${name} up`);
    up.addEventListener("click", () => {
      const at = chosen.indexOf(id);
      chosen.splice(at - 1, 2, id, chosen[at - 1]);
      drawWeights();
      (at > 1 ? up : row).focus();
      changed();
    });
    rows.set(id, row);
    return row;
  }

  function drawWeights() {
    const has = method().dataset.weights === "yes";
    find("#weights").replaceChildren(...chosen.map(rowOf));
    chosen.forEach((id, at) => {
      const row = rowOf(id);
      row.dataset.where = `models[${at}]`;
      find(".swatch", row).dataset.colour = at % 6;
      find(".up", row).hidden = at === 0;
      find(".slide", row).hidden = !has;
    });
    find("#no-weights").hidden = chosen.length > 0;
    drawShares();
  }

  /** How much of the result each model is, where weights are that. */
  function drawShares() {
    const divided = find("[data-key=normalize] [data-value]", settings());
    const shares = method().dataset.shares === "yes" && (!divided || divided.checked);
    const values = chosen.map(weightOf);
    const sum = values.reduce((total, each) => total + each, 0);
    const whole = shares && chosen.length > 1 && sum > 0 && values.every((each) => each >= 0);
    const percent = (value) => (whole ? `${Math.round((100 * value) / sum)} %` : "");
    chosen.forEach((id, at) => (find(".share", rowOf(id)).textContent = percent(values[at])));
    find("#mix").hidden = !whole;
    find("#mix").replaceChildren(...chosen.map((_, at) => make("span", { "data-colour": at % 6 })));
    findAll("#mix span").forEach((part, at) => (part.style.flexGrow = values[at]));
  }

  // Method, base, parameters

  /** The base that is probably meant: that of adapters, or the one of their shape called base. */
  function suggestBase() {
    if (baseIsChosen) return;
    const options = [...base.options].filter((each) => each.value);
    const alike = (each) => chosen.every((id) => box(id).dataset.shape === each.dataset.shape);
    const called = (each) => /(^|[-_/.])base$/i.test(each.value);
    const likely = chosen.length ? options.filter((each) => called(each) && alike(each)) : [];
    const ofAdapters = chosen.map((id) => box(id).dataset.base).filter(Boolean);
    const found = ofAdapters[0] || (likely.length === 1 ? likely[0].value : "");
    base.value = options.some((each) => each.value === found) ? found : "";
  }

  function drawMethod() {
    const needs = method().dataset.base;
    find("#base").hidden = needs === "none";
    base.options[0].textContent = needs === "optional" ? "Without a base" : "Choose the base";
    for (const each of findAll(".settings", form)) each.hidden = each !== settings();
    suggestBase();
    drawWeights();
    drawParameters();
  }

  /** Hide what has no effect beside other settings. */
  function drawParameters() {
    for (const each of findAll("[data-only]", settings())) {
      const other = find(`[data-key="${each.dataset.only}"]`, settings());
      each.hidden = !JSON.parse(each.dataset.values).includes(valueOf(other));
    }
  }

  /** What a field holds; null for nothing. */
  function valueOf(field) {
    const control = find("[data-value]", field);
    if (field.dataset.kind === "switch") return control.checked;
    if (field.dataset.kind === "choice") {
      return { "": null, true: true, false: false }[control.value] ?? (control.value || null);
    }
    return control.value === "" ? null : Number(control.value);
  }

  function parameters() {
    const found = {};
    for (const field of findAll("[data-key]", settings())) {
      const value = valueOf(field);
      const isDefault = value === JSON.parse(field.dataset.default);
      if (field.hidden || value === null) continue;
      if (field.dataset.main === "yes" || !isDefault) found[field.dataset.key] = value;
    }
    return found;
  }

  // What is asked for

  function request() {
    const name = form.elements.name.value.trim();
    const evaluation = questionsIn(form);
    const common = { ...(name ? { name } : {}), ...(evaluation ? { evaluation } : {}) };
    if (way() === "recipe") return { recipe: form.elements.recipe.value, ...common };
    const weights = method().dataset.weights === "yes";
    const dtype = find("[data-dtype]", settings()).value;
    const basis = method().dataset.base === "none" ? "" : base.value;
    return {
      method: method().value,
      models: chosen.map((id) => (weights ? { id, weight: weightOf(id) } : { id })),
      ...(basis ? { base_model: basis } : {}),
      parameters: parameters(),
      ...(dtype ? { dtype } : {}),
      ...common,
    };
  }

  /** What is still to be filled in before it is worth asking; empty if nothing. */
  function missing() {
    const recipe = form.elements.recipe.value.trim();
    if (way() === "recipe") return recipe ? "" : "Write or paste a recipe to begin.";
    const { title, fewest, base: needs } = method().dataset;
    const short = Number(fewest) - chosen.length;
    if (short > 0) return `Choose ${several(short, chosen.length ? "more model" : "model")} for ${title}.`;
    if (needs === "required" && !base.value) return `Choose the base: ${title} needs one.`;
    return "";
  }

  /** Fields in which there is no number. */
  function malformed() {
    const numbers = findAll("#settings [type=number]").filter((each) => !each.closest("[hidden]"));
    const isWrong = (each) => each.validity.badInput || (each.value === "" && each.closest(".slide"));
    const where = (each) => each.closest("[data-where]").dataset.where;
    const text = (each) => `${each.labels[0]?.textContent || each.ariaLabel} is no number`;
    return numbers.filter(isWrong).map((each) => ({ where: where(each), text: text(each) }));
  }

  // The plan

  function changed() {
    clearTimeout(timer);
    turn += 1;
    wanted = false;
    const lacks = missing();
    const wrong = malformed();
    if (lacks || wrong.length) {
      showProblems(wrong);
      if (lacks) say(lacks);
      return;
    }
    say("Looking at what this takes …", "planning");
    timer = setTimeout(plan, DEBOUNCE);
  }

  function say(text, state = "waiting") {
    ready = state === "ready";
    form.dataset.state = state;
    start.setAttribute("aria-disabled", String(!ready));
    find("#why").textContent = text;
  }

  async function plan() {
    const mine = turn;
    const answer = await ask(`${API}/experiments/plan`, { method: "POST", body: request() });
    if (mine !== turn) return; // something has changed since
    if (answer.ok) {
      clearProblems(form);
      find("#problems").hidden = true;
      drawPlan(answer.content);
      say("Ready to start.", "ready");
      if (wanted) submit();
    } else {
      showProblems(problemsOf(answer));
      if (answer.status === 0 || answer.status === 429) timer = setTimeout(plan, AGAIN);
    }
  }

  function showProblems(problems) {
    clearProblems(form);
    const others = problems.filter((each) => !showAt(placed(each), form));
    const list = find("#problems");
    list.replaceChildren(
      ...others.map(({ where, text }) => make("li", {}, where ? `${where}: ${text}` : sentence(text))),
    );
    list.hidden = others.length === 0;
    if (!problems.length) return;
    const found = several(problems.length, "problem");
    const first = problems[0].text.length < 200 ? sentence(problems[0].text) : "";
    say(`Cannot start yet: ${found} to solve. ${first}`, "problem");
  }

  /** Problems of a recipe stand below it, with the line that they are about. */
  function placed({ where, text }) {
    if (way() !== "recipe" || /^(name|evaluation)/.test(where)) return { where, text };
    return { where: "recipe", text: where ? `${where}: ${text}` : sentence(text) };
  }

  function drawPlan({ plan: found, recipe }) {
    const meter = (value, most, what) => {
      const label = `Share of the ${what} that is free for it`;
      const limits = { max: most, high: most * 0.8, optimum: 0, "aria-label": label };
      return most > 0 ? [make("meter", { value, ...limits })] : [];
    };
    const { rows: vocabulary, tokens, tokenizer_source: source, tokens_added: added } =
      found.vocabulary;
    const moved = Object.keys(found.vocabulary.rows_changed).length;
    const aligned = [
      source ? `tokenizer of ${source}` : "no tokenizer",
      `${several(vocabulary, "row")} for ${several(tokens ?? 0, "token")}`,
      ...(added.length ? [`${several(added.length, "token")} added`] : []),
      ...(moved ? [`rows rearranged in ${several(moved, "model")}`] : []),
    ];
    const parameters = several(found.parameters_count, "parameter");
    const passes = found.passes > 1 ? `, in ${found.passes} passes` : "";
    const { memory_bytes: memory, disk_bytes: disk } = found;
    const figures = [
      ["Memory", `up to ${bytes(memory)}`, ...meter(memory, Number(form.dataset.memory), "memory")],
      ["Disk", `up to ${bytes(disk)}`, ...meter(disk, found.disk_free, "disk")],
      ["Result", `${bytes(found.write_bytes)}, ${parameters}, ${found.dtype}`],
      ["Reads", `${bytes(found.read_bytes)}${passes}`],
      ...(found.download_bytes ? [["Downloads", bytes(found.download_bytes)]] : []),
      ["Vocabulary", aligned.join(", ")],
    ].map(([name, ...about]) => make("div", {}, make("dt", {}, name), make("dd", {}, ...about)));
    const notes = found.notes.map((note) => make("p", { class: "note" }, sentence(note)));
    find("#figures").replaceChildren(make("dl", { class: "figures" }, ...figures), ...notes);
    find("#recipe-view").textContent = recipe;
    find("#summary-view").textContent = found.summary;
    for (const each of findAll("#plan-recipe, #plan-summary")) each.hidden = false;
    find("#edit-recipe").hidden = way() === "recipe";
  }

  async function submit() {
    wanted = form.dataset.state === "planning";
    if (!ready) return find("[aria-invalid=true]", form)?.focus();
    say("Starting …");
    const answer = await ask(`${API}/experiments`, { method: "POST", body: request() });
    if (answer.ok) location.assign(`/experiments/${answer.content.experiment_id}`);
    else showProblems(problemsOf(answer));
  }

  function drawWay() {
    for (const each of ["form", "recipe"]) find(`#by-${each}`).hidden = way() !== each;
  }

  /** Fill in what an earlier experiment was asked for by. */
  function fillIn(content) {
    form.elements.name.value = content.name || "";
    if (content.evaluation) {
      find("#questions").open = true;
      form.elements.prompts.value = (content.evaluation.prompts || []).join("\n");
      form.elements.text.value = content.evaluation.text || "";
      form.elements.max_new_tokens.value = content.evaluation.max_new_tokens || 64;
      form.elements.chat.checked = Boolean(content.evaluation.chat);
    }
    form.elements.way.value = content.way;
    form.elements.recipe.value = content.recipe || "";
    if (content.way === "recipe") return;
    form.elements.method.value = content.method;
    find("#more-methods").open = find("#more-methods").contains(method());
    const isThere = ({ id }) => box(id) && !box(id).disabled;
    const lost = content.models.filter((each) => !isThere(each)).map(({ id }) => id);
    const notice = make("p", { class: "notice" }, `Not there any more: ${lost.join(", ")}.`);
    if (lost.length) find("#models .help").after(notice);
    for (const { id, weight } of content.models.filter(isThere)) {
      box(id).checked = true;
      for (const each of findAll("input", rowOf(id))) each.value = weight ?? 1;
      choose(id, true);
    }
    baseIsChosen = Boolean(content.base_model);
    if (content.base_model) base.value = content.base_model;
    for (const [key, value] of Object.entries(content.parameters)) {
      const field = find(`[data-key="${CSS.escape(key)}"]`, settings());
      for (const each of findAll("input, select", field)) {
        if (each.type === "checkbox") each.checked = value;
        else each.value = String(value);
      }
      if (field.dataset.main === "no") field.closest("details").open = true;
    }
    find("[data-dtype]", settings()).value = content.dtype || "";
  }

  form.addEventListener(
    "input",
    ({ target }) => {
      const pair = target.closest(".slide"); // a slider and a number that say the same
      if (pair) for (const each of findAll("input", pair)) if (each !== target) each.value = target.value;
    },
    true, // before anyone looks at them
  );
  form.addEventListener("input", ({ target }) => {
    if (target.id === "filter") {
      const text = target.value.trim().toLowerCase();
      const cards = findAll(".card.model", form);
      for (const card of cards) card.hidden = !card.textContent.toLowerCase().includes(text);
    }
    if (target.id === "filter" || (ready && target.closest("#last"))) return; // the plan is the same
    if (target === base) baseIsChosen = true;
    if (target.name === "way") drawWay();
    if (target.name === "model") choose(target.value, target.checked);
    if (target.name === "method") drawMethod();
    if (target.closest(".settings")) drawParameters();
    if (target.closest("#settings")) drawShares();
    changed();
  });

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  find("#edit-recipe").addEventListener("click", () => {
    form.elements.recipe.value = find("#recipe-view").textContent;
    form.elements.way.value = "recipe";
    drawWay();
    form.elements.recipe.focus();
    changed();
  });

  form.reset(); // browsers fill in what was there before a reload, and not all of it
  const given = find("#filled-in");
  if (given) fillIn(JSON.parse(given.textContent));
  drawWay();
  drawMethod();
  changed();
}

// The list of experiments

function experiments(list) {
  const template = find("#row").content.firstElementChild;
  function fill(row, each) {
    row.dataset.id = each.id;
    row.dataset.open = isOpen(each) || isOpen(each.evaluation) ? "yes" : "no";
    const link = find(".row-name", row);
    link.href = `/experiments/${each.id}`;
    link.textContent = each.name;
    drawState(find(".state", row), each.status);
    find(".row-models", row).textContent = each.models.map((model) => model.id).join(", ");
    find("time", row).dateTime = each.created_at;
    const progress = find("progress", row);
    progress.hidden = each.status !== "running";
    progress.value = each.progress;
  }

  function draw(found) {
    const known = new Map(findAll(".row", list).map((row) => [row.dataset.id, row]));
    const rows = found.map((each) => {
      const row = known.get(each.id) || template.cloneNode(true);
      fill(row, each);
      return row;
    });
    if (rows.length !== known.size || rows.some((row, at) => row !== list.children[at])) {
      list.replaceChildren(...rows);
    }
    localTimes(list);
    find("#no-experiments").hidden = rows.length > 0;
  }

  async function look() {
    const { limit, before } = list.dataset;
    const answer = await ask(`${API}/experiments?limit=${limit}${before && `&before=${before}`}`);
    if (answer.ok) draw(answer.content.experiments);
  }

  async function follow() {
    for (;;) {
      await wait(AGAIN);
      if (find("[data-open=yes]", list)) await look();
    }
  }

  follow();
}

// An experiment

function experiment(page) {
  const path = `${API}/experiments/${page.dataset.id}`;
  const steps = JSON.parse(find("#steps").textContent);
  const title = document.title;
  let states = null;

  function draw(panel, job, place) {
    const bar = find("progress", panel);
    const waits = job.status === "queued";
    const counts = job.total_bytes > 0;
    if (waits || counts) bar.value = job.progress;
    else bar.removeAttribute("value");
    find(".percent", panel).textContent = counts ? `${Math.floor(job.progress)} %` : "";
    const queue = place ? `Waiting, number ${place} in the queue` : "Waiting";
    find(".doing", panel).textContent = waits ? queue : (steps[job.step] ?? job.step);
    const speed = job.bytes_per_second ? `${bytes(job.bytes_per_second)} per second` : "";
    const left = job.seconds_left ? `${duration(job.seconds_left)} left` : "";
    find(".speed", panel).textContent = [speed, left].filter(Boolean).join(", ");
    find(".connection", panel).hidden = true;
    document.title = counts ? `${Math.floor(job.progress)} % ${title}` : title;
    const said = find("#announcement"); // now and then, not at each step
    const running = counts ? `${Math.floor(job.progress / 25) * 25} percent done` : "Running";
    if (said.textContent !== (waits ? queue : running)) said.textContent = waits ? queue : running;
  }

  /** Show how far it is; true if something has begun or ended that the page has no place for. */
  function show(found) {
    const now = `${found.status} ${found.evaluation ? found.evaluation.status : ""}`;
    if (states !== null && now !== states) drawHistory();
    states = now;
    drawState(find(".facts .state"), found.status);
    const jobs = { merge: found, evaluation: found.evaluation };
    const open = Object.entries(jobs).filter(([, job]) => isOpen(job));
    if (!open.length || open.some(([kind]) => !find(`#now-${kind}`))) return true;
    for (const [kind, job] of open) draw(find(`#now-${kind}`), job, found.queue_place);
    return false;
  }

  async function drawHistory() {
    const answer = await ask(path);
    if (!answer.ok) return;
    const list = find("#history");
    list.replaceChildren(
      ...answer.content.experiment.history.map(({ time, text }) =>
        make("li", {}, make("time", { datetime: time }), " ", make("span", {}, text)),
      ),
    );
    localTimes(list);
  }

  /** One look, as long as there is no stream. */
  async function look() {
    const answer = await ask(path);
    if (answer.ok) return show(answer.content.experiment);
    if (answer.status === 404) return true;
    for (const line of findAll(".connection")) showLine(line, sentence(answer.content.error));
    return false;
  }

  /** Follow the stream until it ends (true), or breaks or nobody looks any more (false). */
  function stream() {
    return new Promise((done) => {
      const source = new EventSource(`${path}/events`);
      const close = (over) => {
        source.close();
        document.removeEventListener("visibilitychange", leave);
        done(over);
      };
      const leave = () => document.hidden && close(false); // connections are few, tabs many
      document.addEventListener("visibilitychange", leave);
      source.addEventListener("progress", ({ data }) => show(JSON.parse(data)) && close(true));
      source.addEventListener("end", () => close(true));
      source.addEventListener("error", () => close(false));
    });
  }

  async function follow() {
    for (;;) {
      if (!document.hidden && (await stream())) break;
      if (await look()) break;
      await wait(AGAIN);
    }
    location.reload();
  }

  // What can be done with it

  async function act(button) {
    const deletes = button.dataset.action === "delete";
    const how = deletes ? ["", { method: "DELETE" }] : ["/cancel", { method: "POST" }];
    const answer = await ask(path + how[0], how[1]);
    if (answer.ok && deletes) location.replace("/");
    else if (answer.ok) button.closest("dialog").close();
    else showLine(find(".problem", button.closest("dialog")), sentence(answer.content.error));
  }

  for (const button of findAll("[data-action]")) button.addEventListener("click", () => act(button));

  const form = find("#evaluation");
  if (form) {
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      clearProblems(form);
      const body = questionsIn(form) || {};
      const answer = await ask(`${path}/evaluation`, { method: "POST", body });
      if (answer.ok) return location.reload();
      for (const { where, text } of problemsOf(answer)) {
        showAt({ where: `evaluation.${where.replace(/^evaluation\.?/, "")}`, text }, page);
      }
    });
  }

  if (page.dataset.open === "yes") follow();
}

localTimes();
if (find("#studio")) studio(find("#studio"));
if (find("#experiments")) experiments(find("#experiments"));
if (find("#experiment")) experiment(find("#experiment"));
