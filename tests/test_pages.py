"""/docs and /redoc in a real browser that reaches no other server.

STEPCAST_UPDATE_DOCS=1 takes the picture of docs/ anew.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Page, Route, sync_playwright
from serving import ROOT, Running, running

from service.doors.http.openapi import SECURITY

pytestmark = pytest.mark.service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def weather() -> Iterator[Running]:
    """A server on the committed models."""
    with running(store="memory://", models=ROOT / "models") as server:
        yield server


@contextmanager
def browser(url: str) -> Iterator[tuple[Page, list[str]]]:
    """A page of a headless browser that reaches this server alone, and what it says goes wrong."""
    assert CHROMIUM is not None, "chromium is not on the PATH: install it, or leave out with -m 'not browser'"
    wrong: list[str] = []

    def only_here(route: Route) -> None:
        if urlsplit(route.request.url).netloc == urlsplit(url).netloc:
            route.continue_()
        else:
            wrong.append(f"asks for {route.request.url}")
            route.abort()

    with sync_playwright() as playwright:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", rules])
        try:
            page = chromium.new_page()
            page.route("http://**", only_here)
            page.route("https://**", only_here)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
            page.on("requestfailed", lambda request: wrong.append(f"{request.url}: {request.failure}"))
            yield page, wrong
        finally:
            chromium.close()


@pytest.mark.browser
def test_try_it_out_on_step_answers_200_without_any_network(weather: Running) -> None:
    """The example is executed as it stands, and the page shows its outputs; the session has taken a step."""
    with browser(weather.url) as (page, wrong):
        page.goto(f"{weather.url}/docs")
        operation = page.locator("[id*=post_models_sessions_step]")
        operation.locator(".opblock-summary").click()
        operation.get_by_role("button", name="Try it out").click()
        operation.get_by_role("button", name="Execute").click()
        answer = operation.locator(".live-responses-table tbody .response").first
        answer.wait_for(timeout=30_000)
        assert answer.locator(".response-col_status").inner_text().strip() == "200"
        assert '"step": 1' in answer.inner_text()
        if os.environ.get("STEPCAST_UPDATE_DOCS"):
            page.set_viewport_size({"width": 900, "height": 900})
            place = operation.bounding_box()
            assert place is not None
            top = place["y"] + page.evaluate("window.scrollY")
            area = {"x": place["x"], "y": top, "width": place["width"], "height": 1640.0}
            page.screenshot(path=ROOT / "docs" / "assets" / "try-it-out.png", full_page=True, clip=area)  # type: ignore[arg-type]
    assert wrong == []
    assert httpx.get(f"{weather.url}/v1/models/weather/sessions/kennedy").json()["step"] == 1


@pytest.mark.browser
def test_redoc_shows_every_operation_without_any_network(weather: Running) -> None:
    """Each summary of the document stands on the page."""
    document = httpx.get(f"{weather.url}/openapi.json").json()
    summaries = {operation["summary"] for path in document["paths"].values() for operation in path.values()}
    with browser(weather.url) as (page, wrong):
        page.goto(f"{weather.url}/redoc")
        page.get_by_role("heading", name="Stepcast").first.wait_for(timeout=30_000)
        shown = page.content()
    assert [text for text in summaries if text.replace("&", "&amp;") not in shown] == []
    # ReDoc's credit has a logo elsewhere: the page's policy forbids to ask for it
    blocked = [text for text in wrong if "logo-mini.svg" in text and ("csp" in text or "Security Policy" in text)]
    assert wrong == blocked


@pytest.mark.browser
def test_a_key_given_to_the_page_is_sent(weather: Running) -> None:
    """Authorize, then Execute: 401 without a key, 200 with it."""
    with (
        running(store="memory://", models=ROOT / "models", api_keys="step:acme:a-key-of-the-test") as guarded,
        browser(guarded.url) as (page, _),
    ):
        page.goto(f"{guarded.url}/docs")
        page.locator(".scheme-container .authorize").click()
        page.get_by_label("auth-bearer-value").fill("a-key-of-the-test")
        page.get_by_role("button", name="Apply credentials").first.click()
        page.get_by_role("button", name="Close").first.click()
        operation = page.locator("[id*=get_models]").first
        operation.locator(".opblock-summary").click()
        operation.get_by_role("button", name="Try it out").click()
        operation.get_by_role("button", name="Execute").click()
        answer = operation.locator(".live-responses-table tbody .response").first
        answer.wait_for(timeout=30_000)
        assert answer.locator(".response-col_status").inner_text().strip() == "200"


def test_the_pages_bear_the_logo(http: httpx.Client) -> None:
    """What browsers show in the tab is the site's logo."""
    assert http.get("/favicon.ico").text == (ROOT / "docs" / "assets" / "logo.svg").read_text().strip()


def test_the_pages_name_no_other_server(http: httpx.Client) -> None:
    """Scripts and styles come from this server, and are there."""
    for path in ("/docs", "/redoc"):
        page = http.get(path)
        assert page.status_code == 200
        assets = [part.split('"')[0] for part in page.text.split('src="')[1:] + page.text.split('href="')[1:]]
        assert any(asset.startswith("/docs/assets/") for asset in assets)
        assert [asset for asset in assets if not asset.startswith("/") and asset != "data:,"] == []
        for asset in assets:
            assert http.get(asset).status_code == 200, asset


def test_documents_are_not_there_where_they_are_switched_off() -> None:
    """STEPCAST_DOCS=false: none of the four, and no assets."""
    with running(store="memory://", docs=False) as server, httpx.Client(base_url=server.url) as client:
        for path in ("/docs", "/redoc", "/openapi.json", "/asyncapi.json", "/docs/assets/swagger-ui.css"):
            assert client.get(path).json()["code"] == "route_not_found"


@pytest.mark.parametrize("keys", ["", "read:acme:key-of-a-reader"])
def test_documents_say_whether_a_key_is_needed(keys: str) -> None:
    """Both schemes; without configured keys a call without one is as good."""
    with running(store="memory://", api_keys=keys) as server, httpx.Client(base_url=server.url) as client:
        described, sockets = client.get("/openapi.json").json(), client.get("/asyncapi.json").json()
    assert set(described["components"]["securitySchemes"]) == set(SECURITY) == {"bearer", "key"}
    assert ({} in described["security"]) is not bool(keys)
    assert ("security" in sockets["servers"]["this"]) is bool(keys)
    assert described["paths"]["/healthz/live"]["get"]["security"] == []
