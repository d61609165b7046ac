"""Keeps a web server from naming folders of this machine: MLflow 3.17's client writes artifacts wherever it says.

Remove when MLflow's client refuses a place of artifacts on this machine that a server on another one names.
"""

from collections.abc import Collection
from urllib.parse import urlsplit

from gengap_dist.errors import UsageError


def refuse_local_places(this_machine: Collection[str]) -> None:
    """Let only servers on this machine, by the names of their hosts, keep artifacts in its folders."""
    from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry as registry
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def local(artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> object:
        server = urlsplit(tracking_uri or "")
        if server.scheme in ("http", "https") and server.hostname not in this_machine:
            raise UsageError(
                f"the server keeps artifacts in {artifact_uri:.80}, which would be a folder of this machine: start it "
                "with --serve-artifacts and without --default-artifact-root, and give a new mlflow.experiment"
            )
        return LocalArtifactRepository(artifact_uri, tracking_uri, registry_uri)

    for scheme in ("", "file"):
        registry.register(scheme, local)
