"""`stepcast score`: whole tables stepped as a server steps them, and taken up where a run was cut short."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from random import Random

import httpx
import numpy as np
import pytest
from long_tables import ATOL, RTOL, START, by_session, inputs, refused, rows_of, score, write
from pyarrow import parquet
from redis_servers import RedisServer
from serving import MODELS, ROOT, Running, running

from service.engine.repository import Repository
from service.scoring import files
from service.scoring.landing import Landing
from service.scoring.layout import Wanted, layout_of
from service.scoring.rows import RowReader
from service.scoring.scratch import Saved
from service.scoring.states import BEFORE
from service.scoring.work import Plan, Work
from service.settings import Settings
from stepcast.client import Client
from stepcast.features import FeatureNames
from stepcast.manifest import read_manifest

pytestmark = pytest.mark.service

GOOD = b"key,when,u,v,w\na,2026-01-01T00:00:00Z,1,2,3\nb,2026-01-01T00:00:00Z,1,2,3\na,2026-01-01T01:00:00Z,1,2,3\n"


def live(http: httpx.Client, model: str, x: np.ndarray, mask: list[int] | None = None) -> np.ndarray:
    """What a server answers to a new session's call of these steps [T,F]: [T,O]."""
    nulls = [[None if value != value else value for value in row] for row in x.tolist()]
    body = {"inputs": [nulls], **({} if mask is None else {"mask": [mask]})}
    path = f"/v1/models/{model}/sessions/score-{Random().getrandbits(48):x}/step"
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    outputs = [[np.nan if value is None else value for value in row] for row in answer.json()["outputs"][0]]
    return np.array(outputs)


# --- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        *("lstm", "stacked", "gru", "graves_lstm", "recurrences", "policies", "quantile", "mixture", "last_step"),
        *("characters", "conv2d", "foreign_lstm", "foreign_chunks", "foreign_counter", "rnn_loss_classes"),
    ],
)
def test_every_kind_of_model_is_stepped_as_a_server_steps_it(kind: str, http: httpx.Client, tmp_path: Path) -> None:
    """Outputs and step numbers of sessions of different lengths, for rows sorted by time and by key."""
    manifest = read_manifest(MODELS / kind / "1")
    sessions = inputs(manifest, (23, 1, 40, 9))
    for order in ("time", "key"):
        table = write(tmp_path / f"{order}.parquet", rows_of(manifest, sessions, order))
        found = by_session(score(table, kind, tmp_path / f"{order}-out.parquet", "--key", "key"), manifest)
        assert list(found) == list(sessions)
        for key, x in sessions.items():
            steps, y = found[key]
            assert steps == list(range(1, len(x) + 1))
            np.testing.assert_allclose(y, live(http, kind, x), RTOL, ATOL)


def test_many_sessions_take_single_steps_and_few_take_sequences(http: httpx.Client, tmp_path: Path) -> None:
    """300 sessions, three of them with many more steps than the others: both ways of running, in chunks of 512 rows."""
    manifest = read_manifest(MODELS / "stacked" / "1")
    sessions = inputs(manifest, [60, 41, 60] + [1 + place % 5 for place in range(297)])
    table = write(tmp_path / "in.parquet", rows_of(manifest, sessions))
    found = by_session(score(table, "stacked", tmp_path / "out.parquet", "--key", "key", "--chunk-rows", 512), manifest)
    for key in ("s0", "s1", "s2", "s3", "s150", "s299"):
        steps, y = found[key]
        assert steps == list(range(1, len(sessions[key]) + 1))
        np.testing.assert_allclose(y, live(http, "stacked", sessions[key]), RTOL, ATOL)


def test_moments_categories_and_gaps_are_those_of_named_steps(memory_server: Running, tmp_path: Path) -> None:
    """Step by step through the SDK: a category's text, an unknown one, a missing reading, hours without a row."""
    manifest = read_manifest(MODELS / "covariates" / "1")
    random, rows = Random(3), []
    for hour in (0, 1, 2, 5, 6, 30):
        for key, station in (("a", "Brae"), ("b", "7"), ("c", "Nowhere"), ("d", "")):
            when = START + timedelta(hours=hour)
            rows.append({"key": key, "when": when, "station": station, "u": random.random(), "price": random.random()})
    rows[5]["u"] = None
    options = "--key", "key", "--time", "when", "--known-in-row"
    with Client(memory_server.url) as client:
        sessions = {key: client.session("covariates", f"score-{key}-{random.random()}") for key in "abcd"}
        want = []
        for row in rows:
            named = {"time": row["when"], "station": row["station"] or None, "u": row["u"], "price": row["price"]}
            answer = sessions[row["key"]].step(named)
            want.append([answer.step, answer.outputs["u"], answer.outputs["v"]])
    for suffix in ("csv", "parquet"):
        table = write(tmp_path / f"in.{suffix}", rows)
        got = score(table, "covariates", tmp_path / f"out.{suffix}", *options)
        assert got.column_names == ["key", "when", "step", "u", "v"]
        found = np.stack([got[name].to_numpy() for name in ("step", "u", "v")], axis=1)
        np.testing.assert_allclose(found, np.array(want), RTOL, ATOL)
    assert manifest.every_s == 3600


