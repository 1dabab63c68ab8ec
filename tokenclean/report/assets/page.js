"use strict";
/* The browser of samples. Texts of the pool reach the page as textContent, never as markup. */
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const UNITS = 100000, TENTHS = 10, PAGE = 10;
  const byId = (id) => document.getElementById(id);
  const make = (tag, options = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (name === "class") element.className = value;
      else if (name === "text") element.textContent = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };
  const count = (n) => n.toLocaleString("en-US");
  /* Whole units with so many digits, halves away from zero, as in the tables of the page. */
  const decimal = (units, digits) => {
    const whole = Math.floor(Math.abs(units) / 10 ** (5 - digits) + 0.5);
    return (units < 0 && whole ? "−" : "") + (whole / 10 ** digits).toFixed(digits);
  };
  const percent = (kept, total) => (100 * kept / total).toFixed(1) + " %";
  const code = (character) =>
    "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");

  /* Characters that would show nothing, or turn their neighbours round, are named instead.
     Joiners stay: letters of many scripts depend on them. */
  const UNSEEN = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/u;
  const PIECES = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]|[^]/gu;
  const named = (text) => UNSEEN.test(text)
    ? text.match(PIECES).map((c) => UNSEEN.test(c) ? "⟨" + code(c) + "⟩" : c).join("") : text;
  const show = (element, text, breaks) => {
    if (!UNSEEN.test(text) && !(breaks && text.includes("\n"))) {
      element.append(text);
      return element;
    }
    let plain = "";
    for (const character of text.match(PIECES)) {
      if (UNSEEN.test(character)) {
        element.append(plain, make("span", { class: "mark", text: code(character) }));
        plain = "";
      } else if (breaks && character === "\n") {
        element.append(plain, make("span", { class: "break" }));
        plain = "\n";
      } else plain += character;
    }
    element.append(plain);
    return element;
  };

  /* One sample of one arm, token by token; the arrays of an arm run over response tokens. */
  const TRUTH = { "1": "informative", "0": "uninformative", "-1": "corrupted" };
  const tokensOf = (row) => {
    if (row.read) return row.read;
    const text = data.texts[row.text];
    const read = text.texts.map((piece, i) =>
      ({ text: piece, id: text.tokens[i], position: text.first + i, kind: "prompt" }));
    let j = 0;
    for (let s = 0; s < text.spans.length; s += 2) {
      for (let i = text.spans[s]; i < text.spans[s + 1]; i++, j++) {
        const token = read[i], reason = row.reason[j];
        const weight = row.weight ? row.weight[j] / UNITS : reason === 0 ? 1 : 0;
        token.reason = reason;
        token.weight = weight;
        token.kind = weight > 0 ? "kept" : weight < 0 ? "unlearnt" : "dropped";
        if (row.uncleaned && token.kind === "kept") token.kind = "uncleaned";
        for (const name of ["base", "reference", "score", "priority"])
          if (row[name] && row[name][j] !== null) token[name] = row[name][j];
        for (const name of ["score_rank", "priority_rank"])
          if (row[name] && row[name][j] !== null) token[name] = row[name][j] / TENTHS;
        if (text.truth) token.truth = text.truth[j];
      }
    }
    row.read = read;
    return read;
  };
  const whole = (text) => text.joined ??= text.texts.join("").toLowerCase();
  const SAYS = {
    prompt: "prompt", kept: "kept", dropped: "dropped", unlearnt: "dropped and unlearnt",
    uncleaned: "trained on, not cleaned",
  };
  const BLANKS = { "\n": "line break", " ": "blank", "\t": "tab" };
  const spoken = (token) => {
    const text = token.text === "" ? "part of a character"
      : token.text.trim() === "" ? [...token.text].map((c) => BLANKS[c] ?? code(c)).join(" ")
      : named(token.text);
    return text + ", " + SAYS[token.kind];
  };

  /* What is known of a token, beside it; by pointer or by keyboard. */
  const shut = make("button", { type: "button", class: "close", tabindex: "-1",
    "aria-label": "Close", text: "×" });
  const says = make("div", { role: "tooltip", id: "tip-facts" });
  const tip = make("div", { class: "tip", id: "tip", hidden: "" }, shut, says);
  document.body.append(tip);
  let told = null, closing = 0;
  const stay = () => { clearTimeout(closing); closing = 0; };
  const hide = () => {
    stay();
    tip.hidden = true;
    if (told) { told.removeAttribute("aria-describedby"); told.classList.remove("at"); }
    told = null;
  };
  const tell = (element, arm, row, token) => {
    hide();
    const facts = [];
    const add = (name, value) => facts.push(make("dt", { text: name }), make("dd", { text: value }));
    add("token id", String(token.id));
    let state = SAYS[token.kind];
    if (token.reason !== undefined && token.reason !== 0)
      state += ": " + named(arm.reasons[token.reason] ?? "reason " + token.reason);
    add("state", state);
    if (token.base !== undefined) add("base loss", decimal(token.base, 4) + " nats");
    if (token.reference !== undefined) add("reference loss", decimal(token.reference, 4) + " nats");
    const ranked = (name) => token[name + "_rank"] === undefined ? ""
      : " (percentile " + token[name + "_rank"].toFixed(1) + ")";
    if (token.score !== undefined) add("score", decimal(token.score, 5) + ranked("score"));
    if (token.priority !== undefined)
      add("ranked by", decimal(token.priority, 5) + ranked("priority"));
    const cut = arm.cuts[row.round];
    if (cut !== undefined && token.score !== undefined) add("cut", decimal(cut, 5));
    if (token.weight !== undefined && token.weight !== 0 && token.weight !== 1)
      add("weight", String(token.weight).replace("-", "−"));
    if (token.truth !== undefined) add("planted truth", TRUTH[token.truth] ?? String(token.truth));
    if (arm.rounds) add("round", row.uncleaned ? "none (D_0)" : String(row.round));
    add("position", "token " + count(token.position + 1) + " of "
      + count(data.texts[row.text].length) + " of the sample");
    const what = show(make("span", { class: "t " + token.kind }),
      token.text === "" ? "(part of a character)" : token.text.replace(/ /g, "␣"), true);
    says.replaceChildren(make("div", { class: "what" }, what), make("dl", {}, ...facts));
    tip.hidden = false;
    told = element;
    element.classList.add("at");
    element.setAttribute("aria-describedby", "tip-facts");
    // on a narrow screen the tip lies over the lower part of the page
    if (getComputedStyle(tip).position === "fixed") {
      const under = element.getBoundingClientRect().bottom + 8 - tip.getBoundingClientRect().top;
      if (under > 0) window.scrollBy(0, under);
      return;
    }
    const at = element.getClientRects()[0] ?? element.getBoundingClientRect();
    const box = tip.getBoundingClientRect();
    const width = document.documentElement.clientWidth, height = window.innerHeight;
    const left = Math.max(8, Math.min(at.left, width - box.width - 8));
    const below = at.bottom + 4 + box.height <= height || at.top < box.height + 4;
    tip.style.left = left + window.scrollX + "px";
    tip.style.top = (below ? at.bottom + 4 : at.top - box.height - 4) + window.scrollY + "px";
  };
  /* What tokens of the samples shown belong to, and the tip of one of them. */
  const owners = new WeakMap();
  const tokenAt = (target) => target?.closest?.("article .t");
  const tellOf = (element) => {
    const { arm, row, tokens } = owners.get(element.closest("article"));
    tell(element, arm, row, tokens[element.dataset.i]);
  };
  const closeSoon = () => {
    if (closing) return;
    closing = setTimeout(() => {
      closing = 0;
      const pinned = tokenAt(document.activeElement);
      if (pinned === told && told) return;
      // back to the token that was clicked, tabbed or linked to
      if (pinned && !tip.hidden) tellOf(pinned); else hide();
    }, 150);
  };
  /* Texts that move under a resting pointer are not pointed at. */
  let pointer = null, resting = null;
  const rest = () => { resting = pointer ?? "unknown"; };
  document.addEventListener("mousemove", (event) => {
    const before = pointer, now = [event.clientX, event.clientY];
    pointer = now;
    if (before && before[0] === now[0] && before[1] === now[1]) return;
    if (resting === "unknown") resting = now;
    if (resting && Math.hypot(now[0] - resting[0], now[1] - resting[1]) < 8) return;
    resting = null;
    const element = tokenAt(event.target);
    if (element) {
      stay();
      if (element !== told) tellOf(element);
    } else if (event.target.closest?.(".tip, article .text")) stay();
    else if (told) closeSoon();
  });
  document.documentElement.addEventListener("mouseleave", closeSoon);
  shut.addEventListener("click", hide);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  const sampleHash = (arm, id, position) => "#" + arm.slug + "/sample/" + encodeURIComponent(id)
    + (position === undefined ? "" : "/" + (position + 1));

  const article = (arm, row) => {
    const text = data.texts[row.text], tokens = tokensOf(row);
    const link = make("a", { href: sampleHash(arm, text.id) }, show(make("bdi"), text.id));
    const head = make("div", { class: "head" }, make("h4", {}, link),
      make("span", {}, "source ", show(make("bdi"), text.source)));
    if (arm.rounds)
      head.append(make("span", { text: row.uncleaned ? "D_0, not cleaned" : "round " + row.round }));
    if (row.uncleaned)
      head.append(make("span", { text: `all ${count(row.total)} response tokens carry loss` }));
    else if (row.total) {
      const meter = make("span", { class: "meter", "aria-hidden": "true" }, make("span"));
      meter.firstChild.style.width = 100 * row.kept / row.total + "%";
      head.append(make("span", {}, meter,
        `${count(row.kept)} of ${count(row.total)} kept (${percent(row.kept, row.total)})`));
    } else head.append(make("span", { text: "no response tokens" }));
    if (row.highest && !row.uncleaned)
      head.append(make("span", {
        text: `scores ${decimal(row.lowest[0], 3)} to ${decimal(row.highest[0], 3)}` }));
    if (tokens.length < text.length)
      head.append(make("span", { text: `tokens ${count(text.first + 1)} to `
        + `${count(text.first + tokens.length)} of ${count(text.length)} shown` }));
    const elsewhere = data.arms.filter((other) => other !== arm && holders.get(text.id).has(other));
    if (elsewhere.length) {
      const links = elsewhere.map((other) =>
        make("a", { href: sampleHash(other, text.id) }, show(make("bdi"), other.name)));
      const where = `also shown in ${elsewhere.length} other arm${elsewhere.length > 1 ? "s" : ""}`;
      head.append(make("details", { class: "also" }, make("summary", { text: where }), ...links));
    }
    const body = make("div", { class: "text", dir: "auto", role: "listbox",
      "aria-label": "tokens of " + named(text.id), "aria-orientation": "horizontal" });
    tokens.forEach((token, i) => {
      const span = make("span", { class: "t " + token.kind, role: "option", tabindex: "-1",
        "aria-selected": "false", "aria-label": spoken(token) });
      if (token.truth === -1) span.classList.add("corrupted");
      if (token.text === "") span.classList.add("part");
      else show(span, token.text, true);
      span.dataset.i = i;
      body.append(span);
    });
    const first = tokens.findIndex((token) => token.kind !== "prompt");
    if (tokens.length) body.children[Math.max(first, 0)].tabIndex = 0;
    body.addEventListener("focusin", (event) => {
      const element = tokenAt(event.target);
      if (!element) return;
      body.querySelector("[tabindex='0']").tabIndex = -1;
      body.querySelector("[aria-selected='true']")?.setAttribute("aria-selected", "false");
      element.tabIndex = 0;
      element.setAttribute("aria-selected", "true");
      tellOf(element);
    });
    body.addEventListener("focusout", closeSoon);
    body.addEventListener("keydown", (event) => {
      const element = tokenAt(event.target);
      if (!element || event.ctrlKey || event.metaKey || event.altKey) return;
      const at = Number(element.dataset.i), lost = (t) => t.weight !== undefined && !(t.weight > 0);
      const to = {
        ArrowRight: () => at + 1, ArrowLeft: () => at - 1,
        Home: () => 0, End: () => tokens.length - 1,
        ArrowDown: () => tokens.findIndex((t, i) => i > at && lost(t)),
        ArrowUp: () => tokens.findLastIndex((t, i) => i < at && lost(t)),
      }[event.key]?.();
      if (to === undefined) return;
      event.preventDefault();
      if (to >= 0 && to < tokens.length) body.children[to].focus();
    });
    const made = make("article", {}, head, body);
    owners.set(made, { arm, row, tokens });
    return made;
  };

  /* id of a sample -> the arms that show it */
  const holders = new Map(data.texts.map((text) => [text.id, new Set()]));
  for (const arm of data.arms)
    for (const row of arm.rows) holders.get(data.texts[row.text].id).add(arm);

  /* Filters, order, pages: one browser for each arm, made when the arm is first shown. */
  const share = (row) => row.total && !row.uncleaned ? row.kept / row.total : NaN;
  const least = (key) => (a, b) => {
    const x = key(a), y = key(b);
    return Number.isNaN(x) - Number.isNaN(y) || x - y || a.number - b.number;
  };
  const only = (values) => values ? values[0] : NaN;
  const ORDERS = {
    pool: ["order in the pool", least((row) => row.number)],
    lowest_share: ["kept share, lowest first", least(share)],
    highest_share: ["kept share, highest first", least((row) => -share(row))],
    dropped: ["dropped tokens, most first", least((row) => row.uncleaned ? NaN : row.kept - row.total)],
    highest: ["largest score first", least((row) => -only(row.highest))],
    lowest: ["smallest score first", least((row) => only(row.lowest))],
  };
  const browsers = new Map();
  const browser = (arm) => {
    if (browsers.has(arm)) return browsers.get(arm);
    const place = byId(arm.slug + "-browser");
    const prefix = arm.slug + "-";
    const source = make("select", { id: prefix + "source" }, make("option", { value: "", text: "all sources" }));
    const sources = [...new Set(arm.rows.map((row) => data.texts[row.text].source))].sort();
    sources.forEach((name, i) => source.append(make("option", { value: i, text: named(name) })));
    const bound = (name, value, label) => make("input", { id: prefix + name, type: "number",
      min: "0", max: "100", step: "any", value, "aria-label": label });
    const from = bound("from", "0", "kept share from, percent");
    const to = bound("to", "100", "kept share to, percent");
    const step = make("select", { id: prefix + "round" }, make("option", { value: "", text: "all" }));
    for (const round of [...new Set(arm.rows.map((row) => row.round))].sort((a, b) => a - b))
      step.append(make("option", { value: round,
        text: round ? "round " + round : "D_0, not cleaned" }));
    const search = make("input", { id: prefix + "search", type: "search", autocomplete: "off", spellcheck: "false" });
    const order = make("select", { id: prefix + "order" });
    for (const [key, [label]] of Object.entries(ORDERS))
      if (!["highest", "lowest"].includes(key) || arm.rows.some((row) => row[key]))
        order.append(make("option", { value: key, text: label }));
    const status = make("p", { role: "status" });
    const back = make("button", { type: "button", text: "Previous" });
    const next = make("button", { type: "button", text: "Next" });
    const list = make("div", { class: "samples" });
    const range = make("fieldset", {}, make("legend", { text: "kept share, percent" }),
      make("div", { class: "range" }, from, make("span", { text: "to" }), to));
    place.replaceChildren(
      make("div", { class: "controls", role: "search", "aria-label": "samples of " + named(arm.name) },
        make("label", { for: source.id }, "source", source), range,
        ...(arm.rounds ? [make("label", { for: step.id }, "cleaned in", step)] : []),
        make("label", { for: search.id }, "text or id contains", search),
        make("label", { for: order.id }, "order", order)),
      make("div", { class: "bar" }, status, back, next), list);
    let matches = [], page = 0;
    const others = arm.total - arm.rows.length;
    const beyond = others === 0 ? ""
      : `. ${count(others)} more are not in this page; \`tokenclean show\` prints any.`;
    const draw = () => {
      hide();
      const pages = Math.max(1, Math.ceil(matches.length / PAGE));
      page = Math.max(0, Math.min(page, pages - 1));
      const shown = matches.slice(page * PAGE, (page + 1) * PAGE);
      status.textContent = `${count(matches.length)} of ${count(arm.rows.length)} samples ${others ? "shown " : ""}match`
        + (matches.length ? `; ${count(page * PAGE + 1)} to ${count(page * PAGE + shown.length)} below` : "")
        + beyond;
      back.disabled = page === 0;
      next.disabled = page >= pages - 1;
      list.replaceChildren(...shown.map((row) => article(arm, row)));
    };
    const filter = () => {
      const wanted = search.value.toLowerCase(), name = sources[source.value];
      // bounds the wrong way round are meant the other way
      const [low, high] = [from.value === "" ? 0 : Number(from.value),
        to.value === "" ? 100 : Number(to.value)].sort((a, b) => a - b);
      matches = arm.rows.filter((row) => {
        const text = data.texts[row.text], kept = 100 * share(row);
        return (source.value === "" || text.source === name)
          && (step.value === "" || row.round === Number(step.value))
          && ((low <= 0 && high >= 100) || (kept >= low && kept <= high))
          && (wanted === "" || whole(text).includes(wanted) || text.id.toLowerCase().includes(wanted));
      }).sort(ORDERS[order.value][1]);
      page = 0;
      draw();
    };
    for (const element of [source, order, step]) element.addEventListener("change", filter);
    for (const element of [from, to, search]) element.addEventListener("input", filter);
    back.addEventListener("click", () => { page--; draw(); });
    next.addEventListener("click", () => { page++; draw(); });
    filter();
    const open = (id, position) => {
      const find = () => matches.findIndex((row) => data.texts[row.text].id === id);
      if (find() < 0) {
        source.value = ""; step.value = ""; from.value = "0"; to.value = "100"; search.value = "";
        filter();
      }
      const at = find();
      if (at < 0) {
        status.textContent = `The sample ${named(id)} is not among the ${count(arm.rows.length)} in this page.`;
        place.scrollIntoView();
        return;
      }
      page = Math.floor(at / PAGE);
      draw();
      const element = list.children[at % PAGE], body = element.querySelector(".text");
      element.classList.add("chosen");
      rest();
      element.scrollIntoView({ block: "start" });
      const inside = Number(position) - 1 - data.texts[matches[at].text].first;
      const token = position === undefined ? null : body.children[inside];
      (token ?? element.querySelector("a")).focus();
    };
    browsers.set(arm, { open });
    return browsers.get(arm);
  };

  /* One arm at a time; without this script they stand one below the other. */
  const opened = data.arms[data.first];
  const choose = (chosen) => {
    for (const arm of data.arms) {
      byId(arm.slug).hidden = arm !== chosen;
      const parts = byId(arm.slug + "-contents");
      if (parts) parts.hidden = arm !== chosen;
      for (const link of document.querySelectorAll(`.arms a[href="#${arm.slug}"]`)) {
        if (arm === chosen) {
          link.setAttribute("aria-current", "true");
          const list = link.closest("ul");
          if (link.offsetTop < list.scrollTop || link.offsetTop > list.scrollTop + list.clientHeight)
            list.scrollTop = link.offsetTop - list.clientHeight / 2;
        } else link.removeAttribute("aria-current");
      }
    }
    if (chosen) browser(chosen);
  };
  const decoded = (text) => { try { return decodeURIComponent(text); } catch { return text; } };
  const go = () => {
    hide();
    const [place, kind, id, position] = location.hash.slice(1).split("/");
    const target = place ? byId(decoded(place)) : null;
    const owner = target?.closest("[data-arm]");
    if (owner || !target) choose(owner ? data.arms[owner.dataset.arm] : opened);
    if (kind === "sample" && owner && id !== undefined)
      browser(data.arms[owner.dataset.arm]).open(decoded(id), position);
    else {
      if (target?.tagName === "DETAILS") target.open = true;
      target?.scrollIntoView();
    }
  };
  window.addEventListener("hashchange", go);
  // a link to the sample that the address names already changes no hash
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='#']");
    if (link && link.hash === location.hash) go();
  });
  choose(opened);
  if (location.hash) go();

  /* Boxes are stops for the keyboard only where there is something to scroll; they show it. */
  const cue = (box) => box.classList.toggle("more",
    box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  for (const box of document.querySelectorAll(".scroll, .sheet"))
    box.addEventListener("scroll", () => cue(box), { passive: true });
  const stops = () => {
    for (const box of document.querySelectorAll(".scroll, .sheet")) {
      const sideways = box.scrollWidth > box.clientWidth + 1;
      if (sideways) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
      box.classList.toggle("sideways", sideways);
      cue(box);
    }
  };
  new ResizeObserver(stops).observe(document.querySelector("main"));
})();
