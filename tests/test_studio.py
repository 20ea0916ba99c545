"""The studio, in a browser, against a service in a process of its own."""

import contextlib
import os
import re
import shutil
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from service_server import Server
from tiny_checkpoints import make_llama

BROWSER = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytest.importorskip("fastapi", reason="the service's packages are not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here; CHROMIUM can name one that is elsewhere"
)

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
PICTURES = os.environ.get("STUDIO_PICTURES")
MERGED = 90_000
"""Milliseconds in which a tiny merge is done, also where its loops have still to be compiled."""

TOKEN = "0123456789abcdef0"
EVIL = "<img src=x onerror=alert(1)>"
EVIL_ID = "img-src-x-onerror-alert-1"
LONG = f"{EVIL} & a name without a space: {'x' * 60}"

SPY = """
addEventListener("mousedown", () => told("click"), true);
addEventListener("securitypolicyviolation", (event) => told(`CSP: ${event.violatedDirective}`));
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    roots = tmp_path_factory.mktemp("models")
    make_llama(roots / EVIL, seed=3, tokenizer=True)
    size = {"vocab_size": 2000, "hidden_size": 384, "intermediate_size": 1024, "layers": 6}
    for seed, name in enumerate(("one", "two")):
        make_llama(roots / "large" / name, seed=seed, tokenizer=True, **size)
    options = ("--models", roots, "--changes-per-minute", 6000)
    with Server(tmp_path_factory.mktemp("server") / "data", *options) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield found
        found.close()


class Visit:
    """A visitor's browser.

    Attributes:
        page: what is looked at.
        clicks: with a mouse.
        wrong: what the browser complained of.
    """

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self.server = server
        self.clicks = 0
        self.wrong: list[str] = []
        self._allowed = re.compile(r"status of 422")  # the browser's word for a refused plan
        context = browser.new_context(base_url=server.url, **options)
        context.set_default_timeout(20_000)
        context.expose_binding("told", lambda _, text: self._told(text))
        context.add_init_script(SPY)
        self.page = context.new_page()
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", self._said)

    def allow(self, text: str) -> None:
        """Expect complaints of this kind."""
        self._allowed = re.compile(text)

    def _told(self, text: str) -> None:
        if text == "click":
            self.clicks += 1
        else:
            self.wrong.append(text)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning") and not self._allowed.search(message.text):
            self.wrong.append(message.text)

    def choose(self, *models: str, method: str | None = None) -> None:
        """Tick models and a method in the form."""
        for model in models:
            self.page.check(f"[name=model][value={model}]")
        if method is not None:
            self.page.check(f"[name=method][value={method}]")

    def wait_until_ready(self) -> None:
        """For a plan that can be started."""
        self.page.wait_for_selector("#studio[data-state=ready]")
        assert self.page.get_attribute("#start", "aria-disabled") == "false"

    def wait_for_problem(self, where: str) -> str:
        """What a field says is wrong with it."""
        line = self.page.locator(f"[data-where='{where}'] > .problem:visible")
        line.wait_for()
        assert self.page.get_attribute("#start", "aria-disabled") == "true"
        return str(line.inner_text())

    def wait_until_merged(self) -> None:
        """For the result's page."""
        self.page.wait_for_selector("#download", timeout=MERGED)

    def picture(self, name: str) -> None:
        """Keep what is seen, at the width of a desk and of a phone."""
        if PICTURES is None:
            return
        before = self.page.viewport_size
        for width in (1280, 390):
            self.page.set_viewport_size({"width": width, "height": 900})
            for frame in self.page.query_selector_all("iframe"):
                frame.scroll_into_view_if_needed()
            self.page.wait_for_timeout(250)
            path = Path(PICTURES) / f"{name}-{width}.png"
            self.page.screenshot(path=path, full_page=True)
        self.page.set_viewport_size(before)


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Visit]:
    found = Visit(browser, server)
    yield found
    found.page.context.close()
    assert found.wrong == []


@pytest.fixture(scope="module")
def judged(server: Server) -> str:
    """A merge with a name and a prompt that are hard to show, and with answers."""
    models = [{"id": "capitals", "weight": 0.5}, {"id": "elements", "weight": 0.5}]
    asked = {"prompts": [EVIL, "y" * 40], "text": "symbol: gold = Au", "max_new_tokens": 8}
    key = server.merge(name=LONG, method="linear", models=models, evaluation=asked)
    found = server.until(
        key, lambda found: found["evaluation"] and found["evaluation"]["finished_at"], 90
    )
    assert found["evaluation"]["status"] == "completed"
    return key