def test_the_table_of_the_training_is_known(tmp_path: Path) -> None:
    """By the recipe in the manifest: key and time, a range, a direction, a static column that only the recipe has."""
    columns = {
        "station": {"static": True, "values": {"a": "Brae", "b": 7}},
        "u": {"range": [0.0, 1.0]},
        "price": {"turn": 360.0},
    }
    made_by = {"data": {"kind": "table", "series": "place", "time": "at", "columns": columns}}
    known = read_manifest(MODELS / "covariates" / "1")
    features = [
        feature.model_copy(update={"name": "price_sin", "known": False, "ahead": 0})
        if feature.name == "price"
        else feature
        for feature in known.features
    ]
    provenance = known.provenance.model_copy(update={"config": made_by})
    manifest = known.model_copy(update={"features": tuple(features), "provenance": provenance})
    rows = [{"place": place, "at": START, "u": u, "price": 90.0} for place, u in (("a", 0.5), ("b", 1.5), ("c", 1.0))]
    table, names = write(tmp_path / "in.parquet", rows), FeatureNames(manifest)
    layout = layout_of(manifest, names, table, files.header(table), Wanted())
    assert (layout.key, layout.time, layout.carried, layout.absent) == ("place", "at", ["place", "at"], ())
    (chunk,) = files.chunks([table], layout.columns, files.Position(), 10)
    read = RowReader(manifest, names, layout, "all", bool).read(chunk)
    np.testing.assert_allclose(read.x[:, :3], [[1, 0.5, 1], [3, np.nan, 1], [np.nan, 1, 1]])
    assert [text.partition(": ")[2] for _, text in read.faults.first()] == [
        "row 2: nothing of its series for 'station'"
    ]
    assert (read.keys, read.of.tolist()) == (["a", "b", "c"], [0, 1, 2])
    shown = layout_of(
        manifest, names, table, [*files.header(table), "station"], Wanted(key="at", renamed={"u": "place"})
    )
    assert (shown.sources["station"].values, shown.sources["u"].column, shown.key) == (None, "place", "at")


def test_a_masked_row_leaves_the_state_and_has_a_number_alone(http: httpx.Client, tmp_path: Path) -> None:
    """As the server's mask: the step counts, nothing comes out."""
    manifest = read_manifest(MODELS / "lstm" / "1")
    sessions, mask = inputs(manifest, (12, 12)), {"s0": [1, 0, 0, 1] * 3, "s1": [0] * 12}
    rows = [row | {"there": mask[row["key"]][row["n"]]} for row in rows_of(manifest, sessions)]
    table = write(tmp_path / "in.csv", rows)
    found = by_session(score(table, "lstm", tmp_path / "out.parquet", "--key", "key", "--mask", "there"), manifest)
    for key, x in sessions.items():
        steps, y = found[key]
        assert steps == list(range(1, 13))
        np.testing.assert_allclose(y, live(http, "lstm", x, mask[key]), RTOL, ATOL)


def test_a_classifier_answers_its_class_and_probabilities(http: httpx.Client, tmp_path: Path) -> None:
    """The class is the likeliest one, as the server says; columns that are kept stand before."""
    manifest = read_manifest(MODELS / "rnn_loss_classes" / "1")
    table = write(tmp_path / "in.parquet", rows_of(manifest, inputs(manifest, (6,))))
    got = score(table, "rnn_loss_classes", tmp_path / "out.csv", "--keep", "n", "--prefix", "p_")
    classes = list(manifest.classes or ())
    assert got.column_names == ["n", "step", "p_class", *(f"p_{name}" for name in classes)]
    likely = np.stack([got[f"p_{name}"].to_numpy() for name in classes], axis=1).argmax(axis=1)
    assert got["p_class"].to_pylist() == [classes[at] for at in likely]


