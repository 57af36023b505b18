"""Without a GPU kernels run under Triton's interpreter: chosen before anything, transformers too, imports triton."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=torch.cuda.is_available())
def memory_given_back():
    """Several processes share a GPU: none keeps much of what its last test needed."""
    yield
    if torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture
def most_of_the_memory():
    """For tests that take tens of GiB of a GPU: one of them at a time, whatever the number of processes."""
    with open(Path(tempfile.gettempdir()) / "gdn2-tests-most-of-the-memory", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield browser
        browser.close()
