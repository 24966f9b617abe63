"""The scripts for Cloud TPU, GKE and Slurm: what they would run, what they refuse, and what they do with a pretended cloud.

The pretended `gcloud` runs the commands for the hosts on this machine, each with a home folder of its own; so copying, installing,
starting, restarting and stopping are the real scripts. Only Python, the trainer and what needs root are pretended there.
"""

import contextlib
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
POD = ROOT / "launch/pod"
SCRIPTS = [*sorted(path.name for path in POD.glob("*.sh")), "train.sbatch"]
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(
    not BASH or not shutil.which("flock") or not shutil.which("git"), reason="needs bash, flock, git"
)

TPU = ["--name=mux", "--zone=us-west4-a", "--type=v5litepod-64"]
TWO_HOSTS = ["--name=mux", "--zone=us-central2-b", "--type=v4-16"]
CLUSTER = ["--cluster=tpus", "--location=us-west4", "--project=my-project"]
JOB = ["--name=mux", "--image=us-west4-docker.pkg.dev/my-project/d/train:1", "--accelerator=v5e", "--topology=8x8"]
SLURM = ["--name=mux", "--nodes=4", "--gpus_per_node=8", "--time=24:00:00", "--workdir=/scratch/runs/mux"]
TRAIN = ["--", "--config=configs/muxbert.py:base,n=5"]
SHARED = ["--volume=v", "--workdir=/mnt/pod/r", *TRAIN]
HOST = "bash datamux_pod/src/launch/pod/host.sh"


def run(script, *words, path=None, root=ROOT, **variables):
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    if path:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        [BASH, str(root / "launch/pod" / script), *map(str, words)],
        env=environment, capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def wait_for(condition, seconds=8):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def tripwires(tmp_path):
    """A PATH on which everything that could do something outside leaves a trace."""
    for name in (
        *("gcloud", "kubectl", "docker", "sbatch", "srun", "squeue", "scancel", "scontrol"),
        *("git", "ssh-add", "tail", "mkdir", "tar"),
    ):
        executable(tmp_path / "bin" / name, f'#!{BASH}\necho "{name} $*" >>{tmp_path}/called\nexit 99\n')
    yield tmp_path / "bin"
    assert not (tmp_path / "called").exists(), (tmp_path / "called").read_text()


