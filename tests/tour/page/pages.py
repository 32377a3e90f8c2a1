"""What the page's tests have in common: tours to write pages of, and a browser that sees as a person does."""

import json
import time

import numpy as np
import torch
from selenium.webdriver import ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from curvops.tour import MatrixFile, each_matrix
from curvops.tour.setups import tiny

# the machine's own name resolver and services have nothing to do with the page
SWITCHES = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars"
)

# its own first page would still ask for what it consists of while ours is opened
BLANK = {"session.restore_on_startup": 4, "session.startup_urls": ["about:blank"]}


def measured_tour():
    """Return the six matrices of the tiny setup."""
    setup = tiny()
    results = list(each_matrix(setup.risk()))
    return MatrixFile(
        {r.title: r.matrix for r in results},
        {name: tuple(p.shape) for name, p in setup.params.items()},
        setup.groups,
        {"setup": setup.title, "seed": 0, "c": 1 / 3},
        {"curvops": "1.2.3"},
        {r.title: r.cost for r in results},
        {r.title: r.explanation for r in results},
    )


def random_tour(side=12, *, seed=0, titles=("A", "B"), dtype=torch.float32, **more):
    """Return symmetric random matrices over magnitudes that differ."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for title in titles:
        square = torch.randn(side, side, generator=generator, dtype=dtype) ** 5
        matrices[title] = square + square.T
    given = {
        "parameters": {"w": (side // 2, 1), "b": (side - side // 2,)},
        "groups": {"1": side // 2, "2": side - side // 2},
    }
    return MatrixFile(matrices, **{**given, **more})


def film():
    """Return two stops."""
    return {"step 0": random_tour(seed=1), "step 100": random_tour(seed=2)}


class Browser:
    """A headless Chromium with a page of ours in it."""

    def __init__(self, program, driver, profile):
        options = ChromeOptions()
        options.binary_location = program
        for switch in [*SWITCHES.split(), f"--user-data-dir={profile}", "--window-size=1280,1000"]:
            options.add_argument(switch)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        options.add_experimental_option("prefs", BLANK)
        self.driver = WebDriver(options, Service(driver))
        assert self.driver.current_url == "about:blank"

    def open(self, path):
        """Open a page, wait until it is ready, and return the addresses that were asked for."""
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.driver.get(path.as_uri())
        self.wait(
            "return document.documentElement.dataset.ready || document.getElementById('alert').textContent", seconds=60
        )
        self.run(
            "window.fields = [...document.querySelectorAll('select, input')];"
            "for (const field of fields) field.dataset.was = field.value"
        )
        logs = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [log["params"]["request"]["url"] for log in logs if log["method"] == "Network.requestWillBeSent"]

    def reset(self):
        """Put the page's controls back to what they were when it was opened, which is quicker than to open it again."""
        self.run(
            "for (const field of fields) if (field.value !== field.dataset.was) { field.value = field.dataset.was;"
            " for (const name of ['input', 'change']) field.dispatchEvent(new Event(name)); }"
            "document.getElementById('whole').click(); scrollTo(0, 0)"
        )

    def type(self, name, text):
        """Put a text into an input by keys."""
        self.find(name).send_keys(Keys.CONTROL, "a", Keys.NULL, text)

    def errors(self):
        """Return what the browser's console has said since it was last asked."""
        return self.driver.get_log("browser")

    def run(self, script, *arguments):
        """Run JavaScript and return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script, *arguments, seconds=20):
        """Run JavaScript until it returns something true, and return that."""
        until = time.monotonic() + seconds
        while not (result := self.run(script, *arguments)):
            assert time.monotonic() < until, f"waited {seconds} s in vain for {script!r}"
            time.sleep(0.02)
        return result

    def devtools(self, command, **arguments):
        """Send a command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(command, arguments)

    def find(self, name):
        """Return the element with an id."""
        return self.driver.find_element(By.ID, name)

    def text(self, name):
        """Return the text that an element shows."""
        return self.find(name).text

    def choose(self, name, label):
        """Choose from a select by the text that is seen."""
        Select(self.find(name)).select_by_visible_text(label)

    def plot(self, name, what):
        """Return something of plotly's plot, an expression in `p`; arrays come as lists, NaN as None."""
        text = self.run(
            f"const p = document.getElementById('{name}'); const value = {what};"
            "return JSON.stringify(value, (_, v) => ArrayBuffer.isView(v) ? Array.from(v) : v)"
        )
        return None if text is None else json.loads(text)

    def ranges(self, name="panels"):
        """Return the ranges of all panels, each ((first row, last row), (first column, last column))."""
        found = self.plot(
            name,
            "Object.keys(p.layout).filter(k => k.startsWith('xaxis')).map(k => [p._fullLayout[k.replace('x', 'y')].range,"
            " p._fullLayout[k].range])",
        )
        return [((rows[1], rows[0]), tuple(columns)) for rows, columns in found]

    def images(self, name="panels"):
        """Return the heat maps of a plot by title: places on the scale `[rows, rows]`, and the scale's ends."""
        maps = self.plot(name, "p.data.filter(t => t.type === 'heatmap').map(t => [t.name, t.z, t.zmin, t.zmax])")
        return {title: (np.array(z, dtype=float), low, high) for title, z, low, high in maps}

    def place(self, row, column, name="panels", panel=0, scroll=True):
        """Return where on the screen a cell is, after scrolling there."""
        return self.run(
            "const [row, column, name, panel, scroll] = arguments, p = document.getElementById(name), id = panel ? panel + 1 : '';"
            "const x = p._fullLayout[`xaxis${id}`], y = p._fullLayout[`yaxis${id}`];"
            "const at = () => { const box = p.getBoundingClientRect();"
            " return [box.left + x._offset + x.l2p(column), box.top + y._offset + y.l2p(row)]; };"
            "if (scroll) scrollBy(0, at()[1] - innerHeight / 2); return at()",
            row, column, name, panel, scroll,
        )  # fmt: skip

    def mouse(self, kind, x, y, button="none"):
        """Send the mouse's `moved`, `pressed` or `released`."""
        more = {} if button == "none" else {"button": button, "clickCount": 1, "buttons": 1}
        self.devtools("Input.dispatchMouseEvent", type=f"mouse{kind.title()}", x=x, y=y, **more)

    def hover(self, row, column, name="panels", panel=0):
        """Point at a cell, and return what the tip says as (name, text) and the name that it emphasises."""
        x, y = self.place(row, column, name, panel)
        self.mouse("moved", 1, 1)
        self.wait("return document.getElementById('tip').hidden")
        self.mouse("moved", x, y)
        self.wait("return !document.getElementById('tip').hidden")
        return self.reading("tip")

    def click(self, row, column, name="panels", panel=0):
        """Click a cell."""
        self.hover(row, column, name, panel)
        x, y = self.place(row, column, name, panel)
        for kind in ("pressed", "released"):
            self.mouse(kind, x, y, "left")

    def drag(self, start, end, name="panels", panel=0):
        """Drag from one cell to another."""
        x, y = self.place(*start, name, panel)
        across, down = self.place(*end, name, panel, scroll=False)
        self.mouse("moved", x, y)
        self.mouse("pressed", x, y, "left")
        for part in (0.5, 1.0):
            self.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=x + part * (across - x), y=y + part * (down - y), buttons=1, button="left")  # fmt: skip
        self.mouse("released", across, down, "left")

    def reading(self, name):
        """Return what is said of an entry as (name, text), and the name that is emphasised."""
        pairs = self.run(
            "return [...document.querySelectorAll(`#${arguments[0]} dt`)].map(t => [t.textContent,"
            " t.nextElementSibling.textContent])",
            name,
        )
        here = self.run("return document.querySelector(`#${arguments[0]} dt.here`)?.textContent", name)
        return dict(pairs), here
