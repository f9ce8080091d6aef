"""axe-core in a page: what people who cannot see, point or tell colours apart would stumble over."""

from importlib.resources import files

from selenium import webdriver

GRAVE = ("serious", "critical")
RUN = """
const done = arguments[0];
axe.run(document, { resultTypes: ["violations"] }).then((found) => done(found.violations.map((one) => ({
  id: one.id, impact: one.impact, help: one.help, at: one.nodes.slice(0, 3).map((node) => node.html.slice(0, 200)),
}))));
"""


def find_violations(driver: webdriver.Chrome) -> list[dict[str, object]]:
    """The serious and critical violations on the page as it is now."""
    if not driver.execute_script("return typeof axe === 'object'"):
        driver.execute_script((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
    found: list[dict[str, object]] = driver.execute_async_script(RUN)
    return [violation for violation in found if violation["impact"] in GRAVE]