def test_csv_parquet_and_a_directory_of_both_give_the_same(tmp_path: Path) -> None:
    """The same rows in one file or several, typed or as text, columns in another order and under other names."""
    manifest = read_manifest(MODELS / "stacked" / "1")
    rows = rows_of(manifest, inputs(manifest, (30, 7, 19)))
    want = score(write(tmp_path / "in.parquet", rows), "stacked", tmp_path / "want.parquet", "--key", "key")
    turned = [{"W_kn": row["w"], **{name: row[name] for name in ("v", "u", "n", "when", "key")}} for row in rows]
    folder = tmp_path / "parts"
    (folder / "late").mkdir(parents=True)
    write(folder / "part-2.csv", turned[:10])
    write(folder / "part-10.parquet", turned[10:33], row_group_size=7)
    write(folder / "part-11.csv", turned[33:34])
    write(folder / "part-12.parquet", turned[34:])
    (folder / "_SUCCESS.csv").write_text("left out")
    got = score(folder, "stacked", tmp_path / "got.parquet", "--key", "key", "--column", "w=W_kn", "--chunk-rows", 1000)
    assert got["key"].to_pylist() == want["key"].to_pylist()
    assert got["step"].to_pylist() == want["step"].to_pylist()
    for name in ("u", "v"):
        np.testing.assert_array_equal(got[name].to_numpy(), want[name].to_numpy())
    text = score(tmp_path / "in.parquet", "stacked", tmp_path / "want.csv", "--key", "key")
    for name in ("u", "v"):
        np.testing.assert_array_equal(text[name].to_numpy().astype(np.float32), want[name].to_numpy())


def test_states_that_do_not_fit_rest_on_the_disk(tmp_path: Path) -> None:
    """More sessions than memory is given for, in small chunks: the same bits as with room for all."""
    manifest = read_manifest(MODELS / "stacked" / "1")
    table = write(tmp_path / "in.parquet", rows_of(manifest, inputs(manifest, [3] * 700)))
    options = "--key", "key", "--chunk-rows", 300
    roomy = score(table, "stacked", tmp_path / "roomy.parquet", *options)
    tight = score(table, "stacked", tmp_path / "tight.parquet", *options, "--state-mb", 0.001)
    assert tight.equals(roomy)


def test_neither_order_nor_chunks_nor_memory_change_a_number(tmp_path: Path) -> None:
    """Sessions mixed by chance, in chunks of any size, states on the disk: each is its own pass through the model."""
    served = Repository(MODELS, device="cpu", threads=1).load("policies", 1)
    random = Random(8)
    for seed in range(8):
        sessions = inputs(served.manifest, [random.randrange(1, 40) for _ in range(random.choice((2, 7, 90)))], seed)
        keys = [key for key, x in sessions.items() for _ in x]
        random.shuffle(keys)
        left = {key: iter(rows_of(served.manifest, {key: x})) for key, x in sessions.items()}
        rows = [next(left[key]) | {"there": int(random.random() < 0.8)} for key in keys]
        table = write(tmp_path / f"{seed}.parquet", rows, row_group_size=random.randrange(1, 200))
        out, wanted = tmp_path / f"{seed}-out.parquet", Wanted("key", "when", "there")
        plan = Plan(table, out, wanted, chunk_rows=random.randrange(1, 300), state_bytes=0, checkpoint_s=0.0)
        Work(plan, served, Settings.read({}, batch_rows=str(random.choice((1, 8, 256))))).run(lambda done, of: None)
        found = by_session(parquet.read_table(out), served.manifest)
        for key, x in sessions.items():
            there = np.array([row["there"] for row in rows if row["key"] == key], np.bool_)
            state, want = np.frombuffer(served.runtime.initial(1), np.uint8)[None], np.full((len(x), 2), np.nan)
            if there.any():
                want[there] = served.runtime.run(x[None, there], None, state)[0][0]
            steps, y = found[key]
            assert steps == list(range(1, len(x) + 1))
            np.testing.assert_allclose(y, want, RTOL, ATOL)


# --- cut short ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "kills"), [("csv", 1), ("parquet", 2)])
def test_a_run_that_was_killed_goes_on_and_writes_the_same_bytes(suffix: str, kills: int, tmp_path: Path) -> None:
    """kill -9 in mid file, then a run to the end; with final states in a store."""
    manifest = read_manifest(MODELS / "stacked" / "1")
    table = write(tmp_path / f"in.{suffix}", rows_of(manifest, inputs(manifest, [150] * 40)))
    options = ["--key", "key", "--time", "when", "--chunk-rows", "256"]
    whole = tmp_path / f"whole.{suffix}"
    score(table, "stacked", whole, *options, "--store", f"sqlite:///{tmp_path}/whole.db")
    out, spool = tmp_path / f"out.{suffix}", tmp_path / f"out.{suffix}.unfinished" / "rows"
    command = [sys.executable, "-m", "service", "score", table, "--model", "stacked", "--models", MODELS, "--out", out]
    command += [*options, "--store", f"sqlite:///{tmp_path}/out.db", "--checkpoint-s", "0"]
    size = 0
    for _ in range(kills):
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 30
        while not spool.exists() or spool.stat().st_size < size + 20_000:
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert spool.stat().st_size >= size
        size = spool.stat().st_size
        assert not out.exists()
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True, capture_output=True)
    assert out.read_bytes() == whole.read_bytes()
    assert not spool.parent.exists()
    with running(store=f"sqlite:///{tmp_path}/out.db") as one, Client(one.url) as client:
        ours = client.session("stacked", "s7").get_state()
    with running(store=f"sqlite:///{tmp_path}/whole.db") as two, Client(two.url) as client:
        theirs = client.session("stacked", "s7").get_state()
    assert ours.step == theirs.step == 150
    np.testing.assert_array_equal(ours.state["lstm_0"]["h"], theirs.state["lstm_0"]["h"])


