"""The benchmark as a whole: what is measured at which batch, all of it interleaved, and written as it comes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from datamux_jax import benchmark_memory, benchmark_report, breakdown, contenders, workdir
from datamux_jax.backbones.vision import VISION
from datamux_jax.benchmark import measure
from datamux_jax.benchmark_networks import BALANCES, SCOPES, STEPS, Entry, Network, Timed, check
from datamux_jax.config import validate
from datamux_jax.errors import InputError, choose
from datamux_jax.losses import TASK_LOSSES

MEMORY = ("program", "process")
JSON = "benchmark.json"
BATCHES = 2  # A call end to end, unless it is said.


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
      step: "predict" or "train".
      balances: of "groups" (every network gets as many mixed rows) and "instances" (as many instances).
      scopes: of "device" (inputs lie there, results stay there) and "end_to_end" (from raw inputs to fetched results).
      instances: of a batch at equal instances; 0: the smallest number from `groups` on that every N divides, on all devices.
      batches: that a call handles end to end, the next one being started before the last one is fetched; 0: 2.
      windows: timed windows each.
      seconds: length of a window.
      memory: "program", what the compiler says, or "process", the peak of a process for each.
      breakdown: also time the stages of a prediction.
      profile: folder for a profiler's trace; None: none.
    """

    step: str = "predict"
    balances: tuple[str, ...] = BALANCES
    scopes: tuple[str, ...] = ("device",)
    instances: int = 0
    batches: int = 0
    windows: int = 15
    seconds: float = 0.3
    memory: str = "program"
    breakdown: bool = False
    profile: Path | None = None


def own_entries(runs: Mapping[str, Any], step: str, folder: Path | None = None) -> list[Entry]:
    """The networks of a config or of an experiment in `folder`: to predict, those that learn a task; to train, all."""
    entries = [
        Entry(name or f"n{one.num_instances}", "own", one, None if folder is None else folder / name)
        for name, one in runs.items()
        if step == "train" or len(runs) == 1 or one.objective in TASK_LOSSES
    ]
    if not entries:
        objectives = ", ".join(sorted({repr(one.objective) for one in runs.values()}))
        raise InputError(f"No run learns a task, only {objectives}: nothing is predicted. Measure --step=train.")
    return entries


