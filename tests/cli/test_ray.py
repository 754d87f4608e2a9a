"""`--ray ADDRESS` on a cluster of two nodes on loopback; CONTRIBUTING.md says what to install for it.

One row is answered at a time, by an artifact that an earlier release made: no exporter is needed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
from fakehub import FakeHub

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install 'precast[ray]'"),
    pytest.mark.filterwarnings("ignore"),
]

ARTIFACTS = Path(__file__).parents[1] / "artifacts" / "0.2.0"
DECODER, ENCODER = ARTIFACTS / "decoder", ARTIFACTS / "encoder"
MEMORY = 200 * 2**20
ACTOR = "MapWorker(MapBatches(BatchActor))"


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as hub:
        files = {path.name: path.read_bytes() for path in DECODER.iterdir()}
        hub.add("user/model", files)
        yield hub


@pytest.fixture(scope="module")
def settings(hub, tmp_path_factory):
    """The environment of all of Ray's processes: files of its own, no token, the Hub of this test."""
    home, short = tmp_path_factory.mktemp("home"), Path(tempfile.mkdtemp(prefix="ray-"))
    yield {
        "HOME": str(home), "PRECAST_HOME": str(home / "precast"), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(short),
        "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(settings):
    """Two nodes with a CPU each, at addresses of loopback that Ray does not take for this machine's outer one."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in settings.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "node_ip_address": "127.0.0.2", "object_store_memory": MEMORY}
        made = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
        add_node(made)
        yield made
        made.shutdown()


def add_node(cluster):
    return cluster.add_node(num_cpus=1, node_ip_address="127.0.0.3", object_store_memory=MEMORY)


@pytest.fixture
def start(cluster, settings, tmp_path):
    """`start("o.jsonl", "generate", MODEL, …)`: the command, with the cluster's address."""
    started = []

    def go(target, *words, ray=True):
        more = ["--ray", cluster.address] if ray else []
        files = ["--input-file", tmp_path / "in.jsonl", "--output-file", tmp_path / target, *more]
        command = [sys.executable, "-m", "precast", *map(str, [*words, *files])]
        environment = {**os.environ, **settings}
        started.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield go
    for process in started:
        process.kill()
        process.communicate()


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def write_rows(folder, count):
    chance = random.Random(3)
    words = ["water", "Paris", "天气", "a", "\u2028"]
    rows = [{"text": " ".join(chance.choices(words, k=chance.randint(1, 3)))} for _ in range(count)]
    rows[1] = {"text": "Paris " * 40}
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def wait_for(process, partial, batches):
    """Until so many batches are kept."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.read_bytes().count(b"\n\n") > batches:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1] if process.poll() is not None else "nothing was kept")


def actors():
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and ACTOR in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


SAMPLED = ("--seed", "3", "--temperature", "2", "--max-new-tokens", "12")


@pytest.fixture
def whole(start, tmp_path):
    """`whole(count)`: what one process makes of so many rows."""

    def go(count):
        write_rows(tmp_path, count)
        finish(start("whole.jsonl", "generate", DECODER, *SAMPLED, ray=False))
        return (tmp_path / "whole.jsonl").read_bytes()

    return go


def test_the_file_is_that_of_one_process(start, whole, tmp_path):
    """In order, with its bad row; of a decoder and of an encoder; without a word of Ray's."""
    expected = whole(60)
    _, err = finish(start("ray.jsonl", "generate", DECODER, *SAMPLED, "--threads", "1"))
    assert (tmp_path / "ray.jsonl").read_bytes() == expected
    assert err == ""
    for name, ray in (("one.jsonl", False), ("two.jsonl", True)):
        finish(start(name, "predict", ENCODER, "--threads", "1", ray=ray))
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_a_model_of_the_hub_is_pulled_once(start, whole, hub, settings, tmp_path):
    expected = whole(20)
    finish(start("ray.jsonl", "generate", "user/model", *SAMPLED))
    assert (tmp_path / "ray.jsonl").read_bytes() == expected
    assert sum("GET" in line and line.endswith("/model.onnx.data") for line in hub.requests) == 1


def test_an_actor_that_is_killed_loses_and_doubles_no_row(start, whole, tmp_path):
    expected = whole(3000)
    process = start("ray.jsonl", "generate", DECODER, *SAMPLED)
    wait_for(process, tmp_path / "ray.jsonl.partial", 100)
    os.kill(actors()[0], signal.SIGKILL)
    finish(process)
    assert (tmp_path / "ray.jsonl").read_bytes() == expected


def test_one_that_is_killed_here_goes_on(start, whole, tmp_path):
    expected, partial = whole(2000), tmp_path / "ray.jsonl.partial"
    process = start("ray.jsonl", "generate", DECODER, *SAMPLED)
    wait_for(process, partial, 100)
    process.kill()
    process.wait()
    kept = partial.read_bytes().count(b"\n\n") - 1
    out, _ = finish(start("ray.jsonl", "generate", DECODER, *SAMPLED, "--resume"))
    assert (tmp_path / "ray.jsonl").read_bytes() == expected
    assert f"{kept} of them from before" in out


def test_a_node_that_is_gone_loses_and_doubles_no_row(start, whole, cluster, tmp_path):
    expected = whole(3000)
    process = start("ray.jsonl", "generate", DECODER, *SAMPLED)
    wait_for(process, tmp_path / "ray.jsonl.partial", 100)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    finish(process)
    assert (tmp_path / "ray.jsonl").read_bytes() == expected
    add_node(cluster)


def test_a_cluster_of_this_machine_alone(start, whole, tmp_path):
    """It ends with the command."""
    expected = whole(20)
    process = start("ray.jsonl", "generate", DECODER, *SAMPLED, "--ray", "local", ray=False)
    finish(process)
    assert (tmp_path / "ray.jsonl").read_bytes() == expected


def test_an_interrupt_is_one(start, whole, tmp_path):
    expected, partial = whole(2000), tmp_path / "ray.jsonl.partial"
    process = start("ray.jsonl", "generate", DECODER, *SAMPLED)
    wait_for(process, partial, 100)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err.splitlines()[-1]) == (130, "precast: Interrupted.")
    finish(start("ray.jsonl", "generate", DECODER, *SAMPLED, "--resume"))
    assert (tmp_path / "ray.jsonl").read_bytes() == expected


def test_what_no_node_can_do(start, tmp_path):
    write_rows(tmp_path, 4)
    _, err = start("ray.jsonl", "generate", DECODER, "--ray-cpus", "2").communicate(timeout=300)
    assert "--ray-cpus 2 are more than any node of" in err
    assert "its 2 have 1, 1. Pass --ray-cpus 1" in err
