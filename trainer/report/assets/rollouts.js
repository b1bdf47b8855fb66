"use strict";
// Prompts as chats, answers with their rewards: the rollouts browser, and before and after.

// The last turn, with the earlier ones behind a summary: held-out rows often share them.
function lastOfChat(messages) {
  if (!messages || messages.length < 2) return chat(messages);
  return element("div", { class: "chat" }, element("details", {}, element("summary", {}, messages.length === 2 ? "1 earlier turn" : `${messages.length - 1} earlier turns`), chat(messages.slice(0, -1))), chat(messages.slice(-1)));
}

function chat(messages) {
  if (!messages) return element("p", { class: "quiet" }, "The prompt was not recorded: the journal is of an earlier version.");
  return element("div", { class: "chat" }, messages.map((turn) => element("div", { class: `turn ${["system", "user", "assistant", "tool"].includes(turn.role) ? turn.role : "other"}` },
    element("span", { class: "role" }, turn.role), turn.content ? element("div", { class: "said" }, turn.content) : null,
    turn.more ? element("pre", {}, turn.more) : null)));
}

function gold(fields) {
  const names = Object.keys(fields);
  if (!names.length) return null;
  return element("dl", { class: "gold" }, names.map((name) => [element("dt", {}, name), element("dd", {}, plain(fields[name]))]));
}

// Red to green between the smallest and the largest reward of what is shown.
function rewardBadge(reward, failure) {
  if (reward === null) return element("span", { class: "reward failed" }, failure === "every reward abstained" ? "abstained" : "failed");
  const kind = reward > 0 ? "good" : reward < 0 ? "bad" : "zero";
  return element("span", { class: `reward ${kind}` }, number(reward, 3));
}

function rolloutCard(rollout) {
  const parts = Object.entries(rollout.rewards || {});
  const facts = [rollout.advantage === null ? null : `advantage ${signed(rollout.advantage)}`, `${rollout.tokens} tokens`,
                 ...(parts.length > 1 ? parts.map(([name, value]) => `${name} ${value === null ? "none" : number(value, 3)}`) : [])];
  return element("article", { class: "rollout" },
    element("header", {}, rewardBadge(rollout.reward, rollout.failure), facts.filter((fact) => fact).map((fact) => element("span", {}, fact)),
      rollout.cut ? element("span", { class: "state preempted" }, "cut at the token limit") : null),
    rollout.messages ? [chat(rollout.messages), element("small", {}, `ended: ${rollout.stop}`)] : element("div", { class: "said" }, rollout.text || element("i", { class: "quiet" }, "(empty)")),
    rollout.failure ? element("details", {}, element("summary", {}, rollout.failure.trim().split("\n").pop()), element("pre", {}, rollout.failure)) : null);
}

const browser = { step: "", kind: "", text: "", at: 0, root: null };
const KINDS = {
  "": ["all rewards", () => true],
  mixed: ["mixed groups", (group) => new Set(rewards(group)).size > 1],
  flat: ["flat groups", (group) => new Set(rewards(group)).size < 2],
  none: ["no reward above 0", (group) => rewards(group).every((reward) => reward <= 0)],
  failed: ["failed rewards", (group) => group.refused || group.rollouts.some((each) => each.reward === null)],
  cut: ["cut at the limit", (group) => group.rollouts.some((each) => each.cut)],
};

function rewards(group) {
  return group.rollouts.map((each) => each.reward).filter((reward) => reward !== null);
}

function lastTurn(group) {
  const turn = group.messages && group.messages[group.messages.length - 1];
  return turn ? turn.content : group.where;
}

function rolloutBrowser(data) {
  const runs = data.runs.filter((run) => run.rollouts.groups.length);
  if (!runs.length) return null;
  if (!runs.some((run) => run.root === browser.root)) browser.root = runs[0].root;
  const run = runs.find((each) => each.root === browser.root);
  const list = element("div", { class: "list", role: "listbox", tabindex: "0", "aria-label": "prompts; arrow keys move" });
  const detail = element("div", { class: "detail", "aria-live": "polite" });
  const count = element("small", { role: "status" });
  let shown = [];
  const choose = (index) => {
    browser.at = Math.max(0, Math.min(index, shown.length - 1));
    [...list.children].forEach((each, place) => each.setAttribute("aria-selected", place === browser.at));
    const row = list.children[browser.at];
    if (row) list.setAttribute("aria-activedescendant", row.id); else list.removeAttribute("aria-activedescendant");
    if (row) list.scrollTop = Math.min(row.offsetTop, Math.max(list.scrollTop, row.offsetTop + row.offsetHeight - list.clientHeight));
    const group = shown[browser.at];
    detail.replaceChildren(...(group ? groupDetail(group) : [element("p", { class: "quiet" }, "No prompt matches these filters.")]));
  };
  const fill = (at) => {
    const text = browser.text.toLowerCase();
    shown = run.rollouts.groups.filter((group) => (browser.step === "" || group.step === Number(browser.step)) &&
      KINDS[browser.kind][1](group) && (!text || JSON.stringify([group.messages, group.fields, group.rollouts.map((each) => [each.text, each.messages])]).toLowerCase().includes(text)));
    list.replaceChildren(...shown.map((group, index) => groupRow(group, index, () => choose(index))));
    const total = shown.reduce((sum, group) => sum + group.rollouts.length, 0);
    count.textContent = `${shown.length} prompts, ${total} completions`;
    choose(at);
  };
  const select = (label, values, name) => {
    const made = element("select", { onchange: (event) => { browser[name] = event.target.value; fill(0); } },
      values.map(([value, word]) => element("option", { value, selected: String(browser[name]) === String(value) }, word)));
    return element("label", {}, label, made);
  };
  const steps = [...new Set(run.rollouts.groups.map((group) => group.step))];
  const controls = element("div", { class: "controls" },
    runs.length > 1 ? element("label", {}, "run", element("select", { onchange: (event) => { browser.root = event.target.value; browser.step = ""; section.replaceWith(rolloutBrowser(data)); } },
      runs.map((each) => element("option", { value: each.root, selected: each === run }, each.name)))) : null,
    select("step", [["", "all steps"], ...steps.map((step) => [step, `step ${step}`])], "step"),
    select("reward", Object.entries(KINDS).map(([name, [word]]) => [name, word]), "kind"),
    element("label", {}, "text", element("input", { type: "search", value: browser.text, placeholder: "prompt, gold, answer", oninput: (event) => { browser.text = event.target.value; fill(0); } })), count);
  list.addEventListener("keydown", (event) => {
    const move = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, Home: -1e9, End: 1e9 }[event.key];
    if (move !== undefined) { event.preventDefault(); choose(browser.at + move); }
  });
  const section = element("section", { id: "rollouts" }, element("h2", {}, "Rollouts"), controls,
    element("div", { class: "card browser" }, list, detail));
  fill(browser.at);
  return section;
}

