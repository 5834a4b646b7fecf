"""The carried Rust tests, and what they print, whole or cut off."""

import re
from dataclasses import dataclass, field

from .child import Ended

TEST = re.compile(r"^test (\S+)(?: - should panic)? \.\.\. (ok|FAILED)", re.M)
# What a test prints on a card for what cannot be tried there.
SKIPPED = re.compile(r"^skipped: .*", re.M)
PANIC = re.compile(r"^thread '[^']*'.* panicked at [\s\S]*?(?=^note: run with|^----|^test |^$|\Z)", re.M)
# A test that was at work when the program ended.
AT_WORK = re.compile(r"^test (\S+) \.\.\. \Z", re.M)


@dataclass
class Tests:
    """Names by verdict."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    at_work: str = ""
    panic: str = ""
    complete: bool = False

    @staticmethod
    def of(ended: Ended) -> "Tests":
        tests = Tests(complete=re.search(r"^test result: ", ended.text, re.M) is not None)
        for name, verdict in dict(TEST.findall(ended.text)).items():
            (tests.passed if verdict == "ok" else tests.failed).append(name)
        tests.skipped = SKIPPED.findall(ended.text)
        at_work = AT_WORK.search(ended.text)
        tests.at_work = at_work.group(1) if at_work else ""
        panic = PANIC.search(ended.text)
        tests.panic = panic.group(0).strip() if panic else ""
        return tests

    def met(self) -> bool:
        return self.complete and bool(self.passed) and not self.failed

    def in_words(self) -> str:
        parts = [f"{len(self.passed)} passed, {len(self.failed)} failed, {len(self.skipped)} skipped"]
        if not self.complete:
            parts.append(f"cut off at {self.at_work}" if self.at_work else "cut off")
        if self.failed:
            parts.append("first failure: " + self.failed[0])
        return "; ".join(parts)
