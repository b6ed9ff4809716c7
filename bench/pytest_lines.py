"""A plugin of pytest that prints every test's outcome as a JSON line, for `textlock.bench.suite`."""

import json

import pytest


class Outcomes:
    """Prints where pytest itself prints, past what it captures."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # setup is reported only where it skips or fails
            self._print(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":  # such as a module that does not import
            self._print(report, 0.0)

    def _print(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        line = {"part": "tests", "test": report.nodeid, "outcome": report.outcome, "seconds": seconds}
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        assert terminal is not None
        terminal.write(f"\n{json.dumps(line | {'reason': reason_of(report)})}\n")


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a test was skipped or failed, in one line."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        text = str(report.longrepr).strip().splitlines()[-1] if crash is None else crash.message
        return str(text).partition("\n")[0][:300]
    return ""


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the processes of pytest-xdist report to the first one
        config.pluginmanager.register(Outcomes(config))
