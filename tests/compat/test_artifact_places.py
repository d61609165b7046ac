"""Where MLflow's client writes files of a run or a model: not to a folder that a server elsewhere has named."""

import json
import uuid

import pytest

from gengap_dist.errors import UsageError
from gengap_dist.tracking.mlflow.client import connect_client
from tests.tracking.servers import Quiet, serving

pytestmark = pytest.mark.filterwarnings("default")  # MLflow's own


@pytest.mark.parametrize("kind", ["run", "model"])
@pytest.mark.parametrize("scheme", ["file://", ""])
@pytest.mark.parametrize("host", ["127.1", "127.0.0.1"])
def test_only_a_server_on_this_machine_names_its_folders(tmp_path, kind, scheme, host):
    """127.1 stands for another machine: it leads to this one, and is not among its names."""
    sent, place, key = tmp_path / "sent", tmp_path / "place", uuid.uuid4().hex  # MLflow remembers places by their key
    sent.mkdir()
    (sent / "result.txt").write_text("a result")
    info = {"experiment_id": "1", "artifact_uri": f"{scheme}{place}", "status": 1}
    answer = {"run": {"info": info | {"run_id": key}}, "model": {"info": info | {"model_id": key}}}

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.body()
            self.answer(200, json.dumps(answer).encode())

    with serving(Handler) as uri:
        client = connect_client(uri.replace("127.0.0.1", host))
        send = client.log_artifacts if kind == "run" else client.log_model_artifacts
        if host == "127.0.0.1":
            send(key, str(sent))
        else:
            with pytest.raises(UsageError, match="a folder of this machine: start it with --serve-artifacts"):
                send(key, str(sent))
    assert (place / "result.txt").exists() == (host == "127.0.0.1")
