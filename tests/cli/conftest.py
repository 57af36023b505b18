import pytest
from command import TINY, call


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"Number {i} of the texts. It has two sentences!\n")
    out = folder / "shards"
    assert call("prepare", folder, "--out", out, "--val-share", 0.3, "--mix-recall", 20, "--mix-needles", 5) == 0
    return out


@pytest.fixture(scope="session")
def run(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "first"
    assert call("train", "--preset", "gdn2-hybrid-tiny", "--run", run, f"data.path={shards}", *TINY) == 0
    return run
