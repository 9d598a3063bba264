"""What Secateur did not make in MLflow is refused or taken over as asked; whatever was champion can be gone back to."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from secateur.pipeline.config.schema import TrackingSection
from secateur.pipeline.errors import UserError
from secateur.pipeline.tracking import Registry, Tracker
from secateur.pipeline.tracking.history import FOUND, PROMOTE, ROLLBACK, Event, champions, is_known
from secateur.pipeline.tracking.ownership import DEFAULT_DEVICE, KIND, KIND_TAG, MADE_TAG, foreign_aliases
from secateur.pipeline.tracking.store import experiment_of
from tests.pipeline.registered import add, crown, embedded, linear_model, make_template, migrated_home

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture
def registry(tmp_path: Path, template: Path) -> Registry:
    return embedded(migrated_home(tmp_path / "home", template))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linear_model(tmp_path_factory.mktemp("onnx") / "model.onnx")


def client_of(registry: Registry) -> MlflowClient:
    return MlflowClient(registry.uri, registry.uri)


def foreign_model(registry: Registry, folder: Path) -> MlflowClient:
    """A registered model that somebody made with MLflow, whose version 1 is the champion in production."""
    client = client_of(registry)
    client.create_registered_model("net")
    client.create_model_version("net", folder.as_uri())
    client.set_registered_model_alias("net", "champion", "1")
    return client


# -- experiments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [0, 1])
def test_an_experiment_of_others_is_refused_and_left_as_it_is(registry: Registry, tmp_path: Path, runs: int) -> None:
    client = client_of(registry)
    number = client.create_experiment("theirs", tags={"team": "vision"})
    for _ in range(runs):
        client.create_run(number, tags={"mlflow.runName": "by hand"})
    with pytest.raises(UserError, match=r"'theirs' .* did not make it.*tracking\.take_over: true"):
        experiment_of(client, registry.uri, "theirs", tmp_path)
    assert client.get_experiment(number).tags == {"team": "vision"}


def test_an_experiment_of_others_is_taken_over_when_asked_and_is_ours_from_then_on(
    registry: Registry, tmp_path: Path
) -> None:
    client = client_of(registry)
    number = client.create_experiment("theirs", tags={"team": "vision"})
    assert experiment_of(client, registry.uri, "theirs", tmp_path, take_over=True) == number
    assert client.get_experiment(number).tags == {"team": "vision", MADE_TAG: "taken over", KIND_TAG: KIND}
    assert experiment_of(client, registry.uri, "theirs", tmp_path) == number


def test_our_own_experiment_bears_our_tag_and_one_of_an_earlier_version_is_known_by_its_runs(
    registry: Registry, tmp_path: Path
) -> None:
    client = client_of(registry)
    number = experiment_of(client, registry.uri, "ours", tmp_path)
    assert client.get_experiment(number).tags == {MADE_TAG: "made", KIND_TAG: KIND}
    for tag in ("secateur.run_id", "secateur.decision", "secateur.champion"):
        earlier = client.create_experiment(f"earlier {tag}")
        client.create_run(earlier, tags={tag: "x"})
        assert experiment_of(client, registry.uri, f"earlier {tag}", tmp_path) == earlier
        assert client.get_experiment(earlier).tags == {MADE_TAG: "made", KIND_TAG: KIND}


@pytest.mark.parametrize("take_over", [False, True])
def test_a_deleted_experiment_is_refused_with_the_command_that_restores_it(
    registry: Registry, tmp_path: Path, take_over: bool
) -> None:
    client = client_of(registry)
    number = client.create_experiment("gone")
    client.delete_experiment(number)
    with pytest.raises(UserError, match=rf"'gone' was deleted.*experiments restore --experiment-id {number}"):
        experiment_of(client, registry.uri, "gone", tmp_path, take_over)


def test_a_run_delivers_nothing_into_an_experiment_of_others(registry: Registry) -> None:
    client = client_of(registry)
    number = client.create_experiment("theirs")
    tracker = Tracker(TrackingSection(uri=registry.uri, experiment="theirs"), registry.home, "r", "r", {})
    with pytest.raises(UserError, match="did not make it"):
        tracker.finish({}, [])
    assert not client.search_runs([number])


# -- registered models and aliases -------------------------------------------------------------------------------------


def test_a_registered_model_of_others_is_refused_and_left_as_it_is(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    client = foreign_model(registry, tmp_path)
    with pytest.raises(UserError, match=r"'net' .* did not make it.*tracking\.take_over: true"):
        add(registry, tmp_path, model, "run-1")
    found = client.get_registered_model("net")
    assert (found.tags, found.aliases) == ({}, {"champion": 1})
    assert len(client.search_model_versions("name = 'net'")) == 1
    assert not client.search_logged_models(["0"]), "nothing was sent before it was refused"


def test_a_prompt_of_the_models_name_is_refused_even_to_be_taken_over(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    client_of(registry).register_prompt("net", template="hello {{name}}")
    for take_over in (False, True):
        with pytest.raises(UserError, match="'net' is a prompt in MLflow"):
            add(Registry(registry.uri, registry.home, take_over=take_over), tmp_path, model, "run-1")


def test_the_champion_of_a_model_that_was_taken_over_can_be_gone_back_to(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    foreign_model(registry, tmp_path)
    taking = Registry(registry.uri, registry.home, take_over=True)
    ours = add(taking, tmp_path, model, "run-1")
    assert registry.version("net").version == "1", "theirs stays the champion until ours is promoted"
    crown(taking, ours)
    assert registry.version("net").version == ours.version == "2"
    assert [(e.kind, e.version, e.done) for e in registry.history("net")] == [
        ("promote", "2", True),
        (FOUND, "1", True),
    ]
    add(registry, tmp_path, model, "run-2")  # it is ours now: nothing has to be asked again
    assert registry.rollback("net").version == "1"
    assert registry.version("net").version == registry.version("net", "champion", "quick").version == "1"


def test_aliases_of_ours_that_point_to_versions_of_others_are_found() -> None:
    entry = '{"kind": "found", "device": "d", "version": "4", "previous": null, "at": 1.0}'
    aliases = {
        "champion": "1",
        "champion-pi": "2",
        "challenger": "3",
        "champions": "1",
        "prod": "1",
        "challenger-d": "4",
    }
    tags = {DEFAULT_DEVICE: "pi", "secateur.event.1": entry}
    assert foreign_aliases(tags, aliases, ["2"]) == {"champion": "1", "challenger": "3"}


# -- nothing that was champion is lost ---------------------------------------------------------------------------------


def test_a_plain_champion_set_by_hand_is_kept_before_it_follows_the_device_again(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    versions = [add(registry, tmp_path, model, f"run-{i}") for i in range(3)]
    crown(registry, versions[0])
    client_of(registry).set_registered_model_alias("net", "champion", "2")
    registry.challenge("net", "3", "quick")
    assert registry.version("net").version == "1"
    assert registry.rollback("net").version == "2"


def test_a_champion_whose_alias_was_moved_away_by_hand_can_be_gone_back_to(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    versions = [add(registry, tmp_path, model, f"run-{i}") for i in range(3)]
    for version in versions[:2]:
        crown(registry, version)
    client_of(registry).set_registered_model_alias("net", "champion-quick", "3")
    assert [registry.rollback("net").version for _ in range(2)] == ["2", "1"]


def test_a_champion_whose_alias_was_removed_by_hand_can_be_gone_back_to(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    version = add(registry, tmp_path, model, "run-1")
    crown(registry, version)
    client_of(registry).delete_registered_model_alias("net", "champion-quick")
    assert registry.rollback("net").version == "1"


ACTS = st.lists(st.tuples(st.sampled_from(["promote", "by hand", "plain", "remove"]), st.integers(1, 5)), max_size=12)


@given(ACTS)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_was_champion_is_reached_by_going_back(acts: list[tuple[str, int]]) -> None:
    events: list[Event] = []
    current: str | None = None
    plain: str | None = None
    ever: set[str] = set()
    for at, (act, number) in enumerate(acts):
        version = str(number)
        if act == "promote" and version != current:
            events.append(Event(PROMOTE, "d", version, current, at))
            ever |= {version, *filter(None, [current])}
            current = version
        elif act == "by hand":
            current = version
        elif act == "plain":
            plain = version
        elif act == "remove":
            current = None
        if current is not None and plain is not None and plain != current:  # what a repair does
            if not is_known(plain, events, current):
                events.append(Event(FOUND, "d", plain, None, at))
            ever.add(plain)
            plain = current
        if act == "promote":
            plain = current
    if current is not None:
        ever.add(current)
    reached = set()
    for at in range(200):
        earlier = [v for v in champions(events, current) if v != current]
        if current is not None:
            reached.add(current)
        if not earlier:
            break
        events.append(Event(ROLLBACK, "d", earlier[-1], current, 100 + at))
        current = earlier[-1]
    assert ever <= reached


def test_an_entry_whose_move_never_came_is_no_champion_but_one_that_is_marked_is() -> None:
    entries = [Event(PROMOTE, "d", "1", None, 0), Event(PROMOTE, "d", "2", "1", 1, done=False)]
    assert champions(entries, "1") == ["1"]
    assert champions(entries, "2") == ["1", "2"]
    assert champions([entries[0], Event(PROMOTE, "d", "2", "1", 1)], "1") == ["1", "2", "1"]


def test_a_roll_back_to_what_was_found_does_not_lead_forward_again() -> None:
    entries = [Event(PROMOTE, "d", "4", None, 0), Event(FOUND, "d", "3", None, 1), Event(ROLLBACK, "d", "3", "4", 2)]
    assert champions(entries[:2], "4") == ["3", "4"]
    assert champions(entries, "3") == ["3"]