def dry(path, script, *words):
    """The commands that a dry run prints, as lists of words."""
    position = words.index("--") if "--" in words else len(words)
    done = run(script, *words[:position], "--dry_run", *words[position:], path=path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def remote(command):
    """What an ssh command runs on the hosts, as a list of words."""
    (text,) = [word.removeprefix("--command=") for word in command if word.startswith("--command=")]
    return shlex.split(text)


# What is written.


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script):
    subprocess.run([BASH, "-n", str(POD / script)], check=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
def test_shellcheck():
    done = subprocess.run(
        ["shellcheck", "-x", *(f"launch/pod/{name}" for name in SCRIPTS)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["tpu.sh", "gke.sh", "slurm.sh", "host.sh"])
def test_help_names_every_command(script, tripwires):
    shown = run(script, "--help", path=tripwires, HOME=tripwires.parent)
    assert shown.returncode == 0
    for command in (
        run(script, path=tripwires).stderr.partition("Commands are ")[2].partition(";")[0].replace(" and ", ", ").split(", ")
    ):
        assert f"#   {command}" in (POD / script).read_text() or f", {command} " in shown.stdout, command


def examples():
    """The commands of docs/pods.md that call the scripts, as lists of words; what is kept in arrays is filled in."""
    lines = [line.strip() for line in (ROOT / "docs/pods.md").read_text().splitlines() if line.startswith("    ")]
    kept = dict(line.removesuffix(")").split("=(", 1) for line in lines if "=(" in line)
    for line in lines:
        if line.startswith("bash launch/pod/"):
            for name, value in kept.items():
                line = line.replace(f'"${{{name}[@]}}"', value)
            yield shlex.split(line)[1:]


def test_the_guide_names_only_commands_and_flags_that_exist(tripwires):
    called = set()
    for script, command, *words in examples():
        dry(tripwires, Path(script).name, command, *words)
        called.add(f"{Path(script).name} {command}")
    everything = {"create", "install", "mount", "launch", "status", "watch", "stop", "resume", "fetch", "delete"}
    assert {f"tpu.sh {command}" for command in everything} <= called
    everything = {"cluster", "nodes", "storage", "image", "launch", "status", "watch", "stop", "delete_nodes", "delete_cluster"}
    assert {f"gke.sh {command}" for command in everything} <= called
    assert {f"slurm.sh {command}" for command in ("submit", "status", "watch", "stop")} <= called


def test_the_guide_shows_dry_runs_that_run_nothing_as_they_are_written(tripwires):
    shown = [words for words in examples() if "--dry_run" in words]
    assert [command for _, command, *_ in shown] == ["create", "launch"]
    for script, command, *words in shown:
        done = run(Path(script).name, command, *words, path=tripwires)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("gcloud compute tpus ")


def test_the_guide_names_only_configs_that_exist():
    seen = 0
    for words in examples():
        config = None
        for word in words[words.index("--") + 1 :] if "--" in words else []:
            name, _, value = word.removeprefix("--").partition("=")
            if name == "config":
                path, _, argument = value.partition(":")
                config = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config(argument)
                seen += 1
            elif name.startswith("config."):
                node = config
                for part in name.split(".")[1:]:
                    node = node[part]
            else:
                assert name == "profile_steps", word
    assert seen > 5


# What Cloud TPU would be asked for.


@pytest.mark.parametrize(
    ("kind", "chips", "hosts", "runtime"),
    [
        ("v4-8", 4, 1, "tpu-ubuntu2204-base"),
        ("v4-32", 16, 4, "tpu-ubuntu2204-base"),
        ("v5litepod-4", 4, 1, "v2-alpha-tpuv5-lite"),
        ("v5litepod-8", 8, 1, "v2-alpha-tpuv5-lite"),
        ("v5litepod-64", 64, 16, "v2-alpha-tpuv5-lite"),
        ("v5p-8", 4, 1, "v2-alpha-tpuv5"),
        ("v5p-384", 192, 48, "v2-alpha-tpuv5"),
        ("v6e-8", 8, 1, "v2-alpha-tpuv6e"),
        ("v6e-256", 256, 64, "v2-alpha-tpuv6e"),
    ],
)
def test_chips_and_hosts_of_a_type(tripwires, kind, chips, hosts, runtime):
    flags = ["--name=mux", "--zone=us-west4-a", f"--type={kind}"]
    create, describe = dry(tripwires, "tpu.sh", "create", *flags)
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "mux"]
    assert {
        f"--accelerator-type={kind}",
        f"--runtime-version={runtime}",
        "--node-id=mux",
        "--zone=us-west4-a",
        "--async",
    } <= set(create)
    assert "--format=value(state.state)" in describe
    check = dry(tripwires, "tpu.sh", "install", *flags)[-1]
    assert remote(check) == [*HOST.split(), "check", f"--chips={chips}", f"--hosts={hosts}"]
    start = remote(dry(tripwires, "tpu.sh", "launch", *flags, "--workdir=/mnt/pod/r", *TRAIN)[-1])
    assert f"--hosts={hosts}" in start


def test_tpu_create_passes_on_how_to_ask(tripwires):
    flags = ["--project=my-project", "--spot", "--version=v2-new", "--valid_for=6h", "--network=n", "--subnetwork=s"]
    create = dry(tripwires, "tpu.sh", "create", *TPU, *flags, "--service_account=a@b.c", "--internal_ip")[0]
    asked = {
        *(
            "--project=my-project",
            "--spot",
            "--runtime-version=v2-new",
            "--valid-until-duration=6h",
            "--network=n",
            "--subnetwork=s",
        ),
        *("--service-account=a@b.c", "--internal-ips"),
    }
    assert asked <= set(create)
    assert "--reserved" in dry(tripwires, "tpu.sh", "create", *TPU, "--reserved")[0]


def test_tpu_install(tripwires):
    make, archive, copy, unpack, check = dry(tripwires, "tpu.sh", "install", *TPU, "--extras=tpu,hub")
    packed = str(ROOT / "build/datamux_jax.tar.gz")
    assert make == ["mkdir", "-p", str(ROOT / "build")]
    assert archive == ["git", "-C", str(ROOT), "archive", "--format=tar.gz", "-o", packed, "HEAD"]
    assert copy == ["gcloud", "compute", "tpus", "tpu-vm", "scp", packed, "mux:", "--zone=us-west4-a", "--worker=all"]
    assert "--worker=all" in unpack
    assert remote(unpack)[-2:] == ["install", "--extras=tpu,hub"]
    assert "--worker=all" in check


def test_tpu_launch_runs_the_trainer_on_all_workers(tripwires):
    title = '--config.title=it\'s "so" $HOME `x`'
    status, start = dry(
        tripwires, "tpu.sh", "launch", *TPU, "--workdir=/mnt/pod/my runs", *TRAIN, "--config.mesh.fsdp=16", title
    )
    assert remote(status) == [*HOST.split(), "status"]
    assert start[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mux"]
    assert "--worker=all" in start
    assert remote(start) == [
        *HOST.split(), "start", "--workdir=/mnt/pod/my runs", "--hosts=16", "--restarts=3", "--pause=120",
        "--", "--config=configs/muxbert.py:base,n=5", "--config.mesh.fsdp=16", title,
    ]  # fmt: skip


def test_tpu_other_commands(tripwires):
    (mount,) = dry(tripwires, "tpu.sh", "mount", *TPU, "--bucket=my-bucket")
    assert remote(mount) == [*HOST.split(), "mount", "--bucket=my-bucket", "--mount=/mnt/pod"]
    (mount,) = dry(tripwires, "tpu.sh", "mount", *TPU, "--nfs=10.0.0.2:/my share", "--mount=/data")
    assert remote(mount) == [*HOST.split(), "mount", "--nfs=10.0.0.2:/my share", "--mount=/data"]
    (status,) = dry(tripwires, "tpu.sh", "status", *TPU)
    assert remote(status) == [*HOST.split(), "status"]
    (watch,) = dry(tripwires, "tpu.sh", "watch", *TPU, "--worker=3", "--lines=7")
    assert "--worker=3" in watch
    assert remote(watch) == ["tail", "-n", "7", "-F", "datamux_pod/train.log"]
    (stop,) = dry(tripwires, "tpu.sh", "stop", *TPU, "--wait=60", "--kill")
    assert "--worker=all" in stop
    assert remote(stop) == [*HOST.split(), "stop", "--wait=60", "--kill"]
    pack, make, copy, unpack = dry(tripwires, "tpu.sh", "fetch", *TPU, "--workdir=/mnt/pod/my runs", "--to=my folder")
    assert remote(pack)[:4] == ["tar", "-C", "/mnt/pod/my runs", "--exclude=checkpoints"]
    assert make[-1] == unpack[-1] == "my folder"
    assert copy[5] == "mux:datamux_pod/fetched.tar.gz"
    assert "--worker=0" in copy
    (delete,) = dry(tripwires, "tpu.sh", "delete", *TPU)
    assert "--force" in delete
    assert "--quiet" not in delete  # gcloud asks first.
    assert "--quiet" in dry(tripwires, "tpu.sh", "delete", *TPU, "--yes")[0]


def test_tpu_resume_shows_the_whole_way(tripwires):
    commands = dry(tripwires, "tpu.sh", "resume", *TPU, "--spot", "--bucket=my-bucket", "--workdir=/mnt/pod/r", *TRAIN)
    verbs = [" ".join(command[3:5]) if command[0] == "gcloud" else command[0] for command in commands]
    assert verbs == [
        "queued-resources describe", "queued-resources delete", "queued-resources create", "mkdir", "git",
        "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh",
    ]  # fmt: skip
    assert "--spot" in commands[2]
    assert remote(commands[-1])[2] == "start"


# What GKE would be asked for.


@pytest.mark.parametrize(
    ("accelerator", "topology", "machine", "nodes", "chips", "label"),
    [
        ("v4", "2x2x1", "ct4p-hightpu-4t", 1, 4, "tpu-v4-podslice"),
        ("v4", "4x4x8", "ct4p-hightpu-4t", 32, 4, "tpu-v4-podslice"),
        ("v5e", "1x1", "ct5lp-hightpu-1t", 1, 1, "tpu-v5-lite-podslice"),
        ("v5e", "2x4", "ct5lp-hightpu-8t", 1, 8, "tpu-v5-lite-podslice"),
        ("v5e", "8x16", "ct5lp-hightpu-4t", 32, 4, "tpu-v5-lite-podslice"),
        ("v5p", "2x4x4", "ct5p-hightpu-4t", 8, 4, "tpu-v5p-slice"),
        ("v5p", "4x8x12", "ct5p-hightpu-4t", 96, 4, "tpu-v5p-slice"),
        ("v6e", "2x2", "ct6e-standard-4t", 1, 4, "tpu-v6e-slice"),
        ("v6e", "16x16", "ct6e-standard-4t", 64, 4, "tpu-v6e-slice"),
    ],
)
def test_machines_of_a_topology(tripwires, accelerator, topology, machine, nodes, chips, label):
    shape = [f"--accelerator={accelerator}", f"--topology={topology}"]
    (pool,) = dry(tripwires, "gke.sh", "nodes", *CLUSTER, "--name=mux", "--zone=us-west4-a", *shape)
    assert {f"--machine-type={machine}", f"--num-nodes={nodes}"} <= set(pool)
    assert (f"--tpu-topology={topology}" in pool) == (nodes > 1)
    job = ["--name=mux", "--image=i:1", *shape, "--volume=shared", "--workdir=/mnt/pod/r"]
    lines = run("gke.sh", "manifest", *job, *TRAIN, path=tripwires).stdout.splitlines()
    assert lines.count(f"        parallelism: {nodes}") == lines.count(f"        completions: {nodes}") == 1
    assert lines.count(f"                  google.com/tpu: {chips}") == 2
    assert f"              cloud.google.com/gke-tpu-accelerator: {label}" in lines
    assert f'              cloud.google.com/gke-tpu-topology: "{topology}"' in lines
    assert ('              - "--multihost"' in lines) == (nodes > 1)


def test_gke_launch_shows_the_manifest(tripwires):
    title = '--config.title=it\'s "so" $(HOME) \\ `x`'
    where = ["--bucket=my-bucket", "--workdir=/mnt/pod/my runs", "--grace=900", "--restarts=7", "--context=c"]
    done = run("gke.sh", "launch", *JOB, *where, "--dry_run", *TRAIN, title, path=tripwires)
    first, _, rest = done.stdout.partition("\n")
    assert first == "kubectl --context=c --namespace=default create -f - <<'END'"
    text, _, nothing = rest.partition("END\n")
    assert nothing == ""
    assert text == run("gke.sh", "manifest", *JOB, *where, *TRAIN, title, path=tripwires).stdout
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job["metadata"]["annotations"] == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    policy = job["spec"]["failurePolicy"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (7, "BlockingRecreate")
    assert policy["rules"] == [{"name": "refused", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (replicated,) = job["spec"]["replicatedJobs"]
    one = replicated["template"]["spec"]
    assert (one["parallelism"], one["completions"], one["backoffLimit"], one["completionMode"]) == (16, 16, 0, "Indexed")
    (rule,) = one["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [2]}}
    assert one["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    pod = one["template"]["spec"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"], pod["serviceAccountName"]) == ("Never", 900, "datamux")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "8x8",
    }
    (container,) = pod["containers"]
    assert container["name"] == "train"
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    assert container["args"] == [
        "python", "-m", "launch.train", "--workdir=/mnt/pod/my runs", "--multihost",
        "--config=configs/muxbert.py:base,n=5", title.replace("$(", "$$("),
    ]  # fmt: skip
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/mnt/pod"}]
    (volume,) = pod["volumes"]
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    options = set(volume["csi"]["volumeAttributes"]["mountOptions"].split(","))
    assert {"metadata-cache:ttl-secs:0", "metadata-cache:negative-ttl-secs:0", "file-system:rename-dir-limit:200000"} <= options


def test_gke_manifest_with_a_volume(tripwires):
    yaml = pytest.importorskip("yaml")
    done = run("gke.sh", "manifest", *JOB, "--volume=shared", "--workdir=/mnt/pod/r", *TRAIN, path=tripwires)
    one = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert "metadata" not in one["template"]
    assert one["template"]["spec"]["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}}]
    assert "serviceAccountName" not in one["template"]["spec"]


def test_gke_other_commands(tripwires):
    create, credentials, jobset, wait = dry(tripwires, "gke.sh", "cluster", *CLUSTER)
    assert {"--workload-pool=my-project.svc.id.goog", "--location=us-west4"} <= set(create)
    assert credentials[:4] == ["gcloud", "container", "clusters", "get-credentials"]
    assert jobset[-1] == "https://github.com/kubernetes-sigs/jobset/releases/download/v0.12.0/manifests.yaml"
    assert wait[:2] == ["kubectl", "wait"]
    account, binding = dry(
        tripwires,
        "gke.sh",
        "storage",
        "--bucket=my-bucket",
        "--project=my-project",
        "--project_number=123456789012",
        "--namespace=ns",
    )
    assert account == ["kubectl", "--namespace=ns", "create", "serviceaccount", "datamux"]
    assert binding[4:6] == ["gs://my-bucket", "--role=roles/storage.objectUser"]
    assert binding[6].endswith(
        "projects/123456789012/locations/global/workloadIdentityPools/my-project.svc.id.goog/subject/ns/ns/sa/datamux"
    )
    claim = run("gke.sh", "storage", "--volume=shared", "--size=2Ti", "--dry_run", path=tripwires).stdout
    assert "  storageClassName: standard-rwx\n  resources:\n    requests:\n      storage: 2Ti\n" in claim
    _, _, build, push = dry(tripwires, "gke.sh", "image", "--image=r/t:1", "--extras=cuda")
    assert build[:2] == ["docker", "build"]
    assert {"--build-arg=EXTRAS=cuda", "--platform=linux/amd64", "launch/pod/Dockerfile"} <= set(build)
    assert push == ["docker", "push", "r/t:1"]
    job, pods = dry(tripwires, "gke.sh", "status", "--name=mux")
    assert job[-3:] == ["get", "jobset", "mux"]
    assert "jobset.sigs.k8s.io/jobset-name=mux" in pods
    (watch,) = dry(tripwires, "gke.sh", "watch", "--name=mux", "--worker=2")
    assert watch[-1] == "jobset.sigs.k8s.io/jobset-name=mux,batch.kubernetes.io/job-completion-index=2"
    (stop,) = dry(tripwires, "gke.sh", "stop", "--name=mux", "--grace=900")
    assert {"delete", "jobset", "mux", "--cascade=foreground", "--timeout=960s"} <= set(stop)
    (nodes,) = dry(tripwires, "gke.sh", "delete_nodes", *CLUSTER, "--name=mux")
    assert nodes[:5] == ["gcloud", "container", "node-pools", "delete", "mux"]
    (cluster,) = dry(tripwires, "gke.sh", "delete_cluster", *CLUSTER, "--yes")
    assert cluster[:5] == ["gcloud", "container", "clusters", "delete", "tpus"]
    assert cluster[-1] == "--quiet"


# What Slurm would be asked for.


def test_slurm_submit(tripwires):
    flags = [*SLURM[:-1], "--workdir=/scratch/my runs/mux", "--partition=gpu", "--cpus_per_task=12", "--requeues=9"]
    make, submit = dry(tripwires, "slurm.sh", "submit", *flags, "--grace=300", *TRAIN, "--config.title=it's")
    assert make == ["mkdir", "-p", "/scratch/my runs/mux.logs"]
    script = submit.index(str(POD / "train.sbatch"))
    assert {
        *("--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=24:00:00", "--partition=gpu", "--cpus-per-task=12"),
        *("--signal=TERM@300", "--requeue", "--open-mode=append", "--dependency=singleton"),
        "--output=/scratch/my runs/mux.logs/%x-%j.log",
    } <= set(submit[:script])
    assert submit[script + 1 :] == [
        f"--root={ROOT}", f"--python={ROOT}/.venv/bin/python", "--gpus_per_node=8", "--logs=/scratch/my runs/mux.logs",
        "--restarts=3", "--pause=120", "--requeues=9", "--", "--workdir=/scratch/my runs/mux", "--multihost",
        "--config=configs/muxbert.py:base,n=5", "--config.title=it's",
    ]  # fmt: skip
    one = dry(tripwires, "slurm.sh", "submit", *SLURM, "--nodes=1", *TRAIN)[1]
    assert "--multihost" not in one


def test_slurm_other_commands(tripwires):
    (status,) = dry(tripwires, "slurm.sh", "status", "--name=mux")
    assert status[:3] == ["squeue", "--me", "--name=mux"]
    (watch,) = dry(tripwires, "slurm.sh", "watch", "--name=mux", "--workdir=/scratch/r", "--worker=1")
    assert watch[-1] == "/scratch/r.logs/mux-JOB-1.log"
    stop = dry(tripwires, "slurm.sh", "stop", "--name=mux")
    assert ["scontrol", "update", "JobId=JOB", "Requeue=0"] in stop
    assert ["scancel", "--signal=TERM", "JOB"] in stop


# What is refused.

REFUSED = [
    ("tpu.sh", [], "No command is given"),
    ("tpu.sh", ["conquer", *TPU], "There is no command conquer"),
    ("tpu.sh", ["create", *TPU[1:]], "--name is missing. Give it, for instance --name="),
    ("tpu.sh", ["create", TPU[0], TPU[2]], "--zone is missing"),
    ("tpu.sh", ["create", *TPU[:2]], "--type is missing"),
    ("tpu.sh", ["create", "--name=Mux", *TPU[1:]], "--name=Mux is no valid name"),
    ("tpu.sh", ["create", "--name=", *TPU[1:]], "--name is missing"),
    ("tpu.sh", ["create", TPU[0], "--zone=us-west4", TPU[2]], "--zone=us-west4 is no zone"),
    ("tpu.sh", ["create", *TPU, "--project=x"], "--project=x is no project id"),
    ("tpu.sh", ["create", *TPU[:2], "--type=v5e-64"], "Write --type=v5litepod-64"),
    ("tpu.sh", ["create", *TPU[:2], "--type=v7-64"], "--type=v7-64 does not exist"),
    ("tpu.sh", ["create", *TPU[:2], "--type=v5litepod-48"], "1, 4, 8, 16, 32, 64, 128 or 256 chips"),
    ("tpu.sh", ["create", *TPU[:2], "--type=v4-12"], "8, 16, 32, 64 or a multiple of 128 TensorCores, at most 8192"),
    ("tpu.sh", ["create", *TPU[:2], "--type=v4-8320"], "at most 8192"),
    ("tpu.sh", ["create", *TPU, "--spot", "--reserved"], "exclude each other"),
    ("tpu.sh", ["create", *TPU, "--spot=yes"], "--spot takes no value"),
    ("tpu.sh", ["create", *TPU, "--version"], "--version needs a value"),
    ("tpu.sh", ["create", *TPU, "--version=a b"], "is no runtime version"),
    ("tpu.sh", ["create", *TPU, "--valid_for=6"], "--valid_for=6 is no duration"),
    ("tpu.sh", ["create", *TPU, "--poll=0"], "--poll=0 is no positive whole number"),
    ("tpu.sh", ["create", *TPU, "--sped=1"], "There is no flag --sped here. The flags are --name"),
    ("tpu.sh", ["create", *TPU, "--bucket=b-1"], "There is no flag --bucket here"),
    ("tpu.sh", ["create", *TPU, "now"], "Unexpected argument 'now'"),
    ("tpu.sh", ["create", *TPU, *TRAIN], "only launch and resume take flags of launch.train"),
    ("tpu.sh", ["create", *TPU, "--network=a\nb"], "--network holds a line break"),
    ("tpu.sh", ["install", *TPU, "--extras=tpu;ls"], "is no list of extras"),
    ("tpu.sh", ["mount", *TPU], "Neither --bucket nor --nfs is given"),
    ("tpu.sh", ["mount", *TPU, "--bucket=b-1", "--nfs=h:/s"], "--bucket and --nfs are both given"),
    ("tpu.sh", ["mount", *TPU, "--bucket=gs://b-1"], "--bucket=gs://b-1 is no name of a bucket"),
    ("tpu.sh", ["mount", *TPU, "--nfs=/share"], "--nfs=/share is no NFS share"),
    ("tpu.sh", ["mount", *TPU, "--bucket=b-1", "--mount=data"], "--mount=data is no absolute path"),
    ("tpu.sh", ["launch", *TPU, *TRAIN], "--workdir is missing"),
    ("tpu.sh", ["launch", *TPU, "--workdir=runs", *TRAIN], "--workdir=runs is no absolute path"),
    ("tpu.sh", ["launch", *TPU, "--workdir=/r"], "No --config is given"),
    ("tpu.sh", ["launch", *TPU, "--workdir=/r", "--config=c"], "Flags of launch.train come after a bare --"),
    ("tpu.sh", ["launch", *TPU, "--workdir=/r", "--restarts=-1", *TRAIN], "--restarts=-1 is no number"),
    ("tpu.sh", ["launch", *TPU, "--workdir=/r", *TRAIN, "--workdir=/s"], "Write --workdir=DIR before the --"),
    ("tpu.sh", ["launch", *TPU, "--workdir=/r", *TRAIN, "--multihost"], "is added here"),
    ("tpu.sh", ["launch", *TPU, "--workdir=/r", *TRAIN, "more"], "'more' stands after the --"),
    ("tpu.sh", ["watch", *TPU, "--worker=16"], "has 16 hosts, from 0 to 15"),
    ("tpu.sh", ["watch", *TPU, "--worker=all"], "--worker=all is no worker"),
    ("tpu.sh", ["fetch", *TPU, "--workdir=/r"], "--to is missing"),
    ("gke.sh", ["nodes", *CLUSTER, "--name=mux", "--accelerator=v5e", "--topology=8x8"], "--zone is missing"),
    ("gke.sh", ["cluster", "--cluster=c1", "--location=us-west4"], "--project is missing"),
    ("gke.sh", ["cluster", "--cluster=c1", "--location=west", "--project=my-project"], "--location=west is no region"),
    ("gke.sh", ["cluster", *CLUSTER, "--jobset_version=new"], "is no release of JobSet"),
    ("gke.sh", ["manifest", *JOB[:2], "--accelerator=v3", "--topology=2x2", *SHARED], "Choose v4, v5e, v5p or v6e"),
    ("gke.sh", ["manifest", *JOB[:3], "--topology=8", *SHARED], "--topology=8 does not exist for v5e"),
    ("gke.sh", ["manifest", *JOB[:3], "--topology=4x4x4", *SHARED], "does not exist for v5e"),
    ("gke.sh", ["manifest", *JOB[:2], "--accelerator=v5p", "--topology=4x4", *SHARED], "three sizes with x between them"),
    ("gke.sh", ["manifest", *JOB[:2], "--accelerator=v5p", "--topology=8x4x4", *SHARED], "do not fall from left to right"),
    ("gke.sh", ["manifest", *JOB[:2], "--accelerator=v4", "--topology=2x4x8", *SHARED], "three multiples of 4"),
    ("gke.sh", ["manifest", *JOB[:2], "--accelerator=v4", "--topology=16x16x20", *SHARED], "at most 4096"),
    ("gke.sh", ["launch", *JOB, "--workdir=/mnt/pod/r", *TRAIN], "Neither --bucket nor --volume is given"),
    ("gke.sh", ["launch", *JOB, "--workdir=/mnt/pod/r", "--bucket=b-1", "--volume=v", *TRAIN], "both given"),
    ("gke.sh", ["launch", *JOB, "--workdir=/data/r", "--bucket=b-1", *TRAIN], "is not on the shared folder --mount=/mnt/pod"),
    ("gke.sh", ["launch", *JOB, "--grace=soon", *SHARED], "--grace=soon is no positive whole number"),
    ("gke.sh", ["launch", "--name=mux", "--image=a b", *JOB[2:], *SHARED], "is no name of an image"),
    ("gke.sh", ["storage", "--project=my-project"], "Neither --bucket nor --volume"),
    ("gke.sh", ["storage", "--bucket=b-1", "--project=my-project"], "--project_number is missing"),
    ("gke.sh", ["storage", "--volume=v", "--size=big"], "--size=big is no size"),
    ("slurm.sh", ["submit", *SLURM[1:], *TRAIN], "--name is missing"),
    ("slurm.sh", ["submit", *SLURM], "No --config is given"),
    ("slurm.sh", ["submit", *SLURM, "--nodes=two", *TRAIN], "--nodes=two is no positive whole number"),
    ("slurm.sh", ["submit", *SLURM, "--gpus_per_node=0", *TRAIN], "--gpus_per_node=0 is no positive whole number"),
    ("slurm.sh", ["submit", *SLURM, "--time=1h", *TRAIN], "--time=1h is no time limit"),
    ("slurm.sh", ["submit", *SLURM, "--time=00:06:59", *TRAIN], "--time=00:06:59 is too short"),
    ("slurm.sh", ["submit", *SLURM, "--workdir=runs", *TRAIN], "--workdir=runs is no absolute path"),
    ("slurm.sh", ["submit", *SLURM, "--partition=a b", *TRAIN], "is no value that Slurm takes"),
    ("slurm.sh", ["watch", "--name=mux"], "Neither --workdir nor --logs is given"),
    ("slurm.sh", ["stop", "--name=mux", *TRAIN], "only submit takes flags"),
    ("host.sh", ["start", "--workdir=r", *TRAIN], "--workdir=r is no absolute path"),
    ("host.sh", ["check", "--chips=x"], "--chips=x is no positive whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "words", "message"), REFUSED)
def test_bad_input_ends_with_one_paragraph(tripwires, script, words, message):
    done = run(script, *words, path=tripwires if script != "host.sh" else None, HOME=tripwires.parent)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("time_limit", "accepted"), [("7", True), ("6", False), ("07:00", True), ("0-1", True), ("0-0:06:59", False)]
)
def test_slurm_times(tripwires, time_limit, accepted):
    done = run("slurm.sh", "submit", *SLURM, f"--time={time_limit}", "--dry_run", *TRAIN, path=tripwires)
    assert done.returncode == (0 if accepted else 2), done.stderr


# What happens, with a pretended cloud.

GCLOUD = f"""#!{sys.executable} -IS
import contextlib, json, os, pathlib, shutil, subprocess, sys

cloud = pathlib.Path(os.environ["CLOUD"])
words = sys.argv[1:]
with (cloud / "calls").open("a") as calls:
    calls.write(json.dumps(words) + "\\n")
flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
service, verb, rest = words[2], words[3], [word for word in words[4:] if not word.startswith("--")]
states, homes = cloud / "states", sorted(cloud.glob("w*"))


def state():
    now, *later = states.read_text().split()
    states.write_text(" ".join(later or [now]))
    return now


if (cloud / "broken").exists():
    sys.exit("ERROR: (gcloud) there was a problem refreshing your current auth tokens")
if service == "queued-resources" and verb == "describe" or service == "tpu-vm" and verb == "describe":
    if not states.exists():
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
    node = cloud / "node"
    print(state() if service == "queued-resources" else node.read_text() if node.exists() else "READY")
elif verb == "create":
    states.write_text((cloud / "next").read_text())
elif verb == "delete":
    states.unlink()
    for home in homes:
        pids = home / "datamux_pod/pids"
        for pid in pids.read_text().split() if pids.exists() else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        shutil.rmtree(home / "datamux_pod", ignore_errors=True)
elif verb == "scp":
    source, target = rest
    if target.endswith(":"):
        for home in homes:
            shutil.copy(source, home)
    else:
        shutil.copy(homes[int(flags["worker"])] / source.partition(":")[2], target)
elif verb == "ssh":
    code = 0
    for home in homes if flags["worker"] == "all" else [homes[int(flags["worker"])]]:
        environment = dict(os.environ, HOME=str(home), PATH=os.environ["HOST_PATH"])
        code = subprocess.run(["{BASH}", "-c", flags["command"]], cwd=home, env=environment).returncode or code
    sys.exit(code)
"""

# Stands for the Python of the hosts: what comes after `-m launch.train` is noted, and `plan` says what becomes of it.
TRAINER = f"""#!{BASH}
case "$1 $2" in
  '-m pip') echo "$*" >>"$HOME/pip" ;;
  '-c '*) echo 'Python 3.13.0, jax 0.10.2' ;;
  '- '*)
    cat >/dev/null
    echo "checked $2 $3"
    ;;
  '-m launch.train')
    echo "$*" >>"$HOME/ran"
    read -r what <"$HOME/plan"
    sed -i 1d "$HOME/plan"
    case ${{what:-run}} in
      run)
        trap 'exit 130' TERM
        for ((i = 0; i < 1500; i++)); do /bin/sleep 0.02; done
        ;;
      deaf)
        trap '' TERM
        for ((i = 0; i < 1500; i++)); do /bin/sleep 0.02; done
        ;;
      *) exit "$what" ;;
    esac
    ;;
esac
"""


class Cloud:
    """Two hosts, a queue of states, and a checkout to install from."""

    def __init__(self, folder):
        self.folder = folder
        self.repository = folder / "repository"
        shutil.copytree(POD, self.repository / "launch/pod")
        git = ["git", "-C", str(self.repository), "-c", "user.name=t", "-c", "user.email=t@t"]
        for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            subprocess.run([*git, *words], check=True)
        self.homes = [folder / "w0", folder / "w1"]
        for home in self.homes:
            home.mkdir()
            (home / "plan").write_text("")
        here, there = folder / "here", folder / "there"
        self.path = here
        executable(here / "gcloud", GCLOUD)
        executable(here / "ssh-add", f"#!{BASH}\n[ ! -e {folder}/no_agent ]\n")
        for path in (here, there):
            executable(path / "sleep", f"#!{BASH}\nexec /bin/sleep 0.05\n")
        venv = f'mkdir -p "$3/bin" && cp {folder}/trainer "$3/bin/python"'
        executable(folder / "trainer", TRAINER)
        executable(there / "python3.13", f'#!{BASH}\n[ "$1" = -c ] || {{ {venv}; }}\n')
        # Nothing is done as root; only folders of the test are made.
        executable(there / "sudo", f'#!{BASH}\necho "$*" >>"$HOME/sudo"\n[ "$1" != mkdir ] || exec "$@"\n')
        executable(there / "hostname", f'#!{BASH}\nbasename "$HOME"\n')
        executable(there / "stat", f"#!{BASH}\ncat {folder}/filesystem\n")
        executable(there / "gcsfuse", f'#!{BASH}\necho "$*" >>"$HOME/gcsfuse"\ntouch "$HOME/mounted"\n')
        executable(there / "mountpoint", f'#!{BASH}\n[ -e "$HOME/mounted" ]\n')
        # A second of patience is much here.
        executable(
            there / "flock", f'#!{BASH}\n[ "$1 $2" != "-w 1" ] || set -- -w 0.2 "$3"\nexec {shutil.which("flock")} "$@"\n'
        )
        executable(there / "findmnt", f"#!{BASH}\ncat {folder}/mounted_source\n")
        (folder / "filesystem").write_text("fuseblk\n")
        (folder / "mounted_source").write_text("my-bucket\n")
        (folder / "next").write_text("ACTIVE")
        self.shared = folder / "shared"
        self.workdir = f"--workdir={self.shared}/my runs"

    def __call__(self, command, *words, flags=TWO_HOSTS):
        return run(
            "tpu.sh", command, *flags, *words, path=self.path, root=self.repository, CLOUD=self.folder,
            HOST_PATH=f"{self.folder}/there:{os.environ['PATH']}",
        )  # fmt: skip

    def installed(self):
        """As `install` leaves the hosts; how it does that has a test of its own."""
        (self.folder / "states").write_text("ACTIVE")
        for home in self.homes:
            shutil.copytree(self.repository / "launch", home / "datamux_pod/src/launch")
            executable(home / "datamux_pod/venv/bin/python", TRAINER)

    def calls(self):
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def ran(self):
        return [path.read_text().splitlines() if (path := home / "ran").exists() else [] for home in self.homes]

    def statuses(self):
        lines = [line.split() for line in self("status").stdout.splitlines()]
        return {line[1].removeprefix("host="): line[0].removeprefix("status=") for line in lines}

    def plan(self, *lines):
        for home, line in zip(self.homes, lines, strict=True):
            (home / "plan").write_text("".join(f"{word}\n" for word in line.split()))

    def kill_all(self):
        for home in self.homes:
            pids = home / "datamux_pod/pids"
            for pid in pids.read_text().split() if pids.exists() else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path):
    pretended = Cloud(tmp_path)
    yield pretended
    pretended.kill_all()


def test_create_waits_until_the_slice_is_there(cloud):
    (cloud.folder / "next").write_text("WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    done = cloud("create", "--spot", "--poll=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "mux: WAITING_FOR_RESOURCES after 0 minutes",
        "mux: PROVISIONING after 0 minutes",
        "mux: ACTIVE after 0 minutes",
        "mux is ACTIVE: 8 chips on 2 hosts.",
    ]
    again = cloud("create")
    assert again.stdout.startswith("mux was asked for before.\nmux: ACTIVE")
    assert sum(call[3] == "create" for call in cloud.calls()) == 1


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDING"])
def test_create_reports_a_request_that_fails(cloud, state):
    (cloud.folder / "next").write_text(f"ACCEPTED {state}")
    done = cloud("create", "--poll=1")
    assert done.returncode == 1
    assert f"The request for mux is {state}" in done.stderr
    assert "run `delete`, and `create` again" in done.stderr


def test_a_gcloud_that_fails_is_shown_and_nothing_is_created(cloud):
    (cloud.folder / "broken").touch()
    done = cloud("create")
    assert done.returncode == 1
    assert "auth tokens" in done.stderr
    assert [call[3] for call in cloud.calls()] == ["describe"]


def test_a_missing_key_is_explained_before_anything_is_copied(cloud):
    (cloud.folder / "no_agent").touch()
    done = cloud("install")
    assert done.returncode == 2
    assert "ssh-add ~/.ssh/google_compute_engine" in done.stderr
    assert not (cloud.folder / "calls").exists()


def test_from_install_to_delete(cloud, tmp_path):
    (cloud.repository / "new_file").touch()
    (cloud.folder / "states").write_text("ACTIVE")
    done = cloud("install")
    assert done.returncode == 0, done.stderr
    assert "Changes that are not committed are not copied." in done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("installed")] == [
        f"installed host={name} Python 3.13.0, jax 0.10.2" for name in ("w0", "w1")
    ]
    assert done.stdout.count("checked 8 2") == 2
    for home in cloud.homes:
        assert (home / "datamux_pod/src/launch/pod/host.sh").exists()
        assert not (home / "datamux_pod/src/new_file").exists()
        assert (home / "pip").read_text().endswith("-e .[tpu]\n")
    assert cloud.statuses() == {"w0": "idle", "w1": "idle"}

    mounted = cloud("mount", "--bucket=my-bucket", f"--mount={cloud.shared}")
    assert mounted.returncode == 0, mounted.stderr
    assert "--metadata-cache-ttl-secs=0" in (cloud.homes[0] / "gcsfuse").read_text()
    assert cloud("mount", "--bucket=my-bucket", f"--mount={cloud.shared}").returncode == 0
    assert (cloud.homes[0] / "gcsfuse").read_text().count("\n") == 1
    other = cloud("mount", "--bucket=other", f"--mount={cloud.shared}")
    assert other.returncode == 1
    assert "my-bucket is mounted" in other.stderr

    title = '--config.title=it\'s "so" $HOME'
    launched = cloud("launch", cloud.workdir, *TRAIN, title)
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout == "status=running host=w0\nstatus=running host=w1\n"
    expected = f"-m launch.train {cloud.workdir} --multihost --config=configs/muxbert.py:base,n=5 {title}"
    wait_for(lambda: all(cloud.ran()))
    assert cloud.ran() == [[expected]] * 2
    for home in cloud.homes:
        supervisor, trainer = map(int, (home / "datamux_pod/pids").read_text().split())
        assert os.getsid(trainer) == supervisor  # In a session of its own, it does not end with the connection.

    twice = cloud("launch", cloud.workdir, *TRAIN)
    assert twice.returncode == 1
    assert "runs already, on 2 of 2 hosts" in twice.stderr
    busy = cloud("install")
    assert busy.returncode != 0
    assert "its code is not replaced under it" in busy.stderr
    resumed = cloud("resume", cloud.workdir, *TRAIN)
    assert resumed.returncode == 0, resumed.stderr
    assert cloud.ran() == [[expected]] * 2

    stopped = cloud("stop")
    assert stopped.stdout == "status=stopped host=w0\nstatus=stopped host=w1\n"
    assert cloud("stop").returncode == 0

    run_folder = cloud.shared / "my runs"
    (run_folder / "n5/checkpoints").mkdir(parents=True)
    (run_folder / "n5/metrics.jsonl").write_text("{}\n")
    fetched = cloud("fetch", cloud.workdir, f"--to={tmp_path}/my results")
    assert fetched.returncode == 0, fetched.stderr
    assert [path.name for path in (tmp_path / "my results/n5").iterdir()] == ["metrics.jsonl"]

    assert cloud("delete", "--yes").returncode == 0
    assert not (cloud.folder / "states").exists()


def test_a_trainer_outlives_the_connection_and_starts_again_after_a_crash(cloud):
    cloud.installed()
    cloud.plan("134 1 run", "0")
    assert cloud("launch", cloud.workdir, "--restarts=2", *TRAIN).returncode == 0
    wait_for(lambda: len(cloud.ran()[0]) == 3)
    assert cloud.statuses() == {"w0": "running", "w1": "finished"}
    log = (cloud.homes[0] / "datamux_pod/train.log").read_text()
    assert "ended with exit code 134; start 1 of 2 follows in 120 seconds" in log
    assert "ended with exit code 1; start 2 of 2 follows" in log
    assert cloud("stop").stdout == "status=stopped host=w0\nstatus=finished host=w1\n"


def test_how_trainers_end(cloud):
    cloud.installed()
    cloud.plan("2", "137 137")
    cloud("launch", cloud.workdir, "--restarts=1", *TRAIN)
    wait_for(lambda: cloud.statuses() == {"w0": "refused", "w1": "failed-137"})
    assert [len(lines) for lines in cloud.ran()] == [1, 2]
    cloud.plan("130", "143")
    cloud("launch", cloud.workdir, *TRAIN)
    wait_for(lambda: cloud.statuses() == {"w0": "saved", "w1": "saved"})


def test_stop_says_when_a_trainer_does_not_end(cloud):
    cloud.installed()
    cloud.plan("deaf", "run")
    cloud("launch", cloud.workdir, *TRAIN)
    wait_for(lambda: all(cloud.ran()))
    done = cloud("stop", "--wait=1")
    assert done.returncode == 1
    assert "The trainer on w0 has not ended within 1 seconds" in done.stderr
    killed = cloud("stop", "--wait=1", "--kill")
    assert killed.stdout == "status=stopped host=w0\nstatus=stopped host=w1\n"


def test_a_workdir_on_one_hosts_own_disk_is_refused(cloud):
    cloud.installed()
    (cloud.folder / "filesystem").write_text("ext2/ext3\n")
    done = cloud("launch", cloud.workdir, *TRAIN)
    assert done.returncode == 1
    assert "is on a disk of w0 itself (ext2/ext3), but all 2 hosts must see the same folder" in done.stderr
    assert cloud.ran() == [[], []]


def test_resume_after_a_preemption(cloud):
    (cloud.folder / "states").write_text("SUSPENDED")
    done = cloud("resume", "--spot", "--poll=1", "--bucket=my-bucket", f"--mount={cloud.shared}", cloud.workdir, *TRAIN)
    assert done.returncode == 0, done.stderr
    verbs = [call[3] for call in cloud.calls()]
    assert [verb for verb in verbs if verb != "describe"] == ["delete", "create", "scp", "ssh", "ssh", "ssh", "ssh"]
    assert (cloud.homes[0] / "gcsfuse").exists()
    assert cloud.statuses() == {"w0": "running", "w1": "running"}


def test_resume_deletes_nothing_that_somebody_stopped(cloud):
    cloud.installed()
    (cloud.folder / "node").write_text("STOPPED")
    done = cloud("resume", cloud.workdir, *TRAIN)
    assert done.returncode == 1
    assert "gcloud compute tpus tpu-vm start mux --zone=us-central2-b" in done.stderr
    assert {call[3] for call in cloud.calls()} == {"describe"}


def test_resume_starts_only_what_was_lost(cloud):
    cloud.installed()
    cloud("launch", cloud.workdir, *TRAIN)
    wait_for(lambda: all(cloud.ran()))
    for pid in (cloud.homes[1] / "datamux_pod/pids").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    wait_for(lambda: cloud.statuses() == {"w0": "running", "w1": "lost"})
    assert cloud("resume", cloud.workdir, *TRAIN).returncode == 0
    wait_for(lambda: [len(lines) for lines in cloud.ran()] == [1, 2])
    assert not any(call[3] in ("create", "delete") for call in cloud.calls())


def test_until_done_survives_preemptions(cloud):
    cloud.installed()
    # Running is seen once; then the slice is gone, and the new one finishes.
    (cloud.folder / "states").write_text("ACTIVE ACTIVE SUSPENDED")
    cloud.plan("run 0", "run 0")
    flags = ["--spot", "--poll=1", "--until_done", cloud.workdir]
    done = cloud("resume", *flags, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "mux was lost. It is deleted and asked for again." in done.stdout
    assert done.stdout.endswith("Done: the trainer has finished on all 2 hosts.\n")
    assert [len(lines) for lines in cloud.ran()] == [2, 2]
    cloud.plan("2", "2")
    refused = cloud("resume", *flags, *TRAIN)
    assert refused.returncode == 1
    assert "refuses its flags or its data" in refused.stderr


# What happens in GKE and on Slurm, with commands that note how they were called.


@pytest.fixture
def noted(tmp_path):
    """Makes commands that note their words; `note("squeue", "echo 7")` also lets one answer."""

    def note(name, body=""):
        return executable(
            tmp_path / "bin" / name, f'#!{BASH}\n{{ printf "%q " {name} "$@"; echo; }} >>"{tmp_path}/called"\n{body}\n'
        )

    def called(*prefix):
        text = (tmp_path / "called").read_text() if (tmp_path / "called").exists() else ""
        return [words for line in text.splitlines() if (words := shlex.split(line))[: len(prefix)] == list(prefix)]

    note.called, note.path = called, tmp_path / "bin"
    executable(note.path / "sleep", f"#!{BASH}\nexec /bin/sleep 0.05\n")
    return note


def test_gke_launches_once(noted, tmp_path):
    noted("kubectl", f'if [[ " $* " = *" get "* ]]; then [ -e {tmp_path}/job ]; else cat >{tmp_path}/job; fi')
    flags = [*JOB, "--bucket=my-bucket", "--workdir=/mnt/pod/r", *TRAIN]
    done = run("gke.sh", "launch", *flags, path=noted.path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "job").read_text() == run("gke.sh", "manifest", *flags).stdout
    again = run("gke.sh", "launch", *flags, path=noted.path)
    assert again.returncode == 1
    assert "There is a JobSet mux already, and it is not started twice" in again.stderr
    assert len(noted.called("kubectl", "--namespace=default", "create")) == 1


def test_gke_storage_adds_a_second_bucket(noted):
    noted("kubectl")  # Finds the service account.
    noted("gcloud")
    done = run("gke.sh", "storage", "--bucket=other", "--project=my-project", "--project_number=123456789012", path=noted.path)
    assert done.returncode == 0, done.stderr
    assert [words[2] for words in noted.called("kubectl")] == ["get"]
    assert noted.called("gcloud")[0][4] == "gs://other"


def test_gke_image_is_built_from_the_commit(noted, tmp_path):
    cloud = Cloud(tmp_path)
    noted("docker", f'[ "$1" != build ] || tar -tz >{tmp_path}/context')
    (cloud.repository / "not_committed").touch()
    done = run("gke.sh", "image", "--image=r/t:1", path=noted.path, root=cloud.repository)
    assert done.returncode == 0, done.stderr
    context = (tmp_path / "context").read_text().split()
    assert "launch/pod/Dockerfile" in context
    assert "not_committed" not in context
    assert [words[1] for words in noted.called("docker")] == ["build", "push"]


def test_slurm_submits_once(noted, tmp_path):
    noted("sbatch", f"touch {tmp_path}/queued; echo 77")
    noted("squeue", f"[ ! -e {tmp_path}/queued ] || echo 77")
    python = executable(tmp_path / "python", "")
    flags = [*SLURM[:-1], f"--workdir={tmp_path}/my runs", f"--python={python}"]
    done = run("slurm.sh", "submit", *flags, *TRAIN, path=noted.path)
    assert (done.returncode, done.stdout) == (0, "77\n"), done.stderr
    assert (tmp_path / "my runs.logs").is_dir()
    again = run("slurm.sh", "submit", *flags, *TRAIN, path=noted.path)
    assert again.returncode == 1
    assert "A job mux is queued or runs already, as 77" in again.stderr
    assert len(noted.called("sbatch")) == 1
    missing = run("slurm.sh", "submit", *flags, "--python=/nowhere", *TRAIN, path=noted.path)
    assert missing.returncode == 2
    assert "--python=/nowhere is no Python that can be run" in missing.stderr


def test_slurm_stop_saves_and_does_not_come_back(noted, tmp_path):
    (tmp_path / "queued").touch()
    noted("squeue", f"[ ! -e {tmp_path}/queued ] || echo 77")
    noted("scontrol")
    noted("scancel", f'[[ "$*" != *TERM* ]] || rm {tmp_path}/queued')
    done = run("slurm.sh", "stop", "--name=mux", path=noted.path)
    assert done.returncode == 0, done.stderr
    assert noted.called("scontrol") == [["scontrol", "update", "JobId=77", "Requeue=0"]]
    assert noted.called("scancel") == [["scancel", "--state=PENDING", "77"], ["scancel", "--signal=TERM", "77"]]
    assert run("slurm.sh", "stop", "--name=mux", path=noted.path).stdout == "No job mux is queued or runs.\n"


def batch(noted, tmp_path, *flags, plan=(), job="JobState=RUNNING Requeue=1", **variables):
    (tmp_path / "plan").write_text("".join(f"{line}\n" for line in plan))
    (tmp_path / "job").write_text(job)
    noted("scontrol", f"[ $1 != show ] || cat {tmp_path}/job")
    noted(
        "srun",
        f'echo "$JAX_LOCAL_DEVICE_IDS" >{tmp_path}/devices; read -r code <{tmp_path}/plan; sed -i 1d {tmp_path}/plan; exit "$code"',
    )
    words = [
        f"--root={ROOT}",
        "--python=/env/bin/python",
        "--gpus_per_node=8",
        f"--logs={tmp_path}/my logs",
        "--restarts=1",
        "--pause=120",
    ]
    return run(
        "train.sbatch", *words, *flags, "--", "--workdir=/scratch/my runs", "--multihost", *TRAIN[1:], path=noted.path,
        SLURM_JOB_ID=77, SLURM_JOB_NAME="mux", SLURM_JOB_NUM_NODES=4, **variables,
    )  # fmt: skip


def test_slurm_batch_runs_one_process_a_node(noted, tmp_path):
    done = batch(noted, tmp_path, plan=[0], SLURM_CPUS_PER_TASK=12)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "devices").read_text() == "0,1,2,3,4,5,6,7\n"
    (step,) = noted.called("srun")
    assert step == [
        "srun", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "--cpus-per-task=12", "--kill-on-bad-exit=0", "--wait=600",
        "--open-mode=append", f"--output={tmp_path}/my logs/%x-%j-%t.log", "/env/bin/python", "-m", "launch.train",
        "--workdir=/scratch/my runs", "--multihost", "--config=configs/muxbert.py:base,n=5",
    ]  # fmt: skip
    assert noted.called("scontrol") == []


@pytest.mark.parametrize("code", [130, 143])
def test_slurm_batch_goes_back_into_the_queue_when_it_has_saved(noted, tmp_path, code):
    done = batch(noted, tmp_path, plan=[code])
    assert done.returncode == 0, done.stderr
    assert noted.called("scontrol", "requeue") == [["scontrol", "requeue", "77"]]


@pytest.mark.parametrize(
    ("job", "restarted"),
    [("JobState=RUNNING Requeue=0", 0), ("JobState=CANCELLED Requeue=1", 0), ("JobState=RUNNING Requeue=1", 100)],
)
def test_slurm_batch_stays_away_when_it_should(noted, tmp_path, job, restarted):
    done = batch(noted, tmp_path, "--requeues=100", plan=[130], job=job, SLURM_RESTART_COUNT=restarted)
    assert done.returncode == 130
    assert noted.called("scontrol", "requeue") == []


@pytest.mark.parametrize(("plan", "code", "starts"), [([2], 2, 1), ([134, 0], 0, 2), ([134, 1], 1, 2)])
def test_slurm_batch_tries_crashes_again_but_not_bad_input(noted, tmp_path, plan, code, starts):
    done = batch(noted, tmp_path, plan=plan)
    assert done.returncode == code
    assert len(noted.called("srun")) == starts
    assert noted.called("scontrol") == []