function groupRow(group, index, choose) {
  const known = rewards(group);
  const mean = known.length ? known.reduce((sum, each) => sum + each, 0) / known.length : null;
  const dots = element("span", { class: "dots", "aria-hidden": "true" }, group.rollouts.slice(0, 16).map((each) => element("i", { class: each.reward === null ? "failed" : each.reward > 0 ? "good" : each.reward < 0 ? "bad" : "zero" })));
  return element("div", { class: "row", id: `prompt-${index}`, role: "option", onclick: choose }, element("span", { class: "step" }, `step ${group.step}`, group.refused ? " refused" : ""),
    element("span", { class: "mean" }, mean === null ? "failed" : number(mean, 2)), element("span", { class: "snippet" }, lastTurn(group).slice(0, 200)), dots);
}

function groupDetail(group) {
  return [element("h3", {}, `Step ${group.step}`, element("small", {}, group.where), group.refused ? element("span", { class: "state failed" }, "refused, not trained on") : null),
    chat(group.messages), gold(group.fields), element("div", { class: "answers" }, group.rollouts.map(rolloutCard))];
}

function sampleAnswers(answers, title, isJudged) {
  return element("div", { class: "side" }, element("h4", {}, title), answers.map((answer) => element("article", { class: "rollout" },
    element("header", {}, isJudged ? rewardBadge(answer.reward, answer.failure) : null, answer.cut ? element("span", { class: "state preempted" }, "cut") : null),
    element("div", { class: "said" }, answer.text || element("i", { class: "quiet" }, "(empty)")),
    answer.failure ? element("pre", {}, answer.failure) : null)));
}

const meanOf = (answers) => answers.reduce((sum, each) => sum + (each.reward || 0), 0) / Math.max(1, answers.length);

// What the reader chose in before and after, by run: a live page is built again and again.
const samplesView = {};

function beforeAfter(run, several) {
  const about = run.samples;
  const card = (sample) => element("div", { class: "card sample" }, element("small", {}, sample.where), lastOfChat(sample.messages), gold(sample.fields),
    element("div", { class: "sides" }, sampleAnswers(sample.before, `Before (step ${about.first_step})`, about.is_judged), sampleAnswers(sample.after, `After (step ${about.last_step})`, about.is_judged)));
  const change = (sample) => meanOf(sample.after) - meanOf(sample.before);
  const orders = { change: ["largest change first", (a, b) => Math.abs(change(b)) - Math.abs(change(a))],
                   worse: ["worse first", (a, b) => change(a) - change(b)], row: ["order of the rows", () => 0] };
  const box = element("div", { class: "samples" });
  const more = element("button", { type: "button" });
  const view = samplesView[run.root] ??= { shown: 3, order: about.is_judged ? "change" : "row" };
  const fill = () => {
    const sorted = [...about.samples].sort(orders[view.order][1]);
    box.replaceChildren(...sorted.slice(0, view.shown).map(card));
    more.hidden = view.shown >= sorted.length;
    more.textContent = `Show more (${sorted.length - Math.min(view.shown, sorted.length)} left)`;
  };
  more.addEventListener("click", () => { view.shown += 10; fill(); });
  fill();
  const paired = about.difference;
  const verdict = paired ? element("p", { class: "verdict" }, "Mean reward ", element("b", {}, `${paired.first.toFixed(3)} → ${paired.second.toFixed(3)}`),
    ` over ${paired.num_pairs} prompts: ${signed(paired.difference, 3)}, 95% paired bootstrap ${signed(paired.low, 3)} to ${signed(paired.high, 3)}. Better on ${paired.num_better}, worse on ${paired.num_worse}.`) :
    about.is_judged ? null : element("p", { class: "verdict quiet" }, `The likeliest answer to the first ${about.part} rows that have a prompt. They are examples and prove nothing; trainer eval RUN measures.`);
  return element("section", { id: several ? null : "samples" }, element("h2", {}, several ? `Before and after: ${run.name}` : "Before and after"), verdict,
    about.is_judged ? element("div", { class: "controls" }, element("label", {}, "order", element("select", { onchange: (event) => { view.order = event.target.value; fill(); } },
      Object.entries(orders).map(([name, [word]]) => element("option", { value: name, selected: view.order === name }, word))))) : null, box, more);
}