def a_long_merge(server: Server, name: str = "Large") -> str:
    """Asked for; it takes seconds, and says several times how far it is."""
    models = [{"id": "large-two", "weight": 1}] * 32
    return server.merge(name=name, method="della", base_model="large-one", models=models)


@contextlib.contextmanager
def frozen_on_the_way(server: Server, key: str) -> Iterator[Any]:
    """An experiment that stands still when a part of it is done; it is let on bit by bit."""
    while True:
        with server.frozen(key):
            found = server.experiment(key)
            if found["progress"] > 0:
                yield found
                return
        time.sleep(0.1)


def test_a_newcomers_first_merge_takes_four_clicks(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    page.goto("/")
    visit.picture("studio-empty")
    page.locator("#models").get_by_text("capitals", exact=True).click()
    page.locator("#models").get_by_text("elements", exact=True).click()
    page.get_by_role("button", name="Start the merge").click()
    page.wait_for_url("**/experiments/exp-*")
    visit.wait_until_merged()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert visit.clicks == 4
    download.value.save_as(tmp_path / "merged.zip")
    with zipfile.ZipFile(tmp_path / "merged.zip") as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert "lm_head.weight" in weights.keys()  # noqa: SIM118
    python = page.inner_text("#python")
    assert python.count("\n") == 3
    assert python.count(f'from_pretrained("{folder.name}"') == 2
    assert page.locator("iframe").content_frame.locator("h1").inner_text()
    page.locator("[data-copy=python]").click()
    page.locator("[data-copy=python]").get_by_text("Copied").wait_for()
    visit.picture("experiment-done")


def test_a_refused_request_says_so_in_its_place(visit: Visit) -> None:
    page = visit.page
    page.goto("/")
    assert page.inner_text("#why") == "Choose 2 models for Linear average."
    visit.choose("capitals", "elements", method="ties")
    visit.wait_until_ready()
    assert page.input_value("#base-model") == "base"
    page.fill("#ties-density", "1.5")
    assert "Density must be in [0, 1]" in visit.wait_for_problem("parameters.density")
    assert page.get_attribute("#ties-density", "aria-invalid") == "true"
    assert "1 problem to solve" in page.inner_text("#why")
    visit.picture("studio-problem")
    page.press("#start", "Enter")
    assert page.evaluate("document.activeElement.id") == "ties-density"
    page.fill("#ties-density", "")
    assert visit.wait_for_problem("parameters.density") == "Density is no number."
    page.fill("#ties-density", "0.4")
    visit.wait_until_ready()
    assert page.locator(".problem:visible").count() == 0
    visit.choose("german", method="slerp")
    assert "exactly 2 models, got 3" in visit.wait_for_problem("models")
    visit.choose(method="linear")
    visit.wait_until_ready()
    for number in page.locator("#weights [type=number]").all():
        number.fill("0")
    page.wait_for_selector("#problems li")
    assert "sum to 0" in page.inner_text("#problems")


def test_an_answer_that_comes_too_late_is_ignored(visit: Visit) -> None:
    page, held = visit.page, []

    def hold_the_first(route: Any) -> None:
        if held:
            route.continue_()
        else:
            held.append((route, route.fetch()))

    page.route("**/plan", hold_the_first)
    page.goto("/")
    visit.choose("capitals", "elements", method="slerp")
    while not held:
        page.wait_for_timeout(50)
    visit.choose(method="linear")
    visit.wait_until_ready()
    route, answer = held[0]
    route.fulfill(response=answer)
    page.wait_for_timeout(200)
    assert page.text_content("#recipe-view").startswith("method: linear")


def test_every_method_can_be_planned_as_the_form_stands(visit: Visit, server: Server) -> None:
    page = visit.page
    page.goto("/")
    page.click("#more-methods summary")
    for card in page.locator("[name=method]").all():
        method, most = card.get_attribute("value"), int(card.get_attribute("data-most"))
        page.check("[name=model][value=capitals]")
        page.set_checked("[name=model][value=elements]", most > 1)
        card.check()
        page.wait_for_function(
            """method => find("#studio").dataset.state !== "planning"
                && find("#recipe-view").textContent.startsWith(`method: ${method}\\n`)
                || find("#studio").dataset.state === "problem" """,
            arg=method,
        )
        assert page.get_attribute("#studio", "data-state") == "ready", page.inner_text(".plan")
    visit.choose("elements", method="consensus")
    density = page.locator("#consensus-density")
    page.locator(".settings:visible summary").click()
    assert not density.is_visible()
    page.select_option("#consensus-variant", "ties")
    assert density.is_visible()


def test_weights_and_order_are_those_of_the_form(visit: Visit) -> None:
    page = visit.page
    page.goto("/")
    visit.choose("capitals", "elements")
    page.get_by_label("Weight of elements, slider").fill("0.5")
    assert page.get_by_label("Weight of elements", exact=True).input_value() == "0.5"
    assert page.locator(".share").all_inner_texts() == ["67 %", "33 %"]
    page.get_by_role("button", name="Move elements up").click()
    visit.wait_until_ready()
    recipe = page.text_content("#recipe-view")
    assert recipe.index("elements") < recipe.index("capitals")
    assert "- model: elements\n  parameters: {weight: 0.5}" in recipe
    assert "normalize" not in recipe  # as it is by default
    page.click("#plan-recipe summary")
    visit.picture("studio-ready")


def test_a_recipe_can_be_pasted(visit: Visit) -> None:
    page = visit.page
    page.goto("/")
    page.get_by_label("Write a recipe").check()
    page.fill("#recipe", "merge_method: ties\nmodels: [{model: capitals}]\nbase_modl: base\n")
    said = visit.wait_for_problem("recipe")
    assert "Line 3: base_modl: unknown key" in said
    assert "Line 2: models[0]: weight of capitals is missing" in said
    visit.picture("studio-recipe")
    recipe = (
        "merge_method: slerp\nbase_model: capitals\nmodels:\n- model: capitals\n"
        "- model: elements\nparameters:\n  t: 0.3\n"
    )
    page.fill("#recipe", recipe)
    visit.wait_until_ready()
    page.fill("#name", "Pasted")
    page.click("#start")
    page.wait_for_url("**/experiments/exp-*")
    visit.wait_until_merged()
    assert "t: 0.3" in page.inner_text("#recipe-view")
    page.click("text=Merge again with changes")
    visit.wait_until_ready()
    assert page.input_value("#recipe") == recipe


def test_the_form_can_be_filled_in_by_an_earlier_merge(visit: Visit, server: Server) -> None:
    models = [{"id": "elements", "weight": 0.25}, {"id": "capitals", "weight": 0.5}]
    request = {"method": "dare", "base_model": "base", "models": models, "dtype": "float16"}
    parameters = {"drop_rate": 0.3, "seed": 7, "variant": "ties", "elect_method": "count"}
    key = server.merge(name="Again", **request, parameters=parameters)
    visit.page.goto(f"/?from={key}")
    visit.wait_until_ready()
    first = server.experiment(key)["recipe"]
    second = visit.page.text_content("#recipe-view")
    assert second == first.replace("parameters: {seed", "parameters: {lambda: 1.0, seed")
    assert visit.page.input_value("#name") == "Again"


def test_a_merge_can_be_cancelled(visit: Visit, server: Server) -> None:
    page = visit.page
    key = a_long_merge(server)
    with server.frozen(key):
        page.goto(f"/experiments/{key}")
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("button", name="Leave it as it is").click()
        page.get_by_role("button", name="Cancel").click()
        visit.picture("experiment-cancel")
        page.get_by_role("button", name="Stop it").click()
        page.get_by_text("Stopping").wait_for()
    page.get_by_text("This merge was cancelled").wait_for()
    visit.picture("experiment-cancelled")
    history = page.locator("#history li span").all_inner_texts()
    assert history == ["asked for", "begun", "asked to stop", "cancelled"]
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Keep it").click()
    page.get_by_role("button", name="Delete").click()
    page.locator("dialog").get_by_role("button", name="Delete").click()
    page.wait_for_url("**/")
    assert page.locator(f".row[data-id={key}]").count() == 0


def test_progress_goes_on_after_a_reload_and_after_a_crash(visit: Visit, server: Server) -> None:
    page = visit.page
    visit.allow("ERR_CONNECTION_REFUSED|ERR_INCOMPLETE_CHUNKED_ENCODING|ERR_CONNECTION_RESET")
    key = a_long_merge(server)
    page.goto(f"/experiments/{key}")
    with frozen_on_the_way(server, key) as found:
        assert 0 < found["progress"] < 100
        shown = f"{int(found['progress'])} %"
        page.get_by_text("Merging the weights").wait_for()
        assert page.inner_text(".facts .state") == "running"
        page.locator(".percent").get_by_text(shown, exact=True).wait_for()
        visit.picture("experiment-running")
        with page.expect_request("**/events"):
            page.reload()
        assert page.inner_text(".percent") == shown
        visit.picture("experiment-reloaded")
        playwright.expect(page).to_have_title(re.compile(f"^{shown} "))
        assert page.evaluate("find('progress').value") == found["progress"]
        server.kill()
        page.get_by_text("The service does not answer").wait_for()
    server.start()
    visit.wait_until_merged()
    history = page.locator("#history li span").all_inner_texts()
    assert history[-1] == "completed"
    assert any("it goes on from what is done" in text for text in history)


def test_the_keyboard_alone_suffices(visit: Visit, server: Server) -> None:
    page = visit.page
    page.goto("/")

    def tab_to(selector: str) -> None:
        for _ in range(120):
            page.keyboard.press("Tab")
            if page.evaluate("one => document.activeElement.matches(one)", selector):
                outlined = "one => getComputedStyle(one).outlineStyle !== 'none'"
                card = page.locator(":focus").locator("xpath=ancestor-or-self::*[position() <= 2]")
                assert any(each.evaluate(outlined) for each in card.all())
                return
        raise AssertionError(f"the keyboard does not lead to {selector}")

    tab_to(".skip")
    tab_to("[name=model][value=capitals]")
    page.keyboard.press("Space")
    tab_to("[name=model][value=elements]")
    page.keyboard.press("Space")
    tab_to("[name=method]")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.value") == "slerp"
    tab_to("#slerp-t")
    page.keyboard.press("ArrowUp")
    tab_to("#name")
    page.keyboard.type("By hand")
    tab_to("#start")
    visit.wait_until_ready()
    page.keyboard.press("Enter")
    page.wait_for_url("**/experiments/exp-*")
    assert page.inner_text("h1") == "By hand"
    assert visit.clicks == 0
    server.cancel(page.url.rpartition("/")[2])


def test_models_can_be_asked_with_the_merge_and_later(visit: Visit) -> None:
    page = visit.page
    page.goto("/")
    visit.choose("capitals", "elements", method="ties")
    page.click("#questions summary")
    page.fill("#ask-prompts", "capital: france =\n\nsymbol: gold =")
    page.fill("#ask-text", "capital: france = paris")
    visit.wait_until_ready()
    page.click("#start")
    page.wait_for_selector("#comparison", timeout=MERGED)
    asked = page.locator(".answers figcaption").all_inner_texts()
    assert asked == ["capital: france =", "symbol: gold ="]
    of_merge = page.locator(".answer[data-role=merge] dd").all_inner_texts()
    assert of_merge == ["paris", "Au"]
    assert page.locator(".answers").first.locator("dt").count() == 4
    columns = page.locator("#numbers thead th").all_inner_texts()
    assert columns[:2] == ["Model", "perplexity"]
    rows = [row.split("\t") for row in page.inner_text("#numbers tbody").splitlines()]
    assert [row[0] for row in rows] == ["base", "capitals", "elements", "merged"]
    values = [float(row[1].replace(",", "")) for row in rows]
    assert values[3] < values[0]  # it knows more of it than the base
    visit.picture("experiment-asked")
    page.get_by_text("Ask something else").click()
    page.get_by_role("button", name="Ask").click()
    page.locator("form > .problem").get_by_text("Say what to compare by").wait_for()
    page.fill("#ask-prompts", "symbol: iron =")
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("Asking the models").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Stop it").click()
    page.get_by_text("Asking the models was cancelled.").wait_for(timeout=MERGED)
    assert page.get_by_role("link", name="Download").is_visible()


def test_names_are_shown_as_text(visit: Visit, judged: str) -> None:
    page = visit.page
    page.goto("/")
    card = page.locator(f"label:has([value={EVIL_ID}])")
    assert card.locator(".card-title").inner_text() == EVIL
    card.click()
    assert page.locator("#weights .weight-name").inner_text() == EVIL
    visit.choose("capitals")
    page.wait_for_selector("#studio[data-state=problem]")  # their sizes differ
    page.goto(f"/?from={judged}")
    visit.wait_until_ready()
    assert page.input_value("#ask-prompts").startswith(EVIL)
    assert page.locator(f"[data-id={judged}] .row-name").inner_text() == LONG
    assert page.locator("main img").count() == 0
    page.goto(f"/experiments/{judged}")
    assert page.inner_text("h1") == LONG
    assert page.locator(".answers figcaption").first.inner_text() == EVIL
    assert page.locator("main img").count() == 0


def test_the_list_is_live_and_has_pages(visit: Visit, server: Server) -> None:
    page = visit.page
    first = a_long_merge(server)
    with server.frozen(first):
        keys = [a_long_merge(server, f"Waiting {number}") for number in range(9)]
        page.goto("/")
        names = page.locator("#experiments .row-name")
        assert names.all_inner_texts() == [f"Waiting {number}" for number in range(8, 0, -1)]
        visit.picture("studio-list")
        late = a_long_merge(server, "Late")
        names.get_by_text("Late").wait_for()
        assert names.count() == 8
        server.cancel(late)
        page.locator(f"[data-id={late}] [data-state=cancelled]").wait_for()
        page.get_by_role("link", name="Older experiments").click()
        assert names.first.inner_text() in ("Waiting 1", "Waiting 0")
        page.locator(f"[data-id={first}] [data-state=running]").wait_for()
        visit.picture("experiments")
        page.get_by_role("link", name="Newest").click()
        assert names.first.inner_text() == "Late"
        for key in [*keys, first]:
            server.cancel(key)
        page.locator(f"[data-id={keys[0]}] [data-state=cancelled]").wait_for()
    page.locator(f"[data-id={first}] [data-state=cancelled]").wait_for()


def test_a_failed_merge_says_why(visit: Visit, server: Server, tmp_path: Path) -> None:
    key = a_long_merge(server)
    while server.experiment(key)["status"] != "failed":
        os.kill(server.worker(key), signal.SIGKILL)
        server.until(key, lambda found: found["status"] != "running")
    page = visit.page
    page.goto(f"/experiments/{key}")
    assert "Its process was killed" in page.inner_text(".panel.bad")
    assert page.locator("#history li").count() > 4  # with its restarts
    visit.picture("experiment-failed")
    page.get_by_role("link", name="Change something").click()
    visit.wait_until_ready()


@pytest.mark.parametrize("width", [320, 390])
def test_nothing_is_wider_than_a_phone(
    browser: Any, server: Server, judged: str, width: int
) -> None:
    visit = Visit(browser, server, viewport={"width": width, "height": 700}, has_touch=True)
    visit.allow("404")
    page = visit.page
    for path in (
        "/",
        f"/?from={judged}",
        "/experiments",
        f"/experiments/{judged}",
        "/login",
        "/no",
    ):
        page.goto(path)
        page.evaluate("findAll('main details').forEach((each) => (each.open = true))")
        wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide == [width, width], path
    visit.picture("nothing")
    page.context.close()
    assert visit.wrong == []


def test_each_thing_to_fill_in_has_a_name(visit: Visit, judged: str) -> None:
    for path in ("/", "/experiments", f"/experiments/{judged}", "/login"):
        visit.page.goto(path)
        nameless = visit.page.evaluate(
            """() => [...document.querySelectorAll("input, select, textarea, button, iframe")]
                .filter((each) => !(each.labels?.length || each.ariaLabel || each.title
                    || each.textContent.trim()))
                .map((each) => each.outerHTML)"""
        )
        assert nameless == []
        names = visit.page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
        assert len(names) == len(set(names))


def test_a_wrong_address_has_a_page(visit: Visit) -> None:
    visit.allow("404")
    answer = visit.page.goto("/experiments/exp-0000000000000000")
    assert answer.status == 404
    assert "There is no experiment of this id." in visit.page.inner_text("main")


def test_without_scripts_the_pages_can_be_read(browser: Any, server: Server, judged: str) -> None:
    visit = Visit(browser, server, java_script_enabled=False)
    visit.page.goto("/")
    assert "needs JavaScript" in visit.page.inner_text("noscript")
    visit.page.goto(f"/experiments/{judged}")
    assert visit.page.get_by_role("link", name="Download").is_visible()
    visit.page.context.close()


def test_a_token_is_asked_for(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_MERGE_TOKEN", TOKEN)
    with Server(tmp_path / "data") as server:
        visit = Visit(browser, server)
        visit.allow("401")
        page = visit.page
        page.goto("/")
        assert page.url.endswith("/login")
        page.fill("#token", "wrong-wrong-wrong-wrong")
        with page.expect_navigation() as navigation:
            page.click("button")
        assert navigation.value.status == 401
        assert page.inner_text("#wrong") == "This is not the token."
        visit.picture("login")
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("#studio")
        (cookie,) = page.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["secure"]) == (True, "Lax", False)
        assert TOKEN not in cookie["value"]
        visit.choose("capitals", "elements")
        visit.wait_until_ready()
        page.context.close()
        assert visit.wrong == []


def test_every_method_has_words_of_its_own() -> None:
    from merge_methods import METHODS
    from service.studio_methods import WORDS, shown_methods

    assert WORDS.keys() == METHODS.keys()
    for shown in shown_methods():
        keys = {each.key for each in METHODS[shown.name].parameters}
        assert {each.key for each in shown.fields} == keys - {"weight"}
