"""What Ray is to start on each node, without Ray; and what is done with what it brings back."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
import time

import pytest

from precast.runtime import CompiledModelForCausalLM
from precast.runtime.errors import PrecastError, UsageError
from precast.runtime.runner import ray_actor, ray_cluster
from precast.runtime.runner.batches import Prepared, answer_here
from precast.runtime.runner.files import answer_file
from precast.runtime.runner.generating import GeneratingWorker
from precast.runtime.runner.jobs import as_request
from precast.runtime.runner.ray_actor import BatchActor
from precast.runtime.runner.ray_cluster import RayCluster
from precast.runtime.runner.rows import Column, Row

ROWS = [Row("Paris"), Row("Water boils"), Row("a"), Row(7)]


@pytest.fixture(scope="module")
def worker(decoder):
    model = CompiledModelForCausalLM.from_pretrained(decoder, threads=1)
    asked = {"max_new_tokens": 4, "do_sample": True, "seed": 3}
    return GeneratingWorker(model, Column(ROWS, None, ()), asked)


@pytest.fixture
def job(worker):
    return worker.as_job("ray='auto'")


def batches_of(worker):
    return [[worker.prepare(index, row)] for index, row in enumerate(ROWS[:3])]


def ask(job, batches):
    requests = [json.dumps(as_request(batch, False)) for batch in batches]
    found = BatchActor(json.dumps(job), 1)({"number": range(len(requests)), "request": requests})
    assert found["number"] == list(range(len(requests)))
    return [json.loads(each) for each in found["answer"]]


def test_an_actor_answers_as_this_process_does(worker, job):
    batches = batches_of(worker)
    found = [[(index, row) for index, row in each["answers"]] for each in ask(job, batches)]
    assert found == list(answer_here(batches, worker, False))


def test_what_a_node_lacks_is_said_of_it(worker, job, decoder, encoder, tmp_path):
    batches = batches_of(worker)[:1]

    def said(**changes):
        (answer,) = ask({**job, "model": {**job["model"], **changes}}, batches)
        assert answer["error"][1].startswith("On the node ")
        return answer["error"][1]

    ours = job["model"]["precast"]
    assert f"precast is {ours} here, and 9.9 where the rows come from" in said(precast="9.9")
    assert f"There is no directory {tmp_path / 'none'}" in said(path=str(tmp_path / "none"))
    # Other files by the same path: both digests are named.
    theirs, digest = json.loads((encoder / "config.json").read_text())["precast"]["digest"], job["model"]["digest"]
    assert f"is {theirs}, not {digest}" in said(path=str(encoder))


def test_of_the_hub_one_process_pulls_and_what_came_is_looked_at(worker, job, decoder, encoder, monkeypatch):
    """By revision and subfolder as the first process did, and never by two at a time."""
    asked, inside, most = [], [], []

    def locate(name, **hub):
        inside.append(name)
        most.append(len(inside))
        asked.append((name, hub))
        time.sleep(0.05)
        inside.pop()
        return places.pop()

    monkeypatch.setattr(ray_actor, "locate", locate)
    places = [decoder, decoder]
    job["model"] |= {"name": "user/model", "hub": {"revision": "main", "subfolder": "s", "local_files_only": False}}
    threads = [threading.Thread(target=BatchActor, args=(json.dumps(job), 1)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (max(most), asked) == (1, [("user/model", job["model"]["hub"])] * 2)
    places = [encoder]
    (answer,) = ask(job, batches_of(worker)[:1])
    theirs = json.loads((encoder / "config.json").read_text())["precast"]["digest"]
    said = f"user/model has the digest {theirs} on the Hub now, and {job['model']['digest']} where the rows come from"
    assert said in answer["error"][1]


def test_a_name_on_the_hub_is_told_as_one(monkeypatch, decoder, tmp_path):
    monkeypatch.setattr("precast.runtime.storage.hub.locate", lambda name, **options: decoder)
    model = CompiledModelForCausalLM.from_pretrained("user/model", revision="v1", token="secret")
    told = GeneratingWorker(model, Column(ROWS, None, ()), {}).as_job("ray='auto'")
    assert (told["model"]["name"], told["model"]["hub"]["revision"]) == ("user/model", "v1")
    assert "secret" not in json.dumps(told)
    monkeypatch.undo()
    shutil.copytree(decoder, tmp_path / "copy")
    model = CompiledModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert GeneratingWorker(model, Column(ROWS, None, ()), {}).as_job("ray='auto'")["model"]["name"] is None


def test_what_comes_twice_is_taken_once_and_what_is_missing_is_told():
    answers = [(number, {"answers": [[number, {"n": number}]]}) for number in (1, 0, 1)]
    assert list(ray_cluster._collect(iter(answers), 2)) == [[(1, {"n": 1})], [(0, {"n": 0})]]
    with pytest.raises(PrecastError, match=r"answers of 2 batches of 3\. They are kept; resume=True goes on"):
        list(ray_cluster._collect(iter(answers), 3))
    with pytest.raises(UsageError, match="no room"):
        list(ray_cluster._collect(iter([(0, {"error": ["UsageError", "no room"]})]), 3))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:{closed}", r"cannot be reached within 10 seconds: .*refused.*ray start --head"),
        ("ray://127.0.0.1:{closed}", "is for Ray's client, .*`ray start --address HOST:PORT`, and pass ray='auto'"),
        ("somewhere", "is no address of a cluster: give 'auto', 'local' or 'HOST:PORT'"),
    ],
)
def test_clusters_that_are_not_there(address, message):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    with pytest.raises(UsageError, match=message):
        ray_cluster._check_reachable(address.format(closed=closed))


class _Ray:
    """Enough of Ray for a cluster that never answers, or refuses."""

    class exceptions:
        RayError = RuntimeError

    def __init__(self, init):
        self.init = init

    def is_initialized(self):
        return False


def test_a_cluster_that_does_not_answer(monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(ray_cluster, "START_LIMIT", 0.05)
    with pytest.raises(UsageError, match=r"ray='auto' is no cluster .* it did not answer within 0.05 seconds"):
        ray_cluster._connect(_Ray(lambda *_, **__: done.wait(60)), "auto")
    done.set()

    def refuse(*_, **__):
        raise RuntimeError("Version mismatch\nray 2.60.0 here, 2.50.0 there")

    with pytest.raises(UsageError, match=r"can use: ray 2.60.0 here, 2.50.0 there$"):
        ray_cluster._connect(_Ray(refuse), "auto")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (RuntimeError("Traceback\nModuleNotFoundError: no precast"), r"missing \(ModuleNotFoundError: no precast\)"),
        ("9.9", r"9\.9"),
    ],
)
def test_a_node_without_this_version_is_named(monkeypatch, found, message):
    class Task:
        options = remote = lambda self, *_, **__: self

    class exceptions:
        RayTaskError = RuntimeError

    def get(task, timeout):
        if isinstance(found, str):
            return found
        raise found

    strategies = type(sys)("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = lambda node, soft: node
    monkeypatch.setitem(sys.modules, strategies.__name__, strategies)
    monkeypatch.setitem(sys.modules, "ray.util", type(sys)("ray.util"))
    monkeypatch.setitem(sys.modules, "ray", type(sys)("ray"))
    ray = _Ray(None)
    ray.remote, ray.get, ray.exceptions = lambda **_: lambda function: Task(), get, exceptions
    ray.nodes = lambda: [{"Alive": True, "Resources": {"CPU": 1}, "NodeManagerHostname": "far", "NodeID": "x"}]
    with pytest.raises(UsageError, match=f"^precast is {message} on the node far, and .* Install one of them on both"):
        ray_cluster._check_nodes(ray)


def test_where_it_means_nothing(worker, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    work = (ROWS[:3], tmp_path / "o.jsonl", {}, lambda seed: worker)
    with pytest.raises(UsageError, match=r"^ray is not installed \(.*\): pip install 'precast\[ray\]'$"):
        answer_file(*work, ray="auto", force=True)
    with pytest.raises(UsageError, match="replicas=2 are processes of this machine, and ray='auto'"):
        answer_file(*work, ray="auto", replicas=2)
    with pytest.raises(UsageError, match="ray_cpus=0 must be"):
        answer_file(*work, ray="auto", ray_cpus=0)
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 9.0}}]
    ray = _Ray(None)
    ray.nodes = lambda: [*nodes, {"Alive": True, "Resources": {"CPU": 5.0}}]
    assert RayCluster("auto", 2)._count_places(ray) == 3
    with pytest.raises(
        UsageError, match=r"ray_cpus=6 are more than any node of auto has: its 2 have 2, 5. .*ray_cpus=5"
    ):
        RayCluster("auto", 6)._count_places(ray)

    class Shouts:
        batch_size = 1

    with pytest.raises(UsageError, match="Shouts says nothing by which they could"):
        next(RayCluster("auto")([[Prepared(0, ROWS[0], None)]], Shouts(), False))
