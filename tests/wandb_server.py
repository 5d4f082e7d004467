"""A W&B server on loopback for tests: it serves real clients, knows no account, and fails on request.

It speaks what wandb 0.31 needs for online runs (resumed ones too), tables, artifacts, alerts and sweeps, and keeps what
it was sent:

    with WandbServer() as server:
        os.environ.update(server.environment())
        with wandb.init(project="p") as run:
            run.log({"loss": 1.0})
    assert server.run(run.id).history[0]["loss"] == 1.0

`server.fail` makes it sick: "500", "401", "hang" (it takes a request and never answers), "drop" (it hangs up). `stop()`
makes it go away. A client in another process does the same by `GET /_fail/<mode>`, mode "gone" included. `server.stuck`
leaves requests that hold that word without an answer.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import math
import random
import re
import string
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

ENTITY = "nobody"
FAILURES = ("500", "401", "hang", "drop", "gone")
_KEY = "0" * 40  # clients check its length only
_OVER = {"finished", "failed", "crashed", "killed"}

Json = dict[str, Any]


@dataclass
class Run:
    """What the server holds of a run."""

    name: str
    project: str
    config: Json = field(default_factory=dict)  # {"lr": {"value": 0.1}}
    summary: Json = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    sweep: str | None = None
    state: str = "running"
    stop: bool = False

    @property
    def settings(self) -> Json:
        """The config as the user wrote it."""
        return {name: item.get("value") for name, item in self.config.items() if name != "_wandb"}

    @property
    def metrics(self) -> list[Json]:
        """What `define_metric` sent; W&B keeps it in the config, by protobuf field numbers ("1" is the name)."""
        found: list[Json] = self.config.get("_wandb", {}).get("value", {}).get("m", [])
        return found


@dataclass
class Sweep:
    """A sweep, and the generator of its points."""

    name: str
    project: str
    config: Json
    points: Any
    runs: list[str] = field(default_factory=list)
    state: str = "RUNNING"


class WandbServer:
    """State and HTTP server in one; one lock guards the state."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.alerts: list[Json] = []
        self.artifacts: dict[str, Json] = {}
        self.uploads: dict[str, bytes] = {}
        self.unknown: list[Json] = []  # operations that it could not serve
        self.fail: str | None = None
        self.stuck: str | None = None  # requests that say this are never answered: an artifact's type, say
        self.released = threading.Event()  # ends requests that hang
        self._agents: dict[str, str] = {}
        self._lock = threading.RLock()
        self._random = random.Random(0)
        self._stopped = False
        self._http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_state": self}))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *details: object) -> None:
        self.released.set()
        self.stop()

    def stop(self) -> None:
        """Goes away: connections are refused from now on."""
        if not self._stopped:
            self._stopped = True
            self.fail = "drop"  # whoever is connected still
            self._http.shutdown()
            self._http.server_close()

    def environment(self) -> dict[str, str]:
        """The variables that lead a client here."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": _KEY,
            "WANDB_MODE": "online",
            "WANDB_ENTITY": ENTITY,
            "WANDB_ERROR_REPORTING": "false",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def run(self, name: str) -> Run:
        """The run of that id."""
        return self.runs[name]

    def runs_of(self, sweep: str) -> list[Run]:
        """The runs of a sweep, in order."""
        return [self.runs[name] for name in self.sweeps[sweep].runs]

    # ---- GraphQL: one method an operation, given its variables

    def graphql(self, operation: str, variables: Json) -> Json:
        """Answers one operation; what it does not know gets an empty answer and is noted in `unknown`."""
        with self._lock:
            answer: Callable[[Json], Json] | None = getattr(self, f"on_{operation}", None)
            if answer is None:
                self.unknown.append({"operation": operation, "variables": variables})
                return {}
            return answer(variables)

    def on_Viewer(self, _: Json) -> Json:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        viewer = {"id": "user", "username": ENTITY, "name": ENTITY, "email": "", "admin": False, "flags": "{}"}
        own = {"entity": ENTITY, "defaultEntity": {"name": ENTITY}, "deletedAt": None, "apiKeys": {"edges": []}}
        return {"viewer": {**viewer, **own, "teams": teams}}

    on_GetViewer = on_GetDefaultEntity = on_Viewer

    def on_ServerFeaturesQuery(self, _: Json) -> Json:
        return {"serverInfo": {"features": []}}

    def on_ServerInfo(self, _: Json) -> Json:
        local = {"outOfDate": False, "latestVersionString": "0.75.0", "versionOnThisInstanceString": "0.75.0"}
        versions = {"max_cli_version": "99.0.0", "min_cli_version": "0.1.0"}
        return {"serverInfo": {"cliVersionInfo": versions, "latestLocalVersionInfo": local}}

    def on_OrganizationCoreWeaveOrganizationID(self, _: Json) -> Json:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def on_XXHashDigestsEnabled(self, _: Json) -> Json:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def on_UpsertBucket(self, variables: Json) -> Json:
        name = variables.get("name") or _name(variables["id"])
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run(name, variables.get("project") or "uncategorized"))
        run.config.update(json.loads(variables.get("config") or "{}"))
        run.summary.update(json.loads(variables.get("summaryMetrics") or "{}"))
        run.tags = variables.get("tags") or run.tags
        run.sweep = variables.get("sweep") or run.sweep
        if run.state == "pending" or (not inserted and run.state in _OVER and variables.get("host")):
            run.state = "running"  # begun by an agent, or resumed
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": inserted}}

    def on_RunResumeStatus(self, variables: Json) -> Json:
        run = self.runs.get(variables.get("name") or "")
        bucket = None if run is None or run.state == "pending" else self._bucket(run)
        return {"model": {**_project(variables.get("project") or ""), "bucket": bucket}}

    def on_RunStoppedStatus(self, variables: Json) -> Json:
        run = self.runs.get(variables.get("runId") or "")
        return {"project": {"run": {"stopped": run is not None and run.stop}}}

    def on_RunState(self, variables: Json) -> Json:
        run = self.runs.get(variables["run"])
        return {"project": {"run": run and {"id": _id("Run", run.name), "state": run.state}}}

    def on_CreateRunFiles(self, variables: Json) -> Json:
        place = f"{self.url}/_upload/run/{variables['run']}/"
        files = [{"name": name, "uploadUrl": place + name} for name in variables["files"]]
        return {"createRunFiles": {"runID": _id("Run", variables["run"]), "uploadHeaders": [], "files": files}}

    def on_MarkRunFilesUploaded(self, _: Json) -> Json:
        return {"markRunFilesUploaded": {"success": True}}

    def on_NotifyScriptableRunAlert(self, variables: Json) -> Json:
        self.alerts.append(variables)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _bucket(self, run: Run) -> Json:
        kept = {"config": run.config, "summaryMetrics": run.summary, "wandbConfig": {}, "eventsTail": []}
        kept["historyTail"] = [json.dumps(row) for row in run.history[-1:]]
        counts = {"historyLineCount": len(run.history), "logLineCount": 0, "eventsLineCount": 0}
        names = {"id": _id("Run", run.name), "name": run.name, "displayName": run.name, "sweepName": run.sweep}
        texts = {name: json.dumps(value) for name, value in kept.items()}
        return {**names, **counts, **texts, "tags": run.tags, "state": run.state, "project": _project(run.project)}

    # ---- tables and artifacts

    def on_ArtifactType(self, _: Json) -> Json:
        return {"project": {"artifact": None}}

    def on_CreateArtifact(self, variables: Json) -> Json:
        key = _id("Artifact", self._fresh())
        self.artifacts[key] = {"input": variables.get("input", variables), "state": "PENDING", "files": {}}
        sequence = {"latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": key, "state": "PENDING", "artifactSequence": sequence}}}

    def on_CreateArtifactManifest(self, variables: Json) -> Json:
        url = f"{self.url}/_upload/manifest/{variables['artifactID']}"
        file = {"id": _id("File", self._fresh()), "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": _id("Manifest", self._fresh()), "file": file}}}

    def on_CreateArtifactFiles(self, variables: Json) -> Json:
        edges = []
        for file in variables.get("input", variables)["artifactFiles"]:
            path = f"artifact/{file['artifactID']}/{file['name']}"
            node = {"storagePath": path, "uploadUrl": f"{self.url}/_upload/{path}", "uploadHeaders": []}
            edges.append({"node": {**node, "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_CommitArtifact(self, variables: Json) -> Json:
        artifact = self.artifacts[variables["artifactID"]]
        artifact["state"] = "COMMITTED"
        digest = artifact["input"]["digest"]
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": digest}}}

    def on_UseArtifact(self, variables: Json) -> Json:
        return {"useArtifact": {"artifact": {"id": variables["input"]["artifactID"]}}}

    def on_ClientIDMapping(self, variables: Json) -> Json:
        found = [
            k for k, artifact in self.artifacts.items() if artifact["input"].get("clientID") == variables["clientID"]
        ]
        return {"clientIDMapping": {"serverID": found[0]} if found else None}

    # ---- sweeps

    def on_UpsertSweep(self, variables: Json) -> Json:
        sweep = next((s for s in self.sweeps.values() if variables.get("id") in (_id("Sweep", s.name), s.name)), None)
        if sweep is None:
            config = yaml.safe_load(variables["config"])
            points = _points(config, self._random)
            sweep = Sweep(self._fresh(), variables.get("projectName") or "uncategorized", config, points)
            self.sweeps[sweep.name] = sweep
        sweep.state = variables.get("state") or sweep.state
        told = {"id": _id("Sweep", sweep.name), "name": sweep.name, "state": sweep.state}
        return {"upsertSweep": {"sweep": {**told, "project": _project(sweep.project)}, "configValidationWarnings": []}}

    on_UpsertSweepState = on_UpsertSweep

    def on_SweepWithRuns(self, variables: Json) -> Json:
        sweep = self.sweeps.get(variables.get("sweep") or variables.get("name") or "")
        if sweep is None:
            return {"project": {"sweep": None}}
        names = {"id": _id("Sweep", sweep.name), "name": sweep.name, "displayName": sweep.name, "state": sweep.state}
        blank = dict.fromkeys(
            ("description", "createdAt", "heartbeatAt", "updatedAt", "bestLoss", "controller", "user")
        )
        runs: Json = {"edges": [], "pageInfo": {"hasNextPage": False, "endCursor": None}, "totalCount": len(sweep.runs)}
        counts = {"runCount": len(sweep.runs), "runCountExpected": None, "earlyStopJobRunning": False, "runs": runs}
        rest = {"method": sweep.config["method"], "config": yaml.safe_dump(sweep.config), "scheduler": None}
        rest |= {"controllerRunName": "", "priorRuns": {"edges": []}}
        return {"project": {"sweep": {**names, **blank, **counts, **rest}}}

    on_GetSweep = on_GetSweepState = on_SweepConfig = on_SweepWithRuns

    def on_CreateAgent(self, variables: Json) -> Json:
        if variables["sweep"] not in self.sweeps:
            return {"createAgent": None}
        key = _id("Agent", self._fresh())
        self._agents[key] = variables["sweep"]
        return {"createAgent": {"agent": {"id": key}}}

    def on_Heartbeat(self, variables: Json) -> Json:
        running = [name for name, on in json.loads(variables.get("runState") or "{}").items() if on]
        commands = self._commands(self.sweeps[self._agents[variables["id"]]], running)
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}

    def _commands(self, sweep: Sweep, running: list[str]) -> list[Json]:
        """An agent makes one run at a time: stop it, leave it, begin the next, or exit."""
        stops = [name for name in running if self.runs[name].stop and self.runs[name].state not in _OVER]
        if stops or running:
            return [{"type": "stop", "run_id": name} for name in stops]
        capped = len(sweep.runs) >= sweep.config.get("run_cap", math.inf)
        point = None if capped or sweep.state != "RUNNING" else next(sweep.points, None)
        if point is None:
            sweep.state = "FINISHED"
            return [{"type": "exit"}]
        config = {name: {"value": value} for name, value in point.items()}
        run = Run(self._fresh(), sweep.project, config=dict(config), sweep=sweep.name, state="pending")
        self.runs[run.name] = run
        sweep.runs.append(run.name)
        return [{"type": "run", "run_id": run.name, "args": config, "program": sweep.config.get("program")}]

    # ---- files

    def stream(self, name: str, body: Json) -> Json:
        """Takes one request of a run's file stream."""
        with self._lock:
            run = self.runs[name]
            for file, chunk in (body.get("files") or {}).items():
                if file == "wandb-history.jsonl":
                    run.history[int(chunk["offset"]) :] = map(json.loads, chunk["content"])
                elif file == "wandb-summary.json":
                    run.summary = json.loads(chunk["content"][-1])
            if body.get("complete"):
                run.state = "failed" if body.get("exitcode") else "finished"
            return {"stopped": True} if run.stop else {}

    def upload(self, path: str, content: bytes) -> None:
        """Takes a file, of a run or of an artifact."""
        with self._lock:
            self.uploads[path] = content
            kind, owner, *name = path.split("/", 2)
            if kind == "run" and owner in self.runs:
                self.runs[owner].files[name[0]] = content
            elif kind == "artifact" and owner in self.artifacts:
                self.artifacts[owner]["files"][name[0]] = content

    def _fresh(self) -> str:
        return "".join(self._random.choices(string.ascii_lowercase + string.digits, k=8))


