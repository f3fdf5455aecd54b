"""/docs, /redoc and the documents that they show. Nothing of them comes from another server."""

from typing import Final

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.staticfiles import StaticFiles

from ..answers import encode
from ..bodies import JSON
from . import asyncapi, openapi

_ASSETS: Final = "/docs/assets"
LOGO: Final = (  # docs/assets/logo.svg
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><path d="M3 27h7v-7h7v-7h6" fill="none"'
    ' stroke="#00897b" stroke-width="4" stroke-linejoin="round" stroke-linecap="round"/>'
    '<circle cx="27" cy="6.5" r="3.2" fill="#ffa000"/></svg>'
)
# The browser asks nobody else, not even for the logo of ReDoc's credit. Both pages begin by a script of their own.
_HERE_ALONE: Final = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; worker-src blob:; base-uri 'none'; frame-ancestors 'self'"
}


def install(api: FastAPI, guarded: bool) -> None:
    """Add the pages and documents to an application; `guarded`: a key is needed."""
    api.openapi = lambda: openapi.document(api, guarded)  # type: ignore[method-assign]
    documents = {"/openapi.json": api.openapi(), "/asyncapi.json": asyncapi.document(api.version, guarded)}

    async def document(request: Request) -> Response:
        found, root = documents[request.scope["path"]], request.scope.get("root_path", "")
        if root and "openapi" in found:
            found = {**found, "servers": [{"url": root}]}
        return Response(encode(found, JSON), media_type=JSON)

    async def docs(request: Request) -> Response:
        root = request.scope.get("root_path", "")
        page = get_swagger_ui_html(
            openapi_url=f"{root}/openapi.json",
            title=f"{api.title}: try it",
            swagger_js_url=f"{root}{_ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{root}{_ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{root}/favicon.ico",
        )
        page.headers.update(_HERE_ALONE)
        return page

    async def redoc(request: Request) -> Response:
        root = request.scope.get("root_path", "")
        page = get_redoc_html(
            openapi_url=f"{root}/openapi.json",
            title=f"{api.title}: reference",
            redoc_js_url=f"{root}{_ASSETS}/redoc.standalone.js",
            redoc_favicon_url=f"{root}/favicon.ico",
            with_google_fonts=False,
        )
        page.headers.update(_HERE_ALONE)
        return page

    async def favicon(_: Request) -> Response:
        return Response(LOGO, media_type="image/svg+xml", headers={"cache-control": "max-age=86400"})

    pages = {"/docs": docs, "/redoc": redoc, "/favicon.ico": favicon}
    for path, handler in {**pages, **dict.fromkeys(documents, document)}.items():
        api.add_api_route(path, handler, include_in_schema=False)
    api.mount(_ASSETS, StaticFiles(packages=[("fastapi_offline", "static")]))
