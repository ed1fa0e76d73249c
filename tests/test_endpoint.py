"""Which rank serves metrics, and what becomes of an endpoint that cannot be opened."""

import json
import socket

import pytest
import torch

from nepa_dist.config import Config
from nepa_dist.endpoint import node_values, open_on_each_node
from nepa_dist.engines.mesh import World
from nepa_dist.metrics.discovery import FOLDER


class SecondNode(World):
    """Rank 8 of 16 on two nodes; what rank 0 would say is given."""

    host_of_main = ""

    def gather(self, value):
        return [self.host_of_main if isinstance(value, str) else [], value]


def second_node(local_rank=0):
    return SecondNode(8 + local_rank, local_rank, 16, 8, torch.device("cpu"))


def config(tmp_path, **metrics):
    cluster = {"nodes": 2, "gpus_per_node": 8}
    settings = {"name": "big", "run_root": str(tmp_path), "global_batch_size": 16, "cluster": cluster, "metrics": metrics}
    return Config.model_validate(settings)


def describe():
    raise AssertionError("the run is described by rank 0")


@pytest.mark.parametrize(
    ("address", "host_of_main", "served"),
    [
        ("127.0.0.1", "another", False),
        ("127.0.0.1", "here", True),
        ("0.0.0.0", "another", True),
        ("localhost", "another", False),
    ],
)
def test_a_further_node_serves_where_it_can_be_reached(tmp_path, monkeypatch, address, host_of_main, served):
    here = socket.gethostname()
    monkeypatch.setattr(SecondNode, "host_of_main", here if host_of_main == "here" else "another")
    endpoint, notes = open_on_each_node(config(tmp_path, prometheus_address=address), second_node(), describe)
    try:
        assert notes == []
        assert (endpoint.exporter is not None) == served
        files = list((tmp_path / FOLDER).glob("*.json"))
        assert [path.name for path in files] == (["big@node-1.json"] if served else [])
        if served:
            assert json.loads(files[0].read_text())[0]["labels"]["node"] == "1"
    finally:
        endpoint.close()
        if endpoint.exporter is not None:
            endpoint.exporter.close()


def test_the_other_ranks_of_a_node_serve_nothing(tmp_path):
    endpoint, _ = open_on_each_node(config(tmp_path, prometheus_address="0.0.0.0"), second_node(local_rank=3), describe)
    assert endpoint.exporter is None


def test_what_a_node_could_not_do_is_said_with_its_number(tmp_path):
    wanted = config(tmp_path, prometheus_address="0.0.0.0", prometheus_token_file=str(tmp_path / "missing"))
    endpoint, notes = open_on_each_node(wanted, second_node(), describe)
    assert endpoint.exporter is None
    assert len(notes) == 1
    assert notes[0].startswith("node 1: no metrics endpoint: ")


def test_a_node_tells_of_its_own_ranks():
    of_ranks = {"data_wait_seconds": [float(rank) for rank in range(16)], "memory_bytes": [100.0 - rank for rank in range(16)]}
    values = node_values(second_node(), 7, of_ranks)
    assert values["node_step.1"] == 7
    assert values["node_data_wait_seconds_total.1"] == 15
    assert values["node_memory_bytes.1"] == 92
    assert set(node_values(second_node(), 8, {})) == {"node_step.1", "node_heartbeat_timestamp_seconds.1"}
