"""What bounds answers, against servers that send what they should not."""

import contextlib
import gc
import gzip
import time
import warnings

import psutil
import pytest

from gengap_dist.compat import bounded_answers
from gengap_dist.tracking.mlflow.client import connect_client, describe
from tests.tracking.servers import Quiet, serving

pytestmark = pytest.mark.filterwarnings("default")  # MLflow's own
BOMB = gzip.compress(bytes(64 << 20))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("endless", "the answer is larger than 16 MiB"),
        ("chunked", "the answer is larger than 16 MiB"),
        ("compressed", "the answer is larger than 16 MiB when it is decompressed"),
        ("slow body", "the answer takes longer than 0.5 s"),
        ("slow head", "the answer takes longer than 0.5 s"),
    ],
)
def test_answers_are_bounded(monkeypatch, kind, says):
    class Handler(Quiet):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):
                if kind == "slow head":
                    self.send(b"HTTP/1.0 200 OK\r\nX: ", b"a", 0.05)
                self.send_response(200)
                if kind == "compressed":
                    self.send_header("Content-Encoding", "gzip")
                if kind == "chunked":
                    self.send_header("Transfer-Encoding", "chunked")
                else:
                    self.send_header("Content-Length", "1000000000000")
                self.end_headers()
                piece = {"chunked": b"10000\r\n" + bytes(1 << 16) + b"\r\n", "compressed": BOMB, "slow body": b"a"}
                self.send(b"", piece.get(kind, bytes(1 << 16)), 0.05 if "slow" in kind else 0.0)

        def send(self, head: bytes, piece: bytes, pause: float) -> None:
            self.wfile.write(head)
            while True:
                self.wfile.write(piece)
                time.sleep(pause)

    if "slow" in kind:
        monkeypatch.setattr(bounded_answers, "MAX_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with serving(Handler) as uri:
        connect_client(uri)  # imports MLflow
        before = psutil.Process().memory_info().rss
        assert says in _refusal(uri)
        assert psutil.Process().memory_info().rss - before < 150 << 20
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
    assert not [each.message for each in caught if issubclass(each.category, ResourceWarning)]


def _refusal(uri: str) -> str:
    """Why an answer is refused; nothing of the request is left, except what is not closed."""
    with pytest.raises(Exception, match="API request") as error:
        connect_client(uri).search_experiments(max_results=1)
    return describe(error.value)