def groups_of(entries: Sequence[Entry], balance: str, settings: Settings) -> dict[str, int]:
    """Mixed rows of a batch of each entry, by name.

    Raises:
      InputError: the instances of a batch do not divide by every N.
    """
    key = "batch_groups" if settings.step == "train" else "eval.batch_groups"
    given = {e.name: e.config.batch_groups if settings.step == "train" else e.config.eval.batch_groups for e in entries}
    if balance == "groups":
        if len(set(given.values())) > 1:
            raise InputError(
                f"The networks have different {key}: {', '.join(f'{name} {groups}' for name, groups in given.items())}. Give all the "
                f"same with --config.{key}=, or leave 'groups' out of --balance."
            )
        return given
    # Every batch has a multiple of the devices of groups.
    devices = benchmark_memory.devices() if settings.memory == "process" else jax.device_count()
    common = math.lcm(*(e.config.num_instances for e in entries)) * devices
    total = settings.instances or -(-max(given.values()) // common) * common
    if total % common:
        numbers = ", ".join(map(str, sorted({e.config.num_instances for e in entries})))
        raise InputError(
            f"--instances={total} is not a multiple of every number of instances ({numbers}) on {devices} device(s). Give a "
            f"multiple of {common}, or leave 'instances' out of --balance."
        )
    return {e.name: total // e.config.num_instances for e in entries}


def check_settings(entries: Sequence[Entry], settings: Settings, output: Path) -> None:
    """Refuses, before anything long, what cannot be measured or written.

    Raises:
      InputError: a value that does not exist or does not fit, two rows of one name, or a folder that holds a measurement.
    """
    choose(STEPS, settings.step, "The step --step =")
    choose(MEMORY, settings.memory, "The memory --memory =")
    for flag, values, known in (("balance", settings.balances, BALANCES), ("scope", settings.scopes, SCOPES)):
        for value in values or ("",):
            choose(known, value, f"The value --{flag} =")
        if len(set(values)) < len(values):
            raise InputError(f"--{flag}={','.join(values)} names one twice, whose rows would be one. Name each once.")
    if settings.windows < 1 or not 0 < settings.seconds < math.inf or min(settings.batches, settings.instances) < 0:
        raise InputError(
            f"--windows={settings.windows}, --seconds={settings.seconds}, --batches={settings.batches}, "
            f"--instances={settings.instances}: windows are at least 1, seconds are more than 0, and batches and instances are 0 or "
            "more."
        )
    for flag, number, reader, measured in (
        ("instances", settings.instances, "balance=instances", settings.balances),
        ("batches", settings.batches, "scope=end_to_end", settings.scopes),
    ):
        if number and reader.partition("=")[2] not in measured:
            raise InputError(f"--{flag}={number} is for --{reader}, which is not measured. Leave it out, or measure that too.")
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--contenders names {', '.join(twice)} twice. Name each once.")
    if settings.step == "train" and (settings.breakdown or any(entry.path for entry in entries)):
        raise InputError(
            "--step=train measures fresh networks as a whole. Leave out --breakdown, and give --config= and not --workdir=."
        )
    if (output / JSON).exists():
        raise InputError(f"--output={output} holds a measurement, which is not overwritten. Choose another folder.")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output={output} is a file. Choose a folder.")
    if settings.profile and (problem := workdir.obstacle(settings.profile)):
        raise InputError(f"--profile={settings.profile} cannot be written: {problem}. Choose another folder.")
    if settings.memory == "process":
        benchmark_memory.check()
    for entry in entries:
        validate(entry.config)
        check(entry, settings.step)
        if settings.breakdown and entry.config.model.backbone in VISION:
            raise InputError(
                f"--breakdown times the stages of a Transformer, but {entry.name} has model.backbone = "
                f"{entry.config.model.backbone!r}. Leave it out."
            )
    for balance in settings.balances:
        groups_of(entries, balance, settings)


def built(entry: Entry, settings: Settings) -> tuple[Network | contenders.Other, float | None]:
    """The entry, ready for `timed`, and by how much another implementation's logits differ from ours."""
    if entry.kind not in contenders.OTHERS:
        return Network(entry, settings.step), None
    plain = Network(dataclasses.replace(entry, name="plain", kind="own"), "predict")
    other = contenders.Other(entry, plain, settings.step)
    return other, contenders.agreement(other, plain)


def alone(fields: dict[str, Any], config: dict[str, Any], settings: Settings, groups: int) -> dict[str, int]:
    """Peak memory of one entry in this process; arguments can be sent to another one."""

    def make() -> Callable[[], Any]:
        one, _ = built(Entry(config=ml_collections.ConfigDict(config), **fields), settings)
        return one.timed(groups).calls["device"]

    return benchmark_memory.of_calls(make)


def run(entries: Sequence[Entry], settings: Settings, output: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Measures everything in one interleaved run, and writes `benchmark.json`, `.md` and `.png` into `output`.

    The JSON is written anew when a contender is ready and after every round of windows, so that a run that is killed leaves what it
    has measured, with `complete` false. It does not go on from there: windows of different hours are not comparable.

    Args:
      entries: what to measure.
      settings: how.
      output: folder.
      about: `title`, `command` and `results` (accuracies, `benchmark_report.read_results`), for the report.

    Raises:
      InputError: see `check_settings`, or a contender that computes something else than we do.
    """
    check_settings(entries, settings, output)
    output.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Any] = {
        **about,
        "complete": False,
        "settings": {**dataclasses.asdict(settings), "profile": str(settings.profile or "")},
        "machine": {},
        "versions": benchmark_report.versions([entry.kind for entry in entries]),
        "networks": {},
        "rows": [],
        "stages": [],
    }
    load = benchmark_report.load()  # Before it is our own.
    memory = _memory(entries, settings)  # Before this process takes the device.
    contents["machine"] = benchmark_report.machine(load)

    def write() -> None:
        workdir.write_json(output / JSON, contents)

    timed, networks = {}, {}
    for entry in entries:
        one, error = built(entry, settings)
        if isinstance(one, Network):
            networks[entry.name] = one
        contents["networks"][entry.name] = _about(entry, error)
        for balance in settings.balances:
            groups = groups_of(entries, balance, settings)[entry.name]
            timed[entry.name, balance] = one.timed(groups, settings.batches or BATCHES)
            contents["rows"] += _rows(entry, balance, groups, timed[entry.name, balance], settings, memory)
            print(f"{entry.name}, equal {balance}: ready", flush=True)
        write()
    _measure_rows(entries, contents, timed, settings, write)
    if settings.breakdown:
        _measure_stages(entries, contents, timed, networks, settings)
    contents["machine"]["load_after"] = benchmark_report.load()
    contents["complete"] = True
    write()
    benchmark_report.write(output, contents)
    if settings.profile:  # Last: a profiler that fails costs no measurement.
        ours = {f"{name}, equal {kind}": one.calls["device"] for (name, kind), one in timed.items() if name in networks}
        breakdown.trace(settings.profile, ours)
    return contents


def _about(entry: Entry, error: float | None) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "what": contenders.OTHERS[entry.kind][1] if entry.kind in contenders.OTHERS else "",
        "largest_difference_of_logits": error,
        "config": workdir.plain(entry.config),
    }


def _memory(entries: Sequence[Entry], settings: Settings) -> dict[tuple[str, str], dict[str, int]]:
    found = {}
    for balance in settings.balances if settings.memory == "process" else ():
        for entry in entries:
            if entry.kind in contenders.OTHERS:  # Their process would hold what their network was made from.
                continue
            fields = {"name": entry.name, "kind": entry.kind, "path": entry.path}
            groups = groups_of(entries, balance, settings)[entry.name]
            print(f"{entry.name}, equal {balance}: memory, in a process of its own", flush=True)
            found[entry.name, balance] = benchmark_memory.in_own_process(
                alone, fields, workdir.plain(entry.config), settings, groups
            )
    return found


def _rows(
    entry: Entry, balance: str, groups: int, timed: Timed, settings: Settings, memory: Mapping[tuple[str, str], dict[str, int]]
) -> list[dict[str, Any]]:
    peaks = memory.get((entry.name, balance), {})
    return [
        {
            "name": entry.name,
            "kind": entry.kind,
            "num_instances": entry.config.num_instances,
            "balance": balance,
            "scope": scope,
            "groups": groups,
            "instances_per_call": timed.instances[scope],
            "parameters": timed.parameters,
            "setup_seconds": timed.setup_seconds,
            "first_call_seconds": timed.first_seconds,
            "program_bytes": timed.program_bytes,
            **peaks,
        }
        for scope in settings.scopes
    ]


def _key(row: Mapping[str, Any]) -> str:
    return f"{row['name']} {row['balance']} {row['scope']}"


def _measure_rows(
    entries: Sequence[Entry],
    contents: dict[str, Any],
    timed: Mapping[tuple[str, str], Timed],
    settings: Settings,
    write: Callable[[], None],
) -> None:
    plain = [e.name for e in entries if e.kind == "own" and e.config.num_instances == 1]
    contents["reference"] = (plain or [entries[0].name])[0]
    rows = {_key(row): row for row in contents["rows"]}
    calls = {key: timed[row["name"], row["balance"]].calls[row["scope"]] for key, row in rows.items()}
    instances = {key: row["instances_per_call"] for key, row in rows.items()}
    reference = {key: _key({**row, "name": contents["reference"]}) for key, row in rows.items()}

    def after(result: Mapping[str, dict[str, Any]]) -> None:
        for key, numbers in result.items():
            rows[key].update(numbers)
        write()

    how: Any = {"windows": settings.windows, "seconds": settings.seconds}
    measure(calls, instances, reference=reference, after=after, **how)


def _measure_stages(
    entries: Sequence[Entry],
    contents: dict[str, Any],
    timed: Mapping[tuple[str, str], Timed],
    networks: Mapping[str, Network],
    settings: Settings,
) -> None:
    """Times the stages of our networks at the first balance; `whole` is the program that the rows have."""
    balance = settings.balances[0]
    groups = groups_of(entries, balance, settings)
    calls: dict[str, Callable[[], Any]] = {}
    about: dict[str, tuple[str, str]] = {}
    for name, network in networks.items():
        for stage, call in {
            **breakdown.stages(network, groups[name]),
            breakdown.WHOLE: timed[name, balance].calls["device"],
        }.items():
            calls[f"{name} {stage}"], about[f"{name} {stage}"] = call, (name, stage)
    result = measure(calls, dict.fromkeys(calls, 1), windows=settings.windows, seconds=settings.seconds)
    contents["stages"] = [
        {
            "name": about[key][0],
            "stage": about[key][1],
            "balance": balance,
            "groups": groups[about[key][0]],
            "milliseconds": 1000 / numbers["instances_per_second"],
            "spread": numbers["spread"],
            "windows": [1000 / rate for rate in numbers["windows"]],
        }
        for key, numbers in result.items()
    ]
