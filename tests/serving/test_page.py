"""The page at /, in a browser: it works by keyboard, is named for screen readers, and shows what the model did."""

import re

import pytest
import torch
from saved_run import BYTES
from serving.live_server import serving
from serving.texts import alone
from small import small_model

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect


@pytest.fixture
def open_page(browser):
    """Opens the page of a server; afterwards it must have asked nobody else and have had no error."""
    contexts, asked, complaints = [], [], []

    def start(live, width=1280, height=900):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: asked.append((request.url, live.url)))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(f"{live.url}/")
        return page

    yield start
    for context in contexts:
        context.close()
    assert all(url.startswith(own) for url, own in asked)
    assert not [text for text in complaints if "Failed to load resource" not in text]  # those are refusals


def run(page, prompt="def naïve", tokens=20):
    page.get_by_label("New tokens").fill(str(tokens))
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Prompt").fill(prompt)
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("Done", timeout=30_000)


def test_text_and_memory_are_the_models(live, open_page):
    page = open_page(live)
    expect(page.get_by_role("heading", level=1)).to_have_text("small")
    run(page)
    text, tokens = alone(live.model, "def naïve", 20)
    assert page.locator("#text").text_content() == f"def naïve{text}"
    expect(page.locator("#count")).to_have_text(f"10 + {len(tokens)}")
    expect(page.locator("#speed")).to_contain_text("tokens/s")
    expect(page.locator("#state")).to_have_text("10.1 KiB")
    with torch.inference_mode():
        read = torch.tensor([[*BYTES.encode("def naïve"), *tokens]])
        _, state = live.model(read, live.model.initial_state(1))
    drawn = torch.tensor(page.evaluate("Array.from(current)"), dtype=torch.float64).view(8, 8)
    # Three digits of each number are sent; thirty updates of a memory whose entries are up to 1 add their errors up.
    torch.testing.assert_close(drawn, state[0].memory[0, 0], atol=2e-2, rtol=0)
    assert drawn.abs().max() > 0.1
    page.get_by_role("combobox", name="Head").select_option("1")
    expect(page.locator("#detail")).to_contain_text("Head 1 of block 0")
    expect(page.get_by_role("status")).to_have_text("Done")
    drawn = torch.tensor(page.evaluate("Array.from(current)"), dtype=torch.float64).view(8, 8)
    torch.testing.assert_close(drawn, state[0].memory[0, 1], atol=2e-2, rtol=0)
    assert page.locator("#text").text_content() == f"def naïve{text}"
    for canvas in ("strip", "after", "erase", "write"):  # something is on each
        script = f"""(() => {{ const c = document.getElementById('{canvas}');
            return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v > 0) }})()"""
        assert page.evaluate(script), canvas


def test_earlier_tokens_are_chosen_by_keyboard_and_told_in_words(live, open_page):
    page = open_page(live)
    run(page, prompt="ab" * 50)  # more than one kept memory
    slider = page.get_by_role("slider", name="Token")
    slider.focus()
    page.keyboard.press("Home")
    expect(page.locator("#detail")).to_contain_text(f'Token 1 of {100 + len(alone(live.model, "ab" * 50, 20)[1])}, "a"')
    assert re.search(r"0 faded, 0 erased, [\d.]+ written", page.locator("#detail").text_content())
    first = page.evaluate("Array.from(memoryAfter(0))")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#detail")).to_contain_text("Token 2 of")
    assert page.evaluate("Array.from(memoryAfter(cursor))") != first
    expect(slider).to_have_attribute("aria-valuetext", page.locator("#detail").text_content())
    forward = page.evaluate("""(() => {
        const S = new Float32Array(64);
        tokens.slice(0, 71).forEach(token => update(S, token.head));
        return Array.from(S);
    })()""")
    assert page.evaluate("Array.from(memoryAfter(70))") == forward
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    rows = page.get_by_role("table").get_by_role("row")
    expect(rows).to_have_count(1 + page.evaluate("tokens.length"))
    expect(rows.nth(1)).to_contain_text('1"a"00')


def test_everything_is_reached_by_tab_and_has_a_name(live, open_page):
    page = open_page(live)
    run(page, tokens=3)
    page.get_by_label("Prompt").focus()
    seen = []
    for _ in range(13):
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    order = [
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "run",
        "text",
        "cursor",
        "block",
        "head",
        "SUMMARY",
    ]
    assert seen[: len(order)] == order
    for role, name in (("textbox", "Prompt"), ("spinbutton", "Seed"), ("button", "Run"), ("button", "Stop"),
                       ("region", "Text"), ("combobox", "Block"), ("combobox", "Head")):  # fmt: skip
        expect(page.get_by_role(role, name=name)).to_have_count(1)
    assert page.get_by_role("img").count() == 4
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("width", [320, 768])
def test_nothing_sticks_out_on_narrow_screens(live, open_page, width):
    page = open_page(live, width=width, height=700)
    run(page, prompt="x" * 300, tokens=5)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_escape_stops_and_frees_the_slot(open_page):
    with serving() as live:
        page = open_page(live)
        page.get_by_label("New tokens").fill("4000")
        page.get_by_label("Prompt").fill("a")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#count")).to_contain_text("1 + ")
        page.keyboard.press("Escape")
        expect(page.get_by_role("status")).to_have_text("Stopped")
        expect(page.get_by_role("button", name="Run")).to_be_enabled()
        for _ in range(100):
            if live.metric("gdn2_active_requests") == 0:
                break
            page.wait_for_timeout(50)
        assert live.metric('gdn2_texts_total{reason="cancelled"}') == 1


def test_key_is_asked_for_and_errors_are_shown(open_page):
    with serving(keys=("secret",), max_prompt_tokens=20) as live:
        page = open_page(live)
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Tab")
        expect(page.get_by_role("heading", level=1)).to_have_text("small")
        run(page, tokens=3)
        expect(page.get_by_role("alert")).to_be_empty()
        page.get_by_label("Prompt").fill("a" * 21)
        page.get_by_label("Prompt").press("Control+Enter")
        expect(page.get_by_role("alert")).to_have_text("a prompt has 21 tokens; expected at most 20")


def test_models_without_a_delta_rule_have_the_text_alone(open_page):
    with serving(small_model(mixer="mamba2").double()) as live:
        page = open_page(live)
        run(page)
        assert page.locator("#text").text_content() == "def naïve" + alone(live.model, "def naïve", 20)[0]
        expect(page.locator("#memory")).to_be_hidden()


def test_page_names_nothing_outside_and_the_policy_allows_nothing_else(live):
    answer = live.get("/")
    assert not re.findall(r"(?:src|href|url|import)\s*[=(]|https?:", answer.text)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