def _id(kind: str, name: str) -> str:
    return base64.b64encode(f"{kind}:{name}".encode()).decode()


def _name(key: str) -> str:
    return base64.b64decode(key).decode().partition(":")[2]


def _project(name: str) -> Json:
    return {"id": _id("Project", name), "name": name, "entity": {"id": _id("Entity", ENTITY), "name": ENTITY}}


def _points(config: Json, rng: random.Random) -> Any:
    """The points of a sweep: all of a grid, or without end drawn at random."""
    parameters = config["parameters"]
    if config["method"] == "grid":
        values = [p["values"] if "values" in p else [p["value"]] for p in parameters.values()]
        return (dict(zip(parameters, point, strict=True)) for point in itertools.product(*values))
    return ({name: _draw(p, rng) for name, p in parameters.items()} for _ in itertools.count())


def _draw(parameter: Json, rng: random.Random) -> Any:
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return rng.choice(parameter["values"])
    low, high = parameter["min"], parameter["max"]
    if parameter.get("distribution") == "log_uniform_values":
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    return rng.randint(low, high) if isinstance(low, int) and isinstance(high, int) else rng.uniform(low, high)


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Says nothing: clients that go away in mid-request are what the failure tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: WandbServer

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        path = unquote(self.path)
        if path.startswith("/_fail/"):
            mode = path.removeprefix("/_fail/")
            self._answer({})
            if mode == "gone":
                self.server_state.stop()
            else:
                self.server_state.fail = mode
        elif not self._failed():
            content = self.server_state.uploads.get(path.removeprefix("/_upload/"))
            self._answer({} if content is None else content, 200 if content is not None or path == "/healthz" else 404)

    def do_PUT(self) -> None:
        content = self._body()
        if not self._failed():
            self.server_state.upload(unquote(self.path).removeprefix("/_upload/"), content)
            self._answer({})

    def do_POST(self) -> None:
        content = self._body()
        if self._failed():
            return
        body, path = json.loads(content or b"{}"), unquote(self.path)
        if path == "/graphql":
            self._graphql(body)
        elif stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            self._answer(self.server_state.stream(stream[1], body))
        else:
            self._answer({}, 404)

    def _graphql(self, body: Json) -> None:
        named = re.search(r"(?:query|mutation)\s+(\w+)", body.get("query", ""))
        operation = body.get("operationName") or (named[1] if named else "")
        variables = body.get("variables") or {}
        if self.server_state.stuck is not None and self.server_state.stuck in json.dumps(variables):
            self.server_state.released.wait()
        try:
            self._answer({"data": self.server_state.graphql(operation, variables)})
        except Exception as error:  # noqa: BLE001 (the client sees a GraphQL error, the test finds it in `unknown`)
            self.server_state.unknown.append({"operation": operation, "error": repr(error), "variables": variables})
            self._answer({"errors": [{"message": repr(error)}]}, 400)

    def _failed(self) -> bool:
        mode = self.server_state.fail
        if mode == "hang":
            self.server_state.released.wait()
        if mode in ("hang", "drop"):
            self.close_connection = True
            self.connection.close()
        elif mode is not None:
            self._answer({"errors": [{"message": f"{mode}, as the test wants it"}]}, int(mode))
        return mode is not None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _answer(self, content: Json | bytes, code: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