# --- final states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_a_server_goes_on_from_the_final_states(
    kind: str, http: httpx.Client, tmp_path: Path, redis_server: RedisServer
) -> None:
    """Two tables one after the other, then steps through the API: as one session that was stepped live throughout."""
    manifest = read_manifest(MODELS / "stacked" / "1")
    sessions = inputs(manifest, (20, 20, 12))
    store = redis_server.url if kind == "redis" else f"sqlite:///{tmp_path}/sessions.db"
    rows = rows_of(manifest, sessions)
    early = write(tmp_path / "early.csv", [row for row in rows if row["n"] < 9])
    late = write(tmp_path / "late.csv", [row for row in rows if 9 <= row["n"] < 12])
    options = "--key", "key", "--store", store, "--namespace", "default"
    score(early, "stacked", tmp_path / "early-out.csv", *options)
    got = score(late, "stacked", tmp_path / "late-out.csv", *options, "--continue")
    assert got["step"].to_pylist()[:3] == [10, 10, 10]
    with running(store=store) as server, Client(server.url) as client:
        for key, x in sessions.items():
            want = live(http, "stacked", x)
            session = client.session("stacked", key)
            for step, row in enumerate(x[12:], 13):
                answer = session.step(row)
                assert answer.step == step
                np.testing.assert_allclose(answer.outputs, want[step - 1], RTOL, ATOL)
            twin = client.session("stacked", f"{key}-live")
            twin.step(x[None])
            assert session.info()["step"] == twin.info()["step"] == len(x)
            for layer, tensors in twin.get_state().state.items():
                for name, values in tensors.items():
                    np.testing.assert_allclose(session.get_state().state[layer][name], values, RTOL, ATOL)


def test_sessions_of_the_store_are_not_stepped_twice_by_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same table again is refused, and a key that no session can have is named by its line."""
    table, store = tmp_path / "in.csv", f"sqlite:///{tmp_path}/s.db"
    table.write_bytes(GOOD)
    score(table, "lstm", tmp_path / "out.csv", "--key", "key", "--store", store)
    says = refused(capsys, table, "lstm", tmp_path / "again.csv", "--key", "key", "--store", store)
    assert "the store has a session 'a' of model 'lstm' already, at step 2. Go on from it with --continue" in says
    table.write_bytes(GOOD + b"a b,2026-01-01T02:00:00Z,1,2,3\n")
    says = refused(capsys, table, "lstm", tmp_path / "other.csv", "--key", "key", "--store", store, "--namespace", "n")
    assert "in.csv:5: column 'key' has 'a b', wanted a session's id: 1 to 256 of letters" in says


def test_landing_twice_lands_once_and_keeps_what_others_have_done(tmp_path: Path) -> None:
    """A run that is killed while it lands does so again: a session that was stepped since stays, as does another's."""
    settings = Settings.read({}, store=f"sqlite:///{tmp_path}/s.db")
    served = Repository(MODELS, device="cpu", threads=1).load("lstm", 1)
    state = served.runtime.initial(1)
    saved = [Saved(key, 5, BEFORE, b"", state) for key in ("a", "b")]
    landing = Landing(settings, served, "default", b"n" * 16, goes_on=False)
    assert landing.land(saved) == []
    landing.close()
    with running(store=settings.store) as server, Client(server.url) as client:
        assert client.session("lstm", "a").step([1.0, 2.0, 3.0]).step == 6
    landing = Landing(settings, served, "default", b"n" * 16, goes_on=False)
    assert landing.land([*saved, Saved("c", 1, BEFORE, b"", state)]) == []
    other = Landing(settings, served, "default", b"m" * 16, goes_on=True)
    begun = {one.key: one for one in other.begun(["a", "b", "c", "new"])}
    assert {key: one.step for key, one in begun.items()} == {"a": 6, "b": 5, "c": 1}
    assert landing.land([]) == []
    with running(store=settings.store) as server, Client(server.url) as client:
        assert client.session("lstm", "b").step([1.0, 2.0, 3.0]).step == 6
    ahead = [begun[key]._replace(step=50) for key in ("b", "c")]
    assert other.land(ahead) == ["b"]
    landing.close()
    other.close()
    with running(store=settings.store) as server, Client(server.url) as client:
        steps = {key: client.session("lstm", key).info()["step"] for key in "abc"}
    assert steps == {"a": 6, "b": 6, "c": 50}
